"""Token mixers: the only layers in which tokens see each other, through the attention functions and `seq`.

Shape letters: T local tokens, D hidden size, H heads, K width of queries and keys, V width of values.
"""

import torch
from torch import nn

from longspan.attention import LinearBranch, linear_attention, softmax_attention, sparse_attention
from longspan.kernels.block_states import MAPS
from longspan.kernels.swiglu import swiglu
from longspan.kernels.wide import wide_dtype
from longspan.models.config import SOFTMAX_KINDS
from longspan.models.convolution import ShortConvolution
from longspan.models.decay import DECAYS, ScalarGate
from longspan.models.feature_maps import build_feature_map
from longspan.models.layers import RMSNorm, SimpleRMSNorm
from longspan.models.rope import Rotary, rotate


class SoftmaxMixer(nn.Module):
    """Softmax attention, causal where the model is, of softmax:window over the latest `window` keys, with rotary
    positions, grouped key and value heads, optional RMSNorm on q and k."""

    def __init__(self, config, layer: int, kind: str):
        super().__init__()
        hidden, self.head_size, self.causal = config.hidden_size, config.head_size, config.causal
        self.window = config.window_of(kind)
        self.q_proj = nn.Linear(hidden, config.num_heads * self.head_size, bias=False)
        self.k_proj = nn.Linear(hidden, config.kv_heads * self.head_size, bias=False)
        self.v_proj = nn.Linear(hidden, config.kv_heads * self.head_size, bias=False)
        self.o_proj = nn.Linear(config.num_heads * self.head_size, hidden, bias=False)
        self.q_norm = RMSNorm(self.head_size, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_size, config.norm_eps) if config.qk_norm else None

    def forward(self, x_TD: torch.Tensor, rotary: Rotary, seq) -> torch.Tensor:
        heads = (-1, self.head_size)
        q_THK = rotate(self.q_proj(x_TD).unflatten(-1, heads), rotary, self.q_norm)
        k_THK = rotate(self.k_proj(x_TD).unflatten(-1, heads), rotary, self.k_norm)
        v_THK = self.v_proj(x_TD).unflatten(-1, heads)
        return self.o_proj(self.attend(q_THK, k_THK, v_THK, seq).flatten(1))

    def attend(self, q_THK, k_THK, v_THK, seq):
        return softmax_attention(q_THK, k_THK, v_THK, causal=self.causal, window=self.window, seq=seq)


class SparseMixer(SoftmaxMixer):
    """The same over blocks of keys that a selection chooses, of llsa with coarse keys for the rest."""

    def __init__(self, config, layer: int, kind: str):
        super().__init__(config, layer, kind)
        self.selection = config.selection(kind)

    def attend(self, q_THK, k_THK, v_THK, seq):
        return sparse_attention(q_THK, k_THK, v_THK, selection=self.selection, causal=self.causal, seq=seq)


class SLAMixer(SparseMixer):
    """Chosen blocks, and linear attention through a projection that starts at zero (SLA, arXiv 2509.24006): to all
    tokens, as its public code has it, or as in the paper to the blocks that are not chosen."""

    def __init__(self, config, layer: int, kind: str):
        super().__init__(config, layer, kind)
        self.over, self.feature_map = config.sla_linear, config.sla_feature_map
        if self.feature_map not in MAPS:
            self.q_map = build_feature_map(self.feature_map, config.num_heads, self.head_size)
            self.k_map = build_feature_map(self.feature_map, config.kv_heads, self.head_size)
        self.linear_weight = nn.Parameter(torch.empty(self.head_size, self.head_size))  # shared by all heads
        self.linear_bias = nn.Parameter(torch.empty(self.head_size))

    def init_weights(self) -> None:
        nn.init.zeros_(self.linear_weight)
        nn.init.zeros_(self.linear_bias)

    def attend(self, q_THK, k_THK, v_THK, seq):
        given = self.linear_weight, self.linear_bias, self.over
        if self.feature_map in MAPS:  # part of the kernels
            linear = LinearBranch(*given, self.feature_map)
        else:
            linear = LinearBranch(*given, "identity", self.q_map(q_THK), self.k_map(k_THK))
        return sparse_attention(
            q_THK, k_THK, v_THK, selection=self.selection, linear=linear, causal=self.causal, seq=seq
        )


class LinearMixer(nn.Module):
    """Linear attention: o = norm(attention(phi(q), phi(k), v)) per head, times silu(gate(x)), as its family says.

    All heads have their own key and value head. The norm stands where softmax attention has its denominator.
    """

    def __init__(self, config, layer: int, kind: str):
        super().__init__()
        family, hidden, size = config.family(kind), config.hidden_size, config.projected_key_size(kind)
        self.num_heads, key_size, value_size = config.state_shape(kind)
        width = self.num_heads * value_size
        self.normalize, self.causal = config.linear_normalize, config.causal
        self.q_proj = nn.Linear(hidden, self.num_heads * size, bias=False)
        self.keys_from_decay = family.keys_from_decay
        self.k_proj = nn.Linear(hidden, self.num_heads * size, bias=False)
        self.v_proj = nn.Linear(hidden, width, bias=False)
        self.g_proj = nn.Linear(hidden, width, bias=False) if family.output_gate == "silu" else None
        self.o_proj = nn.Linear(width, hidden, bias=False)
        channels, width = 2 * self.num_heads * size + width, family.conv_width
        self.conv = ShortConvolution(channels, width, family.conv_activation) if width else None
        self.q_map = build_feature_map(family.feature_map, self.num_heads, size)
        self.k_map = None if family.keys_from_decay else build_feature_map(family.feature_map, self.num_heads, size)
        self.o_norm = OUTPUT_NORMS[config.output_norm](value_size, config.norm_eps)
        self.decay = DECAYS[family.decay](config, layer, key_size)
        self.b_proj = nn.Linear(hidden, self.num_heads, bias=False) if family.delta_rule else None

    def forward(self, x_TD: torch.Tensor, rotary: Rotary, seq) -> torch.Tensor:
        streams = [project(x_TD) for project in (self.q_proj, self.k_proj, self.v_proj)]
        if self.conv is not None:  # one convolution, so that ranks exchange one halo
            sizes = [stream.shape[-1] for stream in streams]
            streams = self.conv(torch.cat(streams, -1), seq).split(sizes, -1)
        q_THK, k_THK, v_THV = (stream.unflatten(-1, (self.num_heads, -1)) for stream in streams)
        q_THK = self.q_map(q_THK)
        if self.keys_from_decay:
            log_decay, k_THK = self.decay(streams[1])
        else:
            log_decay, k_THK = self.decay(x_TD), self.k_map(k_THK)
        o_THV = linear_attention(
            q_THK, k_THK, v_THV, log_decay=log_decay, beta=self._beta(x_TD), causal=self.causal,
            normalize=self.normalize, seq=seq,
        )  # fmt: skip
        gate_THV = None if self.g_proj is None else self.g_proj(x_TD).view_as(o_THV)
        return self.o_proj(self.o_norm(o_THV, gate_THV).flatten(1))

    def _beta(self, x_TD):
        if self.b_proj is None:
            return None
        b_TH = self.b_proj(x_TD)
        return b_TH.to(wide_dtype(b_TH.dtype)).sigmoid()


class Mamba2Mixer(nn.Module):
    """Mamba-2's block: x, B and C pass a short convolution; o = attention(C, B, dt x) + D x; norm(o silu(z)).

    B and C, the keys and queries, are shared by all heads. The norm is over all heads together, behind the gate.
    """

    def __init__(self, config, layer: int, kind: str):
        super().__init__()
        family, hidden, size = config.family(kind), config.hidden_size, config.projected_key_size(kind)
        self.num_heads, _, value_size = config.state_shape(kind)
        width = self.num_heads * value_size
        self.parts = [width, size, size]  # x, B, C
        self.widths = [width if family.output_gate == "silu" else 0, sum(self.parts), self.num_heads]  # z, xBC, dt
        self.in_proj = nn.Linear(hidden, sum(self.widths), bias=False)
        self.o_proj = nn.Linear(width, hidden, bias=False)
        self.conv = ShortConvolution(sum(self.parts), family.conv_width) if family.conv_width else None
        self.q_map = build_feature_map(family.feature_map, 1, size)
        self.k_map = build_feature_map(family.feature_map, 1, size)
        self.gate = ScalarGate(self.num_heads)
        self.D = nn.Parameter(torch.empty(self.num_heads))
        self.o_norm = OUTPUT_NORMS[config.output_norm](width, config.norm_eps)

    def init_weights(self) -> None:
        nn.init.ones_(self.D)

    def forward(self, x_TD: torch.Tensor, rotary: Rotary, seq) -> torch.Tensor:
        z_TD, streams, a_TH = self.in_proj(x_TD).split(self.widths, -1)
        if self.conv is not None:
            streams = self.conv(streams, seq)
        x_THV, k_THK, q_THK = (
            part.unflatten(-1, (heads, -1))
            for part, heads in zip(streams.split(self.parts, -1), (self.num_heads, 1, 1))
        )
        log_decay_TH, step_TH = self.gate(a_TH)
        o_THV = linear_attention(
            self.q_map(q_THK).expand(-1, self.num_heads, -1),
            self.k_map(k_THK).expand(-1, self.num_heads, -1),
            (x_THV * step_TH[..., None]).to(x_THV.dtype),
            log_decay=log_decay_TH,
            scale=1.0,
            seq=seq,
        )
        o_TD = (o_THV + self.D[:, None] * x_THV).flatten(1)
        if z_TD.shape[-1]:
            o_TD = swiglu(z_TD, o_TD)
        return self.o_proj(self.o_norm(o_TD))


OUTPUT_NORMS = {"rmsnorm": RMSNorm, "simple_rmsnorm": SimpleRMSNorm}
MIXERS = {
    **dict.fromkeys(SOFTMAX_KINDS, SoftmaxMixer),
    "sla": SLAMixer,
    "llsa": SparseMixer,
    "sparse": SparseMixer,
    "linear:mamba2": Mamba2Mixer,
}


def build_mixer(config, layer: int, kind: str) -> nn.Module:
    """The mixer of a layer; kind is one of `config.LAYER_KINDS`."""
    return MIXERS.get(kind, LinearMixer)(config, layer, kind)
