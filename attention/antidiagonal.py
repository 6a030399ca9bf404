"""XAttention (arXiv 2503.16428): blocks are kept until their antidiagonal sums make up a share of the attention."""

from dataclasses import dataclass

import numpy as np
import torch

from longspan.attention.block_tables import BlockTables, Pieces, block_tables, pieces
from longspan.attention.selection import require_whole
from longspan.kernels.wide import wide_dtype
from longspan.parallel.routes import RouteTable, route_table

SCORE_ELEMENTS = 1 << 22  # scores held at once


@dataclass(frozen=True)
class Antidiagonal:
    """Queries and keys are taken in groups of `stride` tokens. The logit of two groups is the sum over an antidiagonal
    of their scores, sum_i q[stride - 1 - i] . k[i] / (stride sqrt(D)); softmax over key groups, summed over the groups
    of a block and the query heads that share a key head, gives the attention of key blocks. The fewest blocks are kept
    whose sum is at least `threshold` of all, so that lists differ in length. first: so many blocks at the start of a
    document are always kept, and count.

    Under a causal mask these are blocks wholly in the past, chosen by the queries of the block before, which know no
    later token; the blocks that the queries' own block meets are always kept as well. Without a mask a block chooses
    by its own queries, among all. Tokens that a group lacks at the end of a document count as zero.

    All keys come to all ranks for this, without values: scores cost 1 / stride of full attention. Blocks: tokens,
    multiples of stride.
    """

    threshold: float = 0.9
    stride: int = 8
    query_block: int = 128
    key_block: int = 128
    first: int = 1

    def __post_init__(self):
        require_whole(self, stride=1, query_block=1, key_block=1, first=0)
        if isinstance(self.threshold, bool) or not 0 < self.threshold <= 1:
            raise ValueError(f"Antidiagonal.threshold={self.threshold!r} must be a share above 0, at most 1")
        for name in ("query_block", "key_block"):
            if getattr(self, name) % self.stride:
                raise ValueError(
                    f"Antidiagonal.{name}={getattr(self, name)} must be a multiple of stride={self.stride}"
                )

    def pairs(self, length: int) -> int:
        """Query-key pairs of one head in a document of `length` tokens under a causal mask, of the blocks that are
        always kept: how many more there are depends on the data."""
        begin = np.arange(0, length, self.query_block)
        count, past = np.minimum(self.query_block, length - begin), begin // self.key_block
        diagonal = count * (begin - past * self.key_block) + count * (count + 1) // 2
        return int((count * np.minimum(past, self.first) * self.key_block + diagonal).sum())

    def tables(self, seq, causal: bool) -> "AntidiagonalTables":
        return seq.derive(antidiagonal_tables, self.query_block, self.key_block, causal)

    def coarse(self, k, v, tables, gather):
        return None, None

    def choose(self, q, k, coarse_k, tables: "AntidiagonalTables", ranks):
        """(int32 [Hkv, local query pieces, n]: key blocks, ascending, -1 for none, None)."""
        everyone = ranks(torch.nn.functional.pad(k, (0, 0, 0, 0, 0, tables.width - k.shape[0])))
        keys, there = _groups(everyone, tables.keys_of, self.stride)
        queries, counted = _groups(ranks.move(tables.to_queries, q), tables.queries_of, self.stride)
        ranges, kept = tables.blocks.candidates, [tables.blocks.diagonal.expand(k.shape[1], -1, -1)]
        bounds, width = ranges.bounds, q.shape[1] * queries.shape[1] * keys.shape[1]
        batch = max(1, SCORE_ELEMENTS // (width * max(1, (bounds[:, 1] - bounds[:, 0]).max(initial=0))))
        found = []
        for at in range(0, len(bounds), batch):
            rows = slice(at, at + batch)
            column = torch.arange(bounds[rows, 0].min(), bounds[rows, 1].max(), device=q.device)
            first, stop = ranges.first[rows, None], ranges.stop[rows, None]
            allowed, mine = (column >= first) & (column < stop), tables.router_of[rows]
            shares = _shares(queries[mine], counted[mine], keys[column], there[column], allowed)
            forced = allowed & (column < first + self.first)
            found.append(_most(shares, forced, self.threshold, column))
        most = max((x.shape[2] for x in found), default=0)
        found = [torch.nn.functional.pad(x, (0, most - x.shape[2]), value=-1) for x in found]
        return torch.cat(kept + ([torch.cat(found, 1)] if found else []), 2).int().sort(-1).values, None


def _groups(x, index, stride):
    """[T, H, D] -> ([blocks, groups, H, stride, D] in at least fp32, bool [blocks, groups] which have a token). index:
    int64 [blocks, tokens], -1 for no token, which is zero."""
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1))[index]
    x = x.to(wide_dtype(x.dtype))
    return x.unflatten(1, (-1, stride)).transpose(2, 3), index.unflatten(1, (-1, stride))[..., 0] >= 0


def _shares(queries, counted, keys, there, allowed):
    """[Hkv, rows, columns]: the attention that query blocks give key blocks, of those that are allowed [rows,
    columns]."""
    heads, (stride, dim) = keys.shape[2], keys.shape[3:]
    rows, groups = counted.shape
    queries = queries.flip(3).unflatten(2, (heads, -1)).permute(2, 0, 1, 3, 4, 5).flatten(4).flatten(1, 3)
    keys = keys.permute(2, 0, 1, 3, 4).flatten(3).flatten(1, 2)
    logits = queries @ keys.mT / (stride * dim**0.5)  # [Hkv, rows groups heads of it, columns groups]
    seen = (allowed[:, None, None, :, None] & there).flatten(3)  # [rows, 1, 1, columns groups]
    logits = logits.unflatten(1, (rows, groups, -1)).masked_fill(~seen, -torch.inf)
    weights = logits.softmax(-1).nan_to_num(0.0) * counted[:, :, None, None]
    return weights.sum((2, 3)).unflatten(2, there.shape).sum(3)


def _most(shares, forced, threshold, column):
    """int64 [H, rows, n]: the fewest columns, of those that are forced and then by their share, that have together
    `threshold` of all shares; -1 for none."""
    order = shares.masked_fill(forced, torch.inf).sort(dim=-1, descending=True, stable=True).indices
    ordered = shares.gather(2, order)
    missing = ordered.cumsum(2) - ordered < threshold * ordered.sum(2, keepdim=True)
    taken = (missing & (ordered > 0)) | forced.expand_as(shares).gather(2, order)
    found = torch.where(taken, column[order], -1)
    return found[..., : int(taken.sum(2).max()) if taken.numel() else 0]


@dataclass(frozen=True)
class AntidiagonalTables:
    """blocks: what TopBlocks goes by. to_queries: brings the queries that choose for this rank's; queries_of: int64
    [blocks, query block], rows of what it brings, -1 for none; router_of: int64 [local query pieces], the block of
    those that chooses for each. width: most tokens of a rank; keys_of: int64 [key blocks, key block], the tokens of
    each in what is gathered, rank * width + row, -1 for none."""

    blocks: BlockTables
    to_queries: RouteTable
    queries_of: torch.Tensor
    router_of: torch.Tensor
    width: int
    keys_of: torch.Tensor

    @property
    def queries(self) -> Pieces:
        return self.blocks.queries

    @property
    def keys(self) -> Pieces:
        return self.blocks.keys

    def map(self, move) -> "AntidiagonalTables":
        """The same with every tensor passed through `move`."""
        blocks, route = self.blocks.map(move), self.to_queries.map(move)
        return AntidiagonalTables(
            blocks, route, move(self.queries_of), move(self.router_of), self.width, move(self.keys_of)
        )


def antidiagonal_tables(layout, rank: int, query_block: int, key_block: int, causal: bool) -> AntidiagonalTables:
    """The tables of `rank`."""
    blocks = block_tables(layout, rank, query_block, key_block, 1, causal)
    tokens_of = _tokens(layout.lengths, query_block)
    starts, wanted = np.concatenate([[0], np.cumsum(layout.lengths)]), []
    for number in range(layout.world_size):
        mine = pieces(layout, number, query_block)
        block = mine.block.numpy()
        if causal:
            block = block[tokens_of[block, 0] > starts[mine.local.document.numpy()]] - 1
        wanted.append(np.unique(block))
    routers = wanted[rank]
    place = np.searchsorted(routers, blocks.router.numpy()).clip(max=max(0, len(routers) - 1))
    tokens = [tokens_of[block][tokens_of[block] >= 0] for block in wanted]
    queries_of = tokens_of[routers] if len(routers) else np.full((1, query_block), -1)
    queries_of = np.where(queries_of < 0, -1, np.cumsum(queries_of >= 0).reshape(queries_of.shape) - 1)
    width, row = max(layout.tokens_per_rank), np.empty(layout.num_tokens + 1, np.int64)
    row[-1] = -1
    for number in range(layout.world_size):
        held = layout.global_indices(number)
        row[held] = number * width + np.arange(len(held))
    tensors = (torch.from_numpy(x) for x in (queries_of, place))
    keys_of = torch.from_numpy(row[_tokens(layout.lengths, key_block)])
    return AntidiagonalTables(blocks, route_table(layout, rank, tokens), *tensors, width, keys_of)


def _tokens(lengths, size):
    """int64 [blocks, size]: the tokens of each block of the batch, -1 past the end of a document."""
    found, start = [], 0
    for length in lengths:
        first = np.arange(0, length, size)[:, None] + np.arange(size)
        found.append(np.where(first < length, start + first, -1))
        start += length
    return np.concatenate(found)
