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
from longspan.attention.selections import block_sums
from longspan.kernels.sparse import descend, pool, top


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

    def tables(self, seq, causal: bool) -> HierarchyTables:
        return seq.derive(hierarchy_tables, self.block, self.keep, self.levels, causal)

    def coarse(self, k, v, tables, gather):
        """Means of keys and values, level after level, in the dtype of k: [rows, Hkv, D] each, with gradients."""
        levels = _means(_levels((k, v), tables, gather), tables)
        return torch.cat(levels).to(k.dtype).split(k.shape[1], 1)

    def choose(self, q, k, coarse_k, tables, gather):
        """(fine, coarse): int32 [Hkv, local pieces, n], blocks of tokens and blocks of coarse rows, both ascending, -1
        for none."""
        # Means up to the number of heads that share a key head, which changes no order.
        queries = _means(_levels((q,), tables, gather, heads=k.shape[1]), tables)
        keys = coarse_k.to(queries[0].dtype).split([len(level) for level in queries])
        last, heads = tables.levels[-1], k.shape[1]
        found, causal = top(queries[-1], keys[-1], last.router, last.candidates), tables.diagonal.shape[1] > 0
        listed = [tables.top.expand(heads, -1, -1)]
        for depth in range(self.levels - 2, -1, -1):  # found: rows of the level above, for each of its rows
            level = tables.levels[depth]
            mine = found[:, level.above]
            if causal:  # the children of the row above which are past, as the mask says
                mine = torch.cat([mine, level.above[:, None].expand(heads, -1, 1)], 2)
            listed.append(level.blocks[mine.clamp(min=0)].masked_fill((mine < 0)[..., None], -1).flatten(2))
            found = descend(queries[depth], keys[depth], found, level.families, self.keep, causal)
        fine = torch.cat([found, tables.diagonal.expand(heads, -1, -1)], 2) if causal else found
        return fine, torch.cat(listed[::-1], 2)


def _levels(tensors, tables, gather, heads=None):
    """Sums over the rows of every level: [T_local, H, D] each -> [rows, heads of all, D], in at least fp32."""
    sums = [block_sums(tensors, tables.keys, gather, heads)]
    for under in tables.under:
        sums.append(pool(sums[-1], under))
    return sums


def _means(sums, tables):
    return [total / size[:, None, None] for total, size in zip(sums, tables.sizes)]
