"""Which key blocks a block of queries attends to. Selections get no gradient."""

from dataclasses import dataclass

import torch

from longspan.attention.block_tables import BlockTables, Pieces, block_tables

SCORE_ELEMENTS = 1 << 22  # scores held at once: 16 MB


@dataclass(frozen=True)
class TopBlocks:
    """The key blocks whose mean key has the highest product with the mean query of a block (SLA, arXiv 2509.24006).

    keep: how many, or below 1 a share of those there are, at least one. Under a causal mask these are blocks wholly in
    the past, chosen by the mean query of the block before, which knows no later token; the blocks that the queries'
    own block meets are always kept as well. first: so many blocks at the start of a document are among those kept;
    recent: so many before the queries. Query heads that share a key head share a list. Blocks: tokens.
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
        for name, least in (("query_block", 1), ("key_block", 1), ("first", 0), ("recent", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"TopBlocks.{name}={value!r} must be a whole number of at least {least}")

        if 1 <= self.keep < self.first + self.recent:
            raise ValueError(f"TopBlocks.keep={self.keep} must be at least first + recent, {self.first + self.recent}")

    def tables(self, seq, causal: bool) -> BlockTables:
        return seq.derive(block_tables, self.query_block, self.key_block, self.keep, causal)

    def choose(self, q, k, tables: BlockTables, gather) -> torch.Tensor:
        """int64 [Hkv, local query pieces, n]: key blocks, -1 for none. gather: rows of this rank -> of all ranks."""
        means = pooled(q.unflatten(1, (k.shape[1], -1)).mean(2), tables.queries, gather)
        means = means[tables.router.clamp(min=0)].transpose(0, 1)
        keys = pooled(k, tables.keys, gather).transpose(0, 1)
        chosen = [tables.diagonal.expand(keys.shape[0], -1, -1)]
        if tables.kept:
            parts = [self._top(means, keys, tables, rows) for rows in _batches(tables, keys.shape[0])]
            chosen.append(torch.cat(parts, 1))
        return torch.cat(chosen, 2)

    def _top(self, means, keys, tables, rows):
        start, stop = int(tables.ranges[rows, 0].min()), int(tables.ranges[rows, 1].max())
        column = torch.arange(start, stop, device=keys.device)
        first, end = tables.first[rows, None], tables.stop[rows, None]
        scores = means[:, rows] @ keys[:, start:stop].mT
        scores = scores.masked_fill((column < first + self.first) | (column >= end - self.recent), torch.inf)
        scores = scores.masked_fill((column < first) | (column >= end), -torch.inf)
        values, order = scores.topk(min(tables.kept, stop - start), -1)
        there = (values > -torch.inf) & (torch.arange(order.shape[-1], device=keys.device) < tables.most[rows, None])
        order = torch.where(there, order + start, -1)
        return torch.nn.functional.pad(order, (0, tables.kept - order.shape[-1]), value=-1)


def pooled(x: torch.Tensor, pieces: Pieces, gather) -> torch.Tensor:
    """Means of blocks, in at least fp32: [T_local, H, D] -> [blocks, H, D] of all ranks."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    sums = x.new_zeros(pieces.width, *x.shape[1:])
    if len(pieces.local):
        sums[: len(pieces.local)] = torch.segment_reduce(x, "sum", lengths=pieces.local.length.long(), axis=0)
    sums = gather(sums)
    total = sums[pieces.of_block[:, 0]]
    for turn in range(1, pieces.of_block.shape[1]):
        piece = pieces.of_block[:, turn]
        total = total + sums[piece.clamp(min=0)].masked_fill((piece < 0)[:, None, None], 0)
    return total / pieces.length[:, None, None]


def _batches(tables, heads):
    """Runs of query pieces whose scores fit the limit, by the key blocks that they reach."""
    first, count = 0, len(tables.ranges)
    while first < count:
        stop, low, high = first, tables.ranges[first, 0], tables.ranges[first, 1]
        while stop < count:
            low, high = min(low, tables.ranges[stop, 0]), max(high, tables.ranges[stop, 1])
            if stop > first and (stop + 1 - first) * (high - low) * heads > SCORE_ELEMENTS:
                break
            stop += 1
        yield slice(first, stop)
        first = stop
