"""The parts of block-sparse attention over ranks: keys that arrive from others, and what is attended to among them.

By request, each rank asks the owners for the blocks its queries chose; in a ring, all keys of one rank after the other
arrive, where anybody chose any of them.
"""

from dataclasses import dataclass

import torch

from longspan.kernels.sparse import BlockPlan, Blocks
from longspan.parallel.exchange import all_to_all_rows, group_rank, group_size, start_all_gather, start_exchange

STRATEGIES = ("fetch", "ring")
RING_SHARE = 0.5  # of all key blocks that ranks could ask for: above, "auto" takes the ring


@dataclass(frozen=True)
class Part:
    """Keys that arrive from some ranks, and what to attend to among them. sends: (peer, rows of the local keys, heads
    of those rows or None for all); receives: (peer, rows of the buffer). The local keys have neither, nor have coarse
    ones, which are everywhere. one_head: the buffer has rows of one head, each of its own block and head."""

    plan: BlockPlan
    sends: tuple = ()
    receives: tuple = ()
    num_rows: int = 0
    one_head: bool = False
    coarse: bool = False

    def start(self, k, v, group):
        """(pending, keys, values): [rows, Hkv or 1, D]."""
        heads = 1 if self.one_head else k.shape[1]
        buffers = [x.new_empty(self.num_rows, heads, x.shape[2]) for x in (k, v)]
        sends = [(peer, _taken(x, rows, head)) for peer, rows, head in self.sends for x in (k, v)]
        receives = [(peer, x[rows]) for peer, rows in self.receives for x in buffers]
        return start_exchange(sends, receives, group), *buffers

    def start_return(self, gradients, dtype, group):
        """Starts sending gradients of the buffer back; (pending, what arrives for each of `sends`)."""
        sends = [(peer, x[rows].to(dtype)) for peer, rows in self.receives for x in gradients]
        counts = [rows.stop if isinstance(rows, slice) else len(rows) for _, rows, _ in self.sends]
        arriving = [tuple(x.new_empty(n, *x.shape[1:], dtype=dtype) for x in gradients) for n in counts]
        receives = [(peer, x) for (peer, _, _), pair in zip(self.sends, arriving) for x in pair]
        return start_exchange(sends, receives, group), arriving

    def add_returned(self, arriving, totals):
        for (_, rows, head), pair in zip(self.sends, arriving):
            for total, x in zip(totals, pair):
                if head is None:
                    total[rows] += x
                else:  # rows of a block that is asked for by several heads differ in their head
                    total.index_put_((rows, head), total[rows, head] + x[:, 0])


def _taken(x, rows, head):
    return x[rows].contiguous() if head is None else x[rows, head][:, None].contiguous()


def block_parts(blocks, tables, causal, strategy, group) -> list[Part]:
    """blocks: int32 [Hkv or 1, local query pieces, n], blocks of keys, ascending, -1 for none."""
    keys = tables.keys
    if keys.whole:
        return [Part(BlockPlan.of(tables.queries.local, keys.local, blocks, causal=causal, ascending=True))]
    rank, world_size = group_rank(group), group_size(group)
    wanted = keys.of_block[blocks.clamp(min=0)].masked_fill((blocks < 0)[..., None], -1).flatten(2)  # pieces
    owner = torch.where(wanted < 0, -1, wanted // keys.width)
    here = torch.where(owner == rank, wanted % keys.width, -1)
    local = Part(BlockPlan.of(tables.queries.local, keys.local, here, causal=causal))
    if world_size == 1:
        return [local]
    heads = wanted.shape[0]
    asked = torch.zeros(heads, world_size * keys.width + 1, dtype=torch.bool, device=wanted.device)
    asked.scatter_(1, torch.where(owner == rank, -1, wanted).flatten(1) % asked.shape[1], True)
    asked = asked[:, :-1].unflatten(1, (world_size, -1))
    counts = start_all_gather(asked.sum((0, 2))[None], group).wait().flatten(0, 1).tolist()  # [who asks][whom]
    others = heads * (world_size - 1) * keys.count
    if strategy == "ring" or (strategy == "auto" and sum(map(sum, counts)) > RING_SHARE * others):
        return [local, *_ring(wanted, owner, tables, causal, counts, rank, world_size)]
    return [local, _fetch(wanted, asked, tables, causal, counts, rank, group)]


def _fetch(wanted, asked, tables, causal, counts, rank, group) -> Part:
    """The blocks that are asked for. With one list for all heads they come whole, else a row of the buffer is one of a
    token and head: a block goes to whom its head's queries chose it for."""
    keys, (heads, world_size, width) = tables.keys, asked.shape
    ids = asked.transpose(0, 1).flatten().nonzero().flatten()  # by owner, then head, then piece
    mine, theirs = counts[rank], [row[rank] for row in counts]
    requests = all_to_all_rows(ids % (heads * width), mine, theirs, group)
    unit_owner, unit_head, unit_piece = ids // (heads * width), ids // width % heads, ids % width
    lengths = keys.lengths[unit_owner * width + unit_piece]
    first = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    # Rows to send, and to receive, from each peer: lengths are known to both.
    sent_head, sent_piece = requests // width, requests % width
    start, length = keys.local.start.long()[sent_piece], keys.local.length.long()[sent_piece]
    sends, receives, at, row = [], [], 0, 0
    bounds = first.tolist()
    for peer in range(world_size):
        if theirs[peer]:
            part = slice(at, at + theirs[peer])
            rows, head = _rows_of(start[part], length[part], sent_head[part])
            sends.append((peer, rows, head if heads > 1 else None))
        at += theirs[peer]
        if mine[peer]:
            receives.append((peer, slice(bounds[row], bounds[row + mine[peer]])))
        row += mine[peer]
    unit = torch.full((heads, world_size * width), -1, dtype=torch.int64, device=wanted.device)
    unit[unit_head, unit_owner * width + unit_piece] = torch.arange(len(ids), device=wanted.device)
    columns = unit.gather(1, wanted.clamp(min=0).flatten(1)).view_as(wanted).masked_fill(wanted < 0, -1)
    blocks = _arrived(keys, unit_owner * width + unit_piece, first[:-1], lengths)
    listed = max(unit_head.bincount(minlength=heads).tolist())
    plan = BlockPlan.of(tables.queries.local, blocks, columns, causal=causal, listed=listed)
    return Part(plan, tuple(sends), tuple(receives), bounds[-1], one_head=heads > 1)


def _ring(wanted, owner, tables, causal, counts, rank, world_size) -> list[Part]:
    """All keys of one rank after the other, where anybody wants any of them."""
    keys, parts = tables.keys, []
    for step in range(1, world_size):
        source, target = (rank - step) % world_size, (rank + step) % world_size
        number = torch.arange(source * keys.width, (source + 1) * keys.width, device=wanted.device)
        lengths = keys.lengths[number]
        first = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        columns = torch.where(owner == source, wanted % keys.width, -1)
        plan = BlockPlan.of(tables.queries.local, _arrived(keys, number, first[:-1], lengths), columns, causal=causal)
        num_rows = keys.tokens[source] if counts[rank][source] else 0
        sends = ((target, slice(0, keys.tokens[rank]), None),) if counts[target][rank] else ()
        receives = ((source, slice(0, num_rows)),) if num_rows else ()
        parts.append(Part(plan, sends, receives, num_rows))
    return parts


def _arrived(keys, number, first, lengths) -> Blocks:
    """Pieces of other ranks where they lie in a buffer."""
    ones = torch.ones_like(first).int()
    return Blocks(keys.size, first.int(), lengths.int(), keys.positions[number].int(), ones, ones)


def _rows_of(start, length, head):
    """(rows, heads) of some runs of rows, one after another."""
    index = torch.repeat_interleave(torch.arange(len(start), device=start.device), length)
    inside = torch.arange(len(index), device=start.device) - (length.cumsum(0) - length)[index]
    return start[index] + inside, head[index]
