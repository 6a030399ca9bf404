"""Sums of rows in one order, in the interpreter and on a GPU."""

import pytest
import torch
from interpreted import interpreted

CASES = pytest.mark.parametrize("shape", [(1, 1), (3, 40), (64, 32), (129, 100), (0, 8)], ids=str)


def check(function, shape, device):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
        found, expected = function(x, dtype), x.double().sum(0)
        assert found.dtype == dtype and found.shape == expected.shape
        assert (found.double() - expected).norm() <= limit * expected.norm()


@CASES
def test_interpreted(shape):
    check(interpreted("sum_rows_triton").sum_rows_triton, shape, "cpu")


@pytest.mark.gpu
@CASES
def test_on_a_gpu(shape):
    from longspan.kernels.sum_rows_triton import sum_rows_triton

    check(sum_rows_triton, shape, "cuda")
