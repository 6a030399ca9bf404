"""Hardware counters of the kernels of one call, forward and backward, by Nsight Compute: what binds each of them.

    python -m longspan.benchmarks.counters --cases fixed:32Kx16 gated_delta:32Kx16 sla:2x16x32Kx128 \\
        --output benchmarks/results/counters_H200.json

Every case runs in a process of its own under `ncu`, which runs every kernel several times. See benchmarks/README.md.
"""

import argparse
import csv
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from longspan.benchmarks import linear_worker, sparse_cases
from longspan.benchmarks.arguments import writable
from longspan.benchmarks.common import format_table, new_record, save
from longspan.benchmarks.linear_cases import FAMILIES, Problem
from longspan.launcher.parsing import parse_tokens

HEAD_DIM = 128
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "WarpStateStats", "SchedulerStats", "Occupancy", "LaunchStats")
# Column of the table: the counter's name in ncu and what it is divided by. Percentages are of the most there can be.
COUNTERS = {
    "us": ("gpu__time_duration.sum", 1e3),
    "dram %": ("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "l2 %": ("lts__throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "sm %": ("sm__throughput.avg.pct_of_peak_sustained_elapsed", 1),
    "issue %": ("smsp__issue_active.avg.pct_of_peak_sustained_active", 1),
    "warps": ("sm__warps_active.avg.per_cycle_active", 1),
    "registers": ("launch__registers_per_thread", 1),
    "blocks": ("launch__grid_size", 1),
}
TENSOR = re.compile(r"sm__\w*pipe_tensor\w*\.(?:avg|sum)\.pct_of_peak_sustained_active")  # its name depends on the GPU
STALL = re.compile(r"smsp__average_warps?_issue_stalled_(\w+?)_per_issue_active\.ratio")
STALLS = 3  # reasons kept, those that most cycles are waited for


def main(argv=None) -> int:
    arguments = parse_arguments(argv)
    if arguments.worker:
        return run_alone(arguments.cases[0])
    if not torch.cuda.is_available() or shutil.which("ncu") is None:
        sys.exit("counters: error: needs a GPU and ncu (Nsight Compute, a part of CUDA's toolkit) on PATH")
    deadline = time.monotonic() + arguments.budget
    record = new_record("counters", vars(arguments)) | {"rows": [], "errors": {}}
    compile_all(arguments.cases, deadline)
    for case in arguments.cases:
        left = deadline - time.monotonic()
        try:
            record["rows"] += [{"case": case} | row for row in measure(case, left)]
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            record["errors"][case] = str(error)[:600]
        if arguments.output:
            save(record, arguments.output)
    columns = ["case", "kernel", *COUNTERS, "tensor %", "waits for"]
    print(format_table([row | {"waits for": _stalls(row)} for row in record["rows"]], columns))
    for case, error in record["errors"].items():
        print(f"{case}: {error}")
    return int(bool(record["errors"]))


def compile_all(cases: list[str], deadline: float) -> None:
    """Runs every case, all at once, so that kernels are compiled, and cached on disk: ncu slows everything down."""
    running = [subprocess.Popen(_alone(case), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for case in cases]
    for process in running:
        try:
            process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def measure(case: str, seconds: float) -> list[dict]:
    """A row for every kernel of a case, in order. RuntimeError with what ncu said where it reads nothing."""
    sections = [word for name in SECTIONS for word in ("--section", name)]
    ncu = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw", *sections]
    command = [*ncu, "--print-units", "base", *_alone(case)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, seconds))
    rows = parse(done.stdout)
    if not rows:
        raise RuntimeError(f"ncu gave no counters: {(done.stdout + done.stderr).strip()[-500:]}")
    return rows


def _alone(case: str) -> list[str]:
    return [sys.executable, "-m", "longspan.benchmarks.counters", "--worker", "--cases", case]


def parse(text: str) -> list[dict]:
    """Rows of what ncu printed: a line of names, one of units, one for every kernel, among lines of other kinds."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if len(lines) < 3:
        return []
    rows = list(csv.DictReader(lines))[1:]  # without that of units
    return [_row(row) for row in rows]


def _row(raw: dict[str, str]) -> dict:
    values = {name: _number(text) for name, text in raw.items() if name}
    row = {"kernel": raw["Kernel Name"].partition("(")[0][:60]}
    for column, (name, divisor) in COUNTERS.items():
        if values.get(name) is not None:
            row[column] = values[name] / divisor
    tensor = [value for name, value in values.items() if TENSOR.fullmatch(name) and value is not None]
    if tensor:
        row["tensor %"] = max(tensor)
    stalls = {found[1]: values[name] for name in values if (found := STALL.fullmatch(name)) and values[name]}
    row["stalls"] = dict(sorted(stalls.items(), key=lambda pair: -pair[1])[:STALLS])
    return row


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except (ValueError, AttributeError):
        return None


def _stalls(row: dict) -> str:
    return ", ".join(f"{name} {cycles:.1f}" for name, cycles in row["stalls"].items())


def run_alone(case: str) -> int:
    """Two calls forward and backward, of which the second is between profiler's start and stop."""
    call = call_of(case, torch.device("cuda"))
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return 0


def call_of(case: str, device: torch.device) -> Callable[[], None]:
    """FAMILY:TOKENSxHEADS of linear_kernels.py, or a case of sparse_kernels.py, forward and backward."""
    parsed = parse_case(case)
    if isinstance(parsed, sparse_cases.Case):
        step = sparse_cases.Step(parsed, "sparse", device, seed=0, seconds=1.0, dense_tokens=0)
        return sparse_cases.Bench(step).ours()["forward+backward"]
    family, tokens, heads = parsed
    problem = Problem(family, tokens, heads, HEAD_DIM, torch.bfloat16, device)
    return linear_worker.calls_of(linear_worker.Step("longspan", "eager", problem), "forward+backward", 1)[0]


def parse_case(text: str) -> sparse_cases.Case | tuple[str, int, int]:
    """A case of sparse attention, or family, tokens and heads; ArgumentTypeError if it is neither."""
    family, _, shape = text.partition(":")
    if family not in FAMILIES:
        return sparse_cases.Case.parse(text)
    found = re.fullmatch(r"(\d+[KMG]?)x(\d+)", shape)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no FAMILY:TOKENSxHEADS")
    return family, parse_tokens(found[1]), int(found[2])


def _checked(text: str) -> str:
    parse_case(text)
    return text


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    text = "FAMILY:TOKENSxHEADS of linear attention or SELECTION:BATCHxHEADSxTOKENSxHEAD_DIM of sparse_kernels.py"
    parser.add_argument("--cases", nargs="+", type=_checked, required=True, help=text)
    parser.add_argument("--output", type=writable, help="JSON file, saved again after every case")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds in all (default: %(default)s)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
