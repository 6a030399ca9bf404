"""Where rows of means are in LLSA (attention.hierarchy): a pure function of the layout, made once per batch."""

from dataclasses import dataclass
from math import log

import numpy as np
import torch

from longspan.attention.block_tables import Pieces, Ranges, pieces
from longspan.kernels.sparse import Blocks
from longspan.parallel.layout import Layout


@dataclass(frozen=True)
class Level:
    """Level l of all documents; all int64 on the device. router: the row whose mean query chooses for each. parent:
    row of the level above. children: [rows above, block], its rows under each of those, -1 for none; before, causal:
    [rows, block], those under a row's own parent that come before it. own, causal: [local pieces, 1], the row above
    each piece, whose children are listed as well (the mask takes those that are past). blocks: [rows above, 2], blocks
    of coarse keys under each. The last level has candidates instead of what leads down from above."""

    router: torch.Tensor
    parent: torch.Tensor | None = None
    children: torch.Tensor | None = None
    before: torch.Tensor | None = None
    own: torch.Tensor | None = None
    blocks: torch.Tensor | None = None
    candidates: Ranges | None = None


@dataclass(frozen=True)
class HierarchyTables:
    """queries, keys: the fine blocks. sizes: int64 [rows] per level, tokens. under: int64 [rows, block] per level but
    the first, rows of the level before. ancestors: int64 [local pieces] per level. coarse_blocks, coarse_weight: blocks
    of rows of all levels laid end to end. top: int64 [local pieces, n], blocks of the last level that each piece sees.
    diagonal: int64 [local pieces, 1 or 0]."""

    queries: Pieces
    keys: Pieces
    levels: tuple[Level, ...]
    sizes: tuple[torch.Tensor, ...]
    under: tuple[torch.Tensor, ...]
    ancestors: tuple[torch.Tensor, ...]
    coarse_blocks: Blocks
    coarse_weight: torch.Tensor
    top: torch.Tensor
    diagonal: torch.Tensor

    def map(self, move) -> "HierarchyTables":
        """The same with every tensor passed through `move`."""
        return _map(self, move)


def _map(value, move):
    if isinstance(value, torch.Tensor):
        return move(value)
    if isinstance(value, tuple):
        return tuple(_map(x, move) for x in value)
    if isinstance(value, (Level, HierarchyTables)):
        return type(value)(**{name: _map(x, move) for name, x in vars(value).items()})
    return value.map(move) if hasattr(value, "map") else value


def hierarchy_tables(layout: Layout, rank: int, block: int, keep: int, levels: int, causal: bool) -> HierarchyTables:
    """The tables of `rank`. block: tokens of a fine block, and rows in a row of the next level."""
    fine, lengths = pieces(layout, rank, block), np.array(layout.lengths)
    rows = [_Rows.of(lengths, block, level) for level in range(1, levels + 2)]
    chain = [fine.block.numpy()]  # the row of every level above each local piece
    for level in rows[:-1]:
        chain.append(level.parent[chain[-1]])
    coarse_blocks, weights, blocks_under = _coarse_blocks(rows[:-1], lengths, block)

    tables = []
    for level, under, above in zip(rows, blocks_under, chain[1:levels]):
        siblings = level.children[level.parent]
        before = np.where(siblings < np.arange(len(siblings))[:, None], siblings, -1)
        tables.append(
            Level(
                _int64(level.router(causal)),
                parent=_int64(level.parent),
                children=_int64(level.children),
                before=_int64(before) if causal else None,
                own=_int64(above[:, None]) if causal else None,
                blocks=_int64(under),
            )
        )
    last = rows[levels - 1]
    chosen_for = np.arange(len(last.place)) if levels > 1 else chain[0]  # of fine blocks, those of local queries
    first = last.base[last.document[chosen_for]]
    stop = first + last.place[chosen_for] if causal else last.base[last.document[chosen_for] + 1]
    tables.append(Level(_int64(last.router(causal)[chosen_for]), candidates=Ranges.of(first, stop, keep)))
    return HierarchyTables(
        fine,
        fine,
        tuple(tables),
        sizes=tuple(_int64(level.size) for level in rows[:-1]),
        under=tuple(_int64(level.children) for level in rows[: levels - 1]),
        ancestors=tuple(map(_int64, chain[:levels])),
        coarse_blocks=coarse_blocks,
        coarse_weight=torch.from_numpy(weights),
        top=_int64(_top_blocks(chain[levels], blocks_under[-1], rows[levels], causal)),
        diagonal=_int64(chain[0][:, None] if causal else np.zeros((len(chain[0]), 0))),
    )


@dataclass(frozen=True)
class _Rows:
    """The rows of a level, documents one after another. base: [documents + 1], first row of each; for every row its
    document, place in it and tokens; parent: its row of the next level; children: [rows there, block], -1 for none."""

    base: np.ndarray
    document: np.ndarray
    place: np.ndarray
    size: np.ndarray
    parent: np.ndarray
    children: np.ndarray
    span: int

    @classmethod
    def of(cls, lengths, block, level):
        span = block**level
        counts = -(-lengths // span)
        base, above = (np.concatenate([[0], np.cumsum(-(-lengths // n))]) for n in (span, span * block))
        document = np.repeat(np.arange(len(lengths)), counts)
        place = np.arange(base[-1]) - base[document]
        parent = above[document] + place // block
        size = np.minimum(span, lengths[document] - place * span)
        return cls(base, document, place, size, parent, _children(parent, above[-1], block), span)

    def router(self, causal):
        """The row whose mean query chooses for each: the one before where there is one, under a causal mask."""
        rows = np.arange(len(self.place))
        return np.where(self.place > 0, rows - 1, rows) if causal else rows


def _coarse_blocks(levels, lengths, block):
    """Blocks of the rows of all levels, laid end to end: (blocks, log weight of each, per level [rows above, 2] the
    blocks under a row). The last row of a document may have fewer tokens, and is a block of its own then."""
    columns, weights, under = [], [], []
    offset = number = 0
    for depth, level in enumerate(levels, 1):
        there = level.children >= 0
        whole = (there & (level.size[level.children.clip(0)] == level.span)).sum(1)
        full, short = np.flatnonzero(whole), np.flatnonzero(there.sum(1) > whole)
        first, last = level.children[full, 0], level.children.max(1)[short]
        table = np.full((len(there), 2), -1)
        table[full, 0] = number + np.arange(len(full))
        table[short, 1] = number + len(full) + np.arange(len(short))
        under.append(table)
        # A row is seen from the token after the last that it stands for.
        columns.append(
            np.stack(
                [
                    offset + np.concatenate([first, last]),
                    np.concatenate([whole[full], np.ones(len(short))]),
                    np.concatenate([(level.place[first] + 1) * level.span, lengths[level.document[last]]]),
                    np.concatenate([np.full(len(full), level.span), np.ones(len(short))]),
                    level.document[np.concatenate([first, last])],
                ]
            )
        )
        weights += [np.full(len(full), depth * log(block)), np.log(level.size[last])]
        offset, number = offset + len(level.place), number + len(full) + len(short)
    columns = (torch.from_numpy(column.astype(np.int32)) for column in np.concatenate(columns, 1))
    return Blocks(block, *columns), np.concatenate(weights), under


def _children(parents, rows, block):
    """[rows, block]: numbers whose parent is each row, -1 for none. parents ascend."""
    first = np.searchsorted(parents, np.arange(rows))
    stop = np.searchsorted(parents, np.arange(rows), "right")
    found = first[:, None] + np.arange(block)
    return np.where(found < stop[:, None], found, -1)


def _top_blocks(groups, blocks, above, causal):
    """[local pieces, n]: the coarse blocks of the last level that a piece sees. groups: the row above each piece."""
    document = above.document[groups]
    first, stop = above.base[document], groups + 1 if causal else above.base[document + 1]
    listed = first[:, None] + np.arange(int((stop - first).max(initial=0)))
    found = np.where(listed[..., None] < stop[:, None, None], blocks[listed.clip(max=len(blocks) - 1)], -1)
    return found.reshape(len(groups), 2 * listed.shape[1])


def _int64(x):
    return torch.from_numpy(np.ascontiguousarray(x).astype(np.int64))
