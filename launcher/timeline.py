"""From a Chrome trace of torch.profiler to the work of components.

A kernel belongs to where it was launched: the call of the CUDA runtime with its correlation id stands on a thread
inside operations and ranges, of which the innermost range names the component. Operations of the backward pass are on
another thread outside all ranges; they belong to where the operation of the forward pass was that autograd links them
to (its sequence number). Without a GPU the operations of the CPU are the work.
"""

import gzip
import json
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from longspan.attention.ranges import PREFIX, RECOMPUTED
from longspan.launcher.breakdown import AGAIN, BACKWARD, DATA, FORWARD, OPTIMIZER, OTHER, OUTSIDE, WHOLE, Work

# Regions of a model in which matrix products are one component and everything else another.
LAYERS, MIXER, MLP = "projections and MLP", "projections", "MLP"
NORMS, LOSS, SHARDING = "norms, gates, rotations", "loss", "copies of sharding"
WHOLES = (DATA, OPTIMIZER, OUTSIDE)  # whatever happens inside is theirs, and so is the device's waiting
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "_scaled_mm", "_addmm_activation"}
STEP, SHARDING_RANGES = "ProfilerStep#", "FSDP::"
OPERATION, RANGE, LAUNCH, KERNEL = "operation", "range", "launch", "kernel"
CATEGORIES = {
    "cpu_op": OPERATION, "user_annotation": RANGE, "cuda_runtime": LAUNCH, "cuda_driver": LAUNCH,
    "kernel": KERNEL, "gpu_memcpy": KERNEL, "gpu_memset": KERNEL,
}  # fmt: skip
OTHER_KINDS = {
    "Memcpy HtoD": "host copies", "Memcpy DtoH": "host copies", "Memcpy PtoP": "peer copies",
    "peer_": "shared memory",
}  # fmt: skip


class Event(NamedTuple):
    """What a trace has: seconds; `thread` of the host. correlation joins a launch and its kernel, external an operation
    and its kernels. origin: of an operation of the backward pass, (thread, start) of that of the forward pass, None
    where there is none; `backward` says that it is one."""

    kind: str
    name: str
    start: float
    end: float
    thread: int = 0
    correlation: int | None = None
    external: int | None = None
    backward: bool = False
    origin: tuple[int, float] | None = None


@dataclass(frozen=True)
class Timeline:
    """What `breakdown.break_down` divides, and over how many steps."""

    work: list[Work]
    window: tuple[float, float]
    host: list[Work]
    steps: int


@dataclass(frozen=True)
class _Place:
    """Where an event stands: in which region, whether in a matrix product, in which phase."""

    region: str = OTHER
    product: bool = False
    phase: str = FORWARD

    def inside(self, event: Event, found: dict) -> "_Place":
        """The place of what `event` encloses, if the event is here."""
        if self.region in WHOLES:
            return self
        if event.kind == RANGE and event.name.startswith(PREFIX):
            name = event.name.removeprefix(PREFIX)
            if name == RECOMPUTED:
                return replace(self, phase=AGAIN)
            return _Place(name, phase=WHOLE if name in WHOLES else self.phase)
        if event.kind == RANGE and event.name.startswith(SHARDING_RANGES):
            return _Place(SHARDING, phase=self.phase)
        if event.backward:
            return _Place(found.get(event.origin, _Place()).region, phase=BACKWARD)
        if event.kind == OPERATION and event.name.removeprefix("aten::") in PRODUCTS:
            return replace(self, product=True)
        return self

    def work(self, start: float, end: float) -> Work:
        region = self.region
        if region in (LAYERS, MIXER, MLP) and not self.product:
            region = NORMS
        return Work(start, end, region, self.phase)


def attribute(events: list[Event]) -> Timeline:
    """The work of a trace with at least one step in it (ValueError without)."""
    steps = [event for event in events if event.kind == RANGE and event.name.startswith(STEP)]
    if not steps:
        raise ValueError("the trace has no training step (no range ProfilerStep#)")
    kernels = [event for event in events if event.kind == KERNEL]
    sent = [event for event in events if event.kind == RANGE and event.name.startswith("gloo:")]
    hosts = [event for event in events if event.kind != KERNEL and not event.name.startswith("gloo:")]
    launches, operations, pieces = _walk(hosts, None if kernels else steps[0].thread)
    work = [place.work(start, end) for start, end, place in pieces]
    if not kernels:
        work += [Work(event.start, event.end, communication=_kind(event.name)) for event in sent]
    for kernel in kernels:
        place = launches.get(kernel.correlation) or operations.get(kernel.external) or _Place(phase=WHOLE)
        whole = place.region == OUTSIDE or (place.region in WHOLES and kernel.name.startswith("Mem"))
        kind = "" if whole else _kind(kernel.name)
        work.append(
            Work(kernel.start, kernel.end, communication=kind) if kind else place.work(kernel.start, kernel.end)
        )
    waits = [
        Work(event.start, event.end, name)
        for event in hosts
        if event.kind == RANGE and (name := event.name.removeprefix(PREFIX)) in WHOLES
    ]
    window = min(step.start for step in steps), max(step.end for step in steps)
    return Timeline(work, window, waits, len(steps))


def _walk(events: list[Event], computing: int | None):
    """({correlation: place}, {external id: place}, [(start, end, place)]): of launches, of operations, and of what the
    thread `computing` itself computes: the parts of its operations that no other event covers."""
    found, launches, operations, pieces = {}, {}, {}, []
    stacks = defaultdict(list)  # by thread: (end, place, whether it computes) of what is under way, outermost first
    since = {}  # by thread: from when on the last of these is innermost

    def close(thread, time):
        """Ends what has ended by `time`, and there the piece of what has not."""
        stack = stacks[thread]
        while stack and stack[-1][0] <= time:
            end, place, computes = stack.pop()
            if computes:
                pieces.append((since[thread], end, place))
            since[thread] = end
        if stack and stack[-1][2]:
            pieces.append((since[thread], time, stack[-1][1]))
        since[thread] = time

    for event in sorted(events, key=lambda event: (event.start, -event.end)):
        close(event.thread, event.start)
        stack = stacks[event.thread]
        place = (stack[-1][1] if stack else _Place()).inside(event, found)
        # An event that is said to end after the one around it does so by rounding.
        end = min(event.end, stack[-1][0]) if stack else event.end
        stack.append((end, place, event.thread == computing and _computes(event)))
        found[event.thread, event.start] = place
        if event.kind == LAUNCH and event.correlation is not None:
            launches[event.correlation] = place
        elif event.external is not None:
            operations[event.external] = place
    for thread in list(stacks):
        close(thread, float("inf"))
    return launches, operations, pieces


def _computes(event: Event) -> bool:
    """Whether the CPU computes in this operation itself; in functions of Python, of autograd's engine and of c10d
    others do, or it waits."""
    namespace, separator, _ = event.name.partition("::")
    computes = separator and namespace not in ("autograd", "torch", "c10d")
    return event.kind == OPERATION and (bool(computes) or event.name.startswith("CompiledFunction"))


def _kind(name: str) -> str:
    """The kind of communication that a kernel, a copy or gloo's range is, "" for all others: `all-gather`."""
    if found := re.match(r"nccl\w*?Kernel_([A-Za-z]+)|gloo:(\w+)", name):
        words = re.sub("([a-z])([A-Z])", r"\1-\2", found[1] or found[2])
        return words.lower().replace("_", "-")
    if name.startswith("nccl"):
        return "nccl"
    return next((kind for start, kind in OTHER_KINDS.items() if name.startswith(start)), "")


def read_trace(path: Path) -> list[Event]:
    """The events of a Chrome trace (.json or .json.gz) that torch.profiler wrote."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as file:
        rows = json.load(file)["traceEvents"]
    links = _links(rows)
    events = []
    for row in rows:
        if row["ph"] == "X" and row.get("cat") in CATEGORIES:
            args, start = row.get("args", {}), row["ts"] / 1e6
            node = _node(args)
            events.append(
                Event(
                    CATEGORIES[row["cat"]], row["name"], start, start + row["dur"] / 1e6, row["tid"],
                    args.get("correlation"), args.get("External id"),
                    node is not None or row["name"].startswith("autograd::engine::evaluate_function"), links.get(node),
                )
            )  # fmt: skip
    return events


def _node(args: dict) -> tuple[int, int] | None:
    """(thread, sequence number), in autograd's numbering, of the node that an operation of the backward pass runs."""
    return (args["Fwd thread id"], args["Sequence number"]) if args.get("Fwd thread id", 0) > 0 else None


def _links(rows: list[dict]) -> dict[tuple[int, int], tuple[int, float]]:
    """Where the forward pass made each node: (thread, start). The arrows of the trace say so, and end at one of the
    operations that run the node; the others have the same numbers."""
    ends = {(row["tid"], row["ts"]): row["id"] for row in rows if row.get("cat") == "fwdbwd" and row["ph"] == "f"}
    starts = {
        row["id"]: (row["tid"], row["ts"] / 1e6) for row in rows if row.get("cat") == "fwdbwd" and row["ph"] == "s"
    }
    links = {}
    for row in rows:
        if row["ph"] == "X" and (row["tid"], row["ts"]) in ends and (node := _node(row.get("args", {}))):
            links[node] = starts[ends[row["tid"], row["ts"]]]
    return links
