"""Mamba-2's gate (arXiv 2405.21060), one rate per token and head. Definition and gradients.

    step = softplus(a + dt_bias);  log decay = -exp(A_log) step

In fp32 (fp64 for fp64) whatever the dtype of a, since log decay is summed over millions of tokens. Nothing but the
inputs is kept. Sums over tokens have one order, so that results repeat bit by bit.
"""

import torch
import torch.nn.functional as F

from longspan.kernels.operators import operator
from longspan.kernels.wide import wide_dtype


def scalar_gate(a: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(log decay, step), both [T, H], of a [T, H], A_log and dt_bias [H]."""
    return _Gate.apply(a, A_log, dt_bias)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, A_log, dt_bias):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, A_log, dt_bias)
        return tuple(scalar_gate_forward(a, A_log, dt_bias))

    @staticmethod
    def backward(ctx, d_log_decay, d_step):
        if d_log_decay is None and d_step is None:
            return None, None, None
        if d_log_decay is None:
            d_log_decay = torch.zeros_like(d_step)
        return tuple(scalar_gate_backward(d_log_decay, d_step, *ctx.saved_tensors))


def scalar_gate_naive(a, A_log, dt_bias):
    """[log decay, step] in plain PyTorch, any device and dtype."""
    wide = wide_dtype(a.dtype)
    step = F.softplus(a.to(wide) + dt_bias.to(wide))
    return [-A_log.to(wide).exp() * step, step]


def scalar_gate_backward_naive(d_log_decay, d_step, a, A_log, dt_bias):
    """[d_a, d_A_log, d_dt_bias] in plain PyTorch, any device and dtype; d_step is None for zeros."""
    wide = wide_dtype(a.dtype)
    shifted, rate = a.to(wide) + dt_bias.to(wide), A_log.to(wide).exp()
    d_A_log = (-rate * F.softplus(shifted) * d_log_decay).sum(0)
    d_shifted = (-rate * d_log_decay + (0 if d_step is None else d_step)) * shifted.sigmoid()
    return [d_shifted.to(a.dtype), d_A_log.to(A_log.dtype), d_shifted.sum(0).to(dt_bias.dtype)]


scalar_gate_forward = operator(
    "scalar_gate(Tensor a, Tensor A_log, Tensor dt_bias) -> Tensor[]",
    naive=scalar_gate_naive,
    fused="scalar_gate_triton.scalar_gate_triton",
    shapes=lambda a, *_: [a.new_empty(a.shape, dtype=wide_dtype(a.dtype)) for _ in range(2)],
)
scalar_gate_backward = operator(
    "scalar_gate_backward(Tensor d_log_decay, Tensor? d_step, Tensor a, Tensor A_log, Tensor dt_bias) -> Tensor[]",
    naive=scalar_gate_backward_naive,
    fused="scalar_gate_triton.scalar_gate_backward_triton",
    shapes=lambda d_log_decay, d_step, *inputs: [x.new_empty(x.shape) for x in inputs],
)
