"""Rows of runs for every token and sums over runs, in the interpreter and on a GPU."""

import pytest
import torch
from interpreted import interpreted

from longspan.kernels.segment_rows import Runs, rows_of_tokens, segment_sums_naive

# (lengths of runs, width); the Triton kernel shares runs among programs in the last two.
CASES = pytest.mark.parametrize(
    "lengths, width",
    [((), 5), ((1,), 1), ((3, 64, 65, 1, 130), 70), ((1,) * 40, 64), ((700, 3), 33), ((2000,), 130)],
    ids=["none", "one", "several", "tokens", "shared", "long"],
)


def runs_of(lengths):
    return Runs.of([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])


def check(function, lengths, width, device):
    """Against a loop over tokens in fp64."""
    generator, runs = torch.Generator().manual_seed(len(lengths)), runs_of(lengths)
    x = torch.randn(sum(lengths), width, generator=generator) + 1.0
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 4e-3)):
        given = x.to(dtype)
        expected = torch.zeros(len(lengths), width, dtype=torch.float64)
        for token, run in enumerate(run for run, length in enumerate(lengths) for _ in range(length)):
            expected[run] += given[token].double()
        found = function(given.to(device), runs.first.to(device), runs.last.to(device))
        assert found.dtype == dtype and found.shape == expected.shape
        assert torch.equal(found, function(given.to(device), runs.first.to(device), runs.last.to(device)))
        assert ((found.cpu().double() - expected).abs() <= limit * expected.abs().clamp(min=1)).all()


@CASES
def test_plain_pytorch(lengths, width):
    check(segment_sums_naive, lengths, width, "cpu")


@CASES
def test_interpreted(lengths, width):
    check(interpreted("segment_rows_triton").segment_sums_triton, lengths, width, "cpu")


@pytest.mark.gpu
@CASES
def test_on_a_gpu(lengths, width):
    from longspan.kernels.segment_rows_triton import segment_sums_triton

    check(segment_sums_triton, lengths, width, "cuda")


def test_reads_and_writes_its_own_tokens_alone():
    """Sums of some runs, with NaN in front of and behind them, and for rows that are a view."""
    kernel = interpreted("segment_rows_triton").segment_sums_triton
    whole = torch.full((300, 12), float("nan"))
    whole[7:290] = 1.0
    found = kernel(whole[:, :9], torch.tensor([7, 60]), torch.tensor([59, 289]))
    assert torch.equal(found, torch.tensor([[53.0] * 9, [230.0] * 9]))


def test_rows_and_their_gradient():
    runs = runs_of((3, 1, 5))
    rows = torch.randn(3, 8, dtype=torch.float64).chunk(2, -1)[1].requires_grad_()
    found = rows_of_tokens(rows, runs)
    assert torch.equal(found, torch.stack([rows[run] for run in (0, 0, 0, 1, 2, 2, 2, 2, 2)]))
    assert torch.autograd.gradcheck(lambda rows: rows_of_tokens(rows, runs), (rows.detach().requires_grad_(),))


def test_gradients_of_many_tokens_are_summed_in_fp32():
    """In bf16 a sum of ones ends at 256."""
    rows = torch.zeros(1, 2, dtype=torch.bfloat16, requires_grad=True)
    rows_of_tokens(rows, runs_of((4096,))).sum().backward()
    assert rows.grad.tolist() == [[4096.0, 4096.0]]
