"""Routes: rows move between ranks by tables made once per batch; a route's gradient is its transpose.

Where a route copies a row to several places, the gradients of the copies are summed in rank order.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from longspan.parallel.exchange import all_to_all_rows, group_rank, group_size, to_device
from longspan.parallel.layout import Layout


@dataclass(frozen=True)
class RouteTable:
    """One rank's part of a route. Rows are sent in `send_rows` order, send_counts[r] of them to rank r; output row p is
    received row `source[p]`. copies: the same as (output rows, received rows) in turns that name no received row twice,
    so that sums over copies have one order. inverse: where every row held is sent once and every row received wanted
    once, the output row of every received row, and the place among those sent of every row held; else None."""

    num_rows: int  # rows this rank holds
    send_rows: torch.Tensor  # int64
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    source: torch.Tensor  # int64 [rows wanted]
    copies: tuple[tuple[torch.Tensor, torch.Tensor], ...]  # int64
    inverse: tuple[torch.Tensor, torch.Tensor] | None  # int64

    @classmethod
    def of(cls, num_rows: int, send_rows, send_counts, receive_counts, source) -> "RouteTable":
        """send_rows, source: int64 arrays."""
        inverses = _inverse(source, sum(receive_counts)), _inverse(send_rows, num_rows)
        inverse = None if any(x is None for x in inverses) else tuple(map(torch.from_numpy, inverses))
        rows = torch.from_numpy(send_rows), send_counts, receive_counts, torch.from_numpy(source)
        return cls(num_rows, *rows, _turns(source), inverse)

    @classmethod
    def outline(cls, held: int, kept: int, wanted: int) -> "RouteTable":
        """Without data, as the first of two ranks has it: of the rows it holds `kept` stay, the others go, and come."""
        rows = {count: torch.empty(count, dtype=torch.int64, device="meta") for count in (held, wanted)}
        counts = (kept, held - kept), (kept, wanted - kept)
        return cls(held, rows[held], *counts, rows[wanted], (), (rows[wanted], rows[held]))

    def map(self, move) -> "RouteTable":
        """The same table with every tensor passed through `move`."""
        copies = tuple(tuple(map(move, turn)) for turn in self.copies)
        inverse = self.inverse and tuple(map(move, self.inverse))
        rows = {"send_rows": move(self.send_rows), "source": move(self.source)}
        return replace(self, **rows, copies=copies, inverse=inverse)


def route_table(layout: Layout, rank: int, wanted) -> RouteTable:
    """The table that brings rank r the rows wanted[r] (global token indices, repeats allowed) of tensors in `layout`.

    Raises ValueError when a wanted index is outside the batch.
    """
    owner, row = places_of(layout)
    wanted = [np.asarray(indices, np.int64) for indices in wanted]
    for r, indices in enumerate(wanted):
        if len(indices) and not (0 <= indices.min() and indices.max() < layout.num_tokens):
            raise ValueError(f"rank {r} wants rows outside 0..{layout.num_tokens - 1}")

    def fetched(r):  # unique rows rank r needs, ordered by owner and then by the owner's local order
        unique = np.unique(wanted[r])
        return unique[np.lexsort((row[unique], owner[unique]))]

    def counts(indices):
        return tuple(np.bincount(owner[indices], minlength=layout.world_size).tolist())

    mine = fetched(rank)
    sent = [indices[owner[indices] == rank] for indices in map(fetched, range(layout.world_size))]
    slot = np.full(layout.num_tokens, -1, np.int64)
    slot[mine] = np.arange(len(mine))
    source = slot[wanted[rank]]
    sent_counts = tuple(map(len, sent))
    return RouteTable.of(layout.tokens_per_rank[rank], row[np.concatenate(sent)], sent_counts, counts(mine), source)


def places_of(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """int64 [num_tokens] each: the rank that holds every token, and its row there."""
    owner, row = np.empty(layout.num_tokens, np.int64), np.empty(layout.num_tokens, np.int64)
    for r in range(layout.world_size):
        held = layout.global_indices(r)
        owner[held], row[held] = r, np.arange(len(held))
    return owner, row


def head_routes(layout: Layout, rank: int, groups: int) -> tuple[RouteTable, RouteTable]:
    """Ways there and back between a rank's tokens with all heads and its group of heads of the tokens of `groups` ranks
    in a row. Rows here are tokens x groups of heads; there, the tokens of those ranks by document and position."""
    tokens, mine = layout.tokens_per_rank, layout.tokens_per_rank[rank]
    ranks = range(rank // groups * groups, (rank // groups + 1) * groups)
    here = np.arange(mine * groups).reshape(mine, groups).T.ravel()  # group after group
    alike = tuple(mine if peer in ranks else 0 for peer in range(layout.world_size))
    theirs = tuple(tokens[peer] if peer in ranks else 0 for peer in range(layout.world_size))
    ordered = np.argsort(np.concatenate([layout.global_indices(peer) for peer in ranks]))
    there = RouteTable.of(len(here), here.copy(), alike, theirs, ordered)
    back = RouteTable.of(len(ordered), np.argsort(ordered), theirs, alike, np.argsort(here))
    return there, back


def _inverse(places, count: int):
    """The inverse of `places` as a permutation of range(count), None if it is none."""
    inverse = np.full(count, -1, np.int64)
    inverse[places] = np.arange(len(places))
    return inverse if len(places) == count and (inverse >= 0).all() else None


def _turns(source) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """(places, source[places]) for the first, second, ... occurrence of every number in `source`, places ascending."""
    order = np.argsort(source, kind="stable")
    ordered = source[order]
    occurrence = np.empty_like(source)
    occurrence[order] = np.arange(len(source)) - np.searchsorted(ordered, ordered)
    places = [np.flatnonzero(occurrence == turn) for turn in range(occurrence.max(initial=-1) + 1)]
    return tuple((torch.from_numpy(p), torch.from_numpy(source[p])) for p in places)


class Route:
    """Moves rows of packed tensors [T, ...] between the ranks of `group`; `route(x)` is differentiable.

    table: this rank's RouteTable. `move` and `transpose` are the two directions without autograd.
    """

    def __init__(self, table: RouteTable, group):
        self.table, self.group = table, group

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] != self.table.num_rows:
            raise ValueError(f"this route moves {self.table.num_rows} rows, got a tensor with {x.shape[0]}")
        return _Move.apply(x, self)

    def move(self, x: torch.Tensor) -> torch.Tensor:
        """x: [rows held, ...] -> [rows wanted, ...]."""
        return self.place(self.receive(x))

    def receive(self, x: torch.Tensor) -> torch.Tensor:
        """What every rank, this one included, sends here of x [rows held, ...], in the order of ranks."""
        table = self._table_on(x.device)
        return all_to_all_rows(x.index_select(0, table.send_rows), table.send_counts, table.receive_counts, self.group)

    def place(self, received: torch.Tensor) -> torch.Tensor:
        """Received rows -> [rows wanted, ...]."""
        return received.index_select(0, self._table_on(received.device).source)

    def foreign(self, received: torch.Tensor) -> torch.Tensor:
        """A copy of the received rows without those that were here before."""
        before, _, after = received.split(self._around_own())
        return torch.cat((before, after))

    def with_own(self, x: torch.Tensor, foreign: torch.Tensor) -> torch.Tensor:
        """The received rows again, from x and `foreign` of them, without communication."""
        before, own, _ = self._around_own()
        start = sum(self.table.send_counts[: group_rank(self.group)])
        rows = self._table_on(x.device).send_rows[start : start + own]
        return torch.cat((foreign[:before], x.index_select(0, rows), foreign[before:]))

    def _around_own(self):
        counts, rank = self.table.receive_counts, group_rank(self.group)
        return [sum(counts[:rank]), counts[rank], sum(counts[rank + 1 :])]

    def transpose(self, grad: torch.Tensor) -> torch.Tensor:
        """grad: [rows wanted, ...] -> [rows held, ...]; sums over copies in at least fp32, in rank order."""
        table = self._table_on(grad.device)
        if table.inverse is not None:
            wanted_at, sent_at = table.inverse
            back = grad.index_select(0, wanted_at)
            back = all_to_all_rows(back, table.receive_counts, table.send_counts, self.group)
            return back.index_select(0, sent_at)
        dtype = torch.promote_types(grad.dtype, torch.float32)
        back = grad.new_zeros(sum(table.receive_counts), *grad.shape[1:], dtype=dtype)
        for places, rows in table.copies:
            back[rows] += grad[places]
        back = all_to_all_rows(back.to(grad.dtype), table.receive_counts, table.send_counts, self.group)
        result = grad.new_zeros(table.num_rows, *grad.shape[1:], dtype=dtype)
        start = 0
        for count in table.send_counts:  # rows are distinct within one rank's part, so each sum has one order
            rows = table.send_rows[start : start + count]
            result[rows] += back[start : start + count]
            start += count
        return result.to(grad.dtype)

    def _table_on(self, device):
        if self.table.source.device != device:
            self.table = self.table.map(lambda x: to_device(x, device))
        return self.table


class Remap(Route):
    """The route that turns tensors in layout `src` into tensors in layout `dst` of the same documents."""

    def __init__(self, src: Layout, dst: Layout, group):
        if src.lengths != dst.lengths or src.world_size != dst.world_size:
            raise ValueError(
                "Remap needs two layouts of the same documents and ranks, got "
                f"{len(src.lengths)} documents on {src.world_size} ranks and {len(dst.lengths)} on {dst.world_size}"
            )
        if src.world_size != group_size(group):
            raise ValueError(f"the layouts have {src.world_size} ranks but the group has {group_size(group)}")
        self.src, self.dst = src, dst
        wanted = [dst.global_indices(rank) for rank in range(dst.world_size)]
        super().__init__(route_table(src, group_rank(group), wanted), group)

    @property
    def inverse(self) -> "Remap":
        return Remap(self.dst, self.src, self.group)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, route):
        ctx.route = route
        return route.move(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.route.transpose(grad), None
