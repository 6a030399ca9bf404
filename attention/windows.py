"""Windows of one to three dimensions: every token sees the tokens near its own in a grid, exactly (NATTEN, arXiv
2204.07143, 2504.16922)."""

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np
import torch

from longspan.attention.selection import require_whole
from longspan.attention.static_blocks import Static, compact
from longspan.kernels.sparse import Boxes

PART = 16  # tokens whose windows are looked at together where blocks are listed
PAIRS = 1 << 18  # pairs of blocks whose parts are compared at once
ORDERS = ("row_major", "morton")


@dataclass(frozen=True)
class Window(Static):
    """Tokens lie in a grid; along each axis a token at place i of n sees w places: from i - w // 2 on, moved inwards at
    the borders, so that all see min(w, n) of them; along a causal axis i - w + 1 to i, as far as they are there.

    window: places seen along each axis, slowest first. shape: places of each axis in a document; 0 for the first, or
    shape left out in one dimension: as many as the document needs. A document may end before the grid does. order of
    tokens: "row_major", or "morton" (Z-order) in the grid, or in one slice after the other where the first axis has
    0. causal_axes: one flag per axis; None: the first under a causal mask, else none. Under a causal mask no later
    token is seen, whatever the axes. Blocks: tokens that share a list; they do not change the result.
    """

    window: tuple[int, ...]
    shape: tuple[int, ...] = (0,)
    order: str = "row_major"
    causal_axes: tuple[bool, ...] | None = None
    query_block: int = 128
    key_block: int = 64

    def __post_init__(self):
        for name in ("window", "shape", "causal_axes"):
            value = getattr(self, name)
            if name != "causal_axes" or value is not None:
                object.__setattr__(self, name, tuple(value) if isinstance(value, (tuple, list)) else (value,))
        require_whole(self, query_block=1, key_block=1)
        if not 1 <= len(self.window) <= 3 or len(self.shape) != len(self.window):
            raise ValueError(
                f"Window.window={self.window} and Window.shape={self.shape} must have the same 1 to 3 axes"
            )
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (*self.window, *self.shape))
        if not whole or min(self.window) < 1 or min(self.shape[1:], default=1) < 1 or self.shape[0] < 0:
            raise ValueError(
                f"Window.window={self.window} and Window.shape={self.shape} must be whole numbers of at least 1 on"
                " every axis; only the first of shape may be 0, as long as a document needs"
            )
        if self.order not in ORDERS:
            raise ValueError(f"Window.order={self.order!r} is unknown; use {' or '.join(ORDERS)}")
        if self.causal_axes is not None and len(self.causal_axes) != len(self.window):
            raise ValueError(f"Window.causal_axes={self.causal_axes} must have a flag for each axis of {self.window}")

    def check(self, lengths) -> None:
        for length in lengths:
            if self.shape[0] and length > prod(self.shape):
                raise ValueError(
                    f"a document of {length} tokens does not fit Window.shape={self.shape}, which has"
                    f" {prod(self.shape)} places; use 0 for the first axis"
                )
        if sum(self._bits(max(lengths))) > 31:
            raise ValueError(f"Window.shape={self.shape} with {max(lengths)} tokens is too large for 31 bits of places")

    def rule(self, layout, rank: int, causal: bool) -> Boxes:
        longest = max(layout.lengths)
        shifts = np.cumsum([0, *self._bits(longest)[:0:-1]])[::-1]  # of each axis, the first highest
        bounds = [np.zeros((0, 2), np.int32)]
        for span in layout.spans[rank]:
            low, high = self._bounds(layout.lengths[span.document], causal)
            bounds.append(np.stack([_packed(x[:, span.start : span.stop], shifts) for x in (low, high)], 1))
        guard = sum(1 << int(shift) + bits - 1 for shift, bits in zip(shifts, self._bits(longest)))
        coordinates = _packed(self._coordinates(longest), shifts)
        return Boxes(torch.from_numpy(coordinates), torch.from_numpy(np.concatenate(bounds)), guard)

    def listed(self, document, length, blocks, causal):
        (low, high), at = self._bounds(length, causal), self._coordinates(length)
        part, key_part = _part(self.query_block), _part(self.key_block)
        low, high = _hull(low, high, part)
        key_low, key_high = _hull(at, at, key_part)
        queries, keys = self.query_block // part, self.key_block // key_part
        tops = [*_hull(low, high, queries), *_hull(key_low, key_high, keys)]
        marks = _meet(*(x[:, blocks, None] for x in tops[:2]), *(x[:, None] for x in tops[2:]))
        row, column = np.nonzero(marks)
        for first in range(0, len(row), PAIRS):  # parts of what meets as a whole
            pair = slice(first, first + PAIRS)
            some = np.minimum(blocks[row[pair], None] * queries + np.arange(queries), low.shape[1] - 1)
            others = np.minimum(column[pair, None] * keys + np.arange(keys), key_low.shape[1] - 1)
            hulls = low[:, some, None], high[:, some, None], key_low[:, others[:, None]], key_high[:, others[:, None]]
            marks[row[pair], column[pair]] = _meet(*hulls).any((1, 2))
        return compact(marks)

    def pairs(self, length: int) -> int:
        """Query-key pairs of one head in a document of `length` tokens under a causal mask."""
        return _pairs(self, length)

    def _extents(self, length):
        return (self.shape[0] or -(-length // prod(self.shape[1:])), *self.shape[1:])

    def _bits(self, length):
        """Of a field for each axis, with the zero above it."""
        return [int(n - 1).bit_length() + 1 for n in self._extents(length)]

    def _coordinates(self, length):
        return _coordinates(self.shape, self.order, int(length))

    def _bounds(self, length, causal):
        """The lowest and highest place that each token sees: int64 [axes, length] each."""
        return _bounds(self, int(length), causal)


@lru_cache(8)
def _coordinates(shape, order, length):
    """The place of each token along each axis: int64 [axes, length]."""
    grid = shape if shape[0] else shape[1:]
    cells = np.arange(length if len(shape) == 1 else prod(grid))
    places = np.stack(np.unravel_index(cells, grid)) if len(shape) > 1 else cells[None]
    if order == "morton":
        code = np.zeros_like(cells)
        for bit in range(int(places.max()).bit_length()):
            for axis, place in enumerate(places[::-1]):  # the last axis takes the lowest bit
                code |= (place >> bit & 1) << bit * len(places) + axis
        places = places[:, np.argsort(code)]
    if len(shape) > len(grid) and len(shape) > 1:
        cell, slices = np.arange(length) % prod(grid), np.arange(length) // prod(grid)
        return np.concatenate([slices[None], places[:, cell]])
    return places[:, :length]


@lru_cache(8)
def _bounds(selection, length, causal):
    at, extents = selection._coordinates(length), selection._extents(length)
    flags = selection.causal_axes
    if flags is None:
        flags = (causal, *[False] * (len(extents) - 1))
    low, high = np.empty_like(at), np.empty_like(at)
    for axis, (n, width, one_way) in enumerate(zip(extents, selection.window, flags)):
        if one_way:
            low[axis], high[axis] = np.maximum(at[axis] - width + 1, 0), at[axis]
        else:
            low[axis] = np.clip(at[axis] - width // 2, 0, max(n - width, 0))
            high[axis] = np.minimum(low[axis] + width, n) - 1
    return low, high


@lru_cache(64)
def _pairs(selection, length):
    low, high = selection._bounds(length, True)
    at = selection._coordinates(length)
    if selection.order == "row_major":  # keys before the token in its box: first by the first axis, then the next
        total, sizes = np.ones(length, np.int64), high - low + 1
        for axis in range(len(at)):
            total += (at[axis] - low[axis]) * sizes[axis + 1 :].prod(0)
        return int(total.sum())
    extents = selection._extents(length)
    position = np.full(extents, length)
    position[tuple(at)] = np.arange(length)
    total, reach = 0, (high - low).max(1) + 1
    for cell in np.ndindex(*reach):
        key = low + np.array(cell)[:, None]
        there = (key <= high).all(0)
        total += int((there & (position[tuple(np.where(there, key, 0))] <= np.arange(length))).sum())
    return total


def _packed(places, shifts):
    return (places << shifts[:, None]).sum(0).astype(np.int32)


def _hull(low, high, size):
    """Lowest and highest of every `size` columns."""
    starts = np.arange(0, low.shape[1], size)
    return np.minimum.reduceat(low, starts, 1), np.maximum.reduceat(high, starts, 1)


def _meet(low, high, key_low, key_high):
    """Whether boxes [axes, ...] have a place in common."""
    return ((low <= key_high) & (key_low <= high)).all(0)


def _part(block):
    return max(n for n in range(1, min(block, PART) + 1) if block % n == 0)
