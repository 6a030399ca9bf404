"""What the benchmarks share: timing over ranks, bytes on the wire, the JSON record and the printed table."""

import math
import os
import platform
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from longspan.launcher.clock import Clock
from longspan.launcher.environment import commit, package_version
from longspan.launcher.files import replace_text, strict_json

_PACKAGES = ("torch", "triton", "flash-attn-4", "nvidia-cutlass-dsl", "nvidia-cudnn-frontend", "numpy")


def new_record(benchmark: str, arguments: dict) -> dict:
    """The head of every result file: commit, date, versions, machine and command."""
    return {
        "benchmark": benchmark,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "arguments": arguments,
        "versions": _versions(),
        "machine": _machine(),
    }


def save(record: dict, path: str | Path):
    """Written whole or not at all, so that it can be saved again after every measurement."""
    replace_text(Path(path), strict_json(record, indent=2) + "\n")


def format_table(rows: list[dict], columns: list[str]) -> str:
    """Aligned text, one line per row; floats to one decimal, missing values as '-'."""
    cells = [columns] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def measure(step, device: torch.device, *, budget_s: float, group=None) -> list[float]:
    """Median seconds between the marks of `step(mark)`, the slowest rank of each repetition counted.

    Two warm-up calls, the second of which says how many repetitions (3 to 20) fit in `budget_s`. The ranks of `group`
    start every repetition together; None is this rank alone.
    """
    for _ in range(2):
        intervals = _run_once(step, device, group)
    repetitions = min(20, max(3, math.floor(budget_s / max(sum(intervals), 1e-9))))
    timings = [_run_once(step, device, group) for _ in range(repetitions)]
    return [statistics.median(interval) for interval in zip(*timings, strict=True)]


class Traffic(TorchDispatchMode):
    """Bytes that this rank receives from others through torch.distributed over the default group: `received`.

    Counts what the algorithm delivers, an all-reduce as reduce-scatter plus all-gather; not what a library's own
    ring passes on. Collectives of the backward are seen too: autograd's threads inherit the mode.
    """

    def __init__(self):
        super().__init__()
        self.received = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(cls, torch.Tensor) and cls.__name__ == "DTensor" for cls in types):
            return NotImplemented  # DTensor first unwraps itself, then comes back here with local tensors
        if func.namespace in ("c10d", "_c10d_functional"):
            count = _RECEIVED.get(func._opname)
            self.received += count(args) if count else 0.0
        return func(*args, **(kwargs or {}))


def _bytes(value) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value))


def _from_others(num_bytes: float) -> float:
    world_size = dist.get_world_size()
    return num_bytes * (world_size - 1) / world_size


def _all_to_all_output(num_bytes: int, splits) -> float:
    return num_bytes * (1 - splits[dist.get_rank()] / max(1, sum(splits))) if splits else _from_others(num_bytes)


# Bytes received from other ranks, by operator: c10d operators take their outputs first, functional ones their inputs.
_RECEIVED = {
    "recv_": lambda args: _bytes(args[0]),
    "allgather_": lambda args: _from_others(_bytes(args[0])),
    "_allgather_base_": lambda args: _from_others(_bytes(args[0])),
    "allgather_into_tensor_coalesced_": lambda args: _from_others(_bytes(args[0])),
    "reduce_scatter_": lambda args: _from_others(_bytes(args[1])),
    "_reduce_scatter_base_": lambda args: _from_others(_bytes(args[1])),
    "reduce_scatter_tensor_coalesced_": lambda args: _from_others(_bytes(args[1])),
    "alltoall_": lambda args: _from_others(_bytes(args[0])),
    "alltoall_base_": lambda args: _all_to_all_output(_bytes(args[0]), args[3]),
    "allreduce_": lambda args: 2 * _from_others(_bytes(args[0])),
    "all_gather_into_tensor": lambda args: _bytes(args[0]) * (dist.get_world_size() - 1),
    "reduce_scatter_tensor": lambda args: _from_others(_bytes(args[0])),
    "all_to_all_single": lambda args: _all_to_all_output(_bytes(args[0]), args[1]),
    "all_reduce": lambda args: 2 * _from_others(_bytes(args[0])),
}


def _run_once(step, device: torch.device, group) -> list[float]:
    """Seconds between consecutive marks of one call, maximum over the ranks."""
    clock, marks = Clock(device), []
    if group is not None:
        dist.barrier(group)
    step(lambda: marks.append(clock.mark()))
    seconds = list(map(clock.seconds, marks, marks[1:]))
    if group is None:
        return seconds
    slowest = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group)
    return slowest.tolist()


def _versions() -> dict:
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    versions |= {package: package_version(package) for package in _PACKAGES}
    if torch.cuda.is_available():
        versions["cudnn"] = torch.backends.cudnn.version()
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        versions["driver"] = _driver()
    return versions


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def _machine() -> dict:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"gpus": gpus, "cpus": os.cpu_count(), "architecture": platform.machine()}


def _cell(value) -> str:
    if value is None:
        return "-"
    return f"{value:,.1f}" if isinstance(value, float) else str(value)
