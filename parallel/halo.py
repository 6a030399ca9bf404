"""Halos of short convolutions: the tokens just before a span, which another rank or another local span may hold.

A convolution of width W reads W - 1 tokens back within the document. The first W - 1 tokens of a span that continues a
document (its border) therefore depend on tokens of earlier spans, several of them where spans are short. For every such
span a strip is made, halo and border in document order; on strips and local tokens alike the convolution is local.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from longspan.parallel.exchange import group_rank, start_exchange
from longspan.parallel.layout import Layout
from longspan.parallel.routes import RouteTable, places_of, route_table


@dataclass(frozen=True)
class Runs:
    """Rows that ranks exchange, every rank one run of them for each. sent, received: rows of this rank's runs; starts:
    of every rank, where its run for this one begins among its own; most: rows of all runs of a rank, at most; total: of
    all ranks; abroad: whether there are any but to a rank itself."""

    sent: tuple[int, ...]
    received: tuple[int, ...]
    starts: tuple[int, ...]
    most: int
    total: int
    abroad: bool

    @classmethod
    def of(cls, moved: np.ndarray, rank: int) -> "Runs":
        """moved: rows [who, to whom]."""
        mine = (x.tolist() for x in (moved[rank], moved[:, rank], moved[:, :rank].sum(1)))
        total = int(moved.sum())
        return cls(*map(tuple, mine), int(moved.sum(1).max()), total, total > moved.trace())


@dataclass(frozen=True)
class Halo:
    """One rank's halo tables for one width W.

    reach: int8 [T], how many of the rows just before each local token (at most W - 1) it reads; -1 on borders.
    strip_reach: int8 [S], the same for the rows of the strips, laid end to end; -1 on halos.
    border, strip_border: int64 [B], the local row and the strip row of each border token.
    route: brings the strips' rows. sent: int64 [N], the local rows that it sends, each once; sent_slot: int64, the
    place in `sent` of each row it sends. there, back: the runs of rows, and of their gradients.
    """

    reach: torch.Tensor
    strip_reach: torch.Tensor
    border: torch.Tensor
    strip_border: torch.Tensor
    route: RouteTable
    sent: torch.Tensor
    sent_slot: torch.Tensor
    there: Runs
    back: Runs

    @property
    def connected(self) -> bool:
        """Whether any rank has rows to bring, from itself or from others; the same on all."""
        return self.there.total > 0

    def map(self, move) -> "Halo":
        """The same tables with every tensor passed through `move`."""
        tensors = {f.name: move(x) for f in fields(self) if isinstance(x := getattr(self, f.name), torch.Tensor)}
        return replace(self, route=self.route.map(move), **tensors)


def halo_tables(layout: Layout, rank: int, width: int) -> Halo:
    """The tables of `rank` for convolutions of `width`: a pure function of the layout."""
    back = width - 1
    lengths = np.diff(layout.local_offsets(rank))
    in_span = np.arange(lengths.sum()) - np.repeat(layout.local_offsets(rank)[:-1], lengths)
    position = layout.positions(rank)
    is_border = (in_span < back) & (position > in_span)
    strips = [_strips(layout, r, back) for r in range(layout.world_size)]
    wanted, strip_reach = zip(*strips)
    route, owner = route_table(layout, rank, wanted), places_of(layout)[0]
    moved = np.stack([np.bincount(owner[np.unique(indices)], minlength=layout.world_size) for indices in wanted], 1)
    sent, slot = np.unique(route.send_rows.numpy(), return_inverse=True)
    return Halo(
        _reach(np.where(is_border, -1, np.minimum(in_span, back))),
        _reach(strip_reach[rank]),
        torch.from_numpy(np.flatnonzero(is_border)),
        torch.from_numpy(np.flatnonzero(strip_reach[rank] >= 0)),
        route,
        torch.from_numpy(sent),
        torch.from_numpy(slot.reshape(-1)),
        Runs.of(moved, rank),
        Runs.of(moved.T, rank),
    )


def _strips(layout, rank, back):
    """Global indices of the rows of `rank`'s strips, and how far each reaches (-1 for halos)."""
    indices, reach = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for span in layout.spans[rank]:
        if span.start > 0:
            halo, border = min(back, span.start), min(back, len(span))
            first = layout.document_offsets[span.document] + span.start
            indices.append(np.arange(first - halo, first + border))
            reach += [np.full(halo, -1), np.minimum(np.arange(halo, halo + border), back)]
    return np.concatenate(indices), np.concatenate(reach)


def _reach(values):
    return torch.from_numpy(values.astype(np.int8))


def start_fetch(x: torch.Tensor, halo: Halo, group, peers=None):
    """Starts bringing the strips' rows of x [T, D]; calling the result gives them, [S, D]. peers: the group's
    PeerMemory, through which they come where it takes them, or None. A collective call if halo.connected."""
    received = _start(x.index_select(0, halo.route.send_rows), halo.there, group, peers)
    return lambda: torch.cat(received()).index_select(0, halo.route.source)


def start_return(grad: torch.Tensor, halo: Halo, group, peers=None):
    """start_fetch transposed: starts sending gradients of the strips' rows [S, D] back to the owners of the rows.

    Calling the result gives the sums of what came back for the rows `halo.sent`, [N, D], added in rank order. The
    gradients travel in their own dtype.
    """
    route = halo.route
    back = grad.new_zeros(sum(route.receive_counts), *grad.shape[1:])
    for places, rows in route.copies:
        back[rows] += grad[places]
    returned = _start(back, halo.back, group, peers)

    def finish():
        total = grad.new_zeros(len(halo.sent), *grad.shape[1:])
        for part, slots in zip(returned(), halo.sent_slot.split(route.send_counts)):
            if len(part):
                total[slots] += part  # rows are distinct within one rank's part, so each sum has one order
        return total

    return finish


def _start(x, runs: Runs, group, peers):
    """Starts sending x, run after run; calling the result gives the runs that came, of every rank."""
    most = runs.most
    if runs.abroad and peers is not None and peers.takes(most * x.shape[1:].numel() * x.element_size()):
        given = x if len(x) == most else torch.cat([x, x.new_empty(most - len(x), *x.shape[1:])])
        gathering = peers.start_gather(given)
        return lambda: [run[a : a + n] for run, a, n in zip(gathering.wait()[0], runs.starts, runs.received)]
    parts, slots = x.split(runs.sent), x.new_empty(sum(runs.received), *x.shape[1:]).split(runs.received)
    me = group_rank(group)
    slots[me].copy_(parts[me])
    # Nothing moves where a run has no rows, so ranks whose spans end where documents end are left alone.
    sends = [(rank, part) for rank, part in enumerate(parts) if rank != me and len(part)]
    receives = [(rank, slot) for rank, slot in enumerate(slots) if rank != me and len(slot)]
    pending = start_exchange(sends, receives, group)

    def finish():
        pending.wait()
        return slots

    return finish
