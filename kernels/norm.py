"""Norms of rows, with what stands around them: residual sum before, scale and gate behind. Definition and gradients.

    s = x + branch;  n = s / sqrt(mean(s^2) + eps);  out = n * weight * silu(gate)

(RMSNorm, arXiv 1910.07467), or with sum in place of mean (L2). Whatever is None is left out. Arithmetic is in fp32
(fp64 for fp64); s is rounded to its dtype before it is normalised, so that the backward, which keeps s and no
statistics, sees the same rows. Sums over tokens have one order, so that results repeat bit by bit.
"""

import torch
import torch.nn.functional as F

from longspan.kernels.operators import operator
from longspan.kernels.wide import wide_dtype


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, gate: torch.Tensor | None = None):
    """[..., D] -> [..., D] in the dtype of x. weight: [D]; gate: [..., D], through silu behind the norm."""
    return _Norm.apply(x, weight, gate, True, eps)


def l2_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(sum(x^2) + eps) over the last dimension: [..., D] -> [..., D] in the dtype of x."""
    return _Norm.apply(x, None, None, False, eps)


def residual_rms_norm(x: torch.Tensor, branch: torch.Tensor | None, weight: torch.Tensor, eps: float):
    """(x + branch, its RMSNorm), or (x, its RMSNorm) without a branch; all [..., D] in the dtype of x.

    The stream passes through, so that its gradient and that of the norm are added where the latter is formed.
    """
    return _ResidualNorm.apply(x, branch, weight, eps)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, gate, mean, eps):
        ctx.save_for_backward(x, weight, gate)
        ctx.mean, ctx.eps = mean, eps
        return norm(x, None, weight, gate, mean, eps)[0]

    @staticmethod
    def backward(ctx, d_out):
        x, weight, gate = ctx.saved_tensors
        d_x, *others = norm_backward(d_out, None, x, weight, gate, ctx.mean, ctx.eps)
        d_weight = None if weight is None else others.pop(0)
        return d_x, d_weight, others.pop() if others else None, None, None


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, weight, eps):
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        stream, out = [x, *norm(x, branch, weight, None, True, eps)][-2:]
        ctx.save_for_backward(stream, weight)
        ctx.branch = branch is not None
        return stream, out

    @staticmethod
    def backward(ctx, d_stream, d_out):
        stream, weight = ctx.saved_tensors
        d_weight = None
        if d_out is not None:
            d_stream, d_weight = norm_backward(d_out, d_stream, stream, weight, None, True, ctx.eps)
        return d_stream, d_stream if ctx.branch else None, d_weight, None


def norm_naive(x, branch, weight, gate, mean, eps):
    """[out], or [x + branch, out] with a branch: plain PyTorch, any device and dtype."""
    stream = x if branch is None else x + branch
    out = _normalised(stream, mean, eps)[0]
    if weight is not None:
        out = out * weight
    if gate is not None:
        out = out * F.silu(gate.to(out.dtype))
    return [out.to(x.dtype)] if branch is None else [stream, out.to(x.dtype)]


def norm_backward_naive(d_out, d_stream, x, weight, gate, mean, eps):
    """[d_x, and d_weight and d_gate where there are weight and gate], d_stream added to d_x: plain PyTorch."""
    n, scale = _normalised(x, mean, eps)
    d_n, others = d_out.to(n.dtype), []
    if gate is not None:
        gate_wide = gate.to(n.dtype)
        sigmoid = gate_wide.sigmoid()
        scaled = n if weight is None else n * weight
        others.append((d_n * scaled * sigmoid * (1 + gate_wide * (1 - sigmoid))).to(gate.dtype))
        d_n = d_n * gate_wide * sigmoid
    if weight is not None:
        others.insert(0, (d_n * n).flatten(0, -2).sum(0).to(weight.dtype))
        d_n = d_n * weight
    share = (d_n * n).mean(-1, keepdim=True) if mean else (d_n * n).sum(-1, keepdim=True)
    d_x = (d_n - n * share) * scale
    if d_stream is not None:
        d_x = d_x + d_stream
    return [d_x.to(x.dtype), *others]


def _normalised(x, mean, eps):
    """(n, 1 / root) in at least fp32."""
    wide = x.to(wide_dtype(x.dtype))
    square = wide.square()
    scale = torch.rsqrt((square.mean(-1, keepdim=True) if mean else square.sum(-1, keepdim=True)) + eps)
    return wide * scale, scale


def _like(*tensors):
    return [x.new_empty(x.shape) for x in tensors if x is not None]


norm = operator(
    "norm(Tensor x, Tensor? branch, Tensor? weight, Tensor? gate, bool mean, float eps) -> Tensor[]",
    naive=norm_naive,
    fused="norm_triton.norm_triton",
    shapes=lambda x, branch, *_: _like(x, branch),
)
norm_backward = operator(
    "norm_backward(Tensor d_out, Tensor? d_stream, Tensor x, Tensor? weight, Tensor? gate, bool mean, float eps)"
    " -> Tensor[]",
    naive=norm_backward_naive,
    fused="norm_triton.norm_backward_triton",
    shapes=lambda d_out, d_stream, x, weight, gate, *_: _like(x, weight, gate),
)
