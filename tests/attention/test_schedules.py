"""Schedules: a double ring sends what is received, and keys cross between nodes once; Ulysses makes one call."""

import pytest
from cases import layouts

from longspan.attention.double_ring import double_ring_schedule
from longspan.attention.moved import head_parallel_schedule, pairs_per_rank
from longspan.attention.schedules import softmax_schedule
from longspan.parallel import Mask, SequenceParallel, Topology, attention_pairs, contiguous, zigzag

MASK = Mask()


def sizes(ends):
    return {peer: rows.stop - rows.start if isinstance(rows, slice) else len(rows) for peer, rows in ends}


def crossing(schedules, topology):
    """Keys that all ranks receive from other nodes."""
    return sum(
        count
        for rank, schedule in enumerate(schedules)
        for step in schedule.steps
        for peer, count in sizes(step.receives).items()
        if topology.node(peer) != topology.node(rank)
    )


@pytest.mark.parametrize("nodes", [1, 2, 4, 8])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "random", "holes"])
def test_what_is_sent_is_received(layout, nodes):
    topology = Topology(nodes, 8 // nodes)
    layout = layouts((300, 1, 17, 80, 2, 64), 8)[layout]
    schedules = [double_ring_schedule(layout, rank, MASK, topology) for rank in range(8)]
    for steps in zip(*(schedule.steps for schedule in schedules), strict=True):
        for rank, step in enumerate(steps):
            for peer, count in sizes(step.sends).items():
                assert sizes(steps[peer].receives)[rank] == count
            assert set(sizes(step.receives)) == {peer for peer in range(8) if rank in sizes(steps[peer].sends)}
        assert len({(step.source, step.last_to_send) for step in steps}) == 1


@pytest.mark.parametrize("nodes", [2, 4])
def test_keys_cross_once_per_node(nodes):
    topology, layout = Topology(nodes, 8 // nodes), zigzag((1024,), 8)
    schedules = [double_ring_schedule(layout, rank, MASK, topology) for rank in range(8)]
    wanted = 0
    for node in range(nodes):
        ranks = range(node * topology.ranks_per_node, (node + 1) * topology.ranks_per_node)
        last = max(span.stop for rank in ranks for span in layout.spans[rank])  # sees all before it
        held = sum(min(span.stop, last) - span.start for rank in ranks for span in layout.spans[rank])
        wanted += last - held
    assert crossing(schedules, topology) == wanted
    rings = [softmax_schedule(layout, rank, "ring", MASK) for rank in range(8)]
    assert crossing(rings, topology) > 0.6 * topology.ranks_per_node * wanted


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "random", "holes"])
def test_ulysses_is_one_packed_call_in_any_layout(layout):
    layout = layouts((300, 1, 17, 80, 2, 64), 4)[layout]
    for rank in range(4):
        step, *others = head_parallel_schedule(layout, rank, MASK, 4).schedule.steps
        assert not others and len(step.calls) == 1
        assert step.calls[0].pack.lengths_q == (300, 1, 17, 80, 2, 64)


def test_pairs_of_ranks_that_share_heads():
    layout = contiguous((300, 20, 60, 9), 1)
    seq = SequenceParallel(softmax="ring").context(layout)
    assert pairs_per_rank(seq, 4) == attention_pairs(layout)
    four = SequenceParallel(softmax="usp")  # as seen from one of four ranks
    four.world_size, four.topology = 4, Topology(2, 2)
    seq = four.context(contiguous((300, 20, 60, 9), 4))
    pairs = attention_pairs(seq.layout)
    halves = [sum(pairs[:2]) / 2] * 2 + [sum(pairs[2:]) / 2] * 2
    assert pairs_per_rank(seq, 4) == tuple(halves) and pairs_per_rank(seq, 3) == pairs
