"""The decoder: embedding, blocks of mixer and SwiGLU, norm, loss. It sees tokens, labels and `seq`, never a rank.

Shape letters: T local tokens in layout order (may be 0), D hidden size, V vocabulary.
"""

import torch
from torch import nn

from longspan.kernels.loss import chunked_cross_entropy
from longspan.kernels.wide import wide_dtype
from longspan.models.config import ModelConfig
from longspan.models.layers import ResidualRMSNorm, RMSNorm, SwiGLU, init_weights
from longspan.models.mixers import build_mixer
from longspan.models.rope import Rotary, rotary_angles
from longspan.models.tiles import feed_in_tiles


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)): [T, D] -> [T, D]."""

    mlp_tile = 0  # tokens for which the MLP is computed at once, see tiles.py; 0: all
    visit_tiles = staticmethod(iter)  # what goes through a list of tiles

    def __init__(self, config: ModelConfig, layer: int, kind: str):
        super().__init__()
        self.mixer_norm = ResidualRMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = build_mixer(config, layer, kind)
        self.mlp_norm = ResidualRMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.mlp_width)

    def forward(self, x_TD: torch.Tensor, rotary: Rotary, seq) -> torch.Tensor:
        x_TD, y_TD = self.mixer_norm(x_TD)
        branch_TD = self.mixer(y_TD, rotary, seq)
        if self.mlp_tile:
            return feed_in_tiles(self, (x_TD + branch_TD,))
        return self.feed(x_TD, branch_TD)

    def feed(self, x_TD: torch.Tensor, branch_TD: torch.Tensor | None = None) -> torch.Tensor:
        """The half of the block that is local to tokens, of the stream and what is still to be added to it."""
        x_TD, y_TD = self.mlp_norm(x_TD, branch_TD)
        return x_TD + self.mlp(y_TD)


class Decoder(nn.Module):
    """A pre-norm decoder of text as `config` describes it; ValueError if the config is not valid.

    Parameters are fp32 and initialised from torch's default generator. Built on the meta device, they are materialised
    with `to_empty` and then `init_weights`.
    """

    called_by_name = ("logits",)  # what runs the model besides `forward`
    cross_entropy = staticmethod(chunked_cross_entropy)  # of hidden [T, D], the head's weight, labels and loss_chunk

    def __init__(self, config: ModelConfig):
        super().__init__()
        config.validate()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer, kind) for layer, kind in enumerate(config.layer_kinds))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """The embedding normal with embedding_init_std, everything else as `layers.init_weights`."""
        nn.init.normal_(self.embedding.weight, std=self.config.embedding_init_std)
        init_weights(self, self.config)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor, seq) -> torch.Tensor:
        """The cross-entropy summed over the local labelled tokens: a scalar in fp32 (fp64 in fp64 models).

        tokens, labels: int64 [T], this rank's part of the batch in the order of seq.layout; label -100 means none.
        """
        hidden_TD = self.hidden(tokens, seq)
        return self.cross_entropy(hidden_TD, self.head_weight(), labels, self.config.loss_chunk)

    def logits(self, tokens: torch.Tensor, seq) -> torch.Tensor:
        """[T, V] in the compute dtype; for short inputs, since training never holds logits of a whole sequence."""
        return self.hidden(tokens, seq) @ self.head_weight().t()

    def hidden(self, tokens: torch.Tensor, seq) -> torch.Tensor:
        """[T, D], what the head multiplies."""
        assert tokens.shape == (seq.num_tokens_local,), (tokens.shape, seq.num_tokens_local)
        x_TD = self.embedding(tokens)
        angles = rotary_angles(seq.positions, self.config.head_size, **self.config.rope, dtype=wide_dtype(x_TD.dtype))
        for block in self.blocks:
            x_TD = block(x_TD, angles, seq)
        return self.norm(x_TD)

    def head_weight(self) -> torch.Tensor:
        """[V, D]."""
        return self.embedding.weight if self.head is None else self.head.weight
