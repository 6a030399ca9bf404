"""AdamW and the dtype of compute, the same for all engines."""

import torch
from torch import nn

from longspan.launcher.config import OptimConfig, TrainConfig


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW of what is trained; weights of one dimension (norms, biases, gates) do not decay."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def compute_dtype(train: TrainConfig) -> torch.dtype | None:
    """What parameters are cast to for the forward and backward; None where they are used as they are."""
    return None if train.dtype == "float32" else getattr(torch, train.dtype)
