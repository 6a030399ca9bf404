"""The benchmark of block-sparse attention: its cases, what follows from times, other libraries, runs on the CPU."""

import argparse
import json

import pytest

from longspan.benchmarks import sparse_kernels
from longspan.benchmarks.sparse_cases import SELECTIONS, Case
from longspan.benchmarks.sparse_kernels import CASES

# What the libraries are called with, by definition: a matrix of blocks, softmax over it, SLA's linear branch.
DEFINITIONS = """
import torch
def attend(q, k, v, lists, size, scale):
    blocks = torch.zeros(*lists.shape[:3], k.shape[2] // size[1], dtype=torch.bool).scatter_(-1, lists.long(), True)
    seen = blocks.repeat_interleave(size[0], 2).repeat_interleave(size[1], 3)
    return (q @ k.mT * scale).masked_fill(~seen, -torch.inf).softmax(-1) @ v
"""
SLA = """
import torch
from definitions import attend
class SparseLinearAttention(torch.nn.Module):
    def __init__(self, head_dim, topk, feature_map, BLKQ, BLKK):
        super().__init__()
        assert feature_map == "softmax"
        self.topk, self.size, self.proj_l = topk, (BLKQ, BLKK), torch.nn.Linear(head_dim, head_dim)
    def forward(self, q, k, v):
        means = [x.unflatten(2, (-1, size)).mean(3) for x, size in zip((q, k), self.size)]
        scores = means[0] @ means[1].mT
        lists = scores.topk(max(1, int(self.topk * scores.shape[-1])), -1).indices
        a, b = q.softmax(-1), k.softmax(-1)
        linear = a @ (b.mT @ v) / (a * b.sum(2, True)).sum(-1, True)
        return attend(q, k, v, lists, self.size, q.shape[-1] ** -0.5) + self.proj_l(linear)
"""
BSA = """
import torch
from definitions import attend
def block_sparse_attention_forward(q, k, v, lists, *, sparse_block_size, softmax_scale):
    assert lists.dtype == torch.int32 and q.is_contiguous() and (lists.diff(dim=-1) > 0).all()
    out = attend(q, k, v, lists, (sparse_block_size,) * 2, softmax_scale)
    return {"o_tensor": out, "lse_tensor": out[..., 0]}
def block_sparse_attention_backward(d_out, q, k, v, out, lse, lists, *, sparse_block_size, softmax_scale):
    return {"dq_tensor": q, "dk_tensor": k, "dv_tensor": v}
"""
# By this one the process is lost.
LLSA = "import os\nllsa_l2 = lambda q, k, v, topk1, topk2, block_size: os._exit(3)"


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    files = {
        "definitions.py": DEFINITIONS,
        "sparse_linear_attention.py": SLA,
        "cudnn/block_sparse_attention.py": BSA,
        "llsa/kernel/torch_op/flash_sparse_attention_res_1.py": "",
        "llsa/kernel/torch_op/flash_sparse_attention_res_2.py": LLSA,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)


def run(path, *cases):
    given = ["--device", "cpu", "--seconds", "0.001", "--output", str(path), "--cases", *cases]
    return sparse_kernels.main(given), json.loads(path.read_text())


def test_cases_are_read():
    assert Case.parse("llsa2:2x4x64Kx64:clustered") == Case("llsa2", 2, 4, 65536, 64, "clustered")
    assert [Case.parse(text).selection in SELECTIONS for text in CASES] == [True] * len(CASES)
    for text in ("top", "top:2x2x64", "top:2x2x1Kx16:sorted", "none:1x1x1Kx16", "top:axbxcxd"):
        with pytest.raises(argparse.ArgumentTypeError, match="no case"):
            Case.parse(text)


def test_efficiency_is_speed_up_times_density_and_kernels_are_compared_with_kernels():
    parts = {"select": 0.6, "rows": 0.4, "kernels_forward": 8.0, "columns": 1.0, "kernels_backward": 15.0}
    row = {
        "dense": {"forward": {"ms": 100.0}},
        "sparse": {"forward": {"ms": 10.0}, "forward+backward": {"ms": 30.0}},
        "parts": {"density": 0.05} | {name: {"ms": ms} for name, ms in parts.items()},
        "nvidia_bsa": {"forward": {"ms": 4.0}, "forward+backward": {"ms": 12.0}},
        "official_sla": {"forward": {"ms": 40.0}},
    }
    sparse_kernels.finish(row)
    assert row["sparse"]["forward"]["efficiency"] == pytest.approx(0.5)
    assert row["sparse"]["selection_share_of_forward"] == pytest.approx(0.1)
    assert [row["nvidia_bsa"][name]["over_ours"] for name in ("forward", "forward+backward")] == [0.5, 0.5]
    assert row["official_sla"]["forward"]["over_ours"] == 4


def test_small_cases_on_cpu_without_other_libraries(tmp_path, capsys):
    failed, record = run(tmp_path / "sparse.json", "top:2x1x256x16", "llsa2:1x1x256x16:clustered", "top128:2x1x256x16")
    assert not failed
    assert record.keys() >= {"commit", "date", "command", "versions", "machine", "arguments", "seconds"}
    top, llsa, again = record["rows"]
    assert top["dense"] == again["dense"] != llsa["dense"] and again["sparse"]["forward"]["speedup"] > 0
    assert top["parts"]["keys_per_query"] == 64 and top["parts"]["density"] == 0.25
    # 8 fine blocks of 16, the 16 rows of level 1 (all that there are under the row of level 2), and that row
    assert llsa["parts"]["keys_per_query"] == 128 + 16 + 1
    for row in (top, llsa):
        assert all(row["sparse"][name]["efficiency"] > 0 for name in ("forward", "forward+backward"))
    shown = capsys.readouterr().out
    assert "top B=2 H=1 N=256 D=16 random" in shown
    assert "official_llsa is not measured: the package llsa is not installed (github.com/SingleZombie/LLSA)" in shown


def test_other_libraries_do_the_same_and_what_fails_is_recorded(libraries, tmp_path):
    failed, record = run(tmp_path / "sparse.json", "llsa2:1x1x256x16", "sla:2x2x1Kx16", "top128:2x2x2Kx16")
    assert not failed and not record["not_measured"]
    llsa, sla, top = record["rows"]
    assert llsa["official_llsa"] == {"error": "its process died with exit code 3"} and llsa["parts"]["density"]
    for found in (sla["official_sla"], top["nvidia_bsa"]):
        assert found["difference"] < 1e-5 and found["forward+backward"]["over_ours"] > 0


def test_a_case_of_ours_that_fails_is_recorded_and_the_rest_goes_on(tmp_path):
    failed, record = run(tmp_path / "sparse.json", "top:1x0x64x16", "top:1x1x64x16")
    broken, good = record["rows"]
    assert failed and "error" in broken["sparse"] and good["parts"]["density"] == 1.0
