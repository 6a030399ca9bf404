"""DeepSpeed's ZeRO: shards optimizer state (stage 1), gradients (2) and weights (3), and moves them to the host.

DeepSpeed stores and reduces; the update is the AdamW of every engine and checkpoints have the one format, so that any
engine continues what another began. Its own 16-bit modes are not used: they would round the gates' parameters. Instead
fp32 weights are cast where a module reads them, which is what FSDP2's policy computes too; the price is that stage 3
gathers weights in fp32. Written for deepspeed 0.19: moments and weights of a checkpoint go through its internals.
"""

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from longspan.launcher.config import Config, OptimConfig, ParallelConfig
from longspan.launcher.engines.optimizer import build_optimizer, compute_dtype
from longspan.launcher.errors import UserError
from longspan.models.decay import Gate
from longspan.parallel.mesh import Mesh

TESTED = "0.19."
MOMENTS = ("exp_avg", "exp_avg_sq")


def import_deepspeed(device: torch.device) -> ModuleType:
    """The package, set up for `device` without compiling anything. UserError when it is missing or another version."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # it would ask the machine, whatever run.device says
    os.environ.setdefault("LOCAL_RANK", "0")  # of one rank without torchrun
    remedy = "pip install 'longspan[deepspeed]', or use parallel.engine=fsdp2"
    try:
        import deepspeed
        import deepspeed.ops
    except ModuleNotFoundError as error:
        raise UserError(f"parallel.engine=deepspeed needs the package {error.name}: {remedy}") from None
    if not deepspeed.__version__.startswith(TESTED):
        raise UserError(f"parallel.engine=deepspeed needs deepspeed {TESTED}x, not {deepspeed.__version__}: {remedy}")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for CPUs; gloo does as well
    return deepspeed


class ZeroEngine:
    """An Engine on all ranks: parallel.engine=deepspeed."""

    def __init__(self, model: nn.Module, config: Config, mesh: Mesh, deepspeed: ModuleType):
        self._mesh = mesh
        self._parameters = dict(model.named_parameters())
        self.optimizer = build_optimizer(model, config.optim)
        names = {parameter: name for name, parameter in self._parameters.items()}
        self._groups = [[names[parameter] for parameter in group["params"]] for group in self.optimizer.param_groups]
        self.model, *_ = deepspeed.initialize(
            model=model,
            optimizer=self.optimizer,
            config=settings(config.parallel, config.optim, mesh),
            dist_init_required=False,
        )
        dtype = compute_dtype(config.train)
        if dtype is not None:
            cast_parameters(model, dtype)
        self._zero = self.model.optimizer
        self._stage = config.parallel.zero_stage
        self._create_moments()

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        self.model.set_gradient_accumulation_boundary(last)
        # ZeRO averages over ranks; the loss is divided by the global label count already, so the mean is undone.
        self.model.backward(loss * self._mesh.world_size, scale_wrt_gas=False)

    def step(self, lr: float, loss: torch.Tensor) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # ZeRO itself leaves out an update whose norm is not finite.
        self.optimizer.found_inf = (1.0 - loss.isfinite().float()).to(self._update_device)
        self.model.step()
        return torch.as_tensor(self._zero._global_grad_norm, dtype=torch.float32, device=self._mesh.device)

    def state_dict(self) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        steps = next(iter(self.optimizer.state.values()))["step"].cpu()
        model, state = {}, {}
        for name, parameter in self._parameters.items():  # gathered one at a time
            if not parameter.requires_grad:  # ZeRO has no fp32 copy of what it does not update
                with self._whole(parameter):
                    model[name] = self._shard(parameter.detach().clone(), parameter)
                continue
            model[name] = self._shard(safe_get_full_fp32_param(parameter), parameter)
            moments = {key: self._shard(safe_get_full_optimizer_state(parameter, key), parameter) for key in MOMENTS}
            state[name] = {"step": steps.clone(), **moments}
        groups = [
            {**{key: value for key, value in group.items() if key in self.optimizer.defaults}, "params": names}
            for group, names in zip(self.optimizer.param_groups, self._groups, strict=True)
        ]
        return {"model": model, "optimizer": {"state": state, "param_groups": groups}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, parameter in self._parameters.items():
            self._write(parameter, state["model"][name])
        if "optimizer" in state:
            moments = state["optimizer"]["state"]
            for name, own in moments.items():
                for key in MOMENTS:
                    self._write(self._parameters[name], own[key], key)
            steps = moments[next(iter(moments))]["step"]
            for flat in self.optimizer.state.values():
                flat["step"].copy_(steps)
        self._publish_weights()

    def _whole(self, parameter: nn.Parameter) -> AbstractContextManager:
        """In which all of a parameter is here; stages below 3 never split it."""
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        return GatheredParameters(parameter) if self._stage == 3 else nullcontext()

    def _shard(self, whole: torch.Tensor, parameter: nn.Parameter) -> DTensor:
        """This rank's rows, on the host: what ZeRO offloads may not fit on the device beside the weights."""
        whole = whole.view(getattr(parameter, "ds_shape", parameter.shape))
        return distribute_tensor(whole, self._mesh.fsdp_mesh, [Shard(0)], src_data_rank=None).cpu()

    def _write(self, parameter: nn.Parameter, shard: DTensor, moment: str | None = None) -> None:
        """Puts the rows of all ranks into ZeRO's partition of a parameter's fp32 weights, or of a moment."""
        from deepspeed import utils

        whole = shard.to(self._mesh.device).full_tensor().flatten()
        if self._stage == 3:  # equal parts of each parameter, the last padded, which the full setters forget
            size = parameter.ds_tensor.numel()
            whole = F.pad(whole, (0, size * self._mesh.world_size - len(whole)))
            part = whole.narrow(0, size * dist.get_rank(), size)
            if not parameter.requires_grad:
                parameter.ds_tensor.data.copy_(part)
            elif moment is None:
                utils.safe_set_local_fp32_param(parameter, part)
            else:
                utils.safe_set_local_optimizer_state(parameter, part, moment)
        elif not parameter.requires_grad:
            parameter.data.copy_(whole.view_as(parameter))
        elif moment is None:
            utils.safe_set_full_fp32_param(parameter, whole)
        else:
            utils.safe_set_full_optimizer_state(parameter, whole, moment)

    def _create_moments(self) -> None:
        """As AdamW does in its first step, so that a checkpoint has something to load into before it."""
        zero = self._zero
        for flat in zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups:
            zeros = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
            self.optimizer.state[flat] = {"step": torch.zeros((), device=flat.device), **zeros}
        self._update_device = flat.device
        if self._stage < 3:
            zero._lazy_init_hp_params_optimizer_state()

    def _publish_weights(self) -> None:
        """From ZeRO's partitions of fp32 weights to those that the model computes with, as at the end of a step."""
        zero = self._zero
        if self._stage < 3:
            zero.update_lp_params()
            return
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:  # small ones, which every rank keeps whole
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def settings(parallel: ParallelConfig, optim: OptimConfig, mesh: Mesh) -> dict[str, Any]:
    """DeepSpeed's configuration. It does not count micro-batches: `backward` is told which is the last of a step."""
    zero = {"stage": parallel.zero_stage}
    host = {"device": "cpu", "pin_memory": mesh.device.type == "cuda"}
    if parallel.zero_offload_optimizer:
        zero["offload_optimizer"] = host
    if parallel.zero_offload_parameters:
        zero["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.clip_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW, on the host too
        "zero_force_ds_cpu_optimizer": False,
    }


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Lets modules read their parameters in `dtype`, except for gates; what is stored and trained stays as it is."""
    for module in model.modules():
        if module._parameters and not isinstance(module, Gate):
            kind = type(module)
            module.__class__ = type(kind.__name__, (_Cast, kind), {"_compute_dtype": dtype})


class _Cast:
    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return value.to(self._compute_dtype) if isinstance(value, nn.Parameter) else value
