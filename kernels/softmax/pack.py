"""One packed attention call: which query rows attend to which key rows."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch


@dataclass(frozen=True)
class Pack:
    """Sequences laid end to end, as in the varlen calls of attention libraries.

    Query rows cu_q[i]:cu_q[i+1] attend to key rows cu_k[i]:cu_k[i+1]. Every sequence has at least one query and one
    key: libraries disagree about empty ones, one of them kills the process. With `causal`, every sequence is square,
    so top-left and bottom-right alignment of the mask (libraries differ here too) mean the same.
    """

    cu_q: tuple[int, ...]
    cu_k: tuple[int, ...]
    causal: bool
    _tensors: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        lengths_q, lengths_k = self.lengths_q, self.lengths_k
        assert self.cu_q[0] == self.cu_k[0] == 0 and len(lengths_q) == len(lengths_k) >= 1, self
        assert min(lengths_q) >= 1 and min(lengths_k) >= 1, self
        assert not self.causal or lengths_q == lengths_k, self

    @property
    def lengths_q(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in pairwise(self.cu_q))

    @property
    def lengths_k(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in pairwise(self.cu_k))

    @property
    def num_sequences(self) -> int:
        return len(self.cu_q) - 1

    @property
    def equal(self) -> bool:
        """Whether sequences are equally long, on either side, so that they are a batch of dense calls."""
        return len(set(self.lengths_q)) == len(set(self.lengths_k)) == 1

    @property
    def max_q(self) -> int:
        return max(self.lengths_q)

    @property
    def max_k(self) -> int:
        return max(self.lengths_k)

    def sequences(self) -> Iterator[tuple[slice, slice]]:
        """(query rows, key rows) of each sequence."""
        for (start_q, stop_q), (start_k, stop_k) in zip(pairwise(self.cu_q), pairwise(self.cu_k), strict=True):
            yield slice(start_q, stop_q), slice(start_k, stop_k)

    def map(self, move) -> "Pack":
        """The same pack with its offsets, as tensors, passed through `move` ahead of their use."""
        pack = Pack(self.cu_q, self.cu_k, self.causal)
        for side, offsets in (("q", self.cu_q), ("k", self.cu_k)):
            moved = move(torch.tensor(offsets, dtype=torch.int32))
            pack._tensors[side, moved.device] = moved
        return pack

    def cu_q_tensor(self, device: torch.device) -> torch.Tensor:
        """int32 [num_sequences + 1] on `device`, copied there once."""
        return self._tensor("q", self.cu_q, device)

    def cu_k_tensor(self, device: torch.device) -> torch.Tensor:
        """int32 [num_sequences + 1] on `device`, copied there once."""
        return self._tensor("k", self.cu_k, device)

    def offsets_tensor(self, side: str, stride: int, batch: int, device: torch.device) -> torch.Tensor:
        """int64 [batch + 1]: where each sequence of `side` ("q" or "k") starts if rows are `stride` elements apart.

        Sequences past the last are empty ones at its end.
        """
        key = (side, torch.device(device), stride, batch)
        if key not in self._tensors:
            offsets = {"q": self.cu_q_tensor, "k": self.cu_k_tensor}[side](device).long()
            filled = torch.cat([offsets, offsets[-1:].expand(batch - self.num_sequences)])
            self._tensors[key] = filled * stride
        return self._tensors[key]

    def lengths_tensor(self, side: str, batch: int, device: torch.device) -> torch.Tensor:
        """int32 [batch]: lengths of the sequences of `side`, then zeros."""
        key = (side, torch.device(device), batch)
        if key not in self._tensors:
            self._tensors[key] = self.offsets_tensor(side, 1, batch, device).diff().int()
        return self._tensors[key]

    def _tensor(self, side: str, offsets: tuple[int, ...], device: torch.device) -> torch.Tensor:
        key = (side, torch.device(device))
        if key not in self._tensors:
            self._tensors[key] = torch.tensor(offsets, dtype=torch.int32, device=device)
        return self._tensors[key]
