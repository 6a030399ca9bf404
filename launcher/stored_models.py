"""The model of a checkpoint on one rank, for what is done with it besides training."""

import warnings
from pathlib import Path

import torch
from torch import nn

from longspan.launcher import checkpoint
from longspan.launcher.config import Config
from longspan.launcher.parsing import update
from longspan.models.build import build_model
from longspan.models.decay import Gate


def stored(run: str) -> tuple[checkpoint.Info, Config]:
    """The newest checkpoint of a run directory, or that checkpoint, and its settings. UserError where there is none."""
    info = checkpoint.named(Path(run))
    return info, update(Config(), info.config, str(info.path))


def load_model(info: checkpoint.Info, config: Config) -> nn.Module:
    """The whole model in fp32 on the CPU. UserError where the checkpoint is damaged."""
    model = build_model(config.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process alone
        checkpoint.fill(info, {"model": model.state_dict()}, alone=True)
    return model


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with weights of `dtype`, but for those of gates: what training computes with."""
    kept = {parameter for module in model.modules() if isinstance(module, Gate) for parameter in module.parameters()}
    for parameter in model.parameters():
        if parameter not in kept:
            parameter.data = parameter.data.to(dtype)
    return model
