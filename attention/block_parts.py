"""The parts of block-sparse attention over ranks: keys that arrive from others, and what is attended to among them.

By request, each rank asks the owners for the blocks its queries chose; in a ring, all keys of one rank after the other
arrive.
"""

from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from longspan.attention.block_tables import Pieces
from longspan.kernels.scatter import scatter_rows
from longspan.kernels.sparse import BlockPlan, Blocks
from longspan.parallel.exchange import ToHost, all_to_all_rows, group_rank, group_size, start_all_gather, start_exchange

STRATEGIES = ("fetch", "ring")
RING_SHARE = 0.5  # of what a ring would bring that ranks asked for: above, "auto" takes the ring


@dataclass(frozen=True)
class Part:
    """Keys, and what to attend to among them: this rank's own, coarse ones, or those that arrive from other ranks.

    sends: (peer, rows of what is picked); picked: rows and heads of this rank's keys that are sent, peer after peer, or
    rows and None for all heads; None where all rows are. receives: (peer, rows of the buffer). one_head: the buffer has
    rows of one head, each of its own block and head. coarse: of coarse keys, not of tokens; rows: those of them that
    the plan is over. remote: they arrive.
    """

    plan: BlockPlan
    sends: tuple = ()
    receives: tuple = ()
    picked: tuple | None = None
    num_rows: int = 0
    one_head: bool = False
    coarse: bool = False
    rows: slice | None = None
    remote: bool = False

    def start(self, k, v, group):
        """(pending, keys, values): [rows, Hkv or 1, D]."""
        heads = 1 if self.one_head else k.shape[1]
        buffers = [x.new_empty(self.num_rows, heads, x.shape[2]) for x in (k, v)]
        picked = [self._pick(x) for x in (k, v)] if self.sends else ()
        sends = [(peer, x[rows]) for peer, rows in self.sends for x in picked]
        receives = [(peer, x[rows]) for peer, rows in self.receives for x in buffers]
        return start_exchange(sends, receives, group), *buffers

    def start_return(self, gradients, dtype, group):
        """Starts sending gradients of the buffer back; (pending, what arrives, in the order of `picked`)."""
        sends = [(peer, x[rows].to(dtype)) for peer, rows in self.receives for x in gradients]
        num_rows = self.sends[-1][1].stop if self.sends else 0
        arriving = [x.new_empty(num_rows, *x.shape[1:], dtype=dtype) for x in gradients]
        receives = [(peer, x[rows]) for peer, rows in self.sends for x in arriving]
        return start_exchange(sends, receives, group), arriving

    def add_returned(self, arriving, totals):
        """Adds what arrived to [rows, Hkv, D] each, one rank after the other."""
        for total, x in zip(totals, arriving):
            for _, part in self.sends:
                if self.picked is None:
                    scatter_rows(total, part, x[part])
                elif self.one_head:  # rows of a block that is asked for by several heads differ in their head
                    rows, heads = (index[part] for index in self.picked)
                    scatter_rows(total.flatten(0, 1), rows * total.shape[1] + heads, x[part, 0])
                else:
                    scatter_rows(total, self.picked[0][part], x[part])

    def _pick(self, x):
        if self.picked is None:
            return x.contiguous()
        rows, heads = self.picked
        return x[rows, heads][:, None] if self.one_head else x[rows]


def block_parts(blocks, tables, causal, strategy, group, rule=None, full=False):
    """(the part of local keys, what follows of other ranks: a list of parts or, where the host has to wait for what
    ranks ask of one another, a Request). blocks: int32 [Hkv or 1, local query pieces, n], blocks of keys, -1 for
    none; rule: of plans; full: there is no -1."""
    keys, queries = tables.keys, tables.queries.local
    if keys.whole:
        options = {"causal": causal, "ascending": True, "rule": rule, "full": full}
        return Part(BlockPlan.of(queries, keys.local, blocks, **options)), []
    rank, world_size = group_rank(group), group_size(group)
    wanted = pieces_of(blocks, keys)
    held = [keys.local if owner == rank else keys.of_rank(owner) for owner in range(world_size)]
    plans = BlockPlan.split(queries, held, wanted, keys.width, causal=causal, rule=rule)
    if world_size == 1 or strategy == "ring":
        return Part(plans[rank]), ring(plans, keys, keys.reach[int(causal)], group)
    asked = Request(wanted, keys, queries, causal, group, plans if strategy == "auto" else None, rule=rule)
    return Part(plans[rank]), asked


def pieces_of(blocks, keys: Pieces) -> torch.Tensor:
    """int32 [..., n] block numbers -> int32 [..., m] numbers of their pieces, -1 for none."""
    found = keys.of_block.int()[blocks.clamp(min=0)]
    return found.masked_fill_((blocks < 0)[..., None], -1).flatten(-2)


def ring(plans, keys: Pieces, reach, group) -> list[Part]:
    """All keys of one rank after the other. plans: of the keys of every rank; reach: [who, whom], on the host, where
    keys have to go."""
    rank, world_size, parts = group_rank(group), group_size(group), []
    for step in range(1, world_size):
        source, target = (rank - step) % world_size, (rank + step) % world_size
        num_rows = keys.tokens[source] if reach[rank][source] else 0
        sends = ((target, slice(0, keys.tokens[rank])),) if reach[target][rank] and keys.tokens[rank] else ()
        receives = ((source, slice(0, num_rows)),) if num_rows else ()
        plan = plans[source]
        if not num_rows:  # lists may name blocks of a rank of which the mask hides everything
            plan = replace(plan, keys=plan.keys.map(lambda x: x[:0]))
        parts.append(Part(plan, sends, receives, num_rows=num_rows, remote=True))
    return parts


class Request:
    """What ranks ask of one another: the pieces of others that their lists name, a flag for each. How many there are is
    on its way to the host, which has to know the sizes of what is sent.

    wanted: int32 [heads, local query pieces, n] pieces, -1 for none. plans: those of a ring, which is taken where ranks
    want most of what it would bring; None for no ring. weights: floats, log weights of all pieces, or None.
    rule: of the plan. brought: the piece and head of every block of keys that arrived.
    """

    def __init__(self, wanted, keys: Pieces, queries, causal, group, plans=None, weights=None, rule=None):
        self.wanted, self.keys, self.queries, self.causal, self.group = wanted, keys, queries, causal, group
        self.plans, self.weights, self.rule = plans, weights, rule
        rank, world_size, heads = group_rank(group), group_size(group), wanted.shape[0]
        asked = torch.zeros(heads, world_size * keys.width + 1, dtype=torch.uint8, device=wanted.device)
        asked.scatter_(1, torch.where(wanted < 0, asked.shape[1] - 1, wanted).long().flatten(1), 1)
        asked = asked[:, :-1].unflatten(1, (world_size, -1)).transpose(0, 1).contiguous()
        asked[rank] = 0
        self.asked, ones = asked, [1] * world_size  # [owner, head, piece]
        self.incoming = all_to_all_rows(asked, ones, ones, group)  # [who asks, head, my piece]
        pieces, lengths = asked.sum(2, dtype=torch.int64), keys.lengths.view(world_size, 1, -1)
        counts = torch.cat([pieces, (asked * lengths).sum((1, 2))[:, None]], 1)
        self.counts = ToHost(start_all_gather(counts[None], group).wait().flatten(0, 1))

    def parts(self, k, v):
        """(the parts, the transfer of the first under way, its keys, its values). Waits for the device."""
        counts = self.counts.wait()  # [who asks, whom, heads + 1]: pieces of every head, and tokens of all
        tokens = counts[:, :, -1]
        brought = (tokens > 0) * self.keys.tokens * self.wanted.shape[0]  # by a ring
        if self.plans is not None and tokens.sum() > RING_SHARE * brought.sum():
            parts = ring(self.plans, self.keys, (tokens > 0).tolist(), self.group)
            with self.counts.beside() as hand_over:
                first = parts[0].start(k, v, self.group)
                hand_over(*first[1:])
            return parts, *first
        return self._fetch(counts.tolist(), k, v)

    def _fetch(self, counts, k, v):
        """The pieces that are asked for. With one list for all heads they come whole, else a row of the buffer is one
        of a token and head: a piece goes to whom its head's queries chose it for."""
        rank, (_, heads, width) = group_rank(self.group), self.asked.shape
        mine, theirs = counts[rank], [row[rank] for row in counts]
        sends, receives = (_in_order([row[-1] for row in side]) for side in (theirs, mine))
        num_rows = sum(row[-1] for row in mine)
        with self.counts.beside(self.incoming) as hand_over:
            _, sent_head, sent_piece = _flagged(self.incoming, sum(sum(row[:-1]) for row in theirs))
            local = self.keys.of_rank(rank)
            start, length = local.start[sent_piece], local.length[sent_piece]
            picked = rows_of(start, length, sent_head, sum(row[-1] for row in theirs))
            part = Part(None, sends, receives, picked, num_rows, one_head=heads > 1, remote=True)
            first = part.start(k, v, self.group)
            hand_over(*picked, *first[1:])
        flags = self.asked.flatten()
        owner, head, piece = _flagged(self.asked, sum(sum(row[:-1]) for row in mine))
        number = owner * width + piece
        self.brought = number, head
        length = self.keys.lengths[number]
        start = (length.cumsum(0) - length).int()
        blocks = Blocks(self.keys.size, start, length, self.keys.positions[number], self.keys.steps[number], length)
        place = torch.where(flags > 0, flags.cumsum(0) - 1, -1).int().view_as(self.asked).transpose(0, 1).flatten(1)
        columns = place.gather(1, self.wanted.clamp(min=0).long().flatten(1)).view_as(self.wanted)
        plan = BlockPlan.of(
            self.queries, blocks, columns.masked_fill_(self.wanted < 0, -1), causal=self.causal, ascending=True,
            listed=max(sum(row[n] for row in mine) for n in range(heads)),
            log_weight=None if self.weights is None else self.weights[number], rule=self.rule,
        )  # fmt: skip
        return [replace(part, plan=plan)], *first


def _flagged(flags, count):
    """(owner, head, piece) of the `count` flags that are set in [owners, heads, pieces], ascending; without asking the
    device how many."""
    _, heads, width = flags.shape
    at = torch.searchsorted(flags.flatten().cumsum(0), torch.arange(1, count + 1, device=flags.device))
    return at // (heads * width), at // width % heads, at % width


def _in_order(counts):
    """(peer, rows) for those with any, one after the other."""
    stops = list(accumulate(counts))
    return tuple((peer, slice(stop - n, stop)) for peer, (n, stop) in enumerate(zip(counts, stops)) if n)


def rows_of(start, length, head, count):
    """(rows, heads) of some runs of rows, one after another, `count` in all."""
    at = torch.arange(len(start), device=start.device)
    index = torch.repeat_interleave(at, length.long(), output_size=count)
    inside = torch.arange(count, device=start.device) - (length.cumsum(0) - length)[index]
    return start[index] + inside, head[index]
