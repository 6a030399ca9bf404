"""A diffusion transformer over pixels: a pixel is a token, an image a document, whose pixels all see each other.

It learns the velocity of a straight path from images to noise (rectified flow, arXiv 2209.03003): with an image x at
time 0 and noise e at time 1, x_t = (1 - t) x + t e, and the loss is the squared error of v(x_t, t) against e - x.
Tokens stand in Morton order, so that blocks of them are patches. Blocks are modulated by the time of their image (DiT,
arXiv 2212.09748), through one projection for all layers and a table of each layer's own (PixArt, arXiv 2310.00426).

Shape letters: T local tokens in layout order (may be 0) in S runs, each of one image; N images of the batch, D hidden
size, C channels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from longspan.kernels.segment_rows import Runs, rows_of_tokens
from longspan.kernels.wide import wide_dtype
from longspan.models.config import CHANNELS, ModelConfig
from longspan.models.decoder import Block
from longspan.models.layers import RMSNorm, init_weights
from longspan.models.morton import coordinates
from longspan.models.rope import Rotary, image_angles
from longspan.models.tiles import feed_in_tiles
from longspan.parallel.layout import Layout

TIME_FEATURES = 256
SLOWEST, FASTEST = 0.1, 1000.0  # radians per unit of time; as for the 1000 steps of earlier diffusion models


@dataclass(frozen=True)
class Pixels:
    """Of every local token: row and column in its image, int64 [T]. runs: of local tokens; image: of each the number of
    its image, int64 [S]. An image cut in several parts here has as many runs."""

    row: torch.Tensor
    column: torch.Tensor
    runs: Runs
    image: torch.Tensor

    def map(self, move) -> "Pixels":
        """The same with every tensor passed through `move`."""
        return Pixels(move(self.row), move(self.column), self.runs.map(move), move(self.image))


def pixels(layout: Layout, rank: int) -> Pixels:
    """The pixels that `rank` holds of images laid out in Morton order."""
    row, column = coordinates(layout.positions(rank))
    image = np.array([span.document for span in layout.spans[rank]], np.int64)
    runs = Runs.of(layout.local_offsets(rank))
    return Pixels(torch.from_numpy(row), torch.from_numpy(column), runs, torch.from_numpy(image))


class ModulatedBlock(Block):
    """x + gate * mixer(scaled and shifted norm(x)), then the same with the MLP: [T, D] -> [T, D]."""

    def __init__(self, config: ModelConfig, layer: int, kind: str):
        super().__init__(config, layer, kind)
        self.modulation = nn.Parameter(torch.empty(6 * config.hidden_size))

    def init_weights(self) -> None:
        nn.init.zeros_(self.modulation)

    def forward(self, x_TD, modulation_SD, runs: Runs, rotary: Rotary, seq) -> torch.Tensor:
        """modulation_SD: [S, 6 D], of every run of tokens."""
        mixer_S3D, mlp_S3D = (modulation_SD + self.modulation).chunk(2, -1)
        shift_TD, scale_TD, gate_TD = rows_of_tokens(mixer_S3D, runs).chunk(3, -1)
        x_TD, y_TD = self.mixer_norm(x_TD)
        x_TD = x_TD + gate_TD * self.mixer(y_TD * (1 + scale_TD) + shift_TD, rotary, seq)
        if self.mlp_tile:
            return feed_in_tiles(self, (x_TD,), (mlp_S3D,), seq)
        return self.feed(x_TD, mlp_S3D, runs)

    def feed(self, x_TD, modulation_S3D, runs: Runs) -> torch.Tensor:
        shift_TD, scale_TD, gate_TD = rows_of_tokens(modulation_S3D, runs).chunk(3, -1)
        x_TD, y_TD = self.mlp_norm(x_TD)
        return x_TD + gate_TD * self.mlp(y_TD * (1 + scale_TD) + shift_TD)


class DiffusionTransformer(nn.Module):
    """The transformer as `config` describes it; ValueError if the config is not valid.

    Parameters are fp32 and initialised from torch's default generator. At first all gates and the head are zero: every
    block passes its input on, and the velocity is zero.
    """

    called_by_name = ("velocity",)  # what runs the model besides `forward`

    def __init__(self, config: ModelConfig):
        super().__init__()
        config.validate()
        self.config = config
        hidden = config.hidden_size
        # The bias keeps what norms would remove, the size of a pixel's value.
        self.embedding = nn.Linear(CHANNELS, hidden)
        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.modulation = nn.Linear(hidden, (6 + 2) * hidden)  # of blocks, and of the last norm
        kinds = enumerate(config.layer_kinds)
        self.blocks = nn.ModuleList(ModulatedBlock(config, layer, kind) for layer, kind in kinds)
        self.norm = RMSNorm(hidden, config.norm_eps)
        self.head = nn.Linear(hidden, CHANNELS)
        self.init_weights()

    def init_weights(self) -> None:
        """As `layers.init_weights`, the embedding normal with embedding_init_std, modulation and head zero."""
        init_weights(self, self.config)
        for parameter in self.embedding.parameters():
            nn.init.normal_(parameter, std=self.config.embedding_init_std)
        for module in (self.modulation, self.head):
            nn.init.zeros_(module.weight)

    def forward(self, image: torch.Tensor, noise: torch.Tensor, times: torch.Tensor, seq) -> torch.Tensor:
        """The squared error of the velocity, mean over channels and summed over local pixels: a scalar in fp32 (fp64).

        image, noise: [T, C], the clean pixels in the order of seq.layout and what they are mixed with; times: [N], of
        every document of the batch, from 0 (image) to 1 (noise).
        """
        own = seq.derive(pixels)
        time_T1 = times[own.image][own.runs.of_token][:, None]
        error_TC = self._velocity((1 - time_T1) * image + time_T1 * noise, times, seq).to(image.dtype) - (noise - image)
        return error_TC.square().mean(-1).sum()

    def velocity(self, noisy: torch.Tensor, times: torch.Tensor, seq) -> torch.Tensor:
        """v(x_t, t): [T, C] in the compute dtype, of noisy pixels [T, C] at the times [N] of their images."""
        return self._velocity(noisy, times, seq)

    def _velocity(self, noisy_TC, times_N, seq):
        assert len(noisy_TC) == seq.num_tokens_local and len(times_N) == len(seq.layout.lengths)
        own, dtype = seq.derive(pixels), self.embedding.weight.dtype
        x_TD = self.embedding(noisy_TC.to(dtype))
        modulation = self.modulation(self.time(time_features(times_N[own.image]).to(dtype)))
        blocks, last = modulation.split([6 * x_TD.shape[1], 2 * x_TD.shape[1]], -1)
        angles = image_angles(own.row, own.column, self.config.head_size, **self.config.rope, dtype=wide_dtype(dtype))
        for block in self.blocks:
            x_TD = block(x_TD, blocks, own.runs, angles, seq)
        shift_TD, scale_TD = rows_of_tokens(last, own.runs).chunk(2, -1)
        return self.head(self.norm(x_TD) * (1 + scale_TD) + shift_TD)


def time_features(times: torch.Tensor) -> torch.Tensor:
    """[N] -> [N, TIME_FEATURES], cosines and sines of the times at rates from FASTEST to SLOWEST; dtype of times."""
    steps = torch.arange(TIME_FEATURES // 2, dtype=times.dtype, device=times.device) / (TIME_FEATURES // 2)
    angles = times[:, None] * FASTEST * (SLOWEST / FASTEST) ** steps
    return torch.cat([angles.cos(), angles.sin()], -1)


@torch.no_grad()
def sample(model: DiffusionTransformer, noise: torch.Tensor, seq, steps: int) -> torch.Tensor:
    """Images [T, C] from noise [T, C]: `steps` equal steps of Euler's method from time 1 to 0."""
    x_TC = noise
    for step in range(steps, 0, -1):
        times_N = noise.new_full((len(seq.layout.lengths),), step / steps)
        x_TC = x_TC - model.velocity(x_TC, times_N, seq).to(noise.dtype) / steps
    return x_TC
