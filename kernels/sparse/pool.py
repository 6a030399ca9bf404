"""Sums of the rows of blocks: what stands for a block where blocks are chosen, and LLSA's coarse keys and values."""

import torch

from longspan.kernels.sparse import forms
from longspan.kernels.sparse.plan import Blocks
from longspan.kernels.wide import wide_dtype


def pool(x, blocks: Blocks, *, heads: int | None = None, mean: bool = False) -> torch.Tensor:
    """x: [T, H, D] -> [len(blocks), heads, D] in at least fp32, T >= 1: sums over the rows of each block and over the
    H / heads successive heads that belong together, or with `mean` their means. Of several x alike the results lie side
    by side, [len(blocks), heads of all, D]. Differentiable. The blocks hold all T rows, in their order."""
    several = (x,) if isinstance(x, torch.Tensor) else tuple(x)
    heads = several[0].shape[1] if heads is None else heads
    if forms.takes(several[0]):
        return _Pool.apply(blocks, heads, mean, *several)
    return torch.cat([_pool(x, blocks, heads, mean) for x in several], 1)


def _pool(x, blocks, heads, mean):
    sums = torch.segment_reduce(x.to(wide_dtype(x.dtype)), "sum", lengths=blocks.length.long())
    sums = sums.unflatten(1, (heads, -1)).sum(2)
    return sums / (blocks.length * (x.shape[1] // heads))[:, None, None] if mean else sums


def mean_levels(several, levels, size, dtype) -> torch.Tensor:
    """Means of the rows of blocks, then of blocks of these blocks and so on: [T, H, D] each, alike -> [blocks of all
    levels, heads of all, D] in `dtype`, summed in at least fp32; no gradient. levels: Blocks of each, which hold all
    rows of the level before in their order; size: int32, what the sums of each are divided by."""
    return _levels(tuple(several), levels, several[0].shape[1], size, dtype)


def sum_levels(x, levels, heads: int) -> tuple[torch.Tensor, ...]:
    """The sums of these levels, of every one [blocks, heads, D] in at least fp32: also over the H / heads successive
    heads that belong together. No gradient."""
    sums = _levels((x,), levels, heads, None, wide_dtype(x.dtype))
    return sums.split_with_sizes([len(blocks) for blocks in levels])


def _levels(several, levels, heads, size, dtype):
    if forms.takes(several[0]):
        from longspan.kernels.sparse.pool_triton import levels_triton

        return levels_triton(several, levels, heads, size, dtype)
    found = []
    for blocks in levels:
        several = (torch.cat([_pool(x, blocks, heads, False) for x in several], 1),)
        heads = several[0].shape[1]
        found.append(several[0])
    found = torch.cat(found)
    return (found if size is None else found / size[:, None, None]).to(dtype)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, blocks, heads, mean, *several):
        from longspan.kernels.sparse.pool_triton import pool_triton

        ctx.rest = blocks, several[0].shape, several[0].dtype, mean
        return pool_triton(several, blocks, heads, mean)

    @staticmethod
    def backward(ctx, grad):
        from longspan.kernels.sparse.pool_triton import spread_triton

        blocks, shape, dtype, mean = ctx.rest
        wanted = ctx.needs_input_grad[3:]
        parts = grad.chunk(len(wanted), 1)
        return (
            None,
            None,
            None,
            *(
                spread_triton(part, blocks, shape, dtype, mean) if needed else None
                for part, needed in zip(parts, wanted)
            ),
        )
