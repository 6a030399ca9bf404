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
from longspan.parallel.routes import RouteTable, route_table


@dataclass(frozen=True)
class Halo:
    """One rank's halo tables for one width W.

    reach: int8 [T], how many of the rows just before each local token (at most W - 1) it reads; -1 on borders.
    strip_reach: int8 [S], the same for the rows of the strips, laid end to end; -1 on halos.
    border, strip_border: int64 [B], the local row and the strip row of each border token.
    route: brings the strips' rows. sent: int64 [N], the local rows that it sends, each once; sent_slot: int64, the
    place in `sent` of each row it sends.
    """

    reach: torch.Tensor
    strip_reach: torch.Tensor
    border: torch.Tensor
    strip_border: torch.Tensor
    route: RouteTable
    sent: torch.Tensor
    sent_slot: torch.Tensor

    @property
    def connected(self) -> bool:
        """Whether this rank has borders or sends rows to anyone, itself included."""
        return bool(len(self.border) or len(self.sent))

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
    route = route_table(layout, rank, wanted)
    sent, slot = np.unique(route.send_rows.numpy(), return_inverse=True)
    return Halo(
        _reach(np.where(is_border, -1, np.minimum(in_span, back))),
        _reach(strip_reach[rank]),
        torch.from_numpy(np.flatnonzero(is_border)),
        torch.from_numpy(np.flatnonzero(strip_reach[rank] >= 0)),
        route,
        torch.from_numpy(sent),
        torch.from_numpy(slot.reshape(-1)),
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


def start_fetch(x: torch.Tensor, halo: Halo, group):
    """Starts bringing the strips' rows of x [T, D]; calling the result gives them, [S, D]."""
    route = halo.route
    sent = x.index_select(0, route.send_rows)
    received = x.new_empty(sum(route.receive_counts), *x.shape[1:])
    pending = _start(sent.split(route.send_counts), received.split(route.receive_counts), group)

    def finish():
        pending.wait()
        return received.index_select(0, route.source)

    return finish


def start_return(grad: torch.Tensor, halo: Halo, group):
    """start_fetch transposed: starts sending gradients of the strips' rows [S, D] back to the owners of the rows.

    Calling the result gives the sums of what came back for the rows `halo.sent`, [N, D], added in rank order. The
    gradients travel in their own dtype.
    """
    route = halo.route
    back = grad.new_zeros(sum(route.receive_counts), *grad.shape[1:])
    for places, rows in route.copies:
        back[rows] += grad[places]
    returned = grad.new_empty(len(route.send_rows), *grad.shape[1:])
    parts = returned.split(route.send_counts)
    pending = _start(back.split(route.receive_counts), parts, group)

    def finish():
        pending.wait()
        total = grad.new_zeros(len(halo.sent), *grad.shape[1:])
        for part, slots in zip(parts, halo.sent_slot.split(route.send_counts)):
            if len(part):
                total[slots] += part  # rows are distinct within one rank's part, so each sum has one order
        return total

    return finish


def _start(parts, slots, group):
    """Sends parts[r] to rank r and fills slots[r] from it; this rank's own part is copied. Nothing moves where a part
    has no rows, so ranks whose spans end where documents end are left alone."""
    me = group_rank(group)
    slots[me].copy_(parts[me])
    sends = [(rank, part) for rank, part in enumerate(parts) if rank != me and len(part)]
    receives = [(rank, slot) for rank, slot in enumerate(slots) if rank != me and len(slot)]
    return start_exchange(sends, receives, group)
