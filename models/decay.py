"""How the state of a linear-attention layer fades: modules that give log decay, always <= 0, from the layer's input.

Log decay is fp32 (fp64 in fp64 models) whatever the compute dtype: it is summed over millions of tokens.
Shape letters: T local tokens, D hidden size, H heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def decay_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def lightning_slopes(heads: torch.Tensor, layer: int, num_layers: int) -> torch.Tensor:
    """Lightning attention: -8h/H (1 - l/L). Head 0 never forgets; later layers remember longer."""
    return heads * (-8 / len(heads) * (1 - layer / num_layers))


def retention_slopes(heads: torch.Tensor, layer: int, num_layers: int) -> torch.Tensor:
    """Retention: log(1 - 2**(-5 - h)), the same in every layer; a head remembers about 2**(5 + h) tokens."""
    return torch.log1p(-torch.exp2(-5 - heads))


SLOPES = {"lightning": lightning_slopes, "retention": retention_slopes}


class NoDecay(nn.Module):
    """The state keeps everything."""

    def __init__(self, config, layer):
        super().__init__()

    def forward(self, x_TD: torch.Tensor) -> None:
        return None


class FixedDecay(nn.Module):
    """One constant per head, [H].

    Formed on the device at every forward (three operations on H numbers) instead of kept in a buffer: so that no cast
    of the model to bf16 rounds it, and neither a meta-device start nor a checkpoint has to restore it.
    """

    def __init__(self, config, layer):
        super().__init__()
        self.num_heads, self.layer, self.num_layers = config.num_heads, layer, config.num_layers
        self.slopes = SLOPES[config.decay_slopes]

    @torch.compiler.disable  # the layer's number is a constant to the compiler: one compilation per layer
    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        heads = torch.arange(self.num_heads, dtype=torch.float64, device=x_TD.device)
        return self.slopes(heads, self.layer, self.num_layers).to(decay_dtype(x_TD.dtype))


class ScalarGate(nn.Module):
    """Mamba-2's gate: -exp(A_log) * softplus(a + dt_bias), from a [T, H] to log decay [T, H].

    A module of its own because its two vectors must not be rounded to bf16 with the other weights: dt_bias is near -7
    for the longest memories, where a bf16 step changes the rate of forgetting by 3%. `parallelize` keeps it in fp32.
    """

    def __init__(self, num_heads: int):
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads))

    def init_weights(self) -> None:
        """Rates A uniform in [1, 16], steps dt log-uniform in [0.001, 0.1], as in Mamba-2."""
        with torch.no_grad():
            self.A_log.uniform_(1, 16).log_()
            step = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp_()
            step.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus

    def forward(self, a_TH: torch.Tensor) -> torch.Tensor:
        dtype = decay_dtype(a_TH.dtype)
        return -self.A_log.to(dtype).exp() * F.softplus(a_TH.to(dtype) + self.dt_bias.to(dtype))


class ScalarDecay(nn.Module):
    """One rate per token and head, [T, H], read from the layer's input."""

    def __init__(self, config, layer):
        super().__init__()
        self.a_proj = nn.Linear(config.hidden_size, config.num_heads, bias=False)
        self.gate = ScalarGate(config.num_heads)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.gate(self.a_proj(x_TD))


DECAYS = {"none": NoDecay, "fixed": FixedDecay, "scalar": ScalarDecay}
