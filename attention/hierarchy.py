"""LLSA (arXiv 2512.16615): top blocks found level by level, and coarse keys that stand for everything else.

Level 0 are tokens; a row of level l stands for block**l of them. Queries of one block attend to the fine blocks chosen
for it, to level-l rows next to those chosen at level l + 1, and to all rows of the last level, each with the number of
its tokens as weight. Under a causal mask a row counts once it lies wholly in the past: what is too recent for a level
is seen through the one below, in the end token by token.
"""

from dataclasses import dataclass
from math import log

import numpy as np
import torch

from longspan.attention.block_tables import Pieces, Ranges, pieces
from longspan.attention.selections import block_sums, top_in_ranges
from longspan.kernels.sparse import Blocks
from longspan.parallel.layout import Layout

CANDIDATE_ELEMENTS = 1 << 24  # numbers of candidate keys gathered at once


@dataclass(frozen=True)
class Hierarchical:
    """block: tokens of a fine block, and rows of a level in a row of the next. keep: blocks chosen at every level.
    levels: at least 1. Query heads that share a key head share lists; only what is attended to gets gradients."""

    block: int = 16
    keep: int = 8
    levels: int = 2

    def __post_init__(self):
        for name, least in (("block", 2), ("keep", 1), ("levels", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Hierarchical.{name}={value!r} must be a whole number of at least {least}")

    def pairs(self, length: int) -> int:
        """Pairs of queries and keys or means of one head in a document of `length` tokens under a causal mask."""
        token = np.arange(length)
        before = [token // self.block**level for level in range(self.levels + 1)]  # rows of each level in the past
        chosen, total = np.minimum(self.keep, before[-1]), before[-1].copy()  # all rows of the last level
        for level in range(self.levels - 1, 0, -1):
            listed = chosen * self.block + before[level] % self.block
            total += listed
            chosen = np.minimum(self.keep, listed)
        return int((total + chosen * self.block + token % self.block + 1).sum())

    def tables(self, seq, causal: bool) -> "HierarchyTables":
        return seq.derive(hierarchy_tables, self.block, self.keep, self.levels, causal)

    def coarse(self, k, v, tables, gather):
        """Means of keys and values, level after level, in the dtype of k: [rows, Hkv, D] each, with gradients."""
        levels = _levels(torch.cat([k, v], 1), tables, gather)
        return torch.cat(levels).to(k.dtype).split(k.shape[1], 1)

    def choose(self, q, k, coarse_k, tables, gather):
        """(fine, coarse): int64 [Hkv, local pieces, n], blocks of tokens and blocks of coarse rows, -1 for none."""
        queries = _levels(q.unflatten(1, (k.shape[1], -1)).mean(2), tables, gather)
        keys = coarse_k.to(queries[0].dtype).split([len(level) for level in queries])
        queries, keys = ([x.transpose(0, 1) for x in levels] for levels in (queries, keys))
        last = tables.levels[-1]
        listed = [tables.top.expand(k.shape[1], -1, -1)]
        found = top_in_ranges(queries[-1][:, last.router], keys[-1], last.candidates)
        for depth in range(self.levels - 2, -1, -1):  # found: rows of the level above, for each of its rows
            level, above = tables.levels[depth], found
            mine = above[:, level.parent[tables.ancestors[depth]]]
            if level.own is not None:
                mine = torch.cat([mine, level.own.expand(mine.shape[0], -1, -1)], 2)
            listed.append(_pick(level.blocks, mine))
            rows = tables.keys.block if depth == 0 else torch.arange(len(level.parent), device=q.device)
            found = self._below(queries[depth], keys[depth], above, level, rows)
        return torch.cat([found, tables.diagonal.expand(found.shape[0], -1, -1)], 2), torch.cat(listed, 2)

    def _below(self, queries, keys, above, level, rows):
        """int64 [H, rows, n]: the best of the level's rows under what is chosen above and, causal, of those before each
        row under its own parent."""
        found, (heads, _, most) = [], above.shape
        batch = max(1, CANDIDATE_ELEMENTS // (heads * (most + 1) * self.block * keys.shape[2]))
        head = torch.arange(heads, device=keys.device)[:, None, None]
        for part in rows.split(batch):
            candidates = _pick(level.children, above[:, level.parent[part]])
            if level.before is not None:
                candidates = torch.cat([candidates, level.before[part].expand(heads, -1, -1)], 2)
            scores = (keys[head, candidates.clamp(min=0)] @ queries[:, level.router[part], :, None]).squeeze(-1)
            values, order = scores.masked_fill(candidates < 0, -torch.inf).topk(min(self.keep, scores.shape[2]), -1)
            found.append(candidates.gather(2, order).masked_fill(values == -torch.inf, -1))
        return torch.cat(found, 1)


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
    """The tables of `rank`: a pure function of the layout."""
    fine = pieces(layout, rank, block)
    lengths = np.array(layout.lengths)
    counts = [-(-lengths // block**level) for level in range(levels + 2)]  # rows of each document
    bases = [np.concatenate([[0], np.cumsum(count)]) for count in counts]
    documents = [np.repeat(np.arange(len(lengths)), count) for count in counts]
    places = [np.arange(bases[level][-1]) - bases[level][documents[level]] for level in range(levels + 2)]
    sizes = [np.minimum(block**n, lengths[documents[n]] - places[n] * block**n) for n in range(1, levels + 1)]
    # Rows of level n under row r of level n + 1, and r above each.
    parents = [bases[n + 1][documents[n]] + places[n] // block for n in range(levels + 1)]
    children = [None, *(_children(parents[n], bases[n + 1][-1], block) for n in range(1, levels + 1))]
    chain = [fine.block.numpy()]
    for n in range(1, levels + 1):
        chain.append(parents[n][chain[-1]])  # chain[n - 1]: the row of level n above each local piece

    offsets = np.concatenate([[0], np.cumsum([bases[n][-1] for n in range(1, levels + 1)])])
    starts, block_sizes, positions, steps, owners, weights, blocks_under = [], [], [], [], [], [], []
    for n in range(1, levels + 1):
        rows, size = children[n], block**n
        whole = ((rows >= 0) & (sizes[n - 1][rows.clip(0)] == size)).sum(1)
        last = np.where((rows >= 0).sum(1) > whole, rows.max(1), -1)  # the last of a document may be partly filled
        full = np.flatnonzero(whole)
        short = np.flatnonzero(last >= 0)
        table = np.full((len(rows), 2), -1)
        table[full, 0] = len(np.concatenate([[], *starts])) + np.arange(len(full))
        table[short, 1] = len(np.concatenate([[], *starts])) + len(full) + np.arange(len(short))
        blocks_under.append(table)
        first = rows[full, 0]
        starts.append(offsets[n - 1] + np.concatenate([first, last[short]]))
        block_sizes.append(np.concatenate([whole[full], np.ones(len(short))]))
        # Seen from the token after the last that a row stands for.
        ends = np.concatenate([(places[n][first] + 1) * size, lengths[documents[n][last[short]]]])
        positions.append(ends)
        steps.append(np.concatenate([np.full(len(full), size), np.ones(len(short))]))
        owners.append(documents[n][np.concatenate([first, last[short]]).astype(np.int64)])
        weights.append(np.concatenate([np.full(len(full), n * log(block)), np.log(sizes[n - 1][last[short]])]))
    columns = (np.concatenate(x).astype(np.int32) for x in (starts, block_sizes, positions, steps, owners))
    coarse_blocks = Blocks(block, *(torch.from_numpy(x) for x in columns))

    def tensor(x):
        return torch.from_numpy(np.ascontiguousarray(x).astype(np.int64))

    def router(n):
        rows = np.arange(bases[n][-1])
        return tensor(np.where(places[n] > 0, rows - 1, rows) if causal else rows)

    tables = []
    for n in range(1, levels):
        siblings = children[n][parents[n]]
        before = np.where(siblings < np.arange(len(siblings))[:, None], siblings, -1)
        own = tensor(chain[n][:, None]) if causal else None
        tables.append(
            Level(
                router(n), tensor(parents[n]), tensor(children[n]), tensor(before) if causal else None, own,
                tensor(blocks_under[n - 1]),
            )
        )  # fmt: skip
    rows = np.arange(bases[levels][-1]) if levels > 1 else chain[0]  # fine blocks: those of this rank's queries
    first = bases[levels][documents[levels][rows]]
    stop = first + places[levels][rows] if causal else bases[levels][documents[levels][rows] + 1]
    tables.append(Level(router(levels)[tensor(rows)], candidates=Ranges.of(first, stop, keep)))
    under = tuple(tensor(children[n]) for n in range(1, levels))
    return HierarchyTables(
        fine, fine, tuple(tables), tuple(tensor(x) for x in sizes), under,
        tuple(tensor(x) for x in chain[:levels]), coarse_blocks,
        torch.from_numpy(np.concatenate(weights)),
        tensor(_top_blocks(chain[levels], blocks_under[-1], bases[levels + 1], documents[levels + 1], causal)),
        tensor(chain[0][:, None] if causal else np.zeros((len(chain[0]), 0))),
    )  # fmt: skip


def _children(parents, rows, block):
    """[rows, block]: numbers whose parent is each row, -1 for none. parents ascend."""
    first = np.searchsorted(parents, np.arange(rows))
    stop = np.searchsorted(parents, np.arange(rows), "right")
    found = first[:, None] + np.arange(block)
    return np.where(found < stop[:, None], found, -1)


def _top_blocks(groups, blocks, bases, documents, causal):
    """[local pieces, n]: the coarse blocks of the last level that a piece in the given group of them sees."""
    document = documents[groups] if len(groups) else np.zeros(0, np.int64)
    first, stop = bases[document], groups + 1 if causal else bases[document + 1]
    listed = first[:, None] + np.arange(int((stop - first).max(initial=0)))
    found = np.where(listed[..., None] < stop[:, None, None], blocks[listed.clip(max=len(blocks) - 1)], -1)
    return found.reshape(len(groups), 2 * listed.shape[1])


def _levels(x, tables, gather):
    """Means of the rows of every level: [T_local, H, D] -> [rows, H, D] each, in at least fp32."""
    sums = [block_sums(x, tables.keys, gather)]
    for under in tables.under:
        padded = torch.nn.functional.pad(sums[-1], (0, 0, 0, 0, 0, 1))  # row -1 is zero
        sums.append(padded[under].sum(1))
    return [total / size[:, None, None] for total, size in zip(sums, tables.sizes)]


def _pick(table, rows):
    """table [R, n] at rows [H, T, m], -1 for none -> [H, T, m n]."""
    return table[rows.clamp(min=0)].masked_fill((rows < 0)[..., None], -1).flatten(2)
