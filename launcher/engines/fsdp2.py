"""FSDP2: every block sharded over ranks. With whole copies on every rank (a shard axis of size 1) it is what DDP does:
gradients are all-reduced block by block during the backward, and the policy of dtypes is the same."""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_model_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard

from longspan.launcher.config import Config
from longspan.launcher.engines.optimizer import build_optimizer, compute_dtype
from longspan.models.decay import Gate
from longspan.parallel.mesh import Mesh


class Fsdp2Engine:
    """An Engine on mesh.fsdp_mesh: parallel.engine=fsdp2 and ddp, which differ in that mesh alone."""

    def __init__(self, model: nn.Module, config: Config, mesh: Mesh):
        self._host = config.optim.offload == "cpu"
        dtypes = compute_dtype(config.train), getattr(torch, config.train.reduce_dtype)
        self.model = shard(model, mesh.fsdp_mesh, *dtypes, offload=self._host)
        self.optimizer = build_optimizer(self.model, config.optim)
        self._clip, self._device = config.optim.clip_grad_norm, mesh.device

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        # Copies of a shard need the sum of their gradients once a step; shards of one copy are reduced every time.
        self.model.set_requires_all_reduce(last)
        loss.backward()

    def step(self, lr: float, loss: torch.Tensor) -> torch.Tensor:
        norm = self._clip_gradients()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # What a gradient scaler uses: the fused kernel changes nothing when this is 1, without the host knowing.
        finite = (loss.isfinite() & norm.isfinite()).float()
        self.optimizer.found_inf = 1.0 - (finite.cpu() if self._host else finite)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _clip_gradients(self) -> torch.Tensor:
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters]).full_tensor()
        if self._clip:
            nn.utils.clip_grads_with_norm_(parameters, self._clip, norm)
        return norm.to(self._device)

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "optimizer" in state:
            model, optimizer = state["model"], state["optimizer"]
            set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        else:
            set_model_state_dict(self.model, state["model"])
            self.optimizer.state.clear()


def shard(
    model: nn.Module,
    mesh: DeviceMesh,
    param_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
    *,
    offload: bool = False,
) -> nn.Module:
    """FSDP2 on every block and the root of `model`, in place; also on one rank, so that one rank runs the same code.

    mesh: one axis (parameters sharded over it) or two (copies along the first, shards along the second).
    param_dtype, reduce_dtype: of the forward and backward, and of the gradient reduction; None keeps the parameters'
    own. Parameters and gradients are stored in the parameters' own dtype. Gradients are summed over ranks. offload:
    parameters, gradients and so the optimizer that is made for them stay in host memory (pinned on a GPU); blocks get
    copies in time.
    """
    if mesh.ndim not in (1, 2):
        raise ValueError(f"fsdp_mesh has {mesh.ndim} axes {mesh.mesh_dim_names}; use 1 (FSDP) or 2 (HSDP)")
    # Inputs are not cast: the rotary angles must stay in fp32, and everything else has the compute dtype already.
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    uncast = MixedPrecisionPolicy(reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    host = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    across = partial(_across, ranks=mesh.size(mesh.ndim - 1))
    apply = partial(fully_shard, mesh=mesh, offload_policy=host, shard_placement_fn=across)
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
    return model


def _across(parameter: nn.Parameter, ranks: int) -> Shard | None:
    """Weights whose rows are split over tensor-parallel ranks are sharded by columns, all others by rows: so every part
    is one range of each dimension, whatever the numbers of ranks, which is what checkpoints are exchanged by."""
    if not isinstance(parameter, DTensor) or not parameter.placements[0].is_shard(0):
        return None
    if parameter.shape[1] % ranks:
        raise ValueError(
            f"with parallel.tp the {ranks} ranks that shard parameters must divide the {parameter.shape[1]} columns of"
            " a weight: use another parallel.tp, or parallel.sharding=hsdp"
        )
    return Shard(1)
