"""Everything that is done to a model from outside before it trains, in one fixed order.

Compilation -> activation checkpointing -> sharding, from the inside out: a compiled block is what gets recomputed, and
a recomputed block is what gets sharded. Compilation comes first because torch's checkpoint is closed to the compiler: a
block compiled around it would silently run uncompiled. No step changes a parameter's name.
"""

import shutil
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from longspan.attention.recompute import checkpoint_contexts

T = TypeVar("T")
CHECKPOINTING = ("none", "full")


def parallelize(model: nn.Module, *, shard: Callable[[nn.Module], T], checkpointing: str, compile: bool) -> T:
    """Prepares `model` in place for training and returns what `shard` makes of it.

    checkpointing: "none", or "full" to keep only each block's input and what attention would have to communicate for.
    ValueError for a setting that cannot be honoured.
    """
    if checkpointing not in CHECKPOINTING:
        raise ValueError(f"train.checkpointing={checkpointing!r} is unknown; allowed: {', '.join(CHECKPOINTING)}")
    if compile:
        compile_blocks(model, next(model.parameters()).device.type)
    if checkpointing == "full":
        checkpoint_blocks(model)
    return shard(model)


def compile_blocks(model: nn.Module, device_type: str) -> None:
    """Compiles block by block, so that equal blocks share the work; attention functions stay outside the graphs."""
    if device_type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise ValueError("train.compile=true needs a C++ compiler on CPU; install g++ or set train.compile=false")
    for block in model.blocks:
        block.forward = torch.compile(block.forward)


def checkpoint_blocks(model: nn.Module) -> None:
    """Blocks recompute their activations in the backward, without repeating communication or softmax attention."""
    for block in model.blocks:
        # No layer draws random numbers, so there is no generator state to restore.
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, context_fn=checkpoint_contexts
        )
