"""The MLP half of a block computed tile by tile over tokens, in the forward and again in the backward.

What a gated MLP holds inside is several times as wide as the residual stream, and at a million tokens larger than all
else in a layer. Here it exists for one tile at a time: the forward keeps the half's inputs, the backward computes each
tile again and takes its gradients before the next one (tiled computation as in arXiv 2506.13996).
"""

import torch
from torch.autograd.function import once_differentiable

from longspan.attention.ranges import RECOMPUTED, component
from longspan.attention.recompute import recomputing
from longspan.kernels.wide import wide_dtype


@torch.compiler.disable
def feed_in_tiles(block, per_token: tuple, shared: tuple) -> torch.Tensor:
    """block.feed(*per_token, *shared), for at most block.mlp_tile tokens at a time.

    per_token: tensors [T, ...], the first of which has the shape and dtype of the result; shared: tensors that every
    token uses. block.feed uses the parameters of block.mlp_norm and block.mlp. Gradients of parameters and shared
    tensors are summed over tiles in at least fp32. Inside a checkpoint it has to be the last thing that is computed.
    """
    return _Tiles.apply(block, len(per_token), *per_token, *shared, *_parameters(block))


def _parameters(block):
    # Looked up each time: a sharded module has its whole parameters only while it runs.
    return [*block.mlp_norm.parameters(), *block.mlp.parameters()]


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, block, num_per_token, *inputs):
        inputs = inputs[: len(inputs) - len(_parameters(block))]
        ctx.block, ctx.num_per_token = block, num_per_token
        ctx.save_for_backward(*inputs)
        x_TD = inputs[0]
        if recomputing():  # only the inputs are asked for; nobody reads the block's output
            return x_TD.new_empty(1).expand(x_TD.shape)
        out_TD = torch.empty_like(x_TD)
        for rows in _tiles(block, x_TD):
            out_TD[rows] = block.feed(*_tile(inputs, num_per_token, rows))
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out_TD):
        block, split, inputs, needed = ctx.block, ctx.num_per_token, ctx.saved_tensors, ctx.needs_input_grad[2:]
        shared = [x.detach().requires_grad_(need) for x, need in zip(inputs[split:], needed[split:])]
        totals = [*shared, *_parameters(block)]
        sums = [
            torch.zeros_like(x, dtype=wide_dtype(x.dtype)) if need else None for x, need in zip(totals, needed[split:])
        ]
        per_token = [torch.empty_like(x) if need else None for x, need in zip(inputs, needed[:split])]
        for rows in _tiles(block, inputs[0]):
            tile = [x[rows].detach().requires_grad_(need) for x, need in zip(inputs, needed[:split])]
            with torch.enable_grad(), component(RECOMPUTED):
                out = block.feed(*tile, *shared)
            wanted = [x for x, need in zip((*tile, *totals), needed) if need]
            grads = iter(torch.autograd.grad(out, wanted, d_out_TD[rows]))
            for whole in filter(_given, per_token):
                whole[rows] = next(grads)
            for total in filter(_given, sums):
                total += next(grads)
        sums = [None if total is None else total.to(x.dtype) for total, x in zip(sums, totals)]
        return None, None, *per_token, *sums


def _tiles(block, x):
    return block.visit_tiles([slice(start, start + block.mlp_tile) for start in range(0, len(x), block.mlp_tile)])


def _tile(inputs, num_per_token, rows):
    return *(x[rows] for x in inputs[:num_per_token]), *inputs[num_per_token:]


def _given(x):
    return x is not None
