"""Short causal convolutions across ranks: local kernels, and halos for the first tokens of spans.

Forward, the halos travel while the local tokens are convolved; then the few border tokens are finished from their
strips (parallel.halo). Backward, the strips come first, so that their gradients travel back meanwhile.
"""

import torch
from torch.autograd.function import once_differentiable

from longspan.attention.arguments import resolve
from longspan.attention.outline import Outline
from longspan.attention.outline.convolution import outlined_convolution
from longspan.attention.ranges import CONVOLUTION, of_component
from longspan.attention.recompute import keep, recall
from longspan.kernels.convolution import ACTIVATIONS, WIDTHS, convolve, convolve_backward
from longspan.kernels.wide import wide_dtype
from longspan.parallel.halo import halo_tables, start_fetch, start_return


@torch.compiler.disable
@of_component(CONVOLUTION)
def short_convolution(x, weight, bias=None, *, activation=None, layout=None, group=None, seq=None):
    """Causal depthwise convolution: y_t = activation(bias + sum_w weight[:, w] * x_{t-W+1+w}), inside each document.

    x: [T, D], this rank's tokens in the order of `layout`; weight: [D, W] with 2 <= W <= 8; bias: [D] or None; one
    floating dtype, on one device; returns [T, D] in it. Tokens before a document's start count as zeros. fp64 is
    computed and sent in fp64, everything else is accumulated in fp32. activation: None or "silu".
    layout, group: a Layout and its process group (None: one rank, by default one document). seq: a SequenceContext
    instead of those two. Raises ValueError, on all ranks, for what does not fit.
    """

    def check():
        _check(x, weight, bias, activation)

    packed = {"x": x[:, None] if x.ndim == 2 else x}
    options = (activation, tuple(weight.shape), bias is None)
    seq = resolve(seq, layout, group, packed, check, options)
    if isinstance(seq, Outline):
        return outlined_convolution(seq, x, weight, bias)
    return _Convolution.apply(x, weight, bias, activation, seq)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, activation, seq):
        halo, strips, fetched = seq.derive(halo_tables, weight.shape[1]), recall(), None
        if strips is None and halo.connected:
            fetched = start_fetch(x, halo, seq.parallel.group, seq.parallel.peers)
        out = convolve(x, weight, bias, activation, halo.reach)
        if strips is None:
            strips = keep(fetched() if fetched else x.new_empty(0, x.shape[1]))
        if len(strips):
            out[halo.border] = convolve(strips, weight, bias, activation, halo.strip_reach)[halo.strip_border]
        ctx.save_for_backward(x, weight, bias, strips)
        ctx.activation, ctx.seq = activation, seq
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        x, weight, bias, strips = ctx.saved_tensors
        halo, wide = ctx.seq.derive(halo_tables, weight.shape[1]), wide_dtype(x.dtype)

        def gradients(d_out, x, reach, dtype):
            return convolve_backward(d_out, x, weight, bias, ctx.activation, reach, dtype)

        if halo.connected:
            d_strip_out = d_out.new_zeros(strips.shape)
            d_strip_out[halo.strip_border] = d_out[halo.border]
            d_strips, *strip_sums = gradients(d_strip_out, strips, halo.strip_reach, wide)
            returned = start_return(d_strips, halo, ctx.seq.parallel.group, ctx.seq.parallel.peers)
        dx, *sums = gradients(d_out, x, halo.reach, x.dtype)
        if halo.connected:
            dx[halo.sent] = (dx[halo.sent] + returned()).to(x.dtype)
            sums = [a if a is None else a + b for a, b in zip(sums, strip_sums)]
        d_weight, d_bias = (a if a is None else a.to(weight.dtype) for a in sums)
        return dx, d_weight, d_bias, None, None


def _check(x, weight, bias, activation):
    if x.ndim != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; short_convolution takes [tokens, channels], so flatten heads")
    if weight.ndim != 2 or weight.shape[0] != x.shape[1] or weight.shape[1] not in WIDTHS:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; use [{x.shape[1]}, width] with a width of"
            f" {WIDTHS[0]} to {WIDTHS[-1]}, for the {x.shape[1]} channels of x"
        )
    if bias is not None and bias.shape != x.shape[1:]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; use [{x.shape[1]}], one number for each channel of x")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.dtype != x.dtype:
            raise ValueError(f"{name} has dtype {parameter.dtype} but x has {x.dtype}; give them one dtype")
        if parameter is not None and parameter.device != x.device:
            raise ValueError(f"{name} is on {parameter.device} but x is on {x.device}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; use {' or '.join(map(repr, ACTIVATIONS))}")
