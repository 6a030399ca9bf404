"""What counters.py makes of ncu's output, and of cases."""

import argparse

import pytest
import torch

from longspan.benchmarks import counters

STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
NAMES = [
    "ID", "Kernel Name", "gpu__time_duration.sum", "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active", "launch__grid_size",
    *(STALLED.format(name) for name in ("barrier", "long_scoreboard", "wait", "selected")),
]  # fmt: skip
OUTPUT = "\n".join(
    ["==PROF== Connected to process 7", "tokens printed by the program"]
    + [",".join(f'"{cell}"' for cell in line) for line in (
        NAMES, ["", "", "ns", "%", "%", "", "inst", "inst", "inst", "inst"],
        ["0", "_sweep(Params)", "123,500", "61.5", "20.25", "1,056", "0.5", "7.25", "1.5", "1.0"],
        ["1", "copy", "2,000", "n/a", "0", "132", "0", "3.0", "0", "1.0"],
    )]
    + ["==PROF== Disconnected"]
)  # fmt: skip


def test_counters_are_read_by_name():
    first, second = counters.parse(OUTPUT)
    assert first["kernel"] == "_sweep" and first["us"] == 123.5 and first["dram %"] == 61.5 and first["blocks"] == 1056
    assert first["tensor %"] == 20.25 and "l2 %" not in first
    assert list(first["stalls"].items()) == [("long_scoreboard", 7.25), ("wait", 1.5), ("selected", 1.0)]
    assert second["kernel"] == "copy" and "dram %" not in second
    assert list(second["stalls"]) == ["long_scoreboard", "selected"]


@pytest.mark.parametrize("text", ["", "==ERROR== The user does not have permission", '"ID","Kernel Name"\n"",""'])
def test_output_without_kernels_has_no_rows(text):
    assert counters.parse(text) == []


def test_cases_are_calls():
    device = torch.device("cpu")
    counters.call_of("gated_delta:100x2", device)()
    counters.call_of("sla:1x2x300x64", device)()
    for wrong in ("fixed:100", "fixed:axb", "nothing:1x2x3x4"):
        with pytest.raises(argparse.ArgumentTypeError):
            counters.parse_case(wrong)
