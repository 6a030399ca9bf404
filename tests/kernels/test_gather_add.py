"""Sums of rows by a table: the Triton kernel and plain PyTorch against a loop, and what neither may read."""

import pytest
import torch
from interpreted import interpreted

from longspan.kernels.gather_add import gather_add

# (rows of the whole, which of them, most rows of the part for one, rest of the shape, dtype of the part)
CASES = [
    (37, slice(3, 30), 3, (3, 5), torch.float32),
    (12, "some", 1, (16, 128), torch.bfloat16),
    (9, "some", 7, (1,), torch.float32),
    (4, slice(0, 4), 2, (3, 700), torch.bfloat16),
]


def check(add, device):
    generator = torch.Generator().manual_seed(0)
    for num_rows, rows, most, tail, dtype in CASES:
        if rows == "some":
            rows = torch.randperm(num_rows, generator=generator)[: num_rows // 2]
        numbers = torch.arange(num_rows)[rows].tolist()
        places = torch.randint(-1, 11, (len(numbers), most), generator=generator, dtype=torch.int32)
        part = torch.randn(12, *tail, generator=generator).to(dtype)
        part[11] = float("nan")
        if most == 1:
            places[0] = 0
        else:  # the row that a place of -1 stands for where it must not be read
            part[0], places[places == 0] = float("nan"), -1
        total = torch.randn(num_rows, *tail, generator=generator)
        expected = total.clone()
        for row, of_row in zip(numbers, places.tolist()):
            for place in of_row:
                if place >= 0:
                    expected[row] += part[place].float()
        actual = total.to(device)
        rows = rows if isinstance(rows, slice) else rows.to(device)
        add(actual, rows, places.to(device), part.to(device))
        assert torch.equal(actual.cpu(), expected)


def test_plain_pytorch():
    check(gather_add, "cpu")


def test_fused_in_the_interpreter():
    check(interpreted("gather_add_triton").gather_add_triton, "cpu")


@pytest.mark.gpu
def test_on_a_gpu():
    check(gather_add, "cuda")
