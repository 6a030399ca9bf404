"""The common part of all kinds of layers: a call that is noted, and the function that stands in for kernels."""

from dataclasses import dataclass
from typing import Any

import torch

from longspan.attention.recompute import keep, recall


@dataclass(frozen=True)
class Call:
    """One call of an attention kernel: kind is softmax, linear, sparse or convolution; detail says which (a Mask, a
    form of linear attention, a selection, a width). asked: of sparse layers whose keys come by request, the tokens of
    others whose keys this rank gets, None for others and in a ring. window: of those that come through memory that
    ranks share, for which no host waits, bytes of this rank's window, which all layers use."""

    kind: str
    detail: Any
    backward: bool
    heads: int
    kv_heads: int
    key_size: int
    value_size: int
    asked: int | None = None
    window: int = 0


class StandIn(torch.autograd.Function):
    """Runs a kind: `travels` what comes from other ranks and is kept for recomputation, `output` the
    result and what else is saved, `hold` what exists in the backward pass besides gradients."""

    @staticmethod
    def forward(ctx, kind, *inputs):
        kept = recall()
        if kept is None:
            kept = keep(kind.travels(*inputs))
        out, saved = kind.output(kept, *inputs)
        ctx.kind = kind
        ctx.save_for_backward(*inputs, *saved)
        ctx.inputs = len(inputs)
        return out.detach()

    @staticmethod
    def backward(ctx, d_out):
        tensors = ctx.saved_tensors
        inputs = tensors[: ctx.inputs]
        d_out = d_out.contiguous()
        held = ctx.kind.hold(d_out, *inputs)
        needed = ctx.needs_input_grad[1:]
        gradients = tuple(torch.empty_like(x) if need else None for x, need in zip(inputs, needed))
        del held
        return None, *gradients
