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
from longspan.attention.recompute import keep, recall
from longspan.attention.selections import gathered_sums, piece_sums, total_sums
from longspan.kernels.recorded import recorded
from longspan.kernels.sparse import blocks_below, descend, mean_levels, pool, sum_levels, top


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
        """Means of keys and values, level after level, in the dtype of k: [rows, Hkv, D] each. Their gradients go where
        tables.owned says. Recomputation takes those that were made before where ranks made them together."""
        with torch.no_grad():
            if tables.keys.whole:
                return _halves(mean_levels((k, v), tables.under, tables.size, k.dtype))
            kept = recall()
            if kept is None:
                sums = gathered_sums(piece_sums((k, v), tables.keys), tables.keys, gather)
                kept = keep(mean_levels((sums,), tables.under, tables.size, k.dtype))
            return _halves(kept)

    def choose(self, q, k, coarse_k, tables, ranks):
        """(fine, coarse): int32 [Hkv, local pieces, n], blocks of tokens, and [Hkv, local tiles, m], blocks of coarse
        rows, those of the last level last, -1 for none; None where there is one level."""
        # Sums in place of means: a factor for each query changes no order.
        if tables.keys.whole:
            return _joined(*_choose_whole(q, coarse_k, tables, self.levels, self.keep))
        here = piece_sums((q,), tables.keys, k.shape[1])
        queries = [total_sums(here, tables.routers, ranks)]
        if self.levels > 1:
            runs = pool(here, tables.runs) if len(tables.runs) else here
            queries.append(gathered_sums(runs, tables.second, ranks))
        for under in tables.under[2:]:
            queries.append(pool(queries[-1], under))
        return _joined(*_choose(queries, coarse_k, tables, self.levels, self.keep))


@recorded
def _choose_whole(q, coarse_k, tables, levels, keep):
    return _choose(sum_levels(q, tables.under, coarse_k.shape[1]), coarse_k, tables, levels, keep)


def _choose(queries, coarse_k, tables, levels, keep):
    """What Hierarchical.choose gives, coarse rows level by level. queries: of each level, sums of those that choose."""
    keys = coarse_k.split_with_sizes(tables.rows)
    last, causal, listed = tables.levels[-1], tables.diagonal.shape[1] > 0, []
    always = [tables.diagonal if causal else None] + [None] * (levels - 1)  # after what is chosen of a level
    found = top(queries[-1], keys[-1], last.router, last.candidates, always=always[-1])
    for depth in range(levels - 2, -1, -1):  # found: rows of the level above, for each of its rows
        level = tables.levels[depth]
        # Under a causal mask the children of the row above as well: those which are past, as the mask says.
        last = tables.always if depth == levels - 2 else None
        listed.append(blocks_below(found, level.above, level.blocks, causal, last))
        found = descend(queries[depth], keys[depth], found, level.families, keep, causal, always[depth])
    return found, *listed[::-1]


def _joined(found, *listed):
    return found, torch.cat(listed, 2) if len(listed) > 1 else listed[0] if listed else None


def _halves(means):
    """Those of keys and those of values, of heads side by side."""
    return means.split_with_sizes((means.shape[1] // 2,) * 2, 1)
