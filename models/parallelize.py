"""Everything that is done to a model from outside before it trains, in one fixed order.

Compilation -> activation checkpointing -> sharding, from the inside out: a compiled block is what gets recomputed, and
a recomputed block is what gets sharded. Compilation comes first because torch's checkpoint is closed to the compiler: a
block compiled around it would silently run uncompiled. No step changes a parameter's name.
"""

import shutil
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from longspan.models.checkpointing import CHECKPOINTING, checkpoint_blocks
from longspan.models.decay import Gate


def parallelize(
    model: nn.Module,
    *,
    fsdp_mesh: DeviceMesh,
    checkpointing: str,
    compile: bool,
    param_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
    checkpoint_layers: Sequence[str] = (),
    offload_activations: bool = False,
    mlp_tile: int = 0,
    offload_optimizer: bool = False,
) -> nn.Module:
    """Prepares `model` in place for training on `fsdp_mesh` and returns it.

    fsdp_mesh: one axis (parameters sharded over it) or two (copies along the first, shards along the second).
    checkpointing, checkpoint_layers, offload_activations: see `checkpointing.checkpoint_blocks`; "none" leaves it out.
    param_dtype, reduce_dtype: of the forward and backward, and of the gradient reduction; None keeps the parameters'
    own. Parameters and gradients are stored in the parameters' own dtype. Gradients are summed over ranks.
    mlp_tile: tokens for which a block's MLP is computed at once, 0 for all. offload_optimizer: parameters, gradients
    and so the optimizer that is made for them stay in host memory (pinned on a GPU); blocks get copies in time.
    ValueError for a setting that cannot be honoured.
    """
    if checkpointing not in CHECKPOINTING:
        raise ValueError(f"train.checkpointing={checkpointing!r} is unknown; allowed: {', '.join(CHECKPOINTING)}")
    if fsdp_mesh.ndim not in (1, 2):
        raise ValueError(f"fsdp_mesh has {fsdp_mesh.ndim} axes {fsdp_mesh.mesh_dim_names}; use 1 (FSDP) or 2 (HSDP)")
    if offload_activations and checkpointing == "none":
        raise ValueError("train.offload_activations=true is for what train.checkpointing keeps; set it to full")
    for block in model.blocks:
        block.mlp_tile = mlp_tile
    if compile:
        compile_blocks(model, fsdp_mesh.device_type)
    if checkpointing != "none":
        checkpoint_blocks(model, checkpointing, checkpoint_layers, offload_activations)
    shard(model, fsdp_mesh, param_dtype, reduce_dtype, offload_optimizer)
    return model


def compile_blocks(model: nn.Module, device_type: str) -> None:
    """Compiles block by block, so that equal blocks share the work; attention functions stay outside the graphs."""
    if device_type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise ValueError("train.compile=true needs a C++ compiler on CPU; install g++ or set train.compile=false")
    for block in model.blocks:
        block.forward = torch.compile(block.forward)
        if block.mlp_tile:  # called tile by tile, outside the graphs of `forward`
            block.feed = torch.compile(block.feed)


def shard(model: nn.Module, mesh: DeviceMesh, param_dtype, reduce_dtype, offload: bool) -> None:
    """FSDP2 on every block and the root, also on one rank, so that one rank runs the same code."""
    # Inputs are not cast: the rotary angles must stay in fp32, and everything else has the compute dtype already.
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    uncast = MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    host = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    apply = partial(fully_shard, mesh=mesh, offload_policy=host)
    for block in model.blocks:
        for module in block.modules():
            if isinstance(module, Gate) and param_dtype is not None:
                apply(module, mp_policy=uncast, reshard_after_forward=False)
        apply(block, mp_policy=policy)
    apply(model, mp_policy=policy)
    for name in model.called_by_name:
        register_fsdp_forward_method(model, name)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is divided by the global label count, so ranks' gradients add up. Plain sums are also what gloo
            # can do, and what NCCL does without an extra multiplication.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
