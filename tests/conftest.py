"""What every test gets: NaN-filled scratch memory in longspan code, one torch thread, GPU tests skipped without one."""

import importlib.util
import os

import interpreter_bf16
import poison
import pytest
import torch

torch.set_num_threads(1)  # tensors are tiny: threads that wait for each other take longer than the work
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start
if not torch.cuda.is_available():  # before any kernel is defined: Triton's interpreter runs them on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        interpreter_bf16.install()


@pytest.fixture(autouse=True, scope="session")
def poisoned_scratch():
    """See poison.py; ranks started by run_ranks install it themselves."""
    undo = poison.install()
    yield
    undo()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    for item in items:  # also what says so itself
        world_size = item.callspec.params.get("world_size") if hasattr(item, "callspec") else None
        if world_size == 8 or item.path.parent.name == "benchmarks":
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
