"""Blocks by request: ranks tell the owners which blocks their queries chose, and get exactly those.

The host has to know how many there are. Everything that follows from lists and flags is queued before it waits for
that; when it knows, keys and values are packed in one launch and sent, and attention to them can be queued.
"""

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import gcd

import numpy as np
import torch

from longspan.attention.block_parts import Part, pieces_of, ring
from longspan.attention.block_tables import Pieces
from longspan.kernels.sparse import READ_PAST, BlockPlan, Packing, add_packed, ask, count, pack, place, rename
from longspan.parallel.exchange import (
    Pending,
    ToHost,
    gather,
    group_rank,
    group_size,
    start_all_to_all,
    start_exchange,
)

GROUPS = 2  # of lists at most, whose keys travel one after the other where nothing else is beside them


def turns_of(lists: int) -> int:
    """Groups that so many lists come in: of equally many."""
    return gcd(lists, GROUPS)


def block_parts(
    blocks, tables, causal, strategy, group, rule=None, full=False, apart=False, alone=True, peers=None, staged=None
):
    """(parts of local keys, what follows: a list of parts of other ranks' keys or, where the host has to wait for what
    ranks ask of one another, a Request). blocks: int32 [Hkv or 1, local query pieces, n], blocks of keys, -1 for none;
    strategy: one of STRATEGIES or an Estimate; rule: of plans; full: there is no -1. apart: local blocks are a part of
    their own, else they are attended to together with those that arrive: a pass over queries less. alone: there are no
    other parts. peers: the group's PeerMemory or None; staged: keys where others can read them, see
    attention.shared_requests, or None."""
    keys, queries, options = tables.keys, tables.queries.local, {"causal": causal, "rule": rule}
    if keys.whole:
        return [Part(BlockPlan.of(queries, keys.local, blocks, ascending=True, full=full, **options))], []
    rank, world_size = group_rank(group), group_size(group)
    if world_size == 1 or strategy == "ring":
        plans = _plans_by_owner(pieces_of(blocks, keys), keys, queries, rank, world_size, options)
        return [Part(plans[rank])], ring(plans, keys, keys.reach[int(causal)], group)
    given = None if strategy == "fetch" else strategy, full, not apart, alone and rule is None
    make = Request if staged is None else staged.request
    request = make(blocks, keys, queries, options, group, *given, peers)
    return request.local, request


def _plans_by_owner(wanted, keys, queries, rank, world_size, options):
    held = [keys.local if owner == rank else keys.of_rank(owner) for owner in range(world_size)]
    return BlockPlan.split(queries, held, wanted, keys.width, **options)


class Request:
    """What ranks ask of one another: the pieces of others that their lists name, a flag for each, which all ranks see.
    How many there are is on its way to the host, which has to know the sizes of what is sent.

    local: parts that can be attended to meanwhile; `together` there are none, and local blocks lie in front of what
    arrives. estimate: which says whether a ring is faster, or None for no ring. in_turn: nothing else
    hides the transfer: keys of some lists come first, and are attended to while others come. Others as in
    `block_parts`.
    """

    window = 0  # see kernels.sparse.place

    def __init__(
        self, blocks, keys: Pieces, queries, options, group, estimate=None, full=False, together=True, in_turn=False,
        peers=None,
    ):  # fmt: skip
        self.keys, self.queries, self.options = keys, queries, options
        self.group, self.estimate, self.together, self.lists = group, estimate, together, len(blocks)
        self.groups = turns_of(len(blocks)) if in_turn and together else 1
        rank, world_size = group_rank(group), group_size(group)
        self.wanted, shown = ask(blocks, keys.of_block, world_size, keys.width, listed=estimate is not None)
        shown = gather(shown, group, peers)
        counts = count(shown, keys.lengths, self.lists)
        given = self.lists, rank, together, self.groups, self.window
        table, arriving, places = place(shown, counts, keys, *given)
        self.packing = Packing(keys.local, places, rank if together else -1)
        self.counts = ToHost(counts)
        self.begin(table, arriving, counts)
        columns = rename(self.wanted, table)
        if together:
            full = full and keys.of_block.shape[1] == 1
            self.local = []
            self.plan = BlockPlan.of(queries, arriving, columns, ascending=True, full=full, apart=True, **options)
        else:
            held = keys.local, arriving
            local, plan = BlockPlan.split(queries, held, columns, len(arriving), **options)
            self.local, self.plan = [Part(local)], replace(plan, apart=True)

    def parts(self, k, v):
        """(parts of local keys that are left, parts of others, the transfer of the first under way). Waits for the
        device."""
        counts, rank, lists = self.counts.wait(), group_rank(self.group), self.lists
        rows = counts[..., :lists].reshape(*counts.shape[:2], self.groups, -1).sum(3)  # [who, owner, group of lists]
        own = int(rows[rank, rank].sum()) if self.together else 0
        if self.estimate is not None:
            tokens = rows.sum(2)
            np.fill_diagonal(tokens, 0)
            if self._ring_is_faster(tokens, counts[..., -1]):
                plans = _plans_by_owner(self.wanted, self.keys, self.queries, rank, len(tokens), self.options)
                parts = ring(plans, self.keys, (tokens > 0).tolist(), self.group)
                return [Part(plans[rank])] if self.together else [], parts, self._start(parts[0].way, k, v)
        rows[rank, rank] = 0
        way = Fetched(self.packing, own, k.shape[0], rows[:, rank].T.tolist(), rows[rank].T.tolist())
        pending = self._start(way, k, v)  # first of all: what follows has time until it is there
        pieces = counts[rank, :, lists : 2 * lists].copy()  # [owner, list]
        pieces[rank] *= self.together
        arrived = self.plan.keys.map(lambda x: x[: pieces.sum()])
        return [], [Part(self.plan.over(arrived, int(pieces.sum(0).max())), way=way)], pending

    def begin(self, table, arriving, counts):
        """Where keys lie when they are here is known, see kernels.sparse.place and .count; lists follow."""

    def settle(self, parts, arrived):
        """parts, and what arrived in them, once all of `parts` is queued."""
        return parts, arrived

    def _start(self, way, k, v):
        with self.counts.beside(self.packing.places) as hand_over:
            pending = way.start(k, v, self.group)
            hand_over(*pending.result)
        return pending

    def _ring_is_faster(self, tokens, entries):
        pairs = self.queries.size * self.keys.size
        return self.estimate.ring_is_faster(tokens, entries, self.keys.tokens, self.lists, pairs)


@dataclass(frozen=True)
class Asked:
    """Keys and values that were asked for, in one buffer. packing: where rows of this rank lie in the buffer, and in
    buffers of what others return; own: rows of this rank, which lie in front of what arrives; tokens: of this rank."""

    packing: Packing
    own: int
    tokens: int

    def foreign(self, tensors):
        """Of keys and values that lie in the buffer of `start`, those of other ranks, in memory of their own."""
        return [torch.cat([x[self.own :] for x in tensors], 1)] if self.own else tensors

    def whole(self, foreign, k, v):
        """The buffer once more, from `foreign` and this rank's keys and values."""
        if not self.own:
            return foreign
        (theirs,), places = foreign, torch.full_like(self.packing.places, -1)
        places[self.packing.own] = self.packing.places[self.packing.own]
        buffer = theirs.new_empty(self.own + len(theirs), *theirs.shape[1:])
        buffer[self.own :] = theirs
        pack((k, v), replace(self.packing, places=places), 0, buffer)
        return list(buffer.chunk(2, 1))

    def add_returned(self, arrived, totals, blocks, shares):
        """totals: None where local blocks lay in front of what arrived, and nothing else was added to them."""
        arrived, own = arrived[:2], arrived[2:]
        if self.packing.own < 0:
            totals = [x.contiguous() for x in totals]
            add_packed(totals, self.packing, arrived, shares)
            return totals
        fresh, shape = totals is None, (self.tokens, self.packing.places.shape[1] * own[0].shape[1], own[0].shape[2])
        if fresh:
            totals = [x.new_empty(shape) for x in own]
        totals = [x.new_zeros(shape) if y is None else y.contiguous() for x, y in zip(own, totals)]
        add_packed(totals, self.packing, arrived, shares, own, fresh)
        return totals


@dataclass(frozen=True)
class Fetched(Asked):
    """How what was asked for travels. packing: also which of this rank's pieces go where; sent, received: of every
    group of lists, rows to and from every rank."""

    sent: list[list[int]]
    received: list[list[int]]

    @property
    def turns(self) -> int:
        return len(self.sent)

    def start(self, k, v, group):
        heads = self.packing.heads_of(k)
        arrived = k.new_empty(self.own + sum(map(sum, self.received)), 2 * heads, k.shape[2])
        for end in [*accumulate(map(sum, self.received), initial=self.own)][1:-1]:
            arrived[end : end + READ_PAST] = 0  # until the next turn's are here
        packed = pack((k, v), self.packing, sum(map(sum, self.sent)), arrived)
        works = _exchange(packed, self.sent, self.received, group, arrived[self.own :])
        return Pending(works, list(arrived.split(heads, 1)))

    def start_return(self, gradients, dtype, group):
        gradients, rows = [x.to(dtype).contiguous() for x in gradients], sum(map(sum, self.sent))
        returned = [x.new_empty(rows, *x.shape[1:]) for x in gradients]
        sends = [run for x in gradients for run in _runs(x[self.own :], self.received)]
        pending = start_exchange(sends, [run for x in returned for run in _runs(x, self.sent)], group)
        return Pending((pending,), returned + [x[: self.own] for x in gradients])


def _runs(x, rows):
    """(rank, its rows of x) in one group after the other, where there are any."""
    parts = x.split([n for of_ranks in rows for n in of_ranks])
    return [(number % len(rows[0]), part) for number, part in enumerate(parts) if len(part)]


def _exchange(x, sent, received, group, out):
    """Transfers of one group of rows after the other."""
    ends = ([0, *accumulate(map(sum, rows))] for rows in (sent, received))
    spans = zip(*(pairwise(x) for x in ends), sent, received)
    return [start_all_to_all(x[slice(*a)], *rows, group, out[slice(*b)]) for a, b, *rows in spans]
