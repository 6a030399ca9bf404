"""Packed tokens cut into segments, and segments into chunks: the table every linear-attention kernel works from."""

from bisect import bisect_right
from dataclasses import dataclass, replace

import numpy as np
import torch

CHUNK = 64  # tokens; 4CD + 4D^2 operations per token and head keep D = 64..256 near the balance point


@dataclass(frozen=True)
class Segments:
    """Runs of consecutive tokens of one document on this rank.

    offsets: where each segment starts among the T local tokens, and T itself (N + 1 numbers, strictly increasing).
    Segments are cut into chunks of at most CHUNK tokens; padding fills each segment's last chunk. Tensors are int64.
    """

    offsets: tuple[int, ...]
    chunk_offsets: tuple[int, ...]  # first chunk of each segment, and the number of chunks (N + 1 numbers)
    first_tokens: torch.Tensor  # [N]
    last_tokens: torch.Tensor  # [N]
    token_segment: torch.Tensor  # [T]: the segment of each token
    chunk_segment: torch.Tensor  # [num_chunks]: the segment of each chunk
    padded_slot: torch.Tensor | None  # [T]: row of each token after padding to whole chunks; None if nothing is padded

    @classmethod
    def of(cls, offsets) -> "Segments":
        """The tables for segments that start at `offsets`, whose last entry is the number of tokens."""
        offsets = np.asarray(offsets, np.int64)
        lengths = np.diff(offsets)
        chunk_counts = -(-lengths // CHUNK)
        chunk_offsets = np.concatenate([[0], np.cumsum(chunk_counts)])
        number = np.arange(len(lengths))
        shifts = np.repeat(chunk_offsets[:-1] * CHUNK - offsets[:-1], lengths)
        tensors = (
            offsets[:-1].copy(),
            offsets[1:] - 1,
            np.repeat(number, lengths),
            np.repeat(number, chunk_counts),
            np.arange(offsets[-1]) + shifts if (lengths % CHUNK).any() else None,
        )
        tensors = (None if x is None else torch.from_numpy(x) for x in tensors)
        return cls(tuple(offsets.tolist()), tuple(chunk_offsets.tolist()), *tensors)

    def map(self, move) -> "Segments":
        """The same segments with every tensor passed through `move`."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return replace(self, **{name: move(x) for name, x in tensors.items()})

    @property
    def num_segments(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_chunks(self) -> int:
        return self.chunk_offsets[-1]

    def chunk_segment_range(self, a: int, b: int) -> tuple[int, int]:
        """First and last segment of chunks a..b, known on the host."""
        return bisect_right(self.chunk_offsets, a) - 1, bisect_right(self.chunk_offsets, b - 1) - 1

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """[T, ...] -> [num_chunks, CHUNK, ...] with zeros in the padding."""
        if self.padded_slot is None:
            return x.reshape(self.num_chunks, CHUNK, *x.shape[1:])
        padded = x.new_zeros(self.num_chunks * CHUNK, *x.shape[1:])
        return padded.index_copy_(0, self.padded_slot, x).view(self.num_chunks, CHUNK, *x.shape[1:])

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """[num_chunks, CHUNK, ...] -> [T, ...]."""
        rows = padded.reshape(self.num_chunks * CHUNK, *padded.shape[2:])
        return rows if self.padded_slot is None else rows.index_select(0, self.padded_slot)
