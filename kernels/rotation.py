"""Rotation of heads by the angles of their tokens, behind an RMSNorm of the heads where one is wanted.

Dimension i is paired with i + K/2. A rotation's gradient is the rotation back, so without a norm nothing but the shared
cosines and sines is kept for it, and with one what was normalised.
"""

import torch

from longspan.kernels.norm import norm_backward_naive, norm_naive
from longspan.kernels.operators import operator


def rotate(x, cos, sin, weight=None, eps=0.0):
    """Turns every head of every token; the dtype of x is kept, arithmetic in the dtype of cos.

    x: [T, H, K]; cos, sin: [T, 1, K/2] in fp32, or fp64 for fp64; weight: [K] or None, of an RMSNorm (kernels.norm)
    that heads pass before, with its eps.
    """
    return _Rotate.apply(x, cos, sin, weight, eps)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, weight, eps):
        ctx.eps = eps
        ctx.save_for_backward(cos, sin, *(() if weight is None else (x, weight)))
        return rotate_forward(x, cos, sin, weight, eps)

    @staticmethod
    def backward(ctx, d_out):
        cos, sin, *normed = ctx.saved_tensors
        x, weight = normed or (None, None)
        d_x, *d_weight = rotate_backward(d_out, cos, sin, x, weight, ctx.eps)
        return d_x, None, None, d_weight[0] if d_weight else None, None


def rotate_naive(x, cos, sin, weight, eps):
    """rotate in plain PyTorch, any device and dtype."""
    wide = x.to(cos.dtype)
    return _turned(wide if weight is None else norm_naive(wide, None, weight, None, True, eps)[0], cos, sin).to(x.dtype)


def rotate_backward_naive(d_out, cos, sin, x, weight, eps):
    """[d_x], or [d_x, d_weight] of normalised heads x: plain PyTorch, any device and dtype."""
    d_wide = _turned(d_out.to(cos.dtype), cos, -sin)
    if weight is None:
        return [d_wide.to(d_out.dtype)]
    d_x, d_weight = norm_backward_naive(d_wide, None, x.to(cos.dtype), weight, None, True, eps)
    return [d_x.to(x.dtype), d_weight]


def _turned(x, cos, sin):
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


rotate_forward = operator(
    "rotate(Tensor x, Tensor cos, Tensor sin, Tensor? weight, float eps) -> Tensor",
    naive=rotate_naive,
    fused="rotation_triton.rotate_triton",
    shapes=lambda x, *_: x.new_empty(x.shape),
)
rotate_backward = operator(
    "rotate_backward(Tensor d_out, Tensor cos, Tensor sin, Tensor? x, Tensor? weight, float eps) -> Tensor[]",
    naive=rotate_backward_naive,
    fused="rotation_triton.rotate_backward_triton",
    shapes=lambda d_out, cos, sin, x, weight, eps: [a.new_empty(a.shape) for a in (d_out, weight) if a is not None],
)
