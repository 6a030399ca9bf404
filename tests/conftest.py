"""What every test gets: NaN-filled scratch memory in longspan code, one torch thread, GPU tests skipped without one."""

import importlib.util
import logging
import os
from collections import defaultdict

import interpreter_bf16
import interpreter_bounds
import poison
import pytest
import torch
from slow_tests import listed, name_of

torch.set_num_threads(1)  # tensors are tiny: threads that wait for each other take longer than the work
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start
if not torch.cuda.is_available():  # before any kernel is defined: Triton's interpreter runs them on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        interpreter_bf16.install()
        interpreter_bounds.install()


def _world_size(item):
    return item.callspec.params.get("world_size") if hasattr(item, "callspec") else None


@pytest.fixture(autouse=True, scope="session")
def poisoned_scratch():
    """See poison.py; ranks started by run_ranks install it themselves."""
    undo = poison.install()
    yield
    undo()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def memory_for_others(request):
    """A GPU's memory that a test has used is there for the other processes that test on it."""
    yield
    if "gpu" in request.keywords:
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def log_as_it_was():
    """Commands of `longspan` that a test calls make the log their own; others look at what pytest catches of it."""
    log = logging.getLogger("longspan")
    handlers, level, propagate = log.handlers, log.level, log.propagate
    yield
    log.handlers, log.propagate = handlers, propagate
    log.setLevel(level)


@pytest.fixture
def deterministic():
    """torch's switch for deterministic algorithms is on."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    tested, takes_long = defaultdict(set), listed()
    for item in items:
        tested[item.path, item.originalname].add(_world_size(item))
    for item in items:  # also what says so itself
        world_size, sizes = _world_size(item), tested[item.path, item.originalname]
        more = world_size in (3, 4) and 2 in sizes  # make test has two ranks in their place
        long = name_of(item.nodeid) in takes_long and world_size != 2
        if more or long or world_size == 8 or item.path.parent.name == "benchmarks":
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
