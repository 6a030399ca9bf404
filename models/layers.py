"""The token-local layers. Shape letters: T local tokens, D hidden size."""

import torch
from torch import nn

from longspan.kernels.norm import residual_rms_norm, rms_norm
from longspan.kernels.swiglu import swiglu


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last dimension, computed in at least fp32; learned scale, no bias.

    gate: of the shape of x, whose silu multiplies the result.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps, gate)


class ResidualRMSNorm(RMSNorm):
    """RMSNorm of a residual stream and what is added to it: (x + branch, its norm), or (x, its norm) without a branch.

    What goes on along the stream has to use the first of the two, so that gradients meet in one place.
    """

    def forward(self, x: torch.Tensor, branch: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return residual_rms_norm(x, branch, self.weight, self.eps)


class SimpleRMSNorm(nn.Module):
    """RMSNorm without a learned scale: what TransNormer (arXiv 2210.10340) puts in the denominator's place."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return rms_norm(x, None, self.eps, gate)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): [T, D] -> [T, D]."""

    def __init__(self, hidden_size: int, inner_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(swiglu(self.gate_proj(x_TD), self.up_proj(x_TD)))


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
