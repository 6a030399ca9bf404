"""Everything that is done to a model from outside before it trains, in one fixed order.

Compilation -> activation checkpointing -> sharding, from the inside out: a compiled block is what gets recomputed, and
a recomputed block is what gets sharded. Compilation comes first because torch's checkpoint is closed to the compiler: a
block compiled around it would silently run uncompiled. No step changes a parameter's name.
"""

import shutil
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from longspan.attention.recompute import checkpoint_contexts
from longspan.models.decay import Gate

CHECKPOINTING = ("none", "full")


def parallelize(
    model: nn.Module,
    *,
    fsdp_mesh: DeviceMesh,
    checkpointing: str,
    compile: bool,
    param_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
) -> nn.Module:
    """Prepares `model` in place for training on `fsdp_mesh` and returns it.

    fsdp_mesh: one axis (parameters sharded over it) or two (copies along the first, shards along the second).
    checkpointing: "none", or "full" to keep only each block's input and what attention would have to communicate for.
    param_dtype, reduce_dtype: of the forward and backward, and of the gradient reduction; None keeps the parameters'
    own. Parameters and gradients are stored in the parameters' own dtype. Gradients are summed over ranks.
    ValueError for a setting that cannot be honoured.
    """
    if checkpointing not in CHECKPOINTING:
        raise ValueError(f"train.checkpointing={checkpointing!r} is unknown; allowed: {', '.join(CHECKPOINTING)}")
    if fsdp_mesh.ndim not in (1, 2):
        raise ValueError(f"fsdp_mesh has {fsdp_mesh.ndim} axes {fsdp_mesh.mesh_dim_names}; use 1 (FSDP) or 2 (HSDP)")
    if compile:
        compile_blocks(model, fsdp_mesh.device_type)
    if checkpointing == "full":
        checkpoint_blocks(model)
    shard(model, fsdp_mesh, param_dtype, reduce_dtype)
    return model


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


def shard(model: nn.Module, mesh: DeviceMesh, param_dtype, reduce_dtype) -> None:
    """FSDP2 on every block and the root, also on one rank, so that one rank runs the same code."""
    # Inputs are not cast: the rotary angles must stay in fp32, and everything else has the compute dtype already.
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    uncast = MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for block in model.blocks:
        for module in block.modules():
            if isinstance(module, Gate) and param_dtype is not None:
                fully_shard(module, mesh=mesh, mp_policy=uncast, reshard_after_forward=False)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for name in model.called_by_name:
        register_fsdp_forward_method(model, name)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the global label count, so ranks' gradients add up. Plain sums are also what gloo
            # can do, and what NCCL does without an extra multiplication.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
