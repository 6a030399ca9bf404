"""Which key blocks a block of queries attends to. Selections get no gradient."""

from dataclasses import dataclass

import numpy as np
import torch

from longspan.attention.block_tables import BlockTables, Pieces, Totals, block_tables
from longspan.attention.selection import require_whole
from longspan.kernels.recorded import recorded
from longspan.kernels.sparse import kept_of, pool, top


@dataclass(frozen=True)
class TopBlocks:
    """The key blocks whose mean key has the highest product with the mean query of a block (SLA, arXiv 2509.24006).

    keep: how many, or below 1 a share of those there are, at least one. Under a causal mask these are blocks wholly in
    the past, chosen by the mean query of the block before, which knows no later token; the blocks that the queries'
    own block meets are always kept as well. first: so many blocks at the start of a document are among those kept;
    recent: so many before the queries; where a share is fewer than these, the lowest of them. Query heads that share a
    key head share a list. Blocks: tokens.
    """

    keep: float = 0.05
    query_block: int = 128
    key_block: int = 64
    first: int = 0
    recent: int = 0

    def __post_init__(self):
        if isinstance(self.keep, bool) or not self.keep > 0 or (self.keep >= 1 and self.keep != int(self.keep)):
            raise ValueError(
                f"TopBlocks.keep={self.keep!r} must be a whole number of blocks or a share between 0 and 1"
            )
        require_whole(self, query_block=1, key_block=1, first=0, recent=0)
        if 1 <= self.keep < self.first + self.recent:
            raise ValueError(f"TopBlocks.keep={self.keep} must be at least first + recent, {self.first + self.recent}")

    def pairs(self, length: int, causal: bool = True) -> int:
        """Query-key pairs of one head in a document of `length` tokens. Without a causal mask blocks count as equally
        long: which rows choose a shorter last one depends on the tokens."""
        if not causal:
            blocks = -(-length // self.key_block)
            return length * length * int(kept_of(np.array(blocks), self.keep)) // blocks
        begin = np.arange(0, length, self.query_block)
        count, past = np.minimum(self.query_block, length - begin), begin // self.key_block
        kept = kept_of(past, self.keep)
        diagonal = count * (begin - past * self.key_block) + count * (count + 1) // 2
        return int((count * kept * self.key_block + diagonal).sum())

    def tables(self, seq, causal: bool) -> BlockTables:
        return seq.derive(block_tables, self.query_block, self.key_block, self.keep, causal)

    def coarse(self, k, v, tables, gather):
        return None, None

    def choose(self, q, k, coarse_k, tables: BlockTables, gather):
        """(int32 [Hkv, local query pieces, n]: key blocks, ascending, -1 for none, None). gather: all ranks' rows from
        mine."""
        if tables.queries.whole and tables.keys.whole:
            return *_choose_whole(q, k, tables, self.first, self.recent), None
        return _choose(q, k, tables, self.first, self.recent, gather), None


@recorded
def _choose_whole(q, k, tables, first, recent):
    return (_choose(q, k, tables, first, recent, None),)


def _choose(q, k, tables, first, recent, gather):
    means, router = router_means(q, tables, gather, k.shape[1])
    keys = block_means(k, tables.keys, gather)
    return top(means, keys, router, tables.candidates, first=first, recent=recent, always=tables.diagonal)


def router_means(q, tables: BlockTables, gather, heads):
    """(mean queries [.., heads, D] in at least fp32, router): router, int32 [local query pieces], says which of the
    means chooses for a piece (not read where a piece has nothing to choose from). `top` takes both."""
    if tables.queries.whole:
        return pool(q, tables.queries.local, heads=heads, mean=True), tables.router
    sums = total_sums(piece_sums((q,), tables.queries, heads), tables.routers, gather)
    means = sums / (tables.routers.size * (q.shape[1] // heads))[:, None, None]
    return means, torch.arange(len(tables.router), dtype=torch.int32, device=q.device)


def block_means(x: torch.Tensor, pieces: Pieces, gather, heads: int | None = None) -> torch.Tensor:
    """[T_local, H, D] -> [blocks, heads, D] of all ranks, in at least fp32: also over heads that belong together."""
    if pieces.whole:
        return pool(x, pieces.local, heads=heads, mean=True)
    sums = block_sums((x,), pieces, gather, heads)
    return sums / (pieces.length * (x.shape[1] // sums.shape[1]))[:, None, None]


def block_sums(tensors, pieces: Pieces, gather, heads: int | None = None) -> torch.Tensor:
    """[T_local, H, D] each -> [blocks, heads of all, D] of all ranks, in at least fp32, differentiable."""
    return gathered_sums(piece_sums(tensors, pieces, heads), pieces, gather)


def piece_sums(tensors, pieces: Pieces, heads: int | None = None) -> torch.Tensor:
    """[T_local, H, D] each -> [local pieces, heads of all, D]; of a rank without tokens one row of zeros, which makes
    it part of the graph."""
    if tensors[0].shape[0]:
        return pool(tensors, pieces.local, heads=heads)
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.cat([x.sum(0, keepdim=True, dtype=wide)[:, : heads or x.shape[1]] for x in tensors], 1)


def gathered_sums(sums, pieces: Pieces, gather) -> torch.Tensor:
    """Sums of the local pieces -> those of the blocks of all ranks."""
    if pieces.whole:
        return sums
    if sums.shape[0] < pieces.width:
        sums = torch.nn.functional.pad(sums, (0, 0, 0, 0, 0, pieces.width - sums.shape[0]))
    return _added(gather(sums), pieces.of_block)


def total_sums(sums, totals: Totals, gather) -> torch.Tensor:
    """Sums of the local pieces -> those of some blocks, for which ranks show one another few pieces."""
    if totals.own:
        return sums
    if len(totals.shown):
        sums = torch.cat([sums, gather(sums[totals.shown])])
    return _added(sums, totals.pieces)


def _added(sums, pieces):
    total = sums[pieces[:, 0].clamp(min=0)]
    for piece in pieces.T[1:]:
        total = total + sums[piece.clamp(min=0)].masked_fill((piece < 0)[:, None, None], 0)
    return total
