"""One row for every run of tokens, given to each of them, and its gradient: the sum over the tokens of each run.

Memory is linear in tokens. Sums are made in fp32 (fp64 for fp64), in one order, so that results repeat bit by bit.
"""

from typing import NamedTuple

import torch

from longspan.kernels.operators import operator
from longspan.kernels.segments import Segments
from longspan.kernels.wide import wide_dtype


class Runs(NamedTuple):
    """T tokens in S runs, each at least one long and together all of them, in order. All are int64."""

    of_token: torch.Tensor  # [T]: the run of each token
    first: torch.Tensor  # [S]: the first token of each run
    last: torch.Tensor  # [S]: its last

    @classmethod
    def of(cls, offsets) -> "Runs":
        """Those that start at `offsets`, whose last entry is the number of tokens, on the CPU."""
        segments = Segments.of(offsets)
        return cls(segments.token_segment, segments.first_tokens, segments.last_tokens)

    def map(self, move) -> "Runs":
        """The same with every tensor passed through `move`."""
        return Runs(*map(move, self))


def rows_of_tokens(rows: torch.Tensor, runs: Runs) -> torch.Tensor:
    """[S, D], of every run -> [T, D], of every token, in the same dtype; differentiable."""
    return _Rows.apply(rows, *runs)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, of_token, first, last):
        ctx.save_for_backward(first, last)
        return rows.index_select(0, of_token)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        return segment_sums(d_out, *ctx.saved_tensors), None, None, None


def segment_sums_naive(x, first, last):
    """[T, D] -> [S, D] in the dtype of x, of tokens first..last of each run: plain PyTorch, any device and dtype."""
    wide = wide_dtype(x.dtype)
    sums = [x[a : b + 1].sum(0, dtype=wide) for a, b in zip(first.tolist(), last.tolist(), strict=True)]
    return torch.stack(sums).to(x.dtype) if sums else x.new_zeros(0, x.shape[1])


segment_sums = operator(
    "segment_sums(Tensor x, Tensor first, Tensor last) -> Tensor",
    naive=segment_sums_naive,
    fused="segment_rows_triton.segment_sums_triton",
    shapes=lambda x, first, last: x.new_empty(len(first), x.shape[1]),
)
