"""What stores and trains a model on the ranks of a run: torch's FSDP2, whole copies, or DeepSpeed's ZeRO.

All engines train the same: gradients are sums over ranks and micro-batches of a loss that is already divided by the
global label count; AdamW keeps fp32 weights and moments; the forward and backward run in train.dtype, with the gates'
parameters in fp32; gradients are reduced in fp32 and clipped by their norm over all trained parameters. Frozen
parameters, which need no gradient (models.trainable), are stored like others and otherwise left alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from longspan.launcher.config import Config
from longspan.parallel.mesh import Mesh


class Engine(Protocol):
    """A model that has been handed over to the ranks. Every method is collective."""

    model: nn.Module  # to be called with a batch; `forward` and `called_by_name` work as before

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Adds the gradients of this rank's `loss` of one micro-batch; `last`: of the step."""

    def step(self, lr: float, loss: torch.Tensor) -> torch.Tensor:
        """Clips, updates and clears the gradients; returns their norm before clipping, the same on all ranks.

        The update is left out when `loss` (a scalar on the device, the same on all ranks) or the norm is not finite.
        """

    def state_dict(self) -> dict[str, Any]:
        """`model` and `optimizer` (fp32, by parameter name; of the latter `state`, of trained parameters, and
        `param_groups`) for torch.distributed.checkpoint, alike for all engines."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what was loaded into a `state_dict()`; without `optimizer`, its states begin anew."""


def find_engine(config: Config, mesh: Mesh) -> Callable[[nn.Module], Engine]:
    """What turns a model into the engine of parallel.engine. UserError when that engine cannot be used here."""
    if config.parallel.engine == "deepspeed":
        from longspan.launcher.engines.zero import ZeroEngine, import_deepspeed

        return partial(ZeroEngine, config=config, mesh=mesh, deepspeed=import_deepspeed(mesh.device))
    from longspan.launcher.engines.fsdp2 import Fsdp2Engine

    return partial(Fsdp2Engine, config=config, mesh=mesh)
