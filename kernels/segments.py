"""Packed tokens cut into segments, and segments into chunks: the table every linear-attention kernel works from."""

from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property

import torch

CHUNK = 64  # tokens; 4CD + 4D^2 operations per token and head keep D = 64..256 near the balance point


@dataclass(frozen=True)
class Segments:
    """Runs of consecutive tokens of one document on this rank.

    offsets: where each segment starts among the T local tokens, and T itself (N + 1 numbers, strictly increasing).
    Segments are cut into chunks of at most CHUNK tokens; padding fills each segment's last chunk.
    """

    offsets: tuple[int, ...]
    device: torch.device = torch.device("cpu")

    def to(self, device) -> "Segments":
        return replace(self, device=torch.device(device))

    @property
    def num_segments(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return self.offsets[-1]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in zip(self.offsets, self.offsets[1:]))

    @cached_property
    def chunk_offsets(self) -> tuple[int, ...]:
        """First chunk of each segment, and the number of chunks (N + 1 numbers)."""
        offsets = [0]
        for length in self.lengths:
            offsets.append(offsets[-1] + -(-length // CHUNK))
        return tuple(offsets)

    @property
    def num_chunks(self) -> int:
        return self.chunk_offsets[-1]

    @cached_property
    def first_tokens(self) -> torch.Tensor:
        """int64 [N]: the first token of each segment."""
        return torch.tensor(self.offsets[:-1], dtype=torch.int64, device=self.device)

    @cached_property
    def last_tokens(self) -> torch.Tensor:
        """int64 [N]: the last token of each segment."""
        return torch.tensor(self.offsets[1:], dtype=torch.int64, device=self.device) - 1

    @cached_property
    def token_segment(self) -> torch.Tensor:
        """int64 [T]: the segment of each token."""
        return self._expand(range(self.num_segments), self.lengths)

    @cached_property
    def chunk_segment(self) -> torch.Tensor:
        """int64 [num_chunks]: the segment of each chunk."""
        chunks = [stop - start for start, stop in zip(self.chunk_offsets, self.chunk_offsets[1:])]
        return self._expand(range(self.num_segments), chunks)

    def chunk_segment_range(self, a: int, b: int) -> tuple[int, int]:
        """First and last segment of chunks a..b, known on the host."""
        return bisect_right(self.chunk_offsets, a) - 1, bisect_right(self.chunk_offsets, b - 1) - 1

    @cached_property
    def padded_slot(self) -> torch.Tensor | None:
        """int64 [T]: row of each token once every segment is padded to whole chunks; None if nothing is padded."""
        if all(length % CHUNK == 0 for length in self.lengths):
            return None
        shifts = [chunk * CHUNK - start for chunk, start in zip(self.chunk_offsets, self.offsets)][: self.num_segments]
        return torch.arange(self.num_tokens, device=self.device) + self._expand(shifts, self.lengths)

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

    def _expand(self, values, counts) -> torch.Tensor:
        values = torch.tensor(list(values), dtype=torch.int64, device=self.device)
        return values.repeat_interleave(torch.tensor(list(counts), dtype=torch.int64, device=self.device))
