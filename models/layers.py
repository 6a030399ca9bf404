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
