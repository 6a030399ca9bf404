"""Everything that is done to a model from outside before it trains, in one fixed order.

Tensor parallelism -> compilation -> activation checkpointing -> freezing -> sharding, from the inside out: a split
block is what gets compiled, a compiled block is what gets recomputed, a recomputed block is what keeps nothing where
all is frozen, and that is what gets sharded. Compilation comes before checkpointing because torch's checkpoint is
closed to the compiler: a block compiled around it would silently run uncompiled. No step changes a parameter's name.
"""

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from longspan.attention.offload import Offload
from longspan.models.checkpointing import CHECKPOINTING, checkpoint_blocks
from longspan.models.tensor_parallel import split_model
from longspan.models.trainable import ALL, Trainable
from longspan.parallel.tensor import TensorParallel

T = TypeVar("T")


def parallelize(
    model: nn.Module,
    *,
    shard: Callable[[nn.Module], T],
    checkpointing: str,
    compile: bool,
    checkpoint_layers: Sequence[str] = (),
    offload_activations: bool = False,
    mlp_tile: int = 0,
    ranks: TensorParallel | None = None,
    trainable: Trainable = ALL,
) -> T:
    """Prepares `model` in place for training and returns what `shard` makes of it.

    checkpointing, checkpoint_layers, offload_activations: see `checkpointing.checkpoint_blocks`; "none" leaves it out.
    mlp_tile: tokens for which a block's MLP is computed at once, 0 for all. ranks: those that share its layers, if any.
    trainable: the parameters that get gradients. ValueError for a setting that cannot be honoured.
    """
    if checkpointing not in CHECKPOINTING:
        raise ValueError(f"train.checkpointing={checkpointing!r} is unknown; allowed: {', '.join(CHECKPOINTING)}")
    if offload_activations and checkpointing == "none":
        raise ValueError("train.offload_activations=true is for what train.checkpointing keeps; set it to full")
    if ranks is not None:
        split_model(model, ranks)
    for block in model.blocks:
        block.mlp_tile = mlp_tile
    if compile:
        compile_blocks(model, next(model.parameters()).device.type)
    if checkpointing != "none":
        checkpoint_blocks(model, checkpointing, checkpoint_layers, Offload() if offload_activations else None)
    freeze(model, trainable)
    return shard(model)


def compile_blocks(model: nn.Module, device_type: str) -> None:
    """Compiles block by block, so that equal blocks share the work; attention functions stay outside the graphs."""
    if device_type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise ValueError("train.compile=true needs a C++ compiler on CPU; install g++ or set train.compile=false")
    for block in model.blocks:
        block.forward = torch.compile(block.forward)
        if block.mlp_tile:  # called tile by tile, outside the graphs of `forward`
            block.feed = torch.compile(block.feed)


def freeze(model: nn.Module, trainable: Trainable) -> None:
    """Lets the parameters of `trainable` alone have gradients. Blocks without any of them that no gradient passes, as
    those in front of the first trained one, keep nothing for a backward pass. To be called when `forward` of blocks is
    final. ValueError for patterns that fit no parameter, or leave none to train."""
    trained = set(trainable.names(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    for block in model.blocks:
        if not any(parameter.requires_grad for parameter in block.parameters()):
            block.forward = partial(_forward_of_frozen, block.forward)


def _forward_of_frozen(forward, *inputs):
    """Unless an input needs a gradient, as in an evaluation: nothing is kept, offloaded or computed again."""
    needed = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
    with torch.set_grad_enabled(needed):
        return forward(*inputs)
