"""The decoder of models/decoder.py as one writes it in plain torch: the same parameters under the same names.

What other systems of long-sequence training plug into it: how attention sees other ranks, another mixer of tokens,
another way to the loss. Shape letters: T tokens on this rank, H heads, K head width, D hidden size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from longspan.models.layers import SwiGLU, init_weights


class Attention(nn.Module):
    """Causal softmax attention with rotary positions. attend: q, k, v [1, H, T, K] -> [1, H, T, K]."""

    def __init__(self, config, attend: Callable):
        super().__init__()
        self.attend, self.head_size = attend, config.head_size
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(config.hidden_size, config.hidden_size, bias=False) for _ in range(4)
        )

    def forward(self, x, cos, sin):
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = self.attend(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)): [1, T, D]; computed again in the backward."""

    def __init__(self, config, mixer: nn.Module):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = mixer
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.mlp_width)

    def forward(self, x, cos, sin):
        return checkpoint(self._forward, x, cos, sin, use_reentrant=False)

    def _forward(self, x, cos, sin):
        x = x + self.mixer(self.mixer_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class PlainDecoder(nn.Module):
    """config: a ModelConfig with as many key heads as heads, without qk_norm and tied embeddings. mixer: called for
    every layer. loss: (head, hidden [1, T, D], labels [1, T]) -> the cross-entropy summed over tokens."""

    def __init__(self, config, mixer: Callable[[], nn.Module], loss: Callable | None = None):
        super().__init__()
        if config.kv_heads != config.num_heads or config.qk_norm or config.tie_embeddings or config.rope_scaling != 1:
            raise ValueError("the plain decoder has a key head per head, no qk_norm, rope_scaling or tied embeddings")
        self.config, self.loss = config, loss or self._chunked_loss
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, mixer()) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        nn.init.normal_(self.embedding.weight, std=config.embedding_init_std)
        init_weights(self, config)

    def forward(self, tokens, labels, positions):
        """tokens, labels, positions: int64 [1, T], this rank's."""
        x = self.embedding(tokens)
        size = self.config.head_size
        exponents = torch.arange(0, size, 2, dtype=torch.float64, device=x.device) / size
        angles = positions[0, :, None].double() * self.config.rope_base**-exponents
        cos, sin = (f(torch.cat((angles, angles), -1)).to(x.dtype) for f in (torch.cos, torch.sin))
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.loss(self.head, self.norm(x), labels)

    def _chunked_loss(self, head, x, labels):
        """Logits of `loss_chunk` tokens at a time, computed again in the backward."""
        pairs = zip(x[0].split(self.config.loss_chunk), labels[0].split(self.config.loss_chunk), strict=True)
        return torch.stack([checkpoint(summed_loss, head, *pair, use_reentrant=False) for pair in pairs]).sum()


def summed_loss(head, x, labels):
    return F.cross_entropy(head(x).float(), labels, reduction="sum")


def _rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
