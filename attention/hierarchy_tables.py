"""Where rows of means are in LLSA (attention.hierarchy): a pure function of the layout, made once per batch."""

from dataclasses import dataclass, fields, replace
from math import log

import numpy as np
import torch

from longspan.attention.block_tables import Pieces, Totals, pieces, router_totals
from longspan.kernels.sparse import BlockPlan, Blocks, Families, Ranges, Shares, Tree
from longspan.parallel.exchange import Pending, start_all_to_all
from longspan.parallel.layout import Layout

TILE = 128  # most queries of a tile, where a fine block has fewer
DENSE = 64  # rows of the last level in a block
DENSE_ITEMS, FEWEST_TILES = 32, 8  # programs for the gradients of such a block, and tiles of queries that each takes
LISTED_QUERIES = 1024  # that a program for the gradients of listed rows takes


@dataclass(frozen=True)
class Level:
    """Level l of all documents; int32 on the device, above int64. The last has candidates, and router: the row whose
    mean query chooses for each that does. The others have families, what leads down from the level above; above:
    [local tiles], the row there that each tile is in; blocks: [rows above + 1, 1 or 2], blocks of coarse keys under
    each, ascending, -1 after the last and for row -1. Where pieces are not the blocks, routers of level 1 are local
    pieces, whose mean query is that of the row that chooses for them."""

    router: torch.Tensor | None = None
    candidates: Ranges | None = None
    families: Families | None = None
    above: torch.Tensor | None = None
    blocks: torch.Tensor | None = None


@dataclass(frozen=True)
class Owned:
    """Gradients of means go to the ranks that have tokens of theirs, whose rows get their shares. tree: the means that
    this rank's pieces are part of, those of level 1 piece by piece. rows: int64, their numbers, rank after rank; None
    where they are all there are, in order, on one rank. counts: of every rank."""

    tree: Tree
    rows: torch.Tensor | None
    counts: tuple[int, ...]

    def start(self, gradients, group) -> Pending:
        """gradients: [rows, Hkv, D] each, of this rank's queries; on their way to what `shares` takes."""
        if self.rows is None:
            return Pending((), gradients)
        sent = torch.cat([x[self.rows] for x in gradients], 1)
        return start_all_to_all(sent, self.counts, [len(self.tree.size)] * len(self.counts), group)

    def shares(self, pending) -> Shares:
        """What ranks sent is added in their order."""
        found = pending.wait()
        if self.rows is not None:
            found = found.view(len(self.counts), len(self.tree.size), *found.shape[1:]).chunk(2, 2)
            found = [x.sum(0, dtype=torch.promote_types(x.dtype, torch.float32)) for x in found]
        return Shares(self.tree, *found)

    def map(self, move) -> "Owned":
        """The same with every tensor passed through `move`."""
        return Owned(self.tree.map(move), self.rows if self.rows is None else move(self.rows), self.counts)


@dataclass(frozen=True)
class HierarchyTables:
    """queries, keys: the fine blocks; routers: sums of those that choose for local pieces. size: int32, tokens of the
    rows of all levels, level after level, so many in each: rows. under: per level what its rows are made of, in blocks,
    one for each: rows of the level before, on level 1 tokens or, where ranks add up their sums, one sum each. second:
    blocks of tokens, one for each row of level 2, and runs: local pieces of keys in each local piece of those; None
    where there is one level. coarse_blocks, coarse_weight: blocks of the rows of all levels, for which queries are in
    larger tiles than for fine blocks: all under one row of level 2 see the same. always: int32 [local tiles, n], those
    of the last level, of which a tile lists all, -1 after the last; chosen_blocks: the others, which come first.
    Gradients of the last level are made in larger blocks by the plan `dense`, which follows from the layout alone and
    has the tiles as queries, those of the others by what was chosen, `chunk` tiles a program. diagonal: int32 [local
    pieces, 1 or 0]. owned: where gradients of means go. full: no list of blocks will have a -1: there is enough to
    choose from everywhere, no row has two blocks under it, and documents are of as many blocks of the last level."""

    queries: Pieces
    keys: Pieces
    routers: Totals
    levels: tuple[Level, ...]
    size: torch.Tensor
    rows: tuple[int, ...]
    under: tuple[Blocks, ...]
    second: Pieces | None
    runs: Blocks | None
    coarse_blocks: Blocks
    coarse_weight: torch.Tensor
    chosen_blocks: Blocks
    always: torch.Tensor
    chunk: int
    dense: BlockPlan
    diagonal: torch.Tensor
    owned: Owned
    full: bool

    def map(self, move) -> "HierarchyTables":
        """The same with every tensor passed through `move`."""
        return _map(self, move)


def _map(value, move):
    if isinstance(value, torch.Tensor):
        return move(value)
    if isinstance(value, tuple):
        return tuple(_map(x, move) for x in value)
    if isinstance(value, (Level, HierarchyTables)):
        return replace(value, **{field.name: _map(getattr(value, field.name), move) for field in fields(value)})
    return value.map(move) if hasattr(value, "map") else value


def hierarchy_tables(layout: Layout, rank: int, block: int, keep: int, levels: int, causal: bool) -> HierarchyTables:
    """The tables of `rank`. block: tokens of a fine block, and rows in a row of the next level."""
    fine, lengths = pieces(layout, rank, block), np.array(layout.lengths)
    rows = [_Rows.of(lengths, block, level) for level in range(1, levels + 1)]
    mine, last = fine.block.numpy(), rows[-1]
    tiles = pieces(layout, rank, tile_rows(block)).local
    document, position = tiles.document.numpy(), tiles.position.numpy()
    blocks, weight, blocks_under = _coarse_blocks(rows, lengths, block)
    dense_from = sum(len(level.place) for level in rows[:-1])
    always = _always(last, blocks_under[-1], tiles, block, causal)

    tables = []
    for level, above, under in zip(rows, rows[1:], blocks_under):
        chooses = mine if not tables else np.arange(len(level.place))  # of fine blocks, those of local queries
        families = _families(level, chooses, block, causal)
        if not tables and not fine.whole:
            router = np.zeros(len(level.place))
            router[mine] = np.arange(len(mine))
            families = replace(families, router=_int32(router))
        under = np.pad(_packed(under), ((0, 1), (0, 0)), constant_values=-1)
        tile_above = torch.from_numpy(above.base[document] + position // above.span)
        tables.append(Level(families=families, above=tile_above, blocks=_int32(under)))
    full = not causal and np.diff(last.base).min() >= keep
    if tables:
        full = full and all(level.blocks.shape[1] == 1 for level in tables) and (always >= 0).all()
    chosen_for = np.arange(len(last.place)) if levels > 1 else mine  # of fine blocks, those of local queries
    first = last.base[last.document[chosen_for]]
    stop = first + last.place[chosen_for] if causal else last.base[last.document[chosen_for] + 1]
    router = last.router(causal) if levels > 1 or fine.whole else np.arange(len(chosen_for))
    tables.append(Level(_int32(router), Ranges.of(first, stop, keep)))
    second = pieces(layout, rank, block**2) if levels > 1 else None
    return HierarchyTables(
        fine,
        fine,
        router_totals(fine, rank, lengths, causal),
        tuple(tables),
        size=_int32(np.concatenate([level.size for level in rows])),
        rows=tuple(len(level.place) for level in rows),
        under=(fine.local if fine.whole else _alone(len(rows[0].place)), *(_blocks_under(x, block) for x in rows[:-1])),
        second=second,
        runs=None if second is None else _runs(fine.local, second.local),
        coarse_blocks=Blocks(block, *map(_int32, blocks)),
        coarse_weight=torch.from_numpy(weight),
        chosen_blocks=Blocks(block, *map(_int32, blocks[:, blocks[0] < dense_from])),
        always=_int32(always),
        chunk=max(1, LISTED_QUERIES // tiles.size),
        dense=_dense_plan(last, dense_from, lengths, tiles, causal),
        diagonal=_int32(mine[:, None] if causal else np.zeros((len(mine), 0))),
        owned=_owned(fine, rank, layout.world_size, rows),
        full=bool(full),
    )


def _owned(fine, rank, world_size, levels):
    base = np.cumsum([0, *(len(level.place) for level in levels)])
    parts = fine.of_block.numpy()
    block, _ = np.nonzero(parts >= 0)
    owner, order = parts[parts >= 0] // fine.width, np.argsort(parts[parts >= 0])
    found, tree = [], None
    for who in range(world_size):
        mine = [block[order][owner[order] == who]]  # rows of every level that the pieces of a rank are part of
        ups = []
        for level in levels[:-1]:
            above, up = np.unique(level.parent[mine[-1]], return_inverse=True)
            ups.append(up + sum(map(len, mine)))
            mine.append(above)
        found.append(np.concatenate([first + rows for first, rows in zip(base, mine)]))
        if who == rank:
            size = np.concatenate([level.size[rows] for level, rows in zip(levels, mine)])
            tree = Tree(_int32(size), _int32(np.concatenate([*ups, np.full(len(mine[-1]), -1)])), len(levels))
    rows = np.concatenate(found)
    here = world_size == 1 and np.array_equal(rows, np.arange(base[-1]))
    return Owned(tree, None if here else torch.from_numpy(rows), tuple(map(len, found)))


def _alone(count):
    """Blocks of one row."""
    ones = torch.ones(count, dtype=torch.int32)
    return Blocks(1, torch.arange(count, dtype=torch.int32), *[ones] * 4)


def _runs(fine, around):
    """The pieces in each of larger pieces, both cut from the same rows."""
    first = np.searchsorted(fine.start.numpy(), around.start.numpy())
    columns = first, np.diff(first, append=len(fine)), *[np.zeros_like(first)] * 3
    return Blocks(around.size // fine.size, *map(_int32, columns))


def _blocks_under(level, block):
    """The rows of a level in blocks, one under each row above."""
    length = (level.children >= 0).sum(1)
    zeros = np.zeros_like(length)
    return Blocks(block, *map(_int32, (level.children[:, 0], length, zeros, zeros, zeros)))


def _families(level, chooses, block, causal):
    """chooses: the rows of a level that choose."""
    parents = level.parent[chooses]
    order = np.argsort(parents, kind="stable")
    turn = np.arange(len(order)) - np.searchsorted(parents[order], parents[order])  # among those of the same parent
    group = np.cumsum(turn % block == 0) - 1
    groups = np.full((group.max(initial=-1) + 1, block), -1)
    groups[group, turn % block] = order
    under = _blocks_under(level, block)
    tables = (level.parent, level.router(causal), chooses, groups, parents[groups[:, 0]])
    parent, *rest = map(_int32, tables)
    return Families(parent, under.start, under.length, *rest, block)


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
    """Blocks of the rows of levels, laid end to end: (columns of Blocks, log weight of each, per level [rows above, 2]
    the blocks under a row). The last row of a document may have fewer tokens, and is a block of its own then."""
    columns, weights, under, offset, number = [np.zeros((5, 0))], [np.zeros(0)], [], 0, 0
    for level in levels:
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
        weights += [np.full(len(full), log(level.span)), np.log(level.size[last])]
        offset, number = offset + len(level.place), number + len(full) + len(short)
    return np.concatenate(columns, 1), np.concatenate(weights), under


def _children(parents, rows, block):
    """[rows, block]: numbers whose parent is each row, -1 for none. parents ascend."""
    first = np.searchsorted(parents, np.arange(rows))
    stop = np.searchsorted(parents, np.arange(rows), "right")
    found = first[:, None] + np.arange(block)
    return np.where(found < stop[:, None], found, -1)


def tile_rows(block):
    """Queries of a tile for which coarse rows are listed: a multiple of a block's size that divides its square."""
    return block * max(n for n in range(1, block + 1) if block % n == 0 and (n == 1 or n * block <= TILE))


def _always(level, under, tiles, block, causal):
    """[tiles, n]: blocks of a level's rows, all that a tile's document has; causal, those of which any of the tile's
    queries sees a row. -1 after the last. under: the blocks by row of the level above."""
    of_above = level.document[level.children[:, 0]]
    place = np.arange(len(under)) - np.searchsorted(of_above, of_above)
    table = np.full((len(level.base) - 1, place.max(initial=-1) + 1, 2), -1)
    table[of_above, place] = under
    listed = _packed(table.reshape(len(table), -1))[tiles.document.numpy()]
    if causal:
        stop = -(-_rows_before(level, tiles) // block)
        listed = np.where(np.arange(listed.shape[1]) < stop[:, None], listed, -1)[:, : stop.max(initial=0)]
    return listed


def _rows_before(level, tiles):
    """Rows of a level in the past of each tile's last query."""
    return (tiles.position.numpy() + tiles.length.numpy() - 1) // level.span


def _dense_plan(level, first, lengths, tiles, causal):
    """All rows of a level for every tile of its document; causal, those which any of the tile's queries sees. A last
    row with fewer tokens is a block of its own. first: row of the level's first."""
    counts = np.diff(level.base)
    whole = counts - (lengths % level.span > 0)  # rows of each document
    blocks = -(-whole // DENSE)
    each = blocks + counts - whole
    base, document = np.concatenate([[0], np.cumsum(each)]), np.repeat(np.arange(len(lengths)), each)
    place = (np.arange(base[-1]) - base[document]) * DENSE
    short = place >= whole[document]
    place = np.where(short, whole[document], place)
    size = np.where(short, 1, np.minimum(DENSE, whole[document] - place))
    seen = np.where(short, lengths[document], (place + 1) * level.span)  # from the token after a row's last on
    rows = level.base[document] + place
    keys = Blocks(DENSE, *map(_int32, (first + rows, size, seen, np.where(short, 1, level.span), document)))

    document = tiles.document.numpy()
    stop = base[document + 1] - base[document]
    if causal:
        stop = -(-_rows_before(level, tiles) // DENSE)
    listed = np.arange(int(stop.max(initial=0)))
    chosen = _int32(np.where(listed < stop[:, None], base[document, None] + listed, -1))[None]
    weight = torch.from_numpy(np.log(level.size[rows].astype(np.float64)))
    chunk = max(FEWEST_TILES, len(tiles) // DENSE_ITEMS)
    plan = BlockPlan.of(tiles, keys, chosen, causal=causal, log_weight=weight, ascending=True, chunk=chunk)
    plan.columns  # noqa: B018  made here and kept: no layer needs to make them
    return plan


def _packed(lists):
    """Lists [rows, n] without what is -1, -1 after the last, as narrow as that allows."""
    there = lists >= 0
    order = np.argsort(~there, axis=1, kind="stable")
    return np.take_along_axis(lists, order, 1)[:, : there.sum(1).max(initial=0)]


def _int32(x):
    return torch.from_numpy(np.ascontiguousarray(x).astype(np.int32))
