"""Transports that gather summaries and fold them where they are needed: over all ranks at once, or in two levels."""

from functools import partial

import torch

from longspan.parallel.exchange import Pending, group_size, start_all_gather, start_exchange

# GPUs up to so many send to each other directly: on 4 H200 that takes less time than NCCL's ring, whose hops wait for
# each other.
DIRECT_RANKS = 8


def lasp2(plan, direction, state, transition, group, *, fold, summarize, step, peers=None):
    """One all-gather of what every rank publishes; every rank folds what its spans need (LASP-2, arXiv 2502.07563)."""
    return (yield from _gather_scan(plan, plan.flat, direction, state, transition, group, fold, summarize, peers))


def hierarchical(plan, direction, state, transition, group, *, fold, summarize, step, peers=None):
    """Summaries are gathered inside a node and folded to totals. Each rank sends its share of the node's totals to its
    counterparts on the other nodes, and the ranks of a node give each other the shares they received."""
    return (yield from _gather_scan(plan, plan.nodes, direction, state, transition, group, fold, summarize))


def _published(plan, state, transition):
    """What this rank sends of both, [num_slots, ...]; transition may be None."""
    payload = [x for x in (state, transition) if x is not None]
    if len(plan.published) < len(state):
        payload = [x.index_select(0, plan.published) for x in payload]
    payload = [_padded(x, plan.num_slots) for x in payload]
    return payload[0], payload[1] if transition is not None else None


def _gather_scan(plan, table, direction, state, transition, group, fold, summarize, peers=None):
    """Transitions travel with the forward states; the backward scan is given all rows of their table."""
    sent = transition if direction != "backward" else None
    pending, parts = None, []  # parts: (states, transitions) of the table's rows
    if plan.num_slots:
        start = peers.start_gather if peers else partial(_Packed, table.peers, plan.rank, group)
        pending = start(*_published(plan, state, sent))
    yield
    if pending:
        states, transitions = (None if x is None else x.flatten(0, 1) for x in pending.wait())
        parts.append((states, transitions))
        if table.num_totals:
            chains = table.total_backward if direction == "backward" else table.total_forward
            if sent is not None:
                totals, passed = summarize(states, transitions, chains)
                passed = _padded(passed, table.num_totals)
            else:
                totals, passed = fold(states, transition, chains), None
            gathered = _gather_totals(_packed([totals, passed]), table, plan.rank, group)
            parts.append(_unpacked(gathered, totals, passed))
    if table.has_own_rows or not parts:
        parts.append((state, sent))
    states, transitions = (None if x[0] is None else x[0] if len(x) == 1 else torch.cat(x) for x in zip(*parts))
    if sent is not None:
        transition = transitions
    return fold(states, transition, getattr(table, direction)), transition


class _Packed:
    """A gather of x [n, ...], and of y [n, ...] unless it is None, in one tensor; `wait()` gives both as
    [len(ranks), n, ...]."""

    def __init__(self, ranks, rank: int, group, x, y):
        self._pending, self._given = _start_gather(_packed([x, y]), ranks, rank, group), (x, y)

    def wait(self):
        gathered = self._pending.wait()
        parts = _unpacked(gathered.flatten(0, 1), *self._given)
        return [None if part is None else part.unflatten(0, gathered.shape[:2]) for part in parts]


def _packed(tensors):
    """[n, width] of tensors [n, ...], None left out."""
    rows = [x.flatten(1) for x in tensors if x is not None]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def _unpacked(rows, x, y):
    """(like x [n, ...], like y or None) of rows [n, width]. What is like y is a copy: the backward pass keeps it, but
    not all that was gathered."""
    width = x.shape[1:].numel()
    first = rows[:, :width].unflatten(1, x.shape[1:])
    return first, None if y is None else rows[:, width:].unflatten(1, y.shape[1:]).contiguous()


def _padded(x, num_rows: int):
    """x with rows added at its end that no chain names."""
    if len(x) == num_rows:
        return x
    return torch.cat([x, x.new_zeros(num_rows - len(x), *x.shape[1:])])


def _gather_totals(totals, table, rank: int, group):
    """totals: [num_totals, width] of this node, equal on its ranks. Returns [nodes * num_totals, width]."""
    num_shares = len(table.peers)
    flat = totals.flatten()
    share = -(-flat.numel() // num_shares)
    flat = torch.nn.functional.pad(flat, (0, share * num_shares - flat.numel()))
    mine = flat.unflatten(0, (num_shares, share))[table.peers.index(rank)]
    received = _start_gather(mine, table.counterparts, rank, group).wait()  # [nodes, share]
    shares = _start_gather(received, table.peers, rank, group).wait()  # [num_shares, nodes, share]
    flat = shares.transpose(0, 1).flatten(1)[:, : totals.numel()]
    return flat.unflatten(1, totals.shape).flatten(0, 1)


def _start_gather(x, ranks, rank: int, group) -> Pending:
    """Starts gathering x, equal in shape on all `ranks`, among them: [len(ranks), *x.shape] in their order."""
    if len(ranks) == group_size(group) and not (x.is_cuda and len(ranks) <= DIRECT_RANKS):
        return start_all_gather(x, group)
    out = x.new_empty(len(ranks), *x.shape)
    out[ranks.index(rank)] = x
    x = x.contiguous()
    sends = [(peer, x) for peer in ranks if peer != rank]
    receives = [(peer, out[place]) for place, peer in enumerate(ranks) if peer != rank]
    pending = start_exchange(sends, receives, group)
    return Pending((pending,), out)
