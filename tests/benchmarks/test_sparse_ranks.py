"""The benchmark of sparse attention over ranks runs on CPU ranks, and what it says of bytes is right."""

import json
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from spawn import run_ranks

from longspan.benchmarks import ranks as benchmark_ranks
from longspan.benchmarks import sparse_ranks
from longspan.benchmarks.ranks import Ranks, join


def run_benchmark(rank, world_size, path, more):
    sys.argv = ["sparse_ranks", "--output", str(path), "--device", "cpu", "--tokens", "2K", "--heads", "2"]
    sys.argv += ["--kv-heads", "1", "--head-dim", "8", "--repetitions", "1", *more]
    return sparse_ranks.main()


def rows_of(tmp_path, more):
    path = tmp_path / "rows.json"
    assert run_ranks(run_benchmark, 2, path, more) == [0, 0]
    rows = json.loads(path.read_text())["rows"]
    for row in rows:
        assert row["ms"]["forward+backward"] > row["ms"]["forward"] > 0
        assert row["strategy"] == "alone" or row["efficiency"]["forward"] > 0
    return rows


def test_operator(tmp_path):
    rows = rows_of(tmp_path, ["--cases", "sla_ratio", "sla_top16", "llsa2"])
    assert [row["strategy"] for row in rows] == 3 * ["alone", *sparse_ranks.FORCED]
    for row in rows:
        if row["strategy"] == "alone":
            continue
        assert row["strategy"] in ("auto", row["took"])
        if row["took"] == "fetch":
            assert 1 <= row["received_over_needed"] < 1.05, row


def test_layer(tmp_path):
    rows = rows_of(tmp_path, ["--cases", "sla_top16", "llsa2", "--strategies", "fetch", "--layer"])
    assert [row["case"] for row in rows] == ["sla_top16"] * 2 + ["llsa2"] * 2


def slow_to_start(rank, world_size):
    """Two cases, whose first calls take all of the budget; what is measured takes it too."""
    slow, ranks = [], Ranks(join("cpu"), torch.device("cpu"), 1)
    clock = SimpleNamespace(monotonic=lambda: sum(slow), perf_counter=lambda: sum(slow))

    def case(ranks, first, others):
        calls = iter([first, *[others] * 9])

        def step(mark):
            slow.append(next(calls))
            for _ in range(3):
                mark()

        return ranks.measure(step)

    with mock.patch.object(benchmark_ranks, "time", clock):
        return [ranks.within(0.0, 60.0, case, *given)[1] for given in ((50, 1), (50, 1), (0, 30), (0, 1))]


def test_what_compiles_is_not_of_the_budget():
    for errors in run_ranks(slow_to_start, 2):
        assert errors == [None, None, None, "skipped: --budget of 60 s is spent"]


def test_kernels_are_told_apart():
    names = ["forward_kernel", "add_packed_kernel", "add_kernel", "whole_output_kernel", "ncclDevKernel_SendRecv"]
    assert [sparse_ranks.part_of(name) for name in names] == ["forward", "packing", "dk, dv", "branch", "other"]


def test_kernels_by_part_and_one_by_one():
    names = ["forward_kernel", "ncclDevKernel_SendRecv", "peer_blocks_kernel", "keys_kernel"]
    times = [(0.0, 2.0), (1.0, 2.5), (2.25, 4.0), (4.5, 5.0)]
    kernels = [sparse_ranks.Kernel(*time, stream, name) for stream, (time, name) in enumerate(zip(times, names))]
    found = sparse_ranks.by_part(kernels)
    assert found["forward"] == 2.0 and found["dk, dv"] == 0.5 and found["launches"] == 4
    assert found["exposed"] == 2.0 and found["idle"] == 0.5 and found["nccl"] == 3.0
    assert sparse_ranks.listing(kernels).splitlines()[3].split() == ["2250.0", "1750.0", "2", "peer_blocks_kernel"]


def test_refusals(capsys):
    with pytest.raises(SystemExit):
        sparse_ranks.parse_arguments(["--device", "cpu", "--kernels", "lists"])
    assert "--kernels lists what GPUs do" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sparse_ranks.parse_arguments(["--heads", "3", "--kv-heads", "2"])
    assert "--kv-heads 2 does not divide --heads 3" in capsys.readouterr().err
