"""Schedules: a double ring sends what is received, and keys cross between nodes once, over all links alike; Ulysses
makes one call."""

import numpy as np
import pytest
from cases import layouts

from longspan.attention.double_ring import double_ring_schedule
from longspan.attention.moved import head_parallel_schedule, pairs_per_rank
from longspan.attention.schedules import softmax_schedule
from longspan.benchmarks.length_mixes import draw
from longspan.benchmarks.routing import lopsided, uneven
from longspan.parallel import (
    Costs,
    Mask,
    SequenceParallel,
    Topology,
    attention_pairs,
    contiguous,
    plan_attention,
    zigzag,
)

MASK = Mask()
ROUTED = Costs(key_s=1e-3, remote_key_s=1e-2)  # every row that crosses counts


def sizes(ends):
    """Rows by peer."""
    found = {}
    for peer, rows, *_ in ends:
        found[peer] = found.get(peer, 0) + (rows.stop - rows.start if isinstance(rows, slice) else len(rows))
    return found


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
    schedules = [double_ring_schedule(layout, rank, MASK, topology, ROUTED) for rank in range(8)]
    for steps in zip(*(schedule.steps for schedule in schedules), strict=True):
        for rank, step in enumerate(steps):
            for peer, count in sizes(step.sends).items():
                assert sizes(steps[peer].receives)[rank] == count
            assert set(sizes(step.receives)) == {peer for peer in range(8) if rank in sizes(steps[peer].sends)}
        assert len({(step.last_to_send, step.beside) for step in steps}) == 1
        assert not any(step.beside and step.calls for step in steps)
        assert len({source for step in steps for _, _, source in step.sends} - {None}) <= 1


@pytest.mark.parametrize("nodes", [2, 4])
def test_keys_cross_once_per_node(nodes):
    topology, layout = Topology(nodes, 8 // nodes), zigzag((1024,), 8)
    schedules = [double_ring_schedule(layout, rank, MASK, topology, ROUTED) for rank in range(8)]
    wanted = 0
    for node in range(nodes):
        ranks = range(node * topology.ranks_per_node, (node + 1) * topology.ranks_per_node)
        last = max(span.stop for rank in ranks for span in layout.spans[rank])  # sees all before it
        held = sum(min(span.stop, last) - span.start for rank in ranks for span in layout.spans[rank])
        wanted += last - held
    assert crossing(schedules, topology) == wanted
    rings = [softmax_schedule(layout, rank, "ring", MASK) for rank in range(8)]
    assert crossing(rings, topology) > 0.6 * topology.ranks_per_node * wanted


def over_links(layout, topology, costs):
    """Keys that every rank sends to other nodes, and what it gets from them, in one pass."""
    schedules = [double_ring_schedule(layout, rank, MASK, topology, costs) for rank in range(layout.world_size)]
    sent, received = [], []
    for rank, schedule in enumerate(schedules):
        for ends, found in (("sends", sent), ("receives", received)):
            peers = [sizes(getattr(step, ends)) for step in schedule.steps]
            found.append(sum(n for p in peers for peer, n in p.items() if topology.node(peer) != topology.node(rank)))
    return sent, received


UNROUTED = Costs.pairs_only()


@pytest.mark.parametrize("topology", [Topology(2, 2), Topology(2, 4), Topology(4, 2), Topology(3, 3)])
@pytest.mark.parametrize("make", [lopsided, uneven])
def test_routing_loads_links_evenly(make, topology):
    """What crosses is the same with routing and without; with it no link of a node carries more than another."""
    layout, size = make((4000, 900), topology), topology.ranks_per_node
    routed, unrouted = (over_links(layout, topology, costs) for costs in (ROUTED, UNROUTED))
    for loads, others in zip(routed, unrouted):
        for node in range(topology.nodes):
            of_node, off = (x[node * size : (node + 1) * size] for x in (loads, others))
            assert sum(of_node) == sum(off)
            assert max(of_node) - min(of_node) <= topology.nodes - 1  # a row per hop
    assert max(unrouted[0]) > 1.4 * max(routed[0])


@pytest.mark.parametrize("costs", [ROUTED, UNROUTED])
def test_every_key_is_attended_to_once(costs):
    """Whatever carries a key, a query meets it in one call: pairs of all calls are those of the mask."""
    topology = Topology(2, 4)
    for make in (lopsided, uneven):
        layout, pairs = make((400, 90, 3), topology), 0
        for rank in range(8):
            for step in double_ring_schedule(layout, rank, MASK, topology, costs).steps:
                pairs += sum(map(pairs_of, step.calls))
        assert pairs == sum(n * (n + 1) // 2 for n in layout.lengths)


def pairs_of(call):
    """Of square causal, or full, packed attention."""
    lengths = zip(call.pack.lengths_q, call.pack.lengths_k)
    return sum(q * (q + 1) // 2 if call.pack.causal else q * k for q, k in lengths)


@pytest.mark.parametrize("mix", ["prolong", "wikipedia", "magi"])
def test_what_crosses_is_what_the_planner_predicts(mix):
    """The planner lets keys cross over the links of all ranks of a node: without routing they do not."""
    topology, generator = Topology(4, 4), np.random.default_rng(0)
    costs = Costs(key_s=0.0, remote_key_s=1e-3)
    everywhere = {"predicted": [], "routed": [], "unrouted": []}
    for _ in range(4):
        plan = plan_attention(draw(mix, generator, 16_000, 16_000), topology, costs)
        everywhere["predicted"].append([seconds / costs.remote_key_s for seconds in plan.predicted.keys_s])
        for name, by in (("routed", costs), ("unrouted", UNROUTED)):
            everywhere[name].append(over_links(plan.layout, topology, by)[1])
    total = {name: sum(map(sum, keys)) for name, keys in everywhere.items()}
    most = {name: sum(map(max, keys)) for name, keys in everywhere.items()}
    assert total["routed"] == total["unrouted"] == pytest.approx(total["predicted"], rel=0.25)
    assert most["routed"] == pytest.approx(most["predicted"], rel=0.35)
    assert most["unrouted"] > 1.35 * max(most["routed"], most["predicted"])


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
