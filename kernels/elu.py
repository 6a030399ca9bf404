"""elu(x) + 1, the positive feature map of linear attention (arXiv 2006.16236), without the cancellation of its formula:
exp(x) below zero and 1 + x above. In fp32 (fp64 for fp64) and rounded once; nothing but the input is kept."""

import torch

from longspan.kernels.operators import operator
from longspan.kernels.wide import wide_dtype


def elu1(x: torch.Tensor) -> torch.Tensor:
    """[T, ...] -> the same shape and dtype; above zero wherever exp(x) is."""
    return _Elu1.apply(x)


class _Elu1(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return elu1_forward(x)

    @staticmethod
    def backward(ctx, d_out):
        return elu1_backward(d_out, *ctx.saved_tensors)


def elu1_naive(x):
    """elu1 in plain PyTorch, any device and dtype."""
    return torch.where(x < 0, x.clamp(max=0).exp(), x + 1)


def elu1_backward_naive(d_out, x):
    """dx in plain PyTorch, any device and dtype."""
    wide = wide_dtype(x.dtype)
    return (d_out * x.to(wide).clamp(max=0).exp()).to(x.dtype)


elu1_forward = operator(
    "elu1(Tensor x) -> Tensor", naive=elu1_naive, fused="elu_triton.elu1_triton", shapes=lambda x: x.new_empty(x.shape)
)
elu1_backward = operator(
    "elu1_backward(Tensor d_out, Tensor x) -> Tensor",
    naive=elu1_backward_naive,
    fused="elu_triton.elu1_backward_triton",
    shapes=lambda d_out, x: x.new_empty(x.shape),
)
