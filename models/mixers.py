"""Token mixers: the only layers in which tokens see each other, through the attention functions and `seq`.

Shape letters: T local tokens, D hidden size, H heads, K head width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from longspan.attention import linear_attention, softmax_attention
from longspan.models.decay import DECAYS
from longspan.models.feature_maps import FEATURE_MAPS
from longspan.models.layers import RMSNorm
from longspan.models.rope import Rotary, rotate


class SoftmaxMixer(nn.Module):
    """Causal softmax attention with rotary positions, grouped key and value heads, optional RMSNorm on q and k."""

    def __init__(self, config, layer: int, kind: str):
        super().__init__()
        hidden, self.head_size = config.hidden_size, config.head_size
        self.q_proj = nn.Linear(hidden, config.num_heads * self.head_size, bias=False)
        self.k_proj = nn.Linear(hidden, config.kv_heads * self.head_size, bias=False)
        self.v_proj = nn.Linear(hidden, config.kv_heads * self.head_size, bias=False)
        self.o_proj = nn.Linear(config.num_heads * self.head_size, hidden, bias=False)
        self.q_norm = RMSNorm(self.head_size, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_size, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_TD: torch.Tensor, rotary: Rotary, seq) -> torch.Tensor:
        heads = (-1, self.head_size)
        q_THK = rotate(self.q_norm(self.q_proj(x_TD).unflatten(-1, heads)), rotary)
        k_THK = rotate(self.k_norm(self.k_proj(x_TD).unflatten(-1, heads)), rotary)
        v_THK = self.v_proj(x_TD).unflatten(-1, heads)
        return self.o_proj(softmax_attention(q_THK, k_THK, v_THK, seq=seq).flatten(1))


class LinearMixer(nn.Module):
    """Linear attention: o = RMSNorm(attention(phi(q), phi(k), v)) per head, times silu(gate(x)) if configured.

    All heads have their own key and value head. The norm stands where softmax attention has its denominator.
    """

    def __init__(self, config, layer: int, kind: str):
        super().__init__()
        hidden, self.head_size = config.hidden_size, config.head_size
        width = config.num_heads * self.head_size
        self.feature_map = FEATURE_MAPS[config.feature_map]
        self.normalize = config.linear_normalize
        self.q_proj = nn.Linear(hidden, width, bias=False)
        self.k_proj = nn.Linear(hidden, width, bias=False)
        self.v_proj = nn.Linear(hidden, width, bias=False)
        self.g_proj = nn.Linear(hidden, width, bias=False) if config.output_gate else None
        self.o_proj = nn.Linear(width, hidden, bias=False)
        self.o_norm = RMSNorm(self.head_size, config.norm_eps)
        self.decay = DECAYS[kind.removeprefix("linear:")](config, layer)

    def forward(self, x_TD: torch.Tensor, rotary: Rotary, seq) -> torch.Tensor:
        heads = (-1, self.head_size)
        q_THK = self.feature_map(self.q_proj(x_TD)).unflatten(-1, heads)
        k_THK = self.feature_map(self.k_proj(x_TD)).unflatten(-1, heads)
        v_THK = self.v_proj(x_TD).unflatten(-1, heads)
        log_decay = self.decay(x_TD)
        o_THK = linear_attention(q_THK, k_THK, v_THK, log_decay=log_decay, normalize=self.normalize, seq=seq)
        o_TD = self.o_norm(o_THK).flatten(1)
        if self.g_proj is not None:
            o_TD = o_TD * F.silu(self.g_proj(x_TD))
        return self.o_proj(o_TD)


def build_mixer(config, layer: int, kind: str) -> nn.Module:
    """The mixer of a layer; kind is one of `config.LAYER_KINDS`."""
    return (SoftmaxMixer if kind == "softmax" else LinearMixer)(config, layer, kind)
