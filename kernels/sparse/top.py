"""The keys with the highest scores for each row, out of a range of keys: lists of key blocks by their means."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from longspan.kernels.sparse import forms

SCORE_ELEMENTS = 1 << 22  # scores that plain PyTorch holds at once: 16 MB
WIDEST = 256  # heads that fit the Triton kernel
TOGETHER = 16  # rows in a tile of it where ranges are short


@dataclass(frozen=True)
class Ranges:
    """What each row may choose from and how much of it: int32 [rows] first, stop and most; bounds: (first, stop) on the
    host; kept: the highest of `most`."""

    first: torch.Tensor
    stop: torch.Tensor
    most: torch.Tensor
    bounds: np.ndarray
    kept: int

    @classmethod
    def of(cls, first: np.ndarray, stop: np.ndarray, keep: float) -> "Ranges":
        """keep: so many, or below 1 a share of the range, at least one."""
        most = kept_of(stop - first, keep)
        tensors = (torch.from_numpy(x.astype(np.int32)) for x in (first, stop, most))
        return cls(*tensors, np.stack([first, stop], 1), int(most.max(initial=0)))

    def __len__(self) -> int:
        return len(self.bounds)

    @cached_property
    def widest(self) -> int:
        """The most keys from the first to the last that TOGETHER successive rows may choose from."""
        first, stop = np.where(self.bounds[:, :1] < self.bounds[:, 1:], self.bounds, (np.iinfo(np.int64).max, 0)).T
        runs = np.arange(0, len(self), TOGETHER)
        least, most = (np.minimum.reduceat(first, runs), np.maximum.reduceat(stop, runs)) if len(runs) else (0, 0)
        return int(np.max(most - np.minimum(least, most), initial=0))

    def map(self, move) -> "Ranges":
        """The same with every tensor passed through `move`."""
        return replace(self, first=move(self.first), stop=move(self.stop), most=move(self.most))


def kept_of(size: np.ndarray, keep: float) -> np.ndarray:
    """How many of so many are kept: `keep`, or below 1 that share, at least one."""
    return np.minimum(size, keep if keep >= 1 else np.maximum((keep * size).astype(np.int64), 1))


def top(means, keys, router, ranges: Ranges, *, first: int = 0, recent: int = 0, always=None) -> torch.Tensor:
    """int32 [H, R, n]: for each row the ranges.most keys from ranges.first to ranges.stop with the highest products,
    ascending, -1 after the last. Of equal products the lower number is taken.

    means: [rows of means, H, D], router: int32 [R], whose mean chooses for each row (not read where there is nothing to
    choose), in at least fp32; keys: [T, H, D] in any. first, recent: so many at either end of a range are always taken.
    always: int32 [R, m], listed after what is chosen, ascending, higher than it, -1 after the last; None for nothing.
    Triton kernels make products of two bf16 halves of each mean: to about 2^-16 of the lengths of the means.
    """
    if forms.takes(means) and means.shape[2] <= WIDEST:
        from longspan.kernels.sparse import top_few_triton, top_triton

        if top_few_triton.takes(ranges, keys.shape[1]):
            return top_few_triton.top_few_triton(means, keys, router, ranges, first, recent, always)
        return top_triton.top_triton(means, keys, router, ranges, first, recent, always)
    heads, means = keys.shape[1], means[router.clamp(min=0)].transpose(0, 1)
    keys = keys.transpose(0, 1).to(means.dtype)
    found = [_top(means, keys, ranges, rows, first, recent) for rows in _batches(ranges.bounds, heads)]
    found = torch.cat(found, 1) if found else router.new_empty(heads, len(ranges), 0)
    return ascending(found if always is None else torch.cat([found, always.expand(heads, -1, -1)], 2), keys.shape[1])


def ascending(lists: torch.Tensor, end: int) -> torch.Tensor:
    """int32 lists [..., n] of numbers below `end` and -1 for none, in ascending order with -1 last."""
    ordered = torch.where(lists < 0, end, lists).int().sort(-1).values
    return ordered.masked_fill(ordered == end, -1)


def _top(means, keys, ranges, rows, forced_first, forced_recent):
    start, end = int(ranges.bounds[rows, 0].min()), int(ranges.bounds[rows, 1].max())
    column = torch.arange(start, end, device=keys.device)
    first, stop = ranges.first[rows, None], ranges.stop[rows, None]
    scores = means[:, rows] @ keys[:, start:end].mT
    scores = scores.masked_fill((column < first + forced_first) | (column >= stop - forced_recent), torch.inf)
    scores = scores.masked_fill((column < first) | (column >= stop), -torch.inf)
    order = scores.sort(stable=True, dim=-1, descending=True).indices[..., : ranges.kept]
    there = torch.arange(order.shape[-1], device=keys.device) < ranges.most[rows, None]
    return torch.nn.functional.pad(torch.where(there, order + start, -1), (0, ranges.kept - order.shape[-1]), value=-1)


def _batches(bounds, heads) -> Iterator[slice]:
    """Runs of rows whose scores fit the limit, by the keys that they reach."""
    first, count = 0, len(bounds)
    while first < count:
        stop, (low, high) = first, bounds[first]
        while stop < count:
            low, high = min(low, bounds[stop, 0]), max(high, bounds[stop, 1])
            if stop > first and (stop + 1 - first) * (high - low) * heads > SCORE_ELEMENTS:
                break
            stop += 1
        yield slice(first, stop)
        first = stop
