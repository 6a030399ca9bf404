"""Transports that pass states on from span to span in document order: whole, or in blocks of heads."""

from math import isqrt

from longspan.parallel.exchange import start_exchange

# Bytes that a link between ranks carries in the time in which a hop of no bytes takes place.
HOP_BYTES = 2**21


def lasp(plan, direction, state, transition, group, *, fold, summarize, step, peers=None):
    """One hop after another, each with a whole state (LASP, arXiv 2404.02882)."""
    return _pass_on(plan, direction, state, transition, group, step, num_blocks=1)


def all_scan(plan, direction, state, transition, group, *, fold, summarize, step, peers=None):
    """A pipeline: a rank sends one block on while it receives the next (All-Scan of ZeCO, arXiv 2507.01004).

    Blocks are of heads, which no transition mixes and which lie together in memory.
    """
    num_blocks = choose_blocks(state.shape[1:].numel() * state.element_size(), state.shape[1], plan.num_hops)
    return _pass_on(plan, direction, state, transition, group, step, num_blocks)


def choose_blocks(num_bytes: int, num_heads: int, num_hops: int) -> int:
    """How many blocks a state of `num_bytes` is cut into: the minimum over B of (hops + B - 1) (hop + bytes / B)."""
    return max(1, min(num_heads, isqrt(max(num_hops - 1, 0) * num_bytes // HOP_BYTES)))


def _pass_on(plan, direction, state, transition, group, step, num_blocks):
    """At step t, block b crosses the links that have t - b links before them. What it needs arrived at step t - 1, and
    all ranks count steps alike: the messages of a step are one batch on each of them, in one order, so that no rank
    waits for a message that its peer posts behind another wait."""
    assert direction in ("forward", "backward"), direction
    backward, which = direction == "backward", getattr(plan, direction).which
    row = {span: n for n, span in enumerate(plan.linked)}
    entries = state.new_empty(len(which), *state.shape[1:])
    entry = dict(zip(which, entries))
    edges = [state.shape[1] * n // num_blocks for n in range(num_blocks + 1)]
    blocks = [slice(*pair) for pair in zip(edges, edges[1:])]
    steps = {}
    for link in plan.links:
        source, target = (link.later, link.earlier) if backward else (link.earlier, link.later)
        for b, heads in enumerate(blocks):
            steps.setdefault(b + (link.after if backward else link.before), []).append((source, target, heads))

    def post(transfers):
        sends, receives = [], []
        for (rank, span), (next_rank, next_span), heads in transfers:
            if rank != plan.rank:
                receives.append((rank, entry[next_span][heads]))
                continue
            entered = entry[span][heads] if span in entry else None
            passed = step(
                state[row[span], heads], None if transition is None else transition[row[span], heads], entered
            )
            if next_rank == plan.rank:
                entry[next_span][heads] = passed
            else:
                sends.append((next_rank, passed.contiguous()))
        return start_exchange(sends, receives, group)

    pending = post(steps.pop(0, ()))
    yield
    for t in sorted(steps):
        pending.wait()
        pending = post(steps[t])
    pending.wait()
    return entries, transition
