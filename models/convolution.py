"""The short convolution that lets every channel see the tokens just before its own."""

import torch
from torch import nn

from longspan.attention import short_convolution


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over `width` tokens inside each document, across ranks: [T, D] -> [T, D].

    activation: None or "silu", applied to the result.
    """

    def __init__(self, channels: int, width: int = 4, activation: str | None = "silu", bias: bool = False):
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def init_weights(self) -> None:
        """Uniform within 1 / sqrt(width), as torch initialises depthwise convolutions."""
        bound = self.weight.shape[1] ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x_TD: torch.Tensor, seq) -> torch.Tensor:
        return short_convolution(x_TD, self.weight, self.bias, activation=self.activation, seq=seq)
