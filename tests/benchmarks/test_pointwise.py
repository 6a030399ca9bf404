"""The benchmark of what stands beside attention runs, and compares what it says it does."""

import json
from functools import partial

import pytest
import torch

from longspan.benchmarks import pointwise
from longspan.benchmarks.pointwise_cases import eager_layers
from longspan.kernels import norm_triton, swiglu
from longspan.models.layers import SwiGLU


def run(monkeypatch, tmp_path, *words):
    file = tmp_path / "rows.json"
    words = ["--device", "cpu", "--output", str(file), "--seconds", "0.001", "--tokens", "24", *words]
    monkeypatch.setattr("sys.argv", ["pointwise", *words])
    return pointwise.main(), json.loads(file.read_text())["rows"]


def test_every_case_agrees_with_fp64_in_both_forms(monkeypatch, tmp_path, capsys):
    status, rows = run(monkeypatch, tmp_path, "--layers", "linear:gated_delta", "--few-tokens", "9", "--no-compile")
    assert status == 0
    assert [row["form"] for row in rows] == 11 * ["eager"] + 11 * ["longspan"] + 2 * ["eager", "longspan"]
    for row in rows[:22]:
        assert max(row["errors"]) < (4e-3 if row["case"] == "loss" else 1e-6), row  # its gradient is bf16
        assert all(row["ms"][direction] > 0 for direction in row["floor_ms"])
    out = capsys.readouterr().out
    assert "norm, rotation" in out and "linear:gated_delta" in out


def test_options_are_in_force_while_they_are_tried(monkeypatch, tmp_path):
    seen, measured = [], pointwise.case_times

    def noted(*arguments):
        seen.append(norm_triton.PROGRAMS)
        return measured(*arguments)

    monkeypatch.setattr(pointwise, "case_times", noted)
    words = ["--cases", "norm", "--layers", "--no-compile", "--try", "norm_triton.PROGRAMS", "7", "9"]
    status, rows = run(monkeypatch, tmp_path, *words)
    in_use = norm_triton.PROGRAMS
    assert status == 0 and seen == [in_use, in_use, 7, 9] and rows[-1]["value"] == "9"


def test_what_is_compiled_is_measured_too(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # inductor takes its time
    status, rows = run(monkeypatch, tmp_path, "--cases", "swiglu", "--layers", "--compile")
    assert status == 0 and [row["form"] for row in rows] == ["eager", "longspan", "compiled"]
    assert max(rows[-1]["errors"]) < 1e-6 and rows[-1]["ms"]["forward+backward"] > 0


def test_when_the_budget_is_spent_rows_say_so(monkeypatch, tmp_path):
    status, rows = run(monkeypatch, tmp_path, "--budget", "1e-9")
    assert status == 1 and all("--budget" in row["error"] for row in rows)


def test_eager_layers_run_no_operator_of_longspan(monkeypatch):
    mlp, x = SwiGLU(8, 12), torch.randn(5, 8)
    expected = mlp(x)

    def refuse(*_):
        raise AssertionError("an operator of longspan ran")

    monkeypatch.setattr(swiglu, "swiglu_forward", refuse)
    with pytest.raises(AssertionError):
        mlp(x)
    with eager_layers():
        torch.testing.assert_close(mlp(x), expected)


def test_kernels_are_told_apart():
    parts = {
        "norm_backward_kernel": "pointwise",
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopB_TNT": "products",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop": "attention",
        "void flash::flash_fwd_kernel<...>": "attention",
        "sweep_kernel": "attention",
        "void at::native::vectorized_elementwise_kernel<4, ...>": "other",
        "Memset (Device)": "other",
    }
    assert {kernel: pointwise.part_of(kernel) for kernel in parts} == parts
