"""docs/library.md: its program trains under torchrun, and prints the same on any number of ranks."""

import contextlib
import io
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from devices import DEVICES
from pages import ROOT, blocks
from spawn import run_ranks

PAGE = ROOT / "docs" / "library.md"
PROGRAM, MESH = blocks(PAGE, "python")


def losses(printed):
    return [float(loss) for loss in re.findall(r"^step \d+ loss (\S+)$", printed, re.MULTILINE)]


def run_program(rank, world_size, program):
    """What the program prints on ranks that are there already, of CPUs."""
    torch.cuda.is_available = lambda: False
    dist.init_process_group = dist.destroy_process_group = lambda *_: None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(program, {"__name__": "own_model"})
    return printed.getvalue()


def on_ranks(program, world_size):
    return losses(run_ranks(run_program, world_size, program)[0])


@pytest.fixture(scope="module")
def on_one_rank():
    return on_ranks(PROGRAM, 1)


@pytest.mark.parametrize("device", DEVICES)
def test_torchrun_prints_what_the_page_says(on_one_rank, tmp_path, device):
    (tmp_path / "own_model.py").write_text(PROGRAM)
    command, script = PROGRAM.splitlines()[0].partition("torchrun ")[2], [sys.executable, "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif torch.cuda.device_count() < 2:
        command = command.replace("--nproc-per-node 2", "--nproc-per-node 1")
    done = subprocess.run(
        [*script, "torch.distributed.run", *command.split()], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = losses(done.stdout)
    assert len(found) == 10 and found == pytest.approx(on_one_rank, rel=1e-5 if device == "cpu" else 1e-3)
    assert (f"{found[0]:.2f}", f"{found[-1]:.2f}") == re.search(r"from (\S+) to (\S+) \(", PAGE.read_text()).groups()


def test_three_ranks_print_the_same(on_one_rank):
    assert on_ranks(PROGRAM, 3) == pytest.approx(on_one_rank, rel=1e-5)


def test_a_rank_may_have_no_tokens():
    program = PROGRAM.replace("[700, 324]", "[2]")
    assert on_ranks(program, 3) == pytest.approx(on_ranks(program, 1), rel=1e-5)


def test_checkpoints_of_torch_alone_send_again_and_train_the_same(on_one_rank):
    program = PROGRAM.replace(", context_fn=checkpoint_contexts", "")
    assert program != PROGRAM
    assert on_ranks(program, 2) == pytest.approx(on_one_rank, rel=1e-5)


def test_groups_of_a_mesh_stand_for_those_of_the_program(on_one_rank):
    program, found = re.subn(r"^parallel = .*\n", MESH, PROGRAM, flags=re.MULTILINE)
    assert found == 1
    assert on_ranks(program, 2) == pytest.approx(on_one_rank, rel=1e-5)


def run_short_form(rank, world_size, code):
    q, k, g = torch.randn(48, 4, 8), torch.randn(48, 2, 8), torch.randn(48, 2).sigmoid().log()
    exec(code.split("out = ", 1)[0], scope := {"sp_group": dist.group.WORLD, "state_group": dist.new_group()})
    softmax, linear = re.findall(r"^out = (.*?)(?:  #.*)?$", code, re.MULTILINE)
    scope |= {"q": q, "k": k, "v": k, "g": g}
    return eval(softmax, scope).shape, eval(linear, scope | {"q": k}).shape


def test_the_short_form_of_sequence_parallelism():
    """What the first lines of docs/sequence-parallelism.md do, for fewer tokens on CPUs."""
    code, *_ = blocks(ROOT / "docs" / "sequence-parallelism.md", "python")
    code = code.replace('"cuda"', '"cpu"').replace("[1_048_576]", "[96]")
    assert run_ranks(run_short_form, 2, code) == [((48, 4, 8), (48, 2, 8))] * 2
