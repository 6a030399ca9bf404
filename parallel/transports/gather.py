"""Transports that gather summaries and fold them where they are needed: over all ranks at once, or in two levels."""

import torch

from longspan.parallel.exchange import Pending, group_size, start_all_gather, start_exchange


def lasp2(plan, direction, state, transition, group, *, fold, summarize, step):
    """One all-gather of what every rank publishes; every rank folds what its spans need (LASP-2, arXiv 2502.07563)."""
    return (yield from _gather_scan(plan, plan.flat, direction, state, transition, group, fold, summarize))


def hierarchical(plan, direction, state, transition, group, *, fold, summarize, step):
    """Summaries are gathered inside a node and folded to totals. Each rank sends its share of the node's totals to its
    counterparts on the other nodes, and the ranks of a node give each other the shares they received."""
    return (yield from _gather_scan(plan, plan.nodes, direction, state, transition, group, fold, summarize))


def _gather_scan(plan, table, direction, state, transition, group, fold, summarize):
    """Transitions travel with the forward states; the backward scan is given all rows of their table."""
    tail, sends_transition = state.shape[1:], transition is not None and direction != "backward"
    pending, parts = None, []  # parts: (states, transitions) of the table's rows
    if plan.num_slots:
        payload = [state, transition] if sends_transition else [state]
        if len(plan.published) < len(state):
            payload = [x.index_select(0, plan.published) for x in payload]
        pending = _start_gather(_padded(_packed(payload), plan.num_slots), table.peers, plan.rank, group)
    yield
    if pending:
        gathered = pending.wait().flatten(0, 1)
        states, transitions = _unpacked(gathered, tail, transition if sends_transition else None)
        parts.append((states, transitions))
        if table.num_totals:
            chains = table.total_backward if direction == "backward" else table.total_forward
            if sends_transition:
                totals, passed = summarize(states, transitions, chains)
                totals = [totals, _padded(passed, table.num_totals)]
            else:
                totals = [fold(states, transition, chains)]
            gathered = _gather_totals(_packed(totals), table, plan.rank, group)
            parts.append(_unpacked(gathered, tail, transition if sends_transition else None))
    if table.has_own_rows or not parts:
        parts.append((state, transition if sends_transition else None))
    states = parts[0][0] if len(parts) == 1 else torch.cat([x for x, _ in parts])
    if sends_transition:  # A copy: the backward pass keeps it, but not all that was gathered.
        transition = torch.cat([x for _, x in parts])
    return fold(states, transition, getattr(table, direction)), transition


def _packed(tensors):
    """[n, width] of tensors [n, ...]."""
    rows = [x.flatten(1) for x in tensors]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def _unpacked(rows, tail, transition):
    """(states [n, *tail], transitions like `transition` or None) of rows [n, width]."""
    states = rows[:, : tail.numel()].unflatten(1, tail)
    if transition is None:
        return states, None
    return states, rows[:, tail.numel() :].unflatten(1, transition.shape[1:])


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
    if len(ranks) == group_size(group):
        return start_all_gather(x, group)
    out = x.new_empty(len(ranks), *x.shape)
    out[ranks.index(rank)] = x
    x = x.contiguous()
    sends = [(peer, x) for peer in ranks if peer != rank]
    receives = [(peer, out[place]) for place, peer in enumerate(ranks) if peer != rank]
    pending = start_exchange(sends, receives, group)
    return Pending((pending,), out)
