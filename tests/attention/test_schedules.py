"""Schedules: a double ring sends what is received, and keys cross between nodes once; Ulysses makes one call."""

import pytest
import torch
from cases import layouts
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.attention.double_ring import double_ring_schedule
from longspan.attention.moved import head_parallel_schedule, pairs_per_rank, planned_schedule
from longspan.attention.schedules import softmax_schedule
from longspan.parallel import (
    Layout,
    Mask,
    SequenceParallel,
    Topology,
    attention_pairs,
    contiguous,
    plan_attention,
    zigzag,
)

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


# What calls see, by playing schedules through with row numbers instead of keys.


def seen(schedules, layout):
    """int [T, T]: how often all calls of all ranks let a query see a key, both in the order of documents."""
    world_size = len(schedules)
    held = [torch.from_numpy(layout.global_indices(rank)) for rank in range(world_size)]
    buffers = [{None: indices} for indices in held]  # of every rank: source -> which keys are there
    counts = torch.zeros(layout.num_tokens, layout.num_tokens, dtype=torch.int64)
    for number, steps in enumerate(zip(*(schedule.steps for schedule in schedules), strict=True)):
        for rank, step in enumerate(steps):
            keys = buffers[rank][None] if number == 0 else torch.full((step.num_keys,), -1)
            for peer, rows in step.receives:
                keys[rows] = dict((to, buffers[peer][step.source][sent]) for to, sent in steps[peer].sends)[rank]
            buffers[rank][number] = keys
            for call in step.calls:
                query_ids, key_ids = held[rank][call.query_rows], keys[call.key_rows]
                assert len(query_ids.unique()) == len(query_ids) and len(key_ids.unique()) == len(key_ids)
                for rows_q, rows_k in call.pack.sequences():
                    visible = torch.ones(rows_q.stop - rows_q.start, rows_k.stop - rows_k.start, dtype=torch.int64)
                    counts[query_ids[rows_q, None], key_ids[rows_k]] += visible.tril() if call.pack.causal else visible
        if number == 0:
            for step, indices in zip(steps, held):  # the first call has every query
                assert not len(indices) or torch.arange(len(indices))[step.calls[0].query_rows].equal(
                    torch.arange(len(indices))
                )
    return counts


def visible(lengths, mask):
    document = torch.repeat_interleave(torch.tensor(lengths))
    row = torch.arange(len(document))
    distance = row[:, None] - row
    same = document[:, None] == document
    if mask.causal:
        same &= distance >= 0
    return (same & (distance < (mask.window or len(row)))).long()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.integers(1, 5).flatmap(lambda nodes: st.tuples(st.just(nodes), st.sampled_from([1, 2] if nodes < 4 else [1]))),
    st.sampled_from(["contiguous", "zigzag", "balanced", "random", "holes"]),
    st.sampled_from(["ring", "all_gather", "double_ring", "shared_heads"]),
    st.one_of(st.just(Mask()), st.just(Mask(causal=False)), st.integers(1, 45).map(lambda w: Mask(window=w))),
)
def test_calls_see_every_visible_pair_once(lengths, nodes, layout, strategy, mask):
    topology = Topology(*nodes)
    layout, ranks = layouts(tuple(lengths), topology.world_size)[layout], range(topology.world_size)
    if strategy == "double_ring":
        schedules = [double_ring_schedule(layout, rank, mask, topology) for rank in ranks]
    elif strategy == "shared_heads" and topology.ranks_per_node > 1:
        size = topology.ranks_per_node  # ranks that have their tokens in common, of which one shows what they see
        moved = [head_parallel_schedule(layout, rank, mask, size).schedule for rank in ranks]
        schedules = [schedule.with_peers(lambda peer: peer // size) for schedule in moved[::size]]
        spans = (sorted(sum(layout.spans[first : first + size], ())) for first in ranks[::size])
        layout = Layout(layout.lengths, tuple(map(tuple, spans)))
    else:
        strategy = "ring" if strategy == "shared_heads" else strategy
        schedules = [softmax_schedule(layout, rank, strategy, mask) for rank in ranks]
    assert torch.equal(seen(schedules, layout), visible(lengths, mask))


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "double_ring"])
def test_only_keys_inside_the_window_travel(strategy):
    """Of each of a rank's two parts, the window - 1 keys before it; between nodes no more than that either."""
    layout, window, topology = zigzag((8192,), 8), 100, Topology(2, 4)

    def received(mask):
        schedules = [
            double_ring_schedule(layout, rank, mask, topology)
            if strategy == "double_ring"
            else softmax_schedule(layout, rank, strategy, mask)
            for rank in range(8)
        ]
        keys = sum(count for s in schedules for step in s.steps for count in sizes(step.receives).values())
        return keys, crossing(schedules, topology), schedules

    keys, crossed, schedules = received(Mask(window=window))
    parts = 16 - 1 - 1  # but the first, and the one that follows its rank's own other part
    assert crossed == 2 * (window - 1)
    assert keys == parts * (window - 1) + (crossed if strategy == "double_ring" else 0)  # which are passed on
    assert received(Mask())[0] > 25 * keys
    for schedule in schedules:  # steps that bring nothing have nothing to do
        assert sum(bool(step.calls) for step in schedule.steps) <= 3
        assert all(step.receives for step in schedule.steps[1:] if step.calls)


def test_documents_within_the_window_make_the_calls_of_causal_attention():
    lengths = (300, 1, 17, 80, 2, 64)
    for name, layout in layouts(lengths, 4).items():
        for rank in range(4):
            plain, wide = (softmax_schedule(layout, rank, "ring", mask) for mask in (Mask(), Mask(window=300)))
            for one, other in zip(plain.steps, wide.steps, strict=True):
                assert [call.pack for call in one.calls] == [call.pack for call in other.calls], name
                assert sizes(one.receives) == sizes(other.receives)


def test_plans_are_made_for_the_window():
    """Of a layer's schedule and of the pairs that are reported, as of four ranks seen from each of them."""
    lengths, topology, mask = (60_000, 9_000, *[700] * 40), Topology(1, 4), Mask(window=50)
    plan = plan_attention(lengths, topology, mask=mask)
    assert plan.layout != plan_attention(lengths, topology).layout
    four = SequenceParallel(softmax="zeppelin")
    four.world_size, four.topology = 4, topology
    seq = four.context(lengths)
    assert pairs_per_rank(seq, 4, mask) == attention_pairs(plan.layout, mask)
    assert pairs_per_rank(seq, 4) == attention_pairs(plan_attention(lengths, topology).layout)
    assert mask in four.context(lengths[::-1])._plans  # made ahead, with the context
    for rank in range(4):
        step, *_ = planned_schedule(seq.layout, rank, mask, "zeppelin", topology, four.costs, 1.5).schedule.steps
        assert step.calls[0].pack.cu_q[-1] == plan.layout.tokens_per_rank[rank]


def test_a_windowed_layer_on_one_rank_is_two_calls():
    layout = contiguous((1000, 30, 100), 1)
    (step,) = softmax_schedule(layout, 0, "ring", Mask(window=100)).steps
    squares, triangles = step.calls
    assert squares.pack.lengths_q == (*[100] * 10, 30, 100) and squares.query_rows == slice(0, 1130)
    assert triangles.pack.lengths_q == (99,) * 9 and triangles.query_rows[:2].tolist() == [198, 197]
