"""How the state of a linear-attention layer fades: modules that give log decay, always <= 0, from the layer's input.

Log decay is fp32 (fp64 in fp64 models) whatever the compute dtype: it is summed over millions of tokens.
Shape letters: T local tokens, D hidden size, H heads, K key channels of a head.
"""

import math

import torch
from torch import nn

from longspan.kernels.channel_gates import biased_gate, bounded_gate
from longspan.kernels.scalar_gate import scalar_gate
from longspan.kernels.wide import wide_dtype


def lightning_slopes(heads: torch.Tensor, layer: int, num_layers: int) -> torch.Tensor:
    """Lightning attention: -8h/H (1 - l/L). Head 0 never forgets; later layers remember longer."""
    return heads * (-8 / len(heads) * (1 - layer / num_layers))


def retention_slopes(heads: torch.Tensor, layer: int, num_layers: int) -> torch.Tensor:
    """Retention: log(1 - 2**(-5 - h)), the same in every layer; a head remembers about 2**(5 + h) tokens."""
    return torch.log1p(-torch.exp2(-5 - heads))


SLOPES = {"lightning": lightning_slopes, "retention": retention_slopes}


class Gate(nn.Module):
    """Base of gates whose parameters must not be rounded to bf16 with the other weights; `parallelize` keeps them fp32.

    The bias of a long memory is far from zero: at Mamba-2's dt_bias of -7 a bf16 step changes the rate of forgetting by
    3%. What is added to it varies around zero and may be bf16.
    """


class ScalarGate(Gate):
    """Mamba-2's gate: from a [T, H] to log decay -exp(A_log) step and step = softplus(a + dt_bias), both [T, H]."""

    def __init__(self, num_heads: int):
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads))

    def init_weights(self) -> None:
        """Rates A uniform in [1, 16], steps log-uniform in [0.001, 0.1], as in Mamba-2."""
        with torch.no_grad():
            self.A_log.uniform_(1, 16).log_()
            step = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp_()
            step.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus

    def forward(self, a_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return scalar_gate(a_TH, self.A_log, self.dt_bias)


class ChannelGate(Gate):
    """GLA's gate: from a [T, C] to log decay [T, C] = logsigmoid(a + bias) / 16."""

    TEMPERATURE = 16

    def __init__(self, num_channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(num_channels))

    def init_weights(self) -> None:
        """Zero: a channel starts by remembering about 23 tokens."""
        nn.init.zeros_(self.bias)

    def forward(self, a_TC: torch.Tensor) -> torch.Tensor:
        return biased_gate(a_TC, self.bias, 1 / self.TEMPERATURE)


class NoDecay(nn.Module):
    """The state keeps everything."""

    def __init__(self, config, layer, key_size):
        super().__init__()

    def forward(self, x_TD: torch.Tensor) -> None:
        return None


class FixedDecay(nn.Module):
    """One constant per head, [H].

    Formed on the device at every forward (three operations on H numbers) instead of kept in a buffer: so that no cast
    of the model to bf16 rounds it, and neither a meta-device start nor a checkpoint has to restore it.
    """

    def __init__(self, config, layer, key_size):
        super().__init__()
        self.num_heads, self.layer, self.num_layers = config.linear_heads, layer, config.num_layers
        self.slopes = SLOPES[config.decay_slopes]

    @torch.compiler.disable  # the layer's number is a constant to the compiler: one compilation per layer
    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        heads = torch.arange(self.num_heads, dtype=torch.float64, device=x_TD.device)
        return self.slopes(heads, self.layer, self.num_layers).to(wide_dtype(x_TD.dtype))


class ScalarDecay(nn.Module):
    """One rate per token and head, [T, H], read from the layer's input (Mamba-2, gated DeltaNet)."""

    def __init__(self, config, layer, key_size):
        super().__init__()
        self.a_proj = nn.Linear(config.hidden_size, config.linear_heads, bias=False)
        self.gate = ScalarGate(config.linear_heads)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        log_decay_TH, _ = self.gate(self.a_proj(x_TD))
        return log_decay_TH


class ChannelDecay(nn.Module):
    """One rate per token and key channel, [T, H, K], read from the layer's input through a few dimensions (GLA)."""

    def __init__(self, config, layer, key_size):
        super().__init__()
        self.num_heads = config.linear_heads
        self.in_proj = nn.Linear(config.hidden_size, config.gate_rank, bias=False)
        self.out_proj = nn.Linear(config.gate_rank, self.num_heads * key_size, bias=False)
        self.gate = ChannelGate(self.num_heads * key_size)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.gate(self.out_proj(self.in_proj(x_TD))).unflatten(-1, (self.num_heads, -1))


class BoundedDecay(nn.Module):
    """HGRN-2's forget gate per key channel: from a [T, H K] to log f [T, H, K] with f = bound + (1 - bound) sigmoid(a),
    and keys 1 - f in the dtype of a.

    The bound of layer l of L is l / L: the first layer may forget at once, later ones keep more and more. The first has
    1e-6 instead of 0, so that log f is finite in fp32 too.
    """

    def __init__(self, config, layer, key_size):
        super().__init__()
        self.num_heads, self.bound = config.linear_heads, max(layer / config.num_layers, 1e-6)

    @torch.compiler.disable  # as in FixedDecay
    def forward(self, a_TC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(x.unflatten(-1, (self.num_heads, -1)) for x in bounded_gate(a_TC, 1 - self.bound))


# name: module of (config, layer, key_size) that maps the layer's input [T, D] to the log decay, or where keys come from
# the decay their projection to the log decay and keys
DECAYS = {
    "none": NoDecay,
    "fixed": FixedDecay,
    "scalar": ScalarDecay,
    "channel": ChannelDecay,
    "bounded": BoundedDecay,
}
