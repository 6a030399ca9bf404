"""The benchmark of block-sparse attention: its cases, what follows from times, and a small run on the CPU."""

import argparse
import json

import pytest

from longspan.benchmarks import sparse_kernels
from longspan.benchmarks.sparse_kernels import CASES, SELECTIONS, Case


def test_cases_are_read():
    assert Case.parse("llsa2:2x4x64Kx64:clustered") == Case("llsa2", 2, 4, 65536, 64, "clustered")
    assert [Case.parse(text).selection in SELECTIONS for text in CASES] == [True] * len(CASES)
    for text in ("top", "top:2x2x64", "top:2x2x1Kx16:sorted", "none:1x1x1Kx16", "top:axbxcxd"):
        with pytest.raises(argparse.ArgumentTypeError, match="no case"):
            Case.parse(text)


def test_efficiency_is_speed_up_times_density():
    row = {
        "dense": {"forward": {"ms": 100.0}},
        "sparse": {"forward": {"ms": 10.0}},
        "parts": {"density": 0.05, "select": {"ms": 0.6}, "rows": {"ms": 0.4}},
    }
    sparse_kernels.finish(row)
    assert row["sparse"]["forward"]["efficiency"] == pytest.approx(0.5)
    assert row["sparse"]["selection_share_of_forward"] == pytest.approx(0.1)


def test_small_cases_on_cpu(tmp_path, capsys):
    path = tmp_path / "sparse.json"
    cases = ["top:2x1x256x16", "llsa2:1x1x256x16:clustered"]
    given = ["--device", "cpu", "--seconds", "0.001", "--output", str(path), "--cases", *cases]
    assert sparse_kernels.main(given) == 0
    record = json.loads(path.read_text())
    assert record.keys() >= {"commit", "date", "command", "versions", "machine", "arguments", "seconds"}
    top, llsa = record["rows"]
    assert top["parts"]["keys_per_query"] == 64 and top["parts"]["density"] == 0.25
    # 8 fine blocks of 16, the 16 rows of level 1 (all that there are under the row of level 2), and that row
    assert llsa["parts"]["keys_per_query"] == 128 + 16 + 1
    for row in (top, llsa):
        assert all(row["sparse"][name]["efficiency"] > 0 for name in ("forward", "forward+backward"))
        assert row["nvidia_bsa_128"]["not_measured"]
    assert "top B=2 H=1 N=256 D=16 random" in capsys.readouterr().out


def test_a_failing_step_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("no dense")

    monkeypatch.setattr(sparse_kernels.Bench, "dense", fail)
    path = tmp_path / "sparse.json"
    given = ["--device", "cpu", "--seconds", "0.001", "--output", str(path), "--cases", "top:1x1x64x16"]
    assert sparse_kernels.main(given) == 1
    (row,) = json.loads(path.read_text())["rows"]
    assert row["dense"] == {"error": "RuntimeError: no dense"} and row["parts"]["density"] == 1.0
