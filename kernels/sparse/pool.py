"""Sums of the rows of blocks: what stands for a block where blocks are chosen, and LLSA's coarse keys and values."""

import torch

from longspan.kernels.sparse import forms
from longspan.kernels.sparse.plan import Blocks


def pool(x: torch.Tensor, blocks: Blocks, *, heads: int | None = None, mean: bool = False) -> torch.Tensor:
    """x: [T, H, D] -> [len(blocks), heads, D] in at least fp32, T >= 1: sums over the rows of each block and over the
    H / heads successive heads that belong together, or with `mean` their means. Differentiable. The blocks hold all T
    rows, in their order."""
    heads = x.shape[1] if heads is None else heads
    if forms.takes(x):
        return _Pool.apply(x, blocks, heads, mean)
    sums = torch.segment_reduce(x.to(torch.promote_types(x.dtype, torch.float32)), "sum", lengths=blocks.length.long())
    sums = sums.unflatten(1, (heads, -1)).sum(2)
    return sums / (blocks.length * (x.shape[1] // heads))[:, None, None] if mean else sums


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, blocks, heads, mean):
        from longspan.kernels.sparse.pool_triton import pool_triton

        ctx.rest = blocks, x.shape, x.dtype, mean
        return pool_triton(x, blocks, heads, mean)

    @staticmethod
    def backward(ctx, grad):
        blocks, (rows, heads, _), dtype, mean = ctx.rest
        group = heads // grad.shape[1]
        if mean:
            grad = grad / (blocks.length * group)[:, None, None]
        grad = grad.to(dtype).repeat_interleave(blocks.length, 0, output_size=rows)
        return grad.repeat_interleave(group, 1) if group > 1 else grad, None, None, None
