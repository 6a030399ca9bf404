"""The token-local layers. Shape letters: T local tokens, D hidden size."""

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last dimension, computed in at least fp32; learned scale, no bias."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class SimpleRMSNorm(nn.Module):
    """RMSNorm without a learned scale: what TransNormer (arXiv 2210.10340) puts in the denominator's place."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.size, self.eps = size, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (self.size,), eps=self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): [T, D] -> [T, D]."""

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


def init_weights(model: nn.Module, config) -> None:
    """Normal weights of init_std, ones in norms, zeros in biases; projections into the residual stream are divided by
    sqrt(2 num_layers). Modules with parameters of another nature have an `init_weights` of their own.
    """
    std = config.init_std
    residual_std = std * (2 * config.num_layers) ** -0.5
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=residual_std if name.endswith((".o_proj", ".down_proj")) else std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif module is not model and hasattr(module, "init_weights"):
            module.init_weights()
