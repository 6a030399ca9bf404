"""Spans side by side: the tables of the PyTorch form that serves every family, made once per batch on the host.

Spans of similar length form a group. Their chunks are ordered by place in the span, so that one step of a recurrence
takes one chunk of every span that is still running. A block is a few steps in a row.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from longspan.kernels.linear.form import Spans

CHUNK = 64  # tokens, a power of two
ROWS = 32  # chunks per block
SIDE_BY_SIDE = 16  # spans of several chunks in a group: for each of them a state is kept at every block


@dataclass(frozen=True)
class Block:
    """counts: spans running at each of its steps, not increasing; start, stop: its part of Groups.tokens and .slots;
    length: tokens per chunk, padding included, a power of two; padded: whether there is any padding."""

    counts: tuple[int, ...]
    start: int
    stop: int
    length: int
    padded: bool


@dataclass(frozen=True)
class Group:
    """Spans that run side by side, the longest first. entered, left, linked: int64, their rows among the spans that a
    state enters, that one leaves, and that exchange states; None where the group has no such spans, for all or none."""

    blocks: tuple[Block, ...]
    num_spans: int
    entered: torch.Tensor | None
    left: torch.Tensor | None
    linked: torch.Tensor | None


@dataclass(frozen=True)
class Groups:
    """tokens: int64 [T], the tokens in the order of blocks; slots: int64 [T], where each goes in its padded block."""

    groups: tuple[Group, ...]
    num_linked: int
    tokens: torch.Tensor
    slots: torch.Tensor

    @classmethod
    def of(cls, spans: Spans, *_) -> "Groups":
        starts, lengths = np.asarray(spans.offsets[:-1], np.int64), np.diff(np.asarray(spans.offsets, np.int64))
        rows = [{span: row for row, span in enumerate(which)} for which in (spans.entered, spans.left, spans.linked)]
        kinds = [tuple(span in which for which in rows) for span in range(len(lengths))]
        order = sorted(range(len(lengths)), key=lambda span: (kinds[span], -lengths[span]))
        groups, tokens, slots, done = [], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
        for members in _side_by_side(order, kinds, lengths):
            blocks = []
            for first, last in _steps(lengths[members]):
                counts, block_tokens, block_slots, length = _block(starts[members], lengths[members], first, last)
                stop = done + len(block_tokens)
                blocks.append(Block(counts, done, stop, length, sum(counts) * length > len(block_tokens)))
                tokens.append(block_tokens)
                slots.append(block_slots)
                done = stop
            where = [torch.tensor([which[n] for n in members]) if members[0] in which else None for which in rows]
            groups.append(Group(tuple(blocks), len(members), *where))
        tokens, slots = (torch.from_numpy(np.concatenate(parts)) for parts in (tokens, slots))
        return cls(tuple(groups), len(spans.linked), tokens, slots)

    def map(self, move) -> "Groups":
        """The same tables with every tensor passed through `move`."""

        def moved(table, names):
            return replace(table, **{name: move(x) for name in names if (x := getattr(table, name)) is not None})

        groups = tuple(moved(group, ("entered", "left", "linked")) for group in self.groups)
        return replace(moved(self, ("tokens", "slots")), groups=groups)


def _side_by_side(order, kinds, lengths):
    """Runs of spans of one kind, taken from `order`."""
    first = 0
    while first < len(order):
        span = order[first]
        most = SIDE_BY_SIDE if lengths[span] > CHUNK else ROWS
        members = [n for n in order[first : first + most] if kinds[n] == kinds[span]]
        yield members
        first += len(members)


def _steps(lengths):
    """(first, last + 1) steps of each block of spans of these lengths, longest first."""
    running = [int((lengths > step * CHUNK).sum()) for step in range(-(-int(lengths[0]) // CHUNK))]
    first = rows = 0
    for step, count in enumerate(running):
        if rows and rows + count > ROWS:
            yield first, step
            first, rows = step, 0
        rows += count
    yield first, len(running)


def _block(starts, lengths, first, last):
    """counts, tokens, slots and length of the block of these steps."""
    counts, begins, sizes = [], [], []
    for step in range(first, last):
        count = int((lengths > step * CHUNK).sum())
        counts.append(count)
        begins.append(starts[:count] + step * CHUNK)
        sizes.append(np.minimum(lengths[:count] - step * CHUNK, CHUNK))
    begins, sizes = np.concatenate(begins), np.concatenate(sizes)
    length = 1 << int(sizes.max() - 1).bit_length()
    place = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    tokens = np.repeat(begins, sizes) + place
    slots = np.repeat(np.arange(len(sizes)) * length, sizes) + place
    return tuple(counts), tokens, slots, length
