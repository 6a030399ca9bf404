"""How runs end: one line once for what a user can put right, a traceback with the rank otherwise, and nobody hangs."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks
from tiny_runs import SETTINGS, write_corpus

from longspan.attention.host_buffers import HostBuffers
from longspan.launcher import errors
from longspan.launcher.corpus import open_corpus
from longspan.launcher.errors import UserError, main_guard
from longspan.models.config import ModelConfig
from longspan.parallel.mesh import join

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, signal, sys, threading
from longspan.launcher.errors import UserError, main_guard
from longspan.models.config import ModelConfig
from longspan.launcher import errors
case, rank = sys.argv[1], int(os.environ["RANK"])
def lost_in_thought():
    threading.Event().wait()
if case == "only at first":
    errors.POLL_SECONDS = 0.01  # so that a failure is seen while the groups are formed
if case == "rank 0 is silent":
    errors.ALONE_SECONDS = 0.5
with main_guard():
    if case == "all ranks, early":
        ModelConfig(num_heads=4, num_kv_heads=3).validate()
    import torch
    import torch.distributed as dist
    from longspan.parallel.mesh import build_mesh
    timeout_s = 6 if case == "a rank hangs" else 2 if "silent" in case else 600
    build_mesh(sp=0, sharding="fsdp", device=torch.device("cpu"), timeout_s=timeout_s)
    if rank == 1 and case == "a rank is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if (rank, case) in ((1, "a rank is silent"), (0, "rank 0 is silent")):
        os.kill(os.getpid(), signal.SIGSTOP)
    if rank == 1 and "a rank hangs" in case:
        lost_in_thought()
    if rank == 2 and case == "a rank hangs, and who waits for it leaves":
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:25264")
    if rank == 1 and case == "user error on one rank":
        raise UserError("corpus x.bin: document 3 holds token id 999")
    if rank == 1 and case == "crash on one rank":
        raise RuntimeError("a broken kernel")
    if rank == 1 and case == "only at first" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raise UserError("a disk that is free again")
    if case not in ("success", "only at first"):
        dist.all_reduce(torch.ones(1))
        print("not reached")
    dist.destroy_process_group()
"""
LIMIT_S = 8.0  # seconds from the end of the first rank to that of the last; gloo's own limit is 30 minutes


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(PROGRAM)
    return path


def _torchrun(program, *arguments, ranks, options=()):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *options]
    command = [*launcher, program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=_environment())
    return (
        done.returncode,
        done.stderr,
        [line for line in done.stderr.splitlines() if line.startswith("longspan: error:")],
    )


def _environment(**extra):
    return os.environ | {"PYTHONSAFEPATH": "1"} | extra


def test_ranks_that_torchrun_starts_again_are_not_ended_by_what_ended_them_before(program):
    code, output, lines = _torchrun(program, "only at first", ranks=2, options=["--max-restarts=1"])
    assert code == 0, output
    assert lines == ["longspan: error: a disk that is free again"]


def test_restarts_are_for_one_machine(monkeypatch):
    for name, value in {"TORCHELASTIC_MAX_RESTARTS": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    errors._check_restarts()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--max-restarts=3 of torchrun is for the ranks of one machine: leave it out"):
        errors._check_restarts()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    errors._check_restarts()


def test_bad_token_met_by_the_reader_of_one_rank(tmp_path):
    """The real program: the rank that holds the last half of the document finds its end token beyond the vocabulary."""
    corpus = write_corpus(tmp_path, documents=1)
    corpus.with_suffix(".json").unlink()  # which would have told the vocabulary before anything is read
    length = int(open_corpus(corpus).lengths[0])
    data = [f"data.corpora=[{{path: {corpus}}}]", "data.validation_fraction=0", f"data.seq_len={length}"]
    others = ["parallel.layout=contiguous", "train.global_batch=1", "model.vocab_size=200", f"run.dir={tmp_path}/run"]
    settings = [*SETTINGS, *data, *others]
    code, output, lines = _torchrun(ROOT / "launcher" / "train.py", *settings, ranks=2)
    assert code != 0
    assert len(lines) == 1 and "UserError" not in output, output
    assert output.index(lines[0]) < output.index("ChildFailedError")
    assert "holds token id 256, outside of model.vocab_size=200" in lines[0] and "corpus.bin" in lines[0]
    summary = output[output.index("Root Cause") :]
    assert re.search(r"rank\s+: 1 ", summary) and f"traceback : {lines[0]}" in summary


@pytest.mark.parametrize("case", ["all ranks, early", "user error on one rank", "crash on one rank", "success"])
def test_every_rank_ends_by_itself(program, case, tmp_path):
    """Without torchrun, which would kill the other ranks: each must end within seconds, with its own exit code."""
    count = 3 if case == "crash on one rank" else 2
    processes, files = _start(program, case, range(count), count, tmp_path)
    try:
        ended = _wait_for(processes)
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    outputs = [Path(file.name).read_text() for file in files]
    lines = [line for output in outputs for line in output.splitlines() if "longspan: error:" in line]
    if case == "success":
        assert not any(codes) and not lines
        return
    assert codes == [1] * count
    assert max(ended) - min(ended) < LIMIT_S
    assert len(lines) == 1, outputs
    assert "not reached" not in "".join(outputs)
    if case == "crash on one rank":
        assert re.fullmatch(
            r"longspan: error: rank 1 \(.+\) failed, all ranks stop: RuntimeError: a broken kernel", lines[0]
        )
        assert "Traceback" in outputs[1] and "Traceback" not in outputs[0] + outputs[2]
    else:
        assert "Traceback" not in "".join(outputs)


@pytest.mark.parametrize("ranks", [[0], [0, 1, 2]])
def test_a_rank_that_does_not_answer_is_named(program, ranks, tmp_path):
    """One that has never come, and one that has been stopped, while a third waits too."""
    processes, files = _start(program, "a rank is silent", ranks, max(2, len(ranks)), tmp_path)
    try:
        _wait_for([process for rank, process in enumerate(processes) if rank != 1])
    finally:
        for process in processes:
            process.kill()
    lines = [line for file in files for line in Path(file.name).read_text().splitlines()]
    assert len(lines) == 1, lines
    named = (
        r"longspan: error: rank [02] \(.+\) has waited [23] s for rank 1, which neither failed nor answered: look at"
    )
    assert re.match(named, lines[0])


@pytest.mark.parametrize(
    "case, waited",
    [
        ("a rank hangs", "(has waited 6 s|was left by a rank that has waited too long) for"),
        ("a rank hangs, and who waits for it leaves", "was left by a rank that has waited too long for"),
    ],
)
def test_a_rank_that_hangs_is_named_and_where(program, case, waited, tmp_path):
    """Its alarm answers, but its main thread does not come; that of a third rank waits like the first."""
    processes, files = _start(program, case, range(3), 3, tmp_path)
    try:
        _wait_for(processes)
    finally:
        for process in processes:
            process.kill()
    said = "".join(Path(file.name).read_text() for file in files)
    (line,) = [line for line in said.splitlines() if "longspan: error" in line]
    remedy = r": look at processes, machines and network, or raise train.timeout_s"
    named = rf"longspan: error: rank [02] \(.+\) {waited} rank 1, which did something else, as the stacks above show"
    assert re.match(named + remedy, line), said
    assert said.index("rank 1, MainThread:\n") < said.index("in lost_in_thought\n") < said.index(line)
    assert said.count(", MainThread:") == 1 and "longspan-alarm" not in said and "Traceback" not in said


@pytest.mark.slow
def test_the_rank_that_has_the_store_does_not_answer(program, tmp_path):
    """So that the others cannot tell each other."""
    processes, files = _start(program, "rank 0 is silent", range(3), 3, tmp_path)
    try:
        _wait_for(processes[1:])
    finally:
        for process in processes:
            process.kill()
    for rank, file in enumerate(files[1:], 1):
        (line,) = Path(file.name).read_text().splitlines()
        assert re.match(rf"longspan: error: rank {rank} \(.+\) has waited 2 s for another rank, which neither", line)


def test_a_rank_that_is_killed_is_named_for_other_machines(program, tmp_path):
    processes, _ = _start(program, "a rank is killed", range(3), 3, tmp_path)
    try:
        _wait_for(processes)
    finally:
        for process in processes:
            process.kill()
    (told,) = (json.loads(path.read_text())["message"]["message"] for path in tmp_path.glob("error *"))
    assert "lost rank 1, which ended without a word: " in told


def test_a_rank_that_is_killed_is_the_root_cause_for_torchrun(program):
    """Also where torchrun looks so seldom that the other has lost it by then."""
    _, output, lines = _torchrun(program, "a rank is killed", ranks=2, options=["--monitor-interval=0.5"])
    assert len(lines) == 1 and "rank 0 " in lines[0] and errors.LOST in lines[0], output
    assert re.search(r"rank\s+: 1 .*\n\s+exitcode\s+: -9 ", output[output.index("Root Cause") :]), output


def test_a_rank_whose_output_cannot_be_written_ends_all_the_same():
    program = "import threading; from longspan.launcher import errors; print('x', end='')\n"
    program += "threading.Thread(target=threading.Event().wait).start(); errors._print('y'); errors._leave()"
    with open("/dev/full", "w") as full:
        command, buffered = [sys.executable, "-c", program], _environment(PYTHONUNBUFFERED="")
        assert subprocess.run(command, stdout=full, stderr=full, env=buffered, timeout=60).returncode == 1


def _start(program, case, ranks, count, folder):
    """Those ranks of `count`, without torchrun, and the files with what they say; what torchrun would be told is in
    files `error RANK`."""
    port, files = str(_free_port()), [open(folder / f"{rank}", "w+") for rank in ranks]
    others = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, program, case],
            stderr=file,
            stdout=file,
            env=_environment(
                RANK=str(rank), LOCAL_RANK=str(rank), TORCHELASTIC_ERROR_FILE=str(folder / f"error {rank}"), **others
            ),
        )
        for rank, file in zip(ranks, files, strict=True)
    ]
    return processes, files


def _wait_for(processes):
    """When each of them ended."""
    ended = {}
    limit = time.monotonic() + 90
    while len(ended) < len(processes):
        assert time.monotonic() < limit, f"only {sorted(ended)} of {len(processes)} ranks ended"
        for rank, process in enumerate(processes):
            if rank not in ended and process.poll() is not None:
                ended[rank] = time.monotonic()
        time.sleep(0.05)
    return ended.values()


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _output_of(action, capsys):
    with pytest.raises(SystemExit) as stop, main_guard():
        action()
    assert stop.value.code == 1
    return capsys.readouterr().err


def test_one_rank(capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def user_error():
        raise UserError("optim.lr=0\n  use a number above 0")

    assert _output_of(user_error, capsys) == "longspan: error: optim.lr=0 use a number above 0\n"
    ours = _output_of(ModelConfig(num_heads=4, num_kv_heads=3).validate, capsys)
    assert ours.startswith("longspan: error: model.num_kv_heads=3") and ours.count("\n") == 1
    theirs = _output_of(lambda: int("x"), capsys)
    assert theirs.startswith("Traceback") and "longspan: error: rank 0 (" in theirs


def test_a_value_error_of_a_library_called_by_us_keeps_its_traceback(capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    module = {"__name__": "longspan.some_module"}
    exec("def convert(): int('x')\ndef refuse(): raise ValueError('model.x=1: use 2')", module)
    assert "Traceback" in _output_of(module["convert"], capsys)
    assert _output_of(module["refuse"], capsys) == "longspan: error: model.x=1: use 2\n"


@pytest.mark.parametrize("kind", [OSError, UserError, RuntimeError])
def test_too_few_files_may_be_open(kind, capsys, monkeypatch):
    """Which our own lines, and those of libraries, put down to something else."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def fail():
        raise kind("device.cc:186] rv != -1. Too many open files")

    line = _output_of(fail, capsys)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert re.match(rf"longspan: error: rank 0 \(.+\) may open {limit} files: allow more with `ulimit -n` \(dev", line)
    assert line.count("\n") == 1


def test_what_torch_cannot_repeat_is_one_line(capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def act():
        torch.use_deterministic_algorithms(True)
        try:
            torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))  # torch has no deterministic form of it
        finally:
            torch.use_deterministic_algorithms(False)

    line = _output_of(act, capsys)
    assert line.startswith("longspan: error: train.deterministic=true, but torch's put_") and line.count("\n") == 1


def test_a_rank_that_was_killed_is_not_taken_for_a_fault_of_those_that_wait_for_it(capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for words in (
        "[../gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:17640: Connection reset by peer.",
        "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:25264",
        "NCCL error: remote process exited or there was a network error, NCCL version 2.29",
    ):

        def fail(words=words):
            raise RuntimeError(words)

        line = _output_of(fail, capsys)
        assert "lost another rank, which ended without a word" in line and line.count("\n") == 1


def test_host_memory_that_cannot_be_had_is_one_line(capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    class Layer(torch.autograd.Function):  # layers take host memory inside of autograd
        @staticmethod
        def forward(ctx, x):
            HostBuffers(pinned=False).take(2**50)

    line = _output_of(lambda: Layer.apply(torch.ones(1, requires_grad=True)), capsys)
    assert line.startswith("longspan: error: rank 0 (") and line.count("\n") == 1
    assert "1048576.00 GiB of host memory cannot be had (Cannot allocate memory), which train.offload_act" in line
    other = _output_of(lambda: bytearray(2**60), capsys)
    assert other.startswith("Traceback") and "MemoryError" in other


@pytest.mark.parametrize("variables", [{"RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "1"}, {"RANK": "x"}])
def test_a_rank_of_no_world(variables, capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = _output_of(lambda: None, capsys)
    assert found.startswith(f"longspan: error: RANK={variables['RANK']} where WORLD_SIZE is 1 or unset: leave both")


def test_one_rank_of_a_launcher_needs_no_place_to_meet(monkeypatch):
    """As some schedulers start it: RANK and WORLD_SIZE, but nothing else."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": None, "MASTER_PORT": None}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    join(torch.device("cpu"), timeout_s=9.0)
    assert dist.get_world_size() == 1
    dist.destroy_process_group()


def test_ranks_that_do_not_know_their_gpu(monkeypatch):
    from longspan.launcher.environment import choose_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("", "x"):
        monkeypatch.setenv("LOCAL_RANK", name)
        with pytest.raises(UserError, match=f"LOCAL_RANK={name} does not say which GPU .*: start ranks with torchrun"):
            choose_device("auto")


@pytest.mark.parametrize(
    "given, found",
    [
        ({"MASTER_ADDR": ""}, "WORLD_SIZE=2 with no MASTER_ADDR: start several ranks with torchrun"),
        ({"MASTER_PORT": "70000"}, "WORLD_SIZE=2 with MASTER_PORT=70000: start"),
        ({"RANK": "2"}, "WORLD_SIZE=2 with RANK=2: start"),
        (
            {"RANK": "0"},
            r"rank 0 \(.+\) cannot meet .* MASTER_PORT=TAKEN \(.*in use\): use a free port",
        ),
        (
            {"MASTER_PORT": "1"},
            r"rank 1 \(.+\) cannot meet .* .*, MASTER_PORT=1 \(.*\): rank 0 has",
        ),
    ],
)
def test_ranks_without_a_place_to_meet(given, found, capsys, monkeypatch):
    monkeypatch.setattr(errors, "CONNECT_SECONDS", 1.0)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "1"} | given
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        output = _output_of(lambda: None, capsys)
    assert re.fullmatch(f"longspan: error: {found.replace('TAKEN', port)}.*\n", output)


def test_an_interrupt_that_an_import_has_turned_into_something_else(capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = signal.getsignal(signal.SIGINT)

    def import_something(found):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise found from None

    line = _output_of(lambda: import_something(AttributeError("module 'numpy' has no attribute 'x'")), capsys)
    assert re.fullmatch(r"longspan: error: interrupted on rank 0 \(.+\)\n", line)
    line = _output_of(lambda: import_something(UserError("interrupted on rank 1 while x was saved")), capsys)
    assert line == "longspan: error: interrupted on rank 1 while x was saved\n"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("ignored", [False, True])
def test_an_interrupt_before_anything_is_imported(ignored):
    """By Python's own handler, that is: of our entry points none leaves a traceback then."""
    interrupting = "import importlib.abc, signal, sys\nclass Finder(importlib.abc.MetaPathFinder):\n"
    interrupting += "    def find_spec(self, name, *_):\n        if name == 'longspan.launcher.cli':\n"
    interrupting += "            print('reached', flush=True)\n            signal.raise_signal(signal.SIGINT)\n"
    interrupting += "sys.meta_path.insert(0, Finder())\nsys.argv = ['longspan', '--version']\n"
    interrupting += "signal.signal(signal.SIGINT, signal.SIG_IGN)\n" * ignored
    script = f"import runpy; runpy.run_path({str(ROOT / 'launcher' / 'train.py')!r}, run_name='x')"
    for start in ("from longspan.launcher.entry import main; main()", script):
        done = subprocess.run([sys.executable, "-c", interrupting + start], capture_output=True, text=True)
        assert done.stderr == "" and done.stdout.startswith("reached\n")
        assert done.returncode == (0 if ignored else -signal.SIGINT)


def test_system_exit_passes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as stop, main_guard():
        raise SystemExit(0)
    assert stop.value.code == 0


def _wait_for_one_that_does_not_answer(rank, world_size):
    group = dist.new_group(timeout=timedelta(seconds=0.5))
    line = None
    if rank == 0:
        with pytest.raises(RuntimeError) as caught:
            dist.all_reduce(torch.ones(1), group=group)
        line = errors._describe(caught.value)
    dist.barrier()  # until when the other does nothing
    return line


def test_a_rank_that_does_not_answer_is_given_up_in_one_line():
    line, _ = run_ranks(_wait_for_one_that_does_not_answer, 2)
    assert line.startswith("longspan: error: rank 0 (") and "has waited 0.5 s for another rank" in line
    assert "\n" not in line and "train.timeout_s" in line
