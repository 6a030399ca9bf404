"""Merging (out, lse): against softmax over the union of keys, with empty sides, strides, row subsets and both twins."""

import pytest
import torch
from interpreted import interpreted

from longspan.kernels.merge import merge, merge_naive


def partial(num_rows, num_heads, head_dim, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(num_rows, num_heads, head_dim, generator=generator, dtype=torch.float64)
    lse = (
        3 * torch.randn(num_heads, num_rows, generator=generator, dtype=torch.float64).t()
    )  # heads first, as libraries
    return out.to(dtype), lse.to(torch.promote_types(dtype, torch.float32))


def test_merge_is_softmax_over_the_union():
    scores, values = torch.randn(5, 2, 12, dtype=torch.float64), torch.randn(2, 12, 3, dtype=torch.float64)
    out_acc, lse_acc = (
        torch.full((5, 2, 3), float("nan"), dtype=torch.float64),
        torch.full((5, 2), float("-inf")).double(),
    )
    for keys in (slice(0, 1), slice(1, 8), slice(8, 12)):
        out = torch.einsum("qhk,hkd->qhd", scores[..., keys].softmax(-1), values[:, keys])
        merge(out_acc, lse_acc, out, scores[..., keys].logsumexp(-1))
    torch.testing.assert_close(out_acc, torch.einsum("qhk,hkd->qhd", scores.softmax(-1), values), rtol=0, atol=1e-13)
    torch.testing.assert_close(lse_acc, scores.logsumexp(-1), rtol=0, atol=1e-13)


def row_choices(num_rows):
    return {"all": None, "slice": slice(2, 2 + num_rows // 2), "index": torch.randperm(num_rows)[: num_rows // 2]}


def check_twins(merge_fused, device, num_rows, num_heads, head_dim, dtype):
    """The fused kernel equals merge_naive in fp64, with -inf on either side and on both; NaN where nothing was seen."""
    for name, rows in row_choices(num_rows).items():
        out_acc, lse_acc = partial(num_rows, num_heads, head_dim, torch.float32, seed=1)
        out, lse = partial(num_rows if rows is None else num_rows // 2, num_heads, head_dim, dtype, seed=2)
        lse_acc[1::3], lse[::2] = float("-inf"), float("-inf")
        out_acc[1::3], out[::2] = float("nan"), float("nan")
        expected = out_acc.double(), lse_acc.double()
        merge_naive(*expected, out.double(), lse.double(), rows)
        actual = out_acc.to(device), lse_acc.to(device)
        merge_fused(*actual, out.to(device), lse.to(device), rows.to(device) if name == "index" else rows)
        for x, y in zip(actual, expected, strict=True):
            torch.testing.assert_close(x.cpu().double(), y, rtol=1e-5, atol=1e-5, equal_nan=True, msg=f"rows: {name}")
        touched = slice(None) if rows is None else rows
        seen = expected[1][touched] > float("-inf")
        assert actual[0].cpu()[touched][seen].isfinite().all(), name
        assert (actual[0].cpu()[touched][~seen] == 0).all(), name


def test_naive_in_single_precision():
    check_twins(merge_naive, "cpu", 23, 3, 5, torch.bfloat16)


def test_naive_takes_no_rows():
    out_acc, lse_acc = partial(4, 2, 3, torch.float32, seed=0)
    before = out_acc.clone(), lse_acc.clone()
    merge(out_acc, lse_acc, out_acc[:0].bfloat16(), lse_acc[:0], slice(1, 1))
    assert torch.equal(out_acc, before[0]) and torch.equal(lse_acc, before[1])


def test_fused_in_the_interpreter():
    merge_triton = interpreted("merge_triton").merge_triton
    check_twins(merge_triton, "cpu", 23, 3, 5, torch.float32)
    check_twins(merge_triton, "cpu", 130, 2, 64, torch.float16)
    out_acc, lse_acc = partial(4, 2, 3, torch.float32, seed=0)
    merge_triton(out_acc, lse_acc, out_acc[:0], lse_acc[:0], slice(1, 1))


class TestOnGpu:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("shape", [(23, 3, 5), (4097, 16, 128), (1000, 2, 64)], ids=str)
    def test_fused_equals_naive(self, shape, dtype):
        check_twins(merge, "cuda", *shape, dtype)

    @pytest.mark.slow
    def test_more_than_two_billion_elements(self):
        num_rows = 2**31 // (16 * 128) + 5
        out_acc = torch.zeros(num_rows, 16, 128, device="cuda")
        lse_acc = torch.zeros(num_rows, 16, device="cuda")
        out = torch.ones(num_rows, 16, 128, device="cuda", dtype=torch.bfloat16)
        merge(out_acc, lse_acc, out, torch.zeros(16, num_rows, device="cuda").t())
        assert (
            (out_acc[:8] == 0.5).all()
            and (out_acc[-8:] == 0.5).all()
            and out_acc.sum(dtype=torch.float64) == out.numel() / 2
        )
