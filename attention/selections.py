"""Which key blocks a block of queries attends to. Selections get no gradient."""

from dataclasses import dataclass

import numpy as np
import torch

from longspan.attention.block_tables import BlockTables, Pieces, Ranges, block_tables, kept_of

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
        """(int64 [Hkv, local query pieces, n]: key blocks, -1 for none, None). gather: rows of all ranks from mine."""
        means = block_means(q.unflatten(1, (k.shape[1], -1)).mean(2), tables.queries, gather)
        means = means[tables.router.clamp(min=0)].transpose(0, 1)
        keys = block_means(k, tables.keys, gather).transpose(0, 1)
        found = top_in_ranges(means, keys, tables.candidates, self.first, self.recent)
        return torch.cat([tables.diagonal.expand(keys.shape[0], -1, -1), found], 2), None


def top_in_ranges(means, keys, ranges: Ranges, first: int = 0, recent: int = 0) -> torch.Tensor:
    """int64 [H, R, n]: of the keys [H, T, D] from ranges.first to ranges.stop those with the highest products with a
    row of means [H, R, D], ranges.most of them, -1 for none. first, recent: so many at either end are always taken."""
    parts = [_top(means, keys, ranges, rows, first, recent) for rows in _batches(ranges.bounds, keys.shape[0])]
    return torch.cat(parts, 1) if parts else torch.empty(*means.shape[:2], 0, dtype=torch.int64, device=keys.device)


def _top(means, keys, ranges, rows, forced_first, forced_recent):
    start, end = int(ranges.bounds[rows, 0].min()), int(ranges.bounds[rows, 1].max())
    column = torch.arange(start, end, device=keys.device)
    first, stop = ranges.first[rows, None], ranges.stop[rows, None]
    scores = means[:, rows] @ keys[:, start:end].mT
    scores = scores.masked_fill((column < first + forced_first) | (column >= stop - forced_recent), torch.inf)
    scores = scores.masked_fill((column < first) | (column >= stop), -torch.inf)
    values, order = scores.topk(min(ranges.kept, end - start), -1)
    there = (values > -torch.inf) & (torch.arange(order.shape[-1], device=keys.device) < ranges.most[rows, None])
    return torch.nn.functional.pad(torch.where(there, order + start, -1), (0, ranges.kept - order.shape[-1]), value=-1)


def block_means(x: torch.Tensor, pieces: Pieces, gather) -> torch.Tensor:
    """[T_local, H, D] -> [blocks, H, D] of all ranks, in at least fp32, differentiable."""
    return block_sums(x, pieces, gather) / pieces.length[:, None, None]


def block_sums(x: torch.Tensor, pieces: Pieces, gather) -> torch.Tensor:
    """[T_local, H, D] -> [blocks, H, D] of all ranks, in at least fp32, differentiable."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.shape[0]:
        sums = torch.segment_reduce(x, "sum", lengths=pieces.local.length.long(), axis=0)
    else:
        sums = x.sum(0, keepdim=True)  # a rank without tokens is part of the graph as well
    sums = gather(torch.nn.functional.pad(sums, (0, 0, 0, 0, 0, pieces.width - sums.shape[0])))
    total = sums[pieces.of_block[:, 0]]
    for turn in range(1, pieces.of_block.shape[1]):
        piece = pieces.of_block[:, turn]
        total = total + sums[piece.clamp(min=0)].masked_fill((piece < 0)[:, None, None], 0)
    return total


def _batches(bounds, heads):
    """Runs of rows whose scores fit the limit, by the keys that they reach."""
    first, count = 0, len(bounds)
    while first < count:
        stop, (low, high) = first, bounds[first]
        while stop < count:
            low, high = min(low, bounds[stop, 0]), max(high, bounds[stop, 1])
            if stop > first and (stop + 1 - first) * (high - low) * heads > SCORE_ELEMENTS:
                break
            stop += 1
        yield slice(first, stop)
        first = stop
