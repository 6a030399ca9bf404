"""Blocks by request: ranks tell the owners which blocks their queries chose, and get exactly those.

The host has to know how many there are. When it does, keys and values are packed in one launch and sent before anything
else is made.
"""

from dataclasses import dataclass

import numpy as np
import torch

from longspan.attention.block_parts import Part, pieces_of, ring
from longspan.attention.block_tables import Pieces
from longspan.kernels.sparse import BlockPlan, Blocks, Packing, add_packed, pack
from longspan.parallel.exchange import (
    Pending,
    ToHost,
    group_rank,
    group_size,
    start_all_gather,
    start_all_to_all,
)


def block_parts(blocks, tables, causal, strategy, group, rule=None, full=False):
    """(the part of local keys, what follows of other ranks: a list of parts or, where the host has to wait for what
    ranks ask of one another, a Request). blocks: int32 [Hkv or 1, local query pieces, n], blocks of keys, -1 for
    none; strategy: one of STRATEGIES or an Estimate; rule: of plans; full: there is no -1."""
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
    return Part(plans[rank]), Request(wanted, keys, plans, group, None if strategy == "fetch" else strategy)


class Request:
    """What ranks ask of one another: the pieces of others that their lists name, a flag for each, which all ranks see.
    How many there are is on its way to the host, which has to know the sizes of what is sent.

    wanted: int32 [lists, local query pieces, n] pieces, -1 for none. plans: of the keys of every rank. estimate: which
    says whether a ring is faster, or None for no ring.
    """

    def __init__(self, wanted, keys: Pieces, plans, group, estimate=None):
        self.wanted, self.keys, self.plans, self.group, self.estimate = wanted, keys, plans, group, estimate
        rank, world_size, lists, width = group_rank(group), group_size(group), wanted.shape[0], keys.width
        asked = torch.zeros(lists, world_size * width + 1, dtype=torch.uint8, device=wanted.device)
        self.columns = (wanted + 1).long().flatten(1)  # what is none has the first
        asked.scatter_(1, self.columns, 1)
        asked[:, 1 + rank * width : 1 + (rank + 1) * width] = 0
        self.asked, given = asked[:, 1:].unflatten(1, (world_size, width)), asked.flatten()  # [list, owner, piece]
        if estimate is not None:  # how many are listed of every owner's: lists lie one owner after the other
            given = torch.cat([torch.stack([plan.row_ptr[:, -1] for plan in plans]).sum(1).view(torch.uint8), given])
        found = start_all_gather(given[None], group).wait().flatten(0, 1)
        listed, flags = found.tensor_split([found.shape[1] - asked.numel()], 1)
        flags = flags.view(world_size, lists, -1)[..., 1:].unflatten(2, (world_size, width))
        self.packing = Packing.of(keys.local, flags[:, :, rank, : len(keys.local)])
        tokens = (flags * keys.lengths.view(world_size, width)).sum((1, 3))
        counts = [tokens[..., None], flags.sum(3, dtype=torch.int64).transpose(1, 2)]
        counts += [] if estimate is None else [listed.contiguous().view(torch.int64)[..., None]]
        self.counts = ToHost(torch.cat(counts, 2))

    def parts(self, k, v):
        """(the parts, the transfer of the first under way). Waits for the device."""
        counts, lists = self.counts.wait(), len(self.wanted)  # [who asks, owner, ...]
        tokens, pieces = counts[..., 0], counts[group_rank(self.group), :, 1 : lists + 1]
        if self.estimate is not None and self._ring_is_faster(tokens, np.diff(counts[..., -1], prepend=0)):
            parts = ring(self.plans, self.keys, (tokens > 0).tolist(), self.group)
            return parts, self._start(parts[0].way, k, v)
        way = Fetched.of(self.packing, tokens, self.group)
        pending = self._start(way, k, v)  # first of all: what follows has time until it is there
        return [Part(self._plan(int(pieces.sum()), int(pieces.sum(0).max())), way=way)], pending

    def _start(self, way, k, v):
        with self.counts.beside(self.packing.places) as hand_over:
            pending = way.start(k, v, self.group)
            hand_over(*pending.result)
        return pending

    def _plan(self, count, most):
        """Over the `count` pieces that arrive, at most so many for a list: owner after owner, list after list."""
        keys, (lists, owners, width) = self.keys, self.asked.shape
        flags, every = self.asked.transpose(0, 1).flatten(), torch.arange(owners * width, device=self.asked.device)
        place = torch.where(flags > 0, flags.cumsum(0) - 1, count)
        number = place.new_empty(count + 1)
        number.scatter_(0, place, every.view(owners, 1, width).expand(-1, lists, -1).flatten())
        number = number[:-1]
        length = keys.lengths[number]
        start = length.cumsum(0, dtype=torch.int32) - length
        blocks = Blocks(keys.size, start, length, keys.positions[number], keys.steps[number], length)
        place = place.masked_fill_(place == count, -1).int().view(owners, lists, width).transpose(0, 1).flatten(1)
        columns = torch.nn.functional.pad(place, (1, 0), value=-1).gather(1, self.columns).view_as(self.wanted)
        own = self.plans[group_rank(self.group)]
        options = {"causal": own.causal, "ascending": True, "rule": own.rule, "listed": most}
        return BlockPlan.of(own.queries, blocks, columns, **options)

    def _ring_is_faster(self, tokens, entries):
        pairs = self.plans[0].queries.size * self.keys.size
        return self.estimate.ring_is_faster(tokens, entries, self.keys.tokens, len(self.wanted), pairs)


@dataclass(frozen=True)
class Fetched:
    """How what was asked for travels. packing: which of this rank's pieces go where; sent, received: rows, to and from
    every rank."""

    packing: Packing
    sent: tuple[int, ...]
    received: tuple[int, ...]

    @classmethod
    def of(cls, packing, tokens, group):
        rank = group_rank(group)
        return cls(packing, tuple(tokens[:, rank].tolist()), tuple(tokens[rank].tolist()))

    def start(self, k, v, group):
        return _exchange(pack((k, v), self.packing, sum(self.sent)), self.sent, self.received, group)

    def start_return(self, gradients, dtype, group):
        return _exchange([x.to(dtype) for x in gradients], self.received, self.sent, group)

    def add_returned(self, arrived, totals, blocks, shares):
        totals = [x.contiguous() for x in totals]
        add_packed(totals, self.packing, arrived, shares)
        return totals


def _exchange(several, sent, received, group):
    works = [start_all_to_all(x, sent, received, group) for x in several]
    return Pending(works, [work.result for work in works])
