"""How much each key channel of a linear layer forgets, from what the layer projects. Definition and gradients.

    of a bias:   log decay = factor logsigmoid(a + bias)                        (GLA, arXiv 2312.06635)
    of a bound:  log decay = log(1 - factor sigmoid(-a)), keys = factor sigmoid(-a)    (HGRN-2, arXiv 2404.07904)

Log decay is in fp32 (fp64 for fp64) whatever the dtype of a, since it is summed over millions of tokens; keys have the
dtype of a. Nothing but the inputs is kept. Sums over tokens have one order, so that results repeat bit by bit.
"""

import torch
import torch.nn.functional as F

from longspan.kernels.operators import operator
from longspan.kernels.wide import wide_dtype


def biased_gate(a: torch.Tensor, bias: torch.Tensor, factor: float) -> torch.Tensor:
    """log decay [T, C] of a [T, C] and bias [C]."""
    return _Gate.apply(a, bias, factor)[0]


def bounded_gate(a: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(log decay, keys), both [T, C], of a [T, C] and 0 < factor < 1."""
    return _Gate.apply(a, None, factor)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, bias, factor):
        ctx.factor = factor
        ctx.save_for_backward(a, bias)
        return tuple(channel_gate(a, bias, factor))

    @staticmethod
    def backward(ctx, d_log_decay, d_keys=None):
        a, bias = ctx.saved_tensors
        d_a, *d_bias = channel_gate_backward(d_log_decay, d_keys, a, bias, ctx.factor)
        return d_a, d_bias[0] if d_bias else None, None


def channel_gate_naive(a, bias, factor):
    """[log decay], without a bias [log decay, keys]: plain PyTorch, any device and dtype."""
    wide = a.to(wide_dtype(a.dtype))
    if bias is not None:
        return [factor * F.logsigmoid(wide + bias)]
    # By way of what is forgotten, which is exact where almost nothing is and memories are long.
    forgotten = factor * torch.sigmoid(-wide)
    return [torch.log1p(-forgotten), forgotten.to(a.dtype)]


def channel_gate_backward_naive(d_log_decay, d_keys, a, bias, factor):
    """[d_a], with a bias [d_a, d_bias]: plain PyTorch, any device and dtype."""
    wide = a.to(wide_dtype(a.dtype))
    if bias is not None:
        d_wide = d_log_decay * factor * torch.sigmoid(-(wide + bias))
        return [d_wide.to(a.dtype), d_wide.sum(0).to(bias.dtype)]
    forgotten = factor * torch.sigmoid(-wide)
    return [(forgotten * torch.sigmoid(wide) * (d_log_decay / (1 - forgotten) - d_keys)).to(a.dtype)]


channel_gate = operator(
    "channel_gate(Tensor a, Tensor? bias, float factor) -> Tensor[]",
    naive=channel_gate_naive,
    fused="channel_gates_triton.channel_gate_triton",
    shapes=lambda a, bias, factor: [
        a.new_empty(a.shape, dtype=t) for t in [wide_dtype(a.dtype), a.dtype][: 1 + (bias is None)]
    ],
)
channel_gate_backward = operator(
    "channel_gate_backward(Tensor d_log_decay, Tensor? d_keys, Tensor a, Tensor? bias, float factor) -> Tensor[]",
    naive=channel_gate_backward_naive,
    fused="channel_gates_triton.channel_gate_backward_triton",
    shapes=lambda d_log_decay, d_keys, a, bias, factor: [x.new_empty(x.shape) for x in (a, bias) if x is not None],
)
