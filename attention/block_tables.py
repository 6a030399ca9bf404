"""Where the blocks of block-sparse attention are: a pure function of the layout, made once per batch.

Documents are cut into blocks from their start, the same on any number of ranks; a rank holds pieces of them, one for
each block that one of its spans meets. Pieces are numbered over all ranks: owner * width + place on the owner.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from longspan.kernels.sparse import Blocks, Ranges
from longspan.parallel.layout import Layout


@dataclass(frozen=True)
class Pieces:
    """The blocks of one size. local: this rank's pieces; block: int64 [local pieces], the block that each is of.
    of_block: int64 [blocks, most], the pieces of every block in the order of tokens, -1 for none; length: int64
    [blocks], tokens. width: most pieces of a rank. starts, lengths, positions, steps: int32 [world_size * width], of
    every piece its first row on its owner, rows, position in its document, and positions from row to row. tokens: of
    every rank. reach: bool [2, world_size, world_size], whether a rank shares a document with another, and whether its
    queries see some of the other's keys under a causal mask. whole: this rank's pieces are the blocks, one by one."""

    local: Blocks
    block: torch.Tensor
    of_block: torch.Tensor
    length: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    positions: torch.Tensor
    steps: torch.Tensor
    width: int
    size: int
    tokens: tuple[int, ...]
    reach: np.ndarray
    whole: bool

    def of_rank(self, rank: int) -> Blocks:
        """The pieces of a rank where they lie in all of its rows; at the end pieces without rows."""
        mine = slice(rank * self.width, (rank + 1) * self.width)
        columns = self.starts, self.lengths, self.positions, self.steps, self.steps
        return Blocks(self.size, *(x[mine] for x in columns))

    def map(self, move) -> "Pieces":
        """The same with every tensor passed through `move`."""
        moved = {name: move(x) for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        return replace(self, local=self.local.map(move), **moved)


@dataclass(frozen=True)
class Totals:
    """Sums of some blocks, from those of pieces: a rank gets few of other ranks. pieces: int64 [rows, turns], of every
    row its pieces in the order of tokens, by their place among this rank's and, behind these, among those that ranks
    show; -1 for none. size: int32 [rows], tokens. shown: int64, this rank's pieces that go to all, as many on each.
    own: the rows are this rank's pieces, one by one, and nothing is shown."""

    pieces: torch.Tensor
    size: torch.Tensor
    shown: torch.Tensor
    own: bool

    @classmethod
    def of(cls, held: Pieces, rank: int, who: np.ndarray, blocks: np.ndarray) -> "Totals":
        """The totals of rank `rank` where rank who[i] needs blocks[i], one row for each, in their order."""
        parts = held.of_block.numpy()[blocks]
        shown = np.unique(parts[(parts >= 0) & (parts // held.width != who[:, None])])
        turn = np.arange(len(shown)) - np.searchsorted(shown // held.width, shown // held.width)
        most, mine = turn.max(initial=-1) + 1, parts[who == rank]
        at = np.searchsorted(shown, mine).clip(max=max(0, len(shown) - 1))
        here = np.where(mine < 0, -1, mine % held.width)
        if most:
            behind = max(1, len(held.local)) + shown[at] // held.width * most + turn[at]
            here = np.where((mine < 0) | (mine // held.width == rank), here, behind)
        given = np.zeros(most, np.int64)
        own = shown // held.width == rank
        given[turn[own]] = shown[own] % held.width
        each = not most and len(here) > 0 and np.array_equal(here, np.arange(len(held.local))[:, None])
        return cls(torch.from_numpy(here), held.length[blocks[who == rank]].int(), torch.from_numpy(given), each)

    def map(self, move) -> "Totals":
        """The same with every tensor passed through `move`."""
        return Totals(*map(move, (self.pieces, self.size, self.shown)), self.own)


@dataclass(frozen=True)
class BlockTables:
    """queries, keys: the blocks of both sizes. routers: sums of the query blocks that choose for local pieces, one row
    for each. For every local piece of queries: candidates, the key blocks that its
    block may choose from, all of its document or, causal, those wholly before it; diagonal: int32 [pieces, n], those
    that it always keeps, -1 for none; router: int32, the query block whose mean chooses for it, its own or, causal, the
    one before (-1 for none)."""

    queries: Pieces
    keys: Pieces
    routers: Totals
    candidates: Ranges
    diagonal: torch.Tensor
    router: torch.Tensor

    def map(self, move) -> "BlockTables":
        """The same with every tensor passed through `move`."""
        parts = self.queries, self.keys, self.routers, self.candidates
        return BlockTables(*(x.map(move) for x in parts), move(self.diagonal), move(self.router))


def block_tables(layout: Layout, rank: int, query_block: int, key_block: int, keep: float, causal: bool) -> BlockTables:
    """keep: key blocks of a list, or below 1 their share of those to choose from (at least one)."""
    queries, keys = pieces(layout, rank, query_block), pieces(layout, rank, key_block)
    per_document = -(-np.array(layout.lengths) // key_block)
    base = np.concatenate([[0], np.cumsum(per_document)])
    document = queries.local.document.numpy().astype(np.int64)
    query_base = np.concatenate([[0], np.cumsum(-(-np.array(layout.lengths) // query_block))])
    place = queries.block.numpy() - query_base[document]  # of the query block in its document
    begin, end = place * query_block, np.minimum((place + 1) * query_block, np.array(layout.lengths)[document])
    first, stop = base[document], base[document + 1]
    diagonal = np.zeros((len(place), 0), np.int64)
    if causal:
        met = first + -(-end // key_block)  # past the last key block that the query block meets
        stop = first + begin // key_block
        diagonal = stop[:, None] + np.arange(int((met - stop).max(initial=0)))
        diagonal = np.where(diagonal < met[:, None], diagonal, -1)
    router = queries.block.numpy() - 1 if causal else queries.block.numpy()
    router = np.where((place > 0) | (not causal), router, -1)
    tensors = (torch.from_numpy(x.astype(np.int32)) for x in (diagonal, router))
    routers = router_totals(queries, rank, layout.lengths, causal)
    return BlockTables(queries, keys, routers, Ranges.of(first, stop, keep), *tensors)


def router_totals(queries: Pieces, rank: int, lengths, causal: bool) -> Totals:
    """Sums of the blocks that choose for the pieces of `rank`: their own or, causal, the one before, where there is
    one."""
    parts = queries.of_block.numpy()
    blocks = np.nonzero(parts >= 0)[0]
    order = np.argsort(parts[parts >= 0])
    first = np.cumsum(-(-np.array(lengths) // queries.size)) - -(-np.array(lengths) // queries.size)
    router = np.where(np.isin(blocks, first), blocks, blocks - 1) if causal else blocks
    return Totals.of(queries, rank, parts[parts >= 0][order] // queries.width, router[order])


def pieces(layout: Layout, rank: int, size: int) -> Pieces:
    """The pieces of blocks of `size` tokens."""
    counts = -(-np.array(layout.lengths) // size)
    base = np.concatenate([[0], np.cumsum(counts)])
    found = []  # per rank: (start among its tokens, tokens, position, document, block)
    for r, spans in enumerate(layout.spans):
        rows = []
        for span, offset in zip(spans, layout.local_offsets(r)):
            cuts = np.arange(span.start // size * size, span.stop, size).clip(span.start)
            ends = np.append(cuts[1:], span.stop)
            document = np.full(len(cuts), span.document)
            rows.append(
                np.stack([offset + cuts - span.start, ends - cuts, cuts, document, base[document] + cuts // size])
            )
        found.append(np.concatenate(rows, 1) if rows else np.zeros((5, 0), np.int64))
    width = max(x.shape[1] for x in found)
    block = np.concatenate([x[4] for x in found])
    number = np.concatenate([r * width + np.arange(x.shape[1]) for r, x in enumerate(found)])
    order = np.lexsort((np.concatenate([x[2] for x in found]), block))
    block, number = block[order], number[order]
    turn = np.arange(len(block)) - np.searchsorted(block, block)
    of_block = np.full((base[-1], turn.max(initial=0) + 1), -1)
    of_block[block, turn] = number
    everywhere = np.zeros((4, len(found) * width), np.int32)  # starts, lengths, positions, steps
    for r, rows in enumerate(found):
        everywhere[:, r * width : r * width + rows.shape[1]] = *rows[:3], np.ones(rows.shape[1])
    start, length, position, document, mine = found[rank]
    columns = (torch.from_numpy(x.astype(np.int32)) for x in (start, length, position, np.ones_like(start), document))
    tokens = np.minimum(
        size, np.repeat(layout.lengths, counts) - (np.arange(base[-1]) - np.repeat(base[:-1], counts)) * size
    )
    return Pieces(
        Blocks(size, *columns), torch.from_numpy(mine), torch.from_numpy(of_block), torch.from_numpy(tokens),
        *torch.from_numpy(everywhere), width, size, layout.tokens_per_rank, _reach(layout),
        len(found) == 1 and np.array_equal(of_block[:, 0], np.arange(len(mine))),
    )  # fmt: skip


def _reach(layout):
    """[2, who, whom]: a document in common, and there a token at or before one's last."""
    first = np.full((layout.world_size, len(layout.lengths)), max(layout.lengths))
    stop = np.zeros_like(first)
    for rank, spans in enumerate(layout.spans):
        for span in spans:
            first[rank, span.document] = min(first[rank, span.document], span.start)
            stop[rank, span.document] = max(stop[rank, span.document], span.stop)
    seen = (first[None] < stop[:, None]).any(2)
    return np.stack([((stop[None] > 0) & (stop[:, None] > 0)).any(2), seen])
