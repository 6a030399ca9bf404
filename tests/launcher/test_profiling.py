"""Profiles: time divided by hand, work attributed on traces written by hand, and runs that are profiled."""

import json
import logging
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks
from tiny_runs import rows, tiny_config, train, write_corpus

from longspan.launcher import cli
from longspan.launcher.breakdown import Work, break_down
from longspan.launcher.config import Config
from longspan.launcher.errors import UserError
from longspan.launcher.estimate import Job, estimate
from longspan.launcher.gpus import parse_gpus
from longspan.launcher.profile_report import PLANNED, ROWS, lines
from longspan.launcher.profiling import StepProfiler
from longspan.launcher.timeline import KERNEL, LAUNCH, OPERATION, RANGE, Event, attribute, read_trace

MAIN, AUTOGRAD = 1, 2


def test_every_instant_goes_to_one_component():
    work = [
        Work(1, 4, "a", "forward"),
        Work(3, 6, "b", "forward"),  # with a from 3 to 4
        Work(3, 4, "a", "forward"),  # a third stream; equal to another
        Work(5, 8, communication="all-gather"),  # beside b until 6, alone until 8
        Work(7, 9, communication="send"),
        Work(11, 30, "b", "backward"),  # ends after the window
        Work(-5, 0.5, "a", "backward"),  # began before it
        Work(4, 4, "never", "forward"),
    ]
    host = [Work(8, 10, "data"), Work(9.5, 10.5, "optimizer"), Work(2, 3, "optimizer")]
    found = break_down(work, (0, 12), host)
    expected = {
        ("a", "backward"): 0.5, ("idle", ""): 0.5 + 0.5, ("a", "forward"): 2 + 2 / 3, ("b", "forward"): 2 + 1 / 3,
        ("communication, exposed", ""): 3, ("data", ""): 0.5, ("optimizer", ""): 1, ("b", "backward"): 1,
    }  # fmt: skip
    assert dict(found.seconds) == pytest.approx(expected)
    assert found.communication == pytest.approx(4) and dict(found.kinds) == {"all-gather": 3, "send": 2}


def test_parts_of_a_step_add_up():
    work = [Work(0, 2, "a", "forward"), Work(2, 5, "a", "backward"), Work(5, 6, "validation and saving")]
    found = break_down(work, (0, 8)).as_dict(steps=2)
    assert found["step_s"] == 3.5  # what is not training is not of the step
    assert found["components"]["a"] == {"total": 2.5, "forward": 1, "backward": 1.5}
    assert found["components"]["idle"] == {"total": 1.0}


class Trace:
    """Events of a GPU's trace in their order; what is launched runs 100 seconds later, for one second."""

    def __init__(self):
        self.events, self._launches = [Event(RANGE, "ProfilerStep#4", 0, 999, MAIN)], 0

    def add(self, kind, name, start, end, thread=MAIN, **more):
        self.events.append(Event(kind, name, start, end, thread, **more))

    def launch(self, time, name="kernel", thread=MAIN):
        self._launches += 1
        self.add(LAUNCH, "cudaLaunchKernel", time, time + 0.1, thread, correlation=self._launches)
        self.add(KERNEL, name, 100 + time, 101 + time, correlation=self._launches)

    def places(self):
        """By the time at which the work was launched: (component, phase), or the kind of communication."""
        timeline = attribute(self.events)
        return {
            round(work.start - 100, 3): work.communication or (work.component, work.phase) for work in timeline.work
        }


def test_kernels_belong_to_the_innermost_range_of_their_launch():
    trace = Trace()
    trace.add(RANGE, "longspan::projections and MLP", 1, 50)
    trace.launch(2)
    trace.add(RANGE, "longspan::projections", 3, 20)
    trace.add(OPERATION, "aten::linear", 4, 6)
    trace.add(OPERATION, "aten::mm", 4.5, 5.5)
    trace.launch(5)
    trace.launch(7)
    trace.add(RANGE, "longspan::softmax attention", 8, 12)
    trace.add(OPERATION, "aten::bmm", 9, 10)
    trace.launch(9.5)
    trace.launch(11, "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)")
    trace.launch(11.5, "peer_collect_kernel")
    trace.launch(12.5)
    trace.add(RANGE, "longspan::MLP", 21, 30)
    trace.add(OPERATION, "aten::addmm", 22, 23)
    trace.launch(22.5)
    trace.launch(24)
    trace.add(OPERATION, "aten::mm", 31, 33)
    trace.launch(32)
    trace.add(RANGE, "FSDP::all_gather (blocks.1)", 34, 36)
    trace.launch(35)
    trace.launch(35.5, "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)")
    trace.launch(60)
    trace.add(RANGE, "longspan::optimizer", 70, 80)
    trace.add(RANGE, "longspan::loss", 71, 73)  # whatever is inside is the optimizer's
    trace.launch(72)
    trace.launch(74, "ncclKernel_AllReduce_RING_LL_Sum_float")
    trace.launch(75, "Memcpy HtoD (Pinned -> Device)")
    trace.launch(81, "Memcpy DtoH (Device -> Pinned)")
    trace.launch(82, "Memcpy DtoD (Device -> Device)")
    trace.add(RANGE, "longspan::validation and saving", 90, 95)
    trace.launch(91, "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL")
    norms = ("norms, gates, rotations", "forward")
    assert trace.places() == {
        2: norms, 5: ("projections", "forward"), 7: norms, 9.5: ("softmax attention", "forward"), 11: "send-recv",
        11.5: "shared memory", 12.5: norms, 22.5: ("MLP", "forward"), 24: norms, 32: ("projections and MLP", "forward"),
        35: ("copies of sharding", "forward"), 35.5: "all-gather", 60: ("other", "forward"), 72: ("optimizer", ""),
        74: "all-reduce", 75: ("optimizer", ""), 81: "host copies", 82: ("other", "forward"),
        91: ("validation and saving", ""),
    }  # fmt: skip
    waits = [(work.start, work.end, work.component) for work in attribute(trace.events).host]
    assert waits == [(70, 80, "optimizer"), (90, 95, "validation and saving")]


def test_backward_and_recomputation_belong_to_their_forward():
    trace = Trace()
    trace.add(RANGE, "longspan::projections and MLP", 1, 50)
    trace.add(RANGE, "longspan::MLP", 10, 15)
    trace.add(OPERATION, "aten::mm", 11, 12)
    trace.launch(11.5)
    trace.add(RANGE, "longspan::linear attention", 20, 25)
    trace.add(OPERATION, "_Causal", 21, 24)
    engine = "autograd::engine::evaluate_function: "
    # The kernels of the MLP's product: two products of its backward, on another thread beside ranges of the first.
    node = {"thread": AUTOGRAD, "backward": True, "origin": (MAIN, 11)}
    trace.add(OPERATION, engine + "MmBackward0", 30, 40, **node)
    trace.add(OPERATION, "MmBackward0", 31, 39, **node)
    trace.add(RANGE, "longspan::recomputed", 32, 36, AUTOGRAD)
    trace.add(RANGE, "longspan::MLP", 33, 35, AUTOGRAD)
    trace.add(OPERATION, "aten::linear", 33.5, 34.5, AUTOGRAD)
    trace.launch(34, thread=AUTOGRAD)
    trace.add(OPERATION, "aten::mm", 37, 38, AUTOGRAD)
    trace.launch(37.5, thread=AUTOGRAD)
    trace.launch(38.5, thread=AUTOGRAD)
    trace.add(OPERATION, engine + "_CausalBackward", 41, 45, AUTOGRAD, backward=True, origin=(MAIN, 21))
    trace.launch(42, thread=AUTOGRAD)
    trace.add(RANGE, "FSDP::post_backward_reduce (blocks.0)", 46, 48, AUTOGRAD)
    trace.launch(47, thread=AUTOGRAD)
    trace.add(OPERATION, engine + "torch::autograd::AccumulateGrad", 50, 52, AUTOGRAD, backward=True)
    trace.launch(51, thread=AUTOGRAD)
    assert trace.places() == {
        11.5: ("MLP", "forward"), 34: ("MLP", "recomputed"), 37.5: ("MLP", "backward"),
        38.5: ("norms, gates, rotations", "backward"), 42: ("linear attention", "backward"),
        47: ("copies of sharding", "forward"), 51: ("other", "backward"),
    }  # fmt: skip


def test_a_kernel_without_its_launch_belongs_to_its_operation_or_to_nobody():
    trace = Trace()
    trace.add(RANGE, "longspan::loss", 1, 5)
    trace.add(OPERATION, "aten::exp", 2, 3, external=7)
    trace.add(KERNEL, "kernel", 103, 104, correlation=55, external=7)
    trace.add(KERNEL, "kernel", 105, 106, correlation=56, external=8)
    assert trace.places() == {3: ("loss", "forward"), 5: ("other", "")}
    with pytest.raises(ValueError, match="no training step"):
        attribute(trace.events[1:])


def test_on_a_cpu_operations_are_the_work():
    events = [
        Event(RANGE, "ProfilerStep#0", 0, 50, MAIN),
        Event(RANGE, "ProfilerStep#1", 50, 100, MAIN),
        Event(RANGE, "longspan::sparse attention", 10, 40, MAIN),
        Event(OPERATION, "_Attention", 11, 39, MAIN),  # a function of Python, which waits or calls others
        Event(OPERATION, "aten::mul", 12, 20, MAIN),
        Event(OPERATION, "aten::to", 14, 15, MAIN),
        Event(OPERATION, "c10d::send", 21, 22, MAIN),
        Event(RANGE, "gloo:all_gather", 18, 31, 9),
        Event(OPERATION, "aten::view", 19, 20, 9),  # of another thread
        Event(OPERATION, "autograd::engine::evaluate_function", 60, 70, MAIN, backward=True, origin=(MAIN, 12)),
        Event(OPERATION, "aten::add", 61, 63, MAIN),
    ]  # fmt: skip
    timeline = attribute(events)
    found = break_down(timeline.work, timeline.window, timeline.host)
    assert timeline.steps == 2 and found.window == 100
    assert found.seconds["sparse attention", "forward"] == 8 and found.seconds["sparse attention", "backward"] == 2
    assert found.seconds["communication, exposed", ""] == 11 and found.communication == 13
    assert found.seconds["idle", ""] == 100 - 8 - 2 - 11


def test_reads_traces(tmp_path):
    """Rows as torch writes them; the arrow between forward and backward ends at the node, inside the engine's call."""
    base = 5038707623241.0

    def row(cat, name, ts, dur, tid=MAIN, **args):
        return {"ph": "X", "cat": cat, "name": name, "pid": 7, "tid": tid, "ts": base + ts, "dur": dur, "args": args}

    backward = {"Fwd thread id": 1, "Sequence number": 42}
    arrow = {"cat": "fwdbwd", "name": "fwdbwd", "id": 3, "pid": 7}
    trace = [
        {"ph": "M", "name": "process_name", "pid": 7, "tid": 0, "args": {"name": "python"}},
        row("user_annotation", "ProfilerStep#1", 0, 90, **{"External id": 1}),
        row("cpu_op", "aten::mm", 1, 2, **{"External id": 2, "Sequence number": 42, "Fwd thread id": 0}),
        {"ph": "s", "tid": MAIN, "ts": base + 1, **arrow},
        row("cpu_op", "autograd::engine::evaluate_function: MmBackward0", 10, 9, AUTOGRAD, **backward),
        row("cpu_op", "MmBackward0", 12.5, 3, AUTOGRAD, **backward),
        {"ph": "f", "tid": AUTOGRAD, "ts": base + 12.5, "bp": "e", **arrow},
        row("cuda_driver", "cuLaunchKernelEx", 13, 0.5, AUTOGRAD, correlation=5, **{"External id": 9}),
        row("kernel", "gemm", 30, 4, 20, correlation=5, stream=20),
        row("gpu_user_annotation", "ProfilerStep#1", 30, 9, 20),
        {"ph": "X", "cat": "Trace", "name": "PyTorch Profiler (0)", "pid": "Spans", "tid": "x", "ts": 1, "dur": 1},
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": trace}))
    events = read_trace(path)
    assert [(x.kind, x.name) for x in events] == [
        (RANGE, "ProfilerStep#1"), (OPERATION, "aten::mm"),
        (OPERATION, "autograd::engine::evaluate_function: MmBackward0"), (OPERATION, "MmBackward0"),
        (LAUNCH, "cuLaunchKernelEx"), (KERNEL, "gemm"),
    ]  # fmt: skip
    assert [x.end - x.start for x in events] == pytest.approx([90e-6, 2e-6, 9e-6, 3e-6, 5e-7, 4e-6], abs=3e-9)
    forward = events[1]
    assert [x.origin for x in events[2:4]] == [(forward.thread, forward.start)] * 2
    assert [x.backward for x in events] == [False, False, True, True, False, False]
    assert [x.correlation for x in events[-2:]] == [5, 5]


PATTERN = "model.pattern=[linear:mamba2, softmax, sla]"
LAYERS, STEPS = 3, 2
RUNS = {  # settings of profiled runs on two ranks
    "plain": ["train.checkpointing=none"],
    "full": ["train.checkpointing=full", "profile.ranks=[]", "log.validation_interval=2"],
    "tiles": ["train.mlp_tile=16", "parallel.engine=ddp", "profile.ranks=[1]", "profile.trace=false"],
    "deepspeed": ["parallel.engine=deepspeed", "parallel.zero_stage=2", "profile.start=1"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")
    return folder, run_ranks(_profiled_runs, 2, folder, write_corpus(folder), timeout=240)[0]


def _profiled_runs(rank, world_size, folder, corpus):
    base = [PATTERN, f"model.num_layers={LAYERS}", "train.steps=3", "train.global_batch=1", "parallel.sp=2",
            "checkpoint.interval=0", "log.validation_samples=1"]  # fmt: skip
    logger, said = logging.getLogger("longspan"), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    results = {"unprofiled": train(tiny_config(corpus, folder / "unprofiled", *base))}
    for name, settings in RUNS.items():
        said.clear()
        train(tiny_config(corpus, folder / name, *base, "profile.start=2", *settings))
        results[name] = rows(folder / name), [line for line in said if line.startswith("profile")]
    return results


def _record(folder, name, first=2):
    return json.loads((folder / name / "profile" / f"step-{first:08d}" / "profile.json").read_text())


def test_profiles_change_no_loss(runs):
    _, results = runs
    losses = [row["loss"] for row in results["unprofiled"]]
    for name in ("plain", "full", "tiles"):
        assert [row["loss"] for row in results[name][0]] == pytest.approx(losses, rel=1e-6), name
    assert [row["loss"] for row in results["plain"][0]] == losses
    assert len(results["deepspeed"][0]) == 3


@pytest.mark.parametrize("name", RUNS)
def test_profiled_runs(runs, name):
    folder, results = runs
    first = 1 if name == "deepspeed" else 2
    record = _record(folder, name, first)
    assert record["steps"] == [first, first + 1] and record["planned_s"] is None
    ranks = {"full": [0, 1], "tiles": [1]}.get(name, [0])
    assert [rank["rank"] for rank in record["ranks"]] == ranks
    traces = sorted(path.name for path in (folder / name / "profile").rglob("trace*"))
    assert traces == ([] if name == "tiles" else [f"trace-rank-{rank}.json.gz" for rank in ranks])
    for rank in record["ranks"]:
        components = rank["components"]
        inside = sum(x["total"] for key, x in components.items() if key != "validation and saving")
        assert inside == pytest.approx(rank["step_s"])
        assert ("validation and saving" in components) == (name != "deepspeed")  # step 3 is saved
        for component in ("softmax attention", "linear attention", "sparse attention", "short convolutions",
                          "projections", "MLP", "norms, gates, rotations", "loss"):  # fmt: skip
            assert components[component]["forward"] > 0, component
            assert components[component]["backward"] > 0, component
        assert components["optimizer"]["total"] > 0 and rank["communication_s"] > 0
        again = {component for component, x in components.items() if x.get("recomputed", 0) > 0}
        if name == "full":
            assert {"linear attention", "short convolutions", "projections", "MLP"} <= again
        else:
            assert again == ({"MLP", "norms, gates, rotations"} if name == "tiles" else set())
    table = results[name][1][0].splitlines()
    assert table[0].startswith(f"profile of steps {first} to {first + 1}, rank")
    assert any(line.startswith("softmax attention ") for line in table)


@pytest.mark.parametrize("name", ["plain", "full"])
def test_products_are_counted_where_they_are(runs, name):
    """The trace of a CPU made one of a GPU with a kernel for every matrix product, which can be counted."""
    events = read_trace(runs[0] / name / "profile" / "step-00000002" / "trace-rank-0.json.gz")
    for number, event in enumerate([event for event in events if event.name == "aten::mm"]):
        middle = (event.start + event.end) / 2
        events.append(Event(LAUNCH, "cudaLaunchKernel", middle, middle, event.thread, correlation=number))
        events.append(Event(KERNEL, "gemm", middle, event.end, correlation=number))
    counts = Counter((work.component, work.phase) for work in attribute(events).work)
    calls = LAYERS * STEPS
    assert (counts["validation and saving", ""] > 0) == (name == "full")
    assert counts["MLP", "forward"] == 3 * calls and counts["MLP", "backward"] == 2 * 3 * calls
    # The recomputation ends in the last product, before it has computed anything.
    assert counts["MLP", "recomputed"] == (3 * calls if name == "full" else 0)
    # mamba2: in and out; the others q, k, v and out. The products inside of attention are attention's.
    assert counts["projections", "forward"] == (2 + 2 * 4) * STEPS
    assert counts["projections", "backward"] == 2 * counts["projections", "forward"]


def test_table_beside_a_plan(runs, capsys):
    settings = ["model.num_layers=3", "parallel.sp=2", "optim.offload=cpu", "data.seq_len=64K"]
    config = Config.load(None, [PATTERN, "data.corpora=[{path: x}]", *settings])
    planned = estimate(Job(config, parse_gpus("2xH200"))).seconds
    names = {PLANNED.get(name, name) for name in ROWS}
    assert set(planned) | {"waiting for the host"} <= names
    record = _record(runs[0], "plain") | {"planned_s": planned}
    table = {line[:26].strip(): line for line in lines(record)}
    assert "planned" in table["ms"]
    for name, seconds in planned.items():
        row = table[{value: key for key, value in PLANNED.items()}.get(name, name)]
        assert row.endswith(f"{1000 * seconds:,.1f}")
    cli.COMMANDS["profile"]([str(runs[0] / "full")])
    printed = capsys.readouterr().out
    assert "profile of steps 2 to 3, ranks 0, 1" in printed and "validation and saving, not in the step" in printed


def test_refusals(tmp_path):
    given = ["data.corpora=[{path: x}]", "train.steps=10"]
    for settings, message in (
        (["profile.start=10"], "profile.start=10 with profile.steps=2 ends at step 11, after the run"),
        (["profile.memory=true"], "profile has settings but profile.start=0"),
        (["profile.start=1", "profile.steps=0"], "profile.steps=0: use 1 or more"),
    ):
        with pytest.raises(UserError, match=message.replace("(", r"\(")):
            Config.load(None, [*given, *settings])
    config = Config.load(None, [*given, "profile.start=2", "profile.ranks=[0, 4]"])
    with pytest.raises(UserError, match="profile.ranks has 4, but the run has the ranks 0 to 3"):
        config.validate(world_size=4)
    with pytest.raises(UserError, match="no run directory with a profile"):
        cli.COMMANDS["profile"]([str(tmp_path)])


def test_memory_needs_a_gpu_and_a_resumed_run_says_what_it_skips(tmp_path):
    run_ranks(_refusals, 1, tmp_path, timeout=60)


def _refusals(rank, world_size, folder):
    from longspan.parallel.mesh import build_mesh

    config = tiny_config(folder / "x", folder / "run", "profile.start=2", "profile.memory=true")
    mesh = build_mesh(sp=1, sharding="fsdp", device=torch.device("cpu"), timeout_s=60)
    with pytest.raises(UserError, match="profile.memory=true records the GPU's allocator"):
        StepProfiler(config, mesh, torch.nn.Identity(), first_step=1)
    config = replace(config, profile=replace(config.profile, memory=False))
    late = StepProfiler(config, mesh, torch.nn.Identity(), first_step=3)
    for step in (3, 4):
        late.begin(step)
        late.end(step)
    assert not (folder / "run").exists() and dist.get_world_size() == 1
