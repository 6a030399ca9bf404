"""Schedules: a double ring sends what is received, and keys cross between nodes once, over all links alike; Ulysses
makes one call."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import layouts
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.attention import moved, softmax, softmax_passes
from longspan.attention.double_ring import double_ring_schedule
from longspan.attention.moved import head_parallel_schedule, pairs_per_rank, planned_schedule, schedule_of
from longspan.attention.schedules import ranks_at_once, softmax_schedule
from longspan.benchmarks.length_mixes import draw
from longspan.benchmarks.routing import lopsided, uneven
from longspan.kernels.softmax import cpu
from longspan.parallel import (
    Costs,
    Layout,
    Mask,
    SequenceParallel,
    Topology,
    attention_pairs,
    contiguous,
    plan_attention,
    zigzag,
)
from longspan.parallel.costs import predict

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
        layout = plan_attention(draw(mix, generator, 16_000, 16_000), topology, Costs.pairs_only()).layout
        predicted = predict(layout, topology, costs).keys_s
        everywhere["predicted"].append([seconds / costs.remote_key_s for seconds in predicted])
        for name, by in (("routed", costs), ("unrouted", UNROUTED)):
            everywhere[name].append(over_links(layout, topology, by)[1])
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


def test_tables_of_a_given_plan_are_built_once(monkeypatch):
    """For every layer and step that gives the plan again; not for another plan, mask or layout."""
    built = []
    monkeypatch.setattr(moved, "schedule_of", lambda *args: built.append(args) or schedule_of(*args))
    lengths = (300, 20, 61)
    x = torch.randn(sum(lengths), 2, 8, dtype=torch.float64)
    layout, plans = contiguous(lengths, 1), [plan_attention(lengths, Topology(1, 1), costs) for costs in (None, ROUTED)]
    turned = Layout(lengths, (layout.spans[0][::-1],))
    calls = {"given": (plans[0], {}), "other plan": (plans[1], {}), "window": (plans[0], {"window": 30})}
    found = {}
    for _ in range(2):
        for name, (plan, options) in calls.items():
            out = softmax.softmax_attention(x, x, x, layout=layout, plan=plan, **options)
            assert torch.equal(out, found.setdefault(name, out))
        softmax.softmax_attention(x, x, x, layout=turned, plan=plans[0])
    assert len(built) == len(set(built)) == 4
    torch.testing.assert_close(found["given"], softmax.softmax_attention(x, x, x, layout=layout, strategy="ring"))
    with pytest.raises(ValueError, match="plan is for 3 documents of 381 tokens on 1 ranks"):
        softmax.softmax_attention(x[:9], x[:9], x[:9], layout=contiguous((9,), 1), plan=plans[0])


def test_pairs_of_ranks_that_share_heads():
    layout = contiguous((300, 20, 60, 9), 1)
    seq = SequenceParallel(softmax="ring").context(layout)
    assert pairs_per_rank(seq, 4) == attention_pairs(layout)
    four = SequenceParallel(softmax="usp", rank=0, topology=Topology(2, 2))
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
    for number, steps in enumerate(zip(*schedules, strict=True)):
        assert len({step.local for step in steps}) == 1 and (number or steps[0].local)
        for rank, step in enumerate(steps):
            keys = buffers[rank][None] if step.local else torch.full((step.num_keys,), -1)
            sent = {
                peer: [buffers[peer][source][rows] for to, rows, source in steps[peer].sends if to == rank]
                for peer, _ in step.receives
            }
            for peer, rows in step.receives:  # several from one peer arrive in the order in which it lists them
                keys[rows] = sent[peer].pop(0)
            assert not any(sent.values()), "sent and not received"
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
    st.sampled_from(["ring", "grouped_ring", "all_gather", "double_ring", "shared_heads"]),
    st.one_of(st.just(Mask()), st.just(Mask(causal=False)), st.integers(1, 45).map(lambda w: Mask(window=w))),
)
def test_calls_see_every_visible_pair_once(lengths, nodes, layout, strategy, mask):
    topology = Topology(*nodes)
    layout, ranks = layouts(tuple(lengths), topology.world_size)[layout], range(topology.world_size)
    if strategy == "double_ring":
        schedules = [double_ring_schedule(layout, rank, mask, topology, ROUTED) for rank in ranks]
    elif strategy == "shared_heads" and topology.ranks_per_node > 1:
        size = topology.ranks_per_node  # ranks that have their tokens in common, of which one shows what they see
        moved = [head_parallel_schedule(layout, rank, mask, size).schedule for rank in ranks]
        schedules = [schedule.with_peers(lambda peer: peer // size) for schedule in moved[::size]]
        spans = (sorted(sum(layout.spans[first : first + size], ())) for first in ranks[::size])
        layout = Layout(layout.lengths, tuple(map(tuple, spans)))
    else:
        strategy = "ring" if strategy == "shared_heads" else strategy
        schedules = [softmax_schedule(layout, rank, strategy, mask) for rank in ranks]
    for number, name in enumerate(("steps", "backward")):
        passes = [getattr(schedule, name) for schedule in schedules]
        assert torch.equal(seen(passes, layout), visible(lengths, mask))
        for schedule, steps in zip(schedules, passes):
            assert schedule.queries_in_two[number] == (most(step.calls for step in steps)["query_rows"] <= 2)
            for step in steps:
                assert step.local or step.keys_in_two == (most([step.calls])["key_rows"] <= 2)


def most(calls_of_steps):
    """By side, the largest number of calls that one row is in."""
    counts = {"query_rows": Counter(), "key_rows": Counter()}
    for calls in calls_of_steps:
        for call in calls:
            for side, count in counts.items():
                rows = getattr(call, side)
                count.update(range(rows.start, rows.stop) if isinstance(rows, slice) else rows.tolist())
    return {side: max(count.values(), default=0) for side, count in counts.items()}


def test_a_grouped_ring_makes_few_calls():
    """On one zig-zagged document: what is here, then what arrives; backward in two halves around it."""
    layout = zigzag((4096,), 4)
    for rank in range(4):
        schedule = softmax_schedule(layout, rank, "grouped_ring", MASK)
        forward, backward = ([len(step.calls) for step in steps] for steps in (schedule.steps, schedule.backward))
        remote = 1 if rank in (0, 3) else 2  # the head part sees less than the tail part
        assert forward == [1, remote] and backward == [1, remote, 1]
        assert schedule.queries_in_two[0] and schedule.steps[1].keys_in_two
    (own, last) = (schedule.backward[0].calls[0], schedule.backward[2].calls[0])
    assert own.pack.lengths_q == (512, 512) and own.pack.causal and last.pack.lengths_q == (512,)


@pytest.mark.parametrize(
    "strategy, world_size, heads_per_key, expected",
    [
        ("ring", 4, 1, (1, 1, 1)), ("all_gather", 4, 1, (3,)), ("grouped_ring", 8, 1, (3, 4)), ("ring", 1, 1, ()),
        ("grouped_ring", 8, 4, (7,)), ("grouped_ring", 16, 1, (3, 4, 4, 4)), ("grouped_ring", 1, 1, ()),
    ],
)  # fmt: skip
def test_ranks_at_once(strategy, world_size, heads_per_key, expected):
    assert ranks_at_once(strategy, world_size, heads_per_key) == expected


def test_sums_in_narrow_dtypes_are_rounded_once():
    """Where no row gets more than two parts, the same bits as sums in fp32."""
    schedule = softmax_schedule(contiguous((300, 20), 1), 0, "ring", Mask(window=50))
    assert schedule.queries_in_two == (True, True)
    q, k, v, d_out = torch.randn(4, 320, 2, 8).bfloat16()
    found = []
    for narrow in (True, False):
        rounded = replace(schedule, queries_in_two=(narrow, narrow))
        out, lse = softmax_passes.forward(q, k, v, rounded, cpu, 0.3, None)
        found.append((out, *softmax_passes.backward(d_out, q, k, v, out, lse, rounded, cpu, 0.3, None)))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("strategy", ["ring", "grouped_ring", "all_gather", "double_ring"])
def test_only_keys_inside_the_window_travel(strategy):
    """Of each of a rank's two parts, the window - 1 keys before it; between nodes no more than that either."""
    layout, window, topology = zigzag((8192,), 8), 100, Topology(2, 4)

    def received(mask):
        schedules = [
            double_ring_schedule(layout, rank, mask, topology, Costs())
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
    four = SequenceParallel(softmax="zeppelin", rank=0, topology=topology)
    seq = four.context(lengths)
    assert pairs_per_rank(seq, 4, mask) == attention_pairs(plan.layout, mask)
    assert pairs_per_rank(seq, 4) == attention_pairs(plan_attention(lengths, topology).layout)
    assert mask in four.context(lengths[::-1])._layouts  # made ahead, with the context
    for rank in range(4):
        step, *_ = planned_schedule(seq.layout, rank, mask, "zeppelin", topology, four.costs, 1.5).schedule.steps
        assert step.calls[0].pack.cu_q[-1] == plan.layout.tokens_per_rank[rank]


def test_a_windowed_layer_on_one_rank_is_two_calls():
    layout = contiguous((1000, 30, 100), 1)
    (step,) = softmax_schedule(layout, 0, "ring", Mask(window=100)).steps
    squares, triangles = step.calls
    assert squares.pack.lengths_q == (*[100] * 10, 30, 100) and squares.query_rows == slice(0, 1130)
    assert triangles.pack.lengths_q == (99,) * 9 and triangles.query_rows[:2].tolist() == [198, 197]
