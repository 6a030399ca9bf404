"""Rows added to or put into a whole: the Triton kernel against indexing, and what neither may touch."""

import pytest
import torch
from interpreted import interpreted

from longspan.kernels.scatter import scatter_rows


def check(scatter, device):
    generator = torch.Generator().manual_seed(0)
    for num_rows, tail, dtype in (
        (37, (3, 5), torch.float32),
        (12, (16, 128), torch.bfloat16),
        (9, (1,), torch.float32),
    ):
        total = torch.randn(num_rows, *tail, generator=generator)
        rows = torch.randperm(num_rows, generator=generator)[: num_rows // 2]
        part = torch.randn(len(rows), *tail, generator=generator).to(dtype)
        for add in (True, False):
            expected = total.double()
            expected[rows] = part.double() + (expected[rows] if add else 0)
            actual = total.clone().to(device)
            if not add:
                actual[rows.to(device)] = float("nan")
            scatter(actual, rows.to(device), part.to(device), add=add)
            torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-6, atol=1e-6)
        scatter(actual, rows[:0].to(device), part[:0].to(device), add=True)


def test_plain_pytorch():
    check(scatter_rows, "cpu")
    total = torch.zeros(4, 2)
    scatter_rows(total, slice(1, 3), torch.ones(2, 2, dtype=torch.bfloat16))
    assert total.sum(1).tolist() == [0, 2, 2, 0]


def test_fused_in_the_interpreter():
    check(interpreted("scatter_triton").scatter_rows_triton, "cpu")


@pytest.mark.gpu
def test_on_a_gpu():
    check(scatter_rows, "cuda")
