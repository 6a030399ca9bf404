"""Activation checkpointing: which blocks compute their activations again in the backward, and what they keep.

Whatever the mode, attention's outputs, log-sum-exps, states and what other ranks sent are kept (attention.recompute).
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from longspan.attention.offload import Offload, fetch
from longspan.attention.recompute import checkpoint_contexts, keep, recall
from longspan.models.config import is_of_kind

CHECKPOINTING = ("none", "full", "selective")


def checkpoint_blocks(model: nn.Module, mode: str, layers: Sequence[str] = (), offload: Offload | None = None) -> None:
    """Makes the blocks of `model` compute their activations again in the backward.

    mode: "full" keeps a block's input; "selective" also keeps the results of its projections, and computes again only
    what lies between them and linear attention inside a rank. layers: the kinds that this is done to, none for all, see
    `config.is_of_kind`. offload: by which what is kept waits in host memory, None to leave it.
    """
    for block, kind in zip(model.blocks, model.config.layer_kinds, strict=True):
        if layers and not any(is_of_kind(kind, entry) for entry in layers):
            continue
        if mode == "selective":
            keep_products(block)
        block.forward = partial(_checkpointed, block.forward, offload)


def _checkpointed(forward, offload: Offload | None, x_TD, *others):
    parcel = offload.parcel() if offload and torch.is_grad_enabled() else None
    # No layer draws random numbers, so there is no generator state to restore.
    run = partial(
        checkpoint, use_reentrant=False, preserve_rng_state=False, context_fn=partial(checkpoint_contexts, parcel)
    )
    if parcel is None:
        return run(forward, x_TD, *others)
    own = x_TD.untyped_storage()._cdata

    def store(tensor):
        # Other inputs (rotary angles, modulation) are shared by all blocks, and stay.
        return parcel.store(tensor) if tensor.untyped_storage()._cdata == own else tensor

    with torch.autograd.graph.saved_tensors_hooks(store, fetch):  # of the checkpoint's input: inside it has its own
        return run(forward, x_TD, *others)


def keep_products(block: nn.Module) -> None:
    """Lets the linear layers of `block` keep their results for its recomputation."""
    last = block.mlp.down_proj  # its result is not asked for, or once; it is computed last and then left out
    for name, part in block.named_children():
        if block.mlp_tile and name == "mlp":  # computed again tile by tile
            continue
        for module in part.modules():
            if isinstance(module, nn.Linear) and module is not last:
                module.forward = partial(_kept_linear, module)


@torch.compiler.disable
def _kept_linear(module: nn.Linear, x):
    return _Kept.apply(x, module.weight, module.bias)


class _Kept(torch.autograd.Function):
    """F.linear whose result is kept."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        kept = recall()
        out = keep(F.linear(x, weight, bias)) if kept is None else kept
        ctx.save_for_backward(x, weight)
        return out.detach()  # what is kept must not lead back to the graph that keeps it

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            d_out @ weight if need_x else None,
            d_out.flatten(0, -2).t() @ x.flatten(0, -2) if need_weight else None,
            d_out.flatten(0, -2).sum(0) if need_bias else None,
        )
