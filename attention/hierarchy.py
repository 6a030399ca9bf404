"""LLSA (arXiv 2512.16615): top blocks found level by level, and coarse keys that stand for everything else.

Level 0 are tokens; a row of level l stands for block**l of them. Queries of one block attend to the fine blocks chosen
for it, to level-l rows next to those chosen at level l + 1, and to all rows of the last level, each with the number of
its tokens as weight. Under a causal mask a row counts once it lies wholly in the past: what is too recent for a level
is seen through the one below, in the end token by token.
"""

from dataclasses import dataclass

import numpy as np
import torch

from longspan.attention.hierarchy_tables import HierarchyTables, hierarchy_tables
from longspan.attention.selections import block_sums, top_in_ranges

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

    def pairs(self, length: int, causal: bool = True) -> int:
        """Pairs of queries and keys or means of one head in a document of `length` tokens. Without a causal mask blocks
        count as equally long: which rows choose a shorter last one depends on the tokens."""
        if not causal:
            rows = [-(-length // self.block**level) for level in range(self.levels + 1)]
            listed = [min(self.keep, above) * of // above for of, above in zip(rows, rows[1:])]
            return length * (sum(listed) + rows[-1])
        token = np.arange(length)
        before = [token // self.block**level for level in range(self.levels + 1)]  # rows of each level in the past
        chosen, total = np.minimum(self.keep, before[-1]), before[-1].copy()  # all rows of the last level
        for level in range(self.levels - 1, 0, -1):
            listed = chosen * self.block + before[level] % self.block
            total += listed
            chosen = np.minimum(self.keep, listed)
        return int((total + chosen * self.block + token % self.block + 1).sum())

    def tables(self, seq, causal: bool) -> HierarchyTables:
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
