"""The linear-attention benchmarks: byte tables and arguments, what they do about failures, small runs on CPU."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longspan.benchmarks import linear_cases, linear_kernels, linear_peers, linear_ranks
from longspan.benchmarks.linear_cases import FAMILIES, Problem, bytes_per_token_head
from longspan.benchmarks.linear_worker import Step
from longspan.benchmarks.worker import run_steps

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
HEAD = {"commit", "date", "command", "versions", "machine", "arguments", "seconds"}


def problem(family, tokens=8, heads=2, head_dim=4):
    return Problem(family, tokens, heads, head_dim, torch.float32, CPU)


def test_bytes_give_the_known_bounds_of_fixed_decay():
    moved = bytes_per_token_head("fixed", 128)
    least_ms = {bound: {d: n * 32768 * 16 / 4.3e9 for d, n in by.items()} for bound, by in moved.items()}
    assert least_ms["once"] == pytest.approx({"forward": 0.125, "forward+backward": 0.343}, rel=0.01)
    assert least_ms["design"] == pytest.approx({"forward": 0.187, "forward+backward": 0.562}, rel=0.01)


def test_gates_are_counted_in_every_pass_that_reads_them():
    fixed, channel, gated = (bytes_per_token_head(f, 128)["design"] for f in ("fixed", "channel", "gated_delta"))
    assert channel["forward"] - fixed["forward"] == 2 * 512
    assert channel["forward+backward"] - fixed["forward+backward"] == 6 * 512  # five reads and dg
    assert gated["forward"] - fixed["forward"] == 2 * 8
    assert gated["forward+backward"] - fixed["forward+backward"] == 256 + 6 * 4 + 6 * 4  # keys once more, g and beta


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_have_what_the_family_needs(family):
    inputs, kind = problem(family).random(0), FAMILIES[family]
    ndim = {None: None, "fixed": 1, "scalar": 2, "channel": 3}[kind.gate]
    assert (None if inputs.log_decay is None else inputs.log_decay.ndim) == ndim
    assert (inputs.beta is not None) == kind.delta
    expected = ["out", "dq", "dk", "dv"] + ["dg"] * (ndim in (2, 3)) + ["dbeta"] * kind.delta
    exact = linear_cases.exact(inputs)
    assert list(exact) == expected and all(x.dtype == torch.float64 for x in exact.values())
    assert linear_cases.relative_error(exact["dq"] * 1.5, exact["dq"]) == pytest.approx(0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_fla_gets_batched_arguments(family, monkeypatch):
    module, name, options = linear_peers._FLA[family]
    seen = {}

    def operation(**arguments):
        seen.update(arguments)
        return arguments["v"], None

    monkeypatch.setenv("FLA_FLASH_QLA", "1")  # put back afterwards
    monkeypatch.setitem(sys.modules, f"fla.ops.{module}", SimpleNamespace(**{name: operation}))
    inputs = problem(family).random(0)
    out = linear_peers.IMPLEMENTATIONS["fla"].make(problem(family))(inputs)
    assert torch.equal(out, inputs.v) and options.items() <= seen.items() and seen["q"].shape == (1, 8, 2, 4)
    gate = inputs.log_decay is not None and inputs.log_decay.ndim > 1
    assert ("g" in seen, "beta" in seen) == (gate, inputs.beta is not None)


def test_a_decay_per_channel_is_compared_by_its_sum():
    inputs = problem("gated_delta").random(0)
    expanded = linear_peers.IMPLEMENTATIONS["cudnn_kda"].prepare(inputs)
    assert expanded.log_decay.shape == inputs.q.shape and expanded.log_decay.is_contiguous()
    gradient = torch.randn(8, 2, 4)
    assert linear_cases.relative_error(gradient, gradient.double().sum(-1)) < 1e-12


def test_rows_are_completed_from_the_reference_rates():
    def row(by, ms):
        return {"family": "fixed", "by": by, "tokens": 32768, "heads": 16, "forward": {"eager": {"ms": ms}}}

    rows = linear_kernels.finish_rows([row("longspan", 0.25), row("fla", 0.5)], {"copy": {"TB/s": 4.3}}, 128)
    ours = rows[0]["forward"]["eager"]
    assert ours["fla_over_this"] == 2 and ours["share_of_once"] == pytest.approx(0.5, rel=0.01)
    assert ours["ns_per_token_head"] == pytest.approx(0.25e6 / 524288)
    table = linear_kernels.kernel_table(rows).splitlines()
    assert len(table) == 3 and "0.250" in table[1] and "50%" in table[1] and "2.00" in table[1]


def test_a_failed_measurement_has_no_time_but_its_reason():
    row = {"family": "scalar", "by": "fla", "tokens": 1024, "heads": 4, "forward+backward": {"eager": {"error": "no"}}}
    assert "failed" in linear_kernels.kernel_table(linear_kernels.finish_rows([row], {}, 128))
    assert "failed" in linear_kernels.flat_table([row])


def test_a_killed_process_costs_one_step_and_a_late_one_the_rest():
    steps = [Step("reference", kind, problem("none"), seconds=0.01) for kind in ("matmul", "copy", "unknown")]
    results, taken, deadline = [], [], time.monotonic() + 60
    given = [steps[2], *(replace(steps[0], seed=seed) for seed in range(40))]
    for step, result in run_steps(given, limit_s=60, deadline=deadline):
        results.append(result)
        taken.append(step)
        if len(results) == 2:
            for process in multiprocessing.active_children():
                process.kill()
        if len(results) > 2 and "error" in results[-2]:
            break
    assert "KeyError" in results[0]["error"] and results[1]["TFLOP/s"] > 0
    assert "died with exit code -9" in results[-2]["error"] and results[-1]["TFLOP/s"] > 0
    assert taken == given[: len(taken)]  # none is lost with the process

    late = [result["error"] for _, result in run_steps(steps[:2], limit_s=0.01, deadline=deadline)]
    assert "longer than" in late[0] and "skipped" in late[1]
    late = [result["error"] for _, result in run_steps(steps[:2], limit_s=0.01, deadline=deadline, go_on=True)]
    assert "longer than" in late[0] and "longer than" in late[1]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    "parse, line, message",
    [
        (linear_kernels.parse_linear_kernels, "--families nothing", "invalid choice: 'nothing'"),
        (linear_kernels.parse_linear_kernels, "--budget 0", "--budget 0.0 must be greater than 0"),
        (linear_ranks.parse_linear_ranks, "--layer --parity", "--layer and --parity exclude each other"),
        (linear_ranks.parse_linear_ranks, "--repetitions 0", "--repetitions 0 must be greater than 0"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(parse, line, message, capsys):
    with pytest.raises(SystemExit):
        parse(line.split())
    assert message in capsys.readouterr().err


def test_defaults():
    arguments = linear_kernels.parse_linear_kernels([])
    assert arguments.tokens == [32768, 131072] and arguments.families == list(FAMILIES)
    assert linear_ranks.parse_linear_ranks([]).tokens == [32768, 131072, 524288]
    assert linear_ranks.parse_linear_ranks(["--layer", "--tokens", "4K"]).tokens == [4096]
    assert linear_ranks.parse_linear_ranks(["--parity"]).families == list(FAMILIES)


def test_kernels_on_cpu(tmp_path):
    output = tmp_path / "kernels.json"
    record = run("-m longspan.benchmarks.linear_kernels --families scalar --peers fla --tokens 128 --heads 2"
                 f" --head-dim 16 --seconds 0.01 --output {output}", output)  # fmt: skip
    assert record["reference"]["copy"]["TB/s"] > 0 and (
        record["not_measured"].keys() == {"fla"} or len(record["rows"]) > 1
    )
    errors, row = record["errors"][0], record["rows"][0]
    assert errors["by"] == row["by"] == "longspan" and max(errors["errors"].values()) < 1e-5
    assert errors["errors"].keys() == {"out", "dq", "dk", "dv", "dg"}
    forward, both = (row[direction]["eager"] for direction in ("forward", "forward+backward"))
    assert both["ms"] > forward["ms"] > 0 and forward["repetitions"] >= 20 and 0 < forward["share_of_once"]


RANKS = "-m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/linear_ranks.py --device cpu --heads 2"


def test_ranks_on_cpu(tmp_path):
    output = tmp_path / "ranks.json"
    record = run(f"{RANKS} --head-dim 8 --families fixed --layouts zigzag --strategies lasp2 all_to_all --tokens 128"
                 f" --repetitions 2 --output {output}", output)  # fmt: skip
    assert [row["strategy"] for row in record["rows"]] == ["alone", "lasp2", "all_to_all"]
    for row in record["rows"][1:]:
        for direction in ("forward", "forward+backward"):
            assert row["exposed_ms"][direction] == pytest.approx(row["ms"][direction] - row["alone_ms"][direction])
            assert row["efficiency"][direction] > 0 and row["received_mib"] > 0


def test_parity_and_drift_on_cpu(tmp_path):
    output = tmp_path / "parity.json"
    record = run(f"{RANKS} --head-dim 16 --families scalar --strategies lasp2 all_to_all --parity --parity-tokens 512"
                 f" --drift-tokens 2K --output {output}", output)  # fmt: skip
    ratios = [row for row in record["rows"] if "ratio" in row]
    assert [(row["layout"], row["strategy"]) for row in ratios] == [
        (layout, strategy) for layout in ("zigzag", "contiguous") for strategy in ("lasp2", "all_to_all")
    ]
    assert all(row["ratio"].keys() == {"out", "dq", "dk", "dv", "dg"} and not row["broken"] for row in ratios)
    one, many = (row for row in record["rows"] if "chunks" in row)
    assert (one["run"], many["run"]) == ("one rank", "all ranks") and one["first"].keys() == {"out", "dq", "dk", "dv"}
    assert len(many["chunks"]["out"]) == 16 and max(many["last"].values()) < 1e-5


def run(command, output):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(output.read_text())
    assert record.keys() >= HEAD
    return record
