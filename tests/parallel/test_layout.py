"""Layouts hold every token once, balanced, in the promised order; bad ones are refused."""

from itertools import combinations

import numpy as np
import pytest
from cases import random_layout
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longspan.benchmarks.length_mixes import draw
from longspan.parallel import Layout, Span, Topology, attention_pairs, balanced, contiguous, rebalance, zigzag
from longspan.parallel.rebalance import SOURCES

batches = st.lists(st.one_of(st.integers(1, 5), st.integers(1, 300)), min_size=1, max_size=10).map(tuple)
world_sizes = st.integers(1, 9)
quick = settings(max_examples=200, deadline=None)


def owners(layout):
    """The rank of every global token; fails unless each is held exactly once."""
    owner = np.full(sum(layout.lengths), -1)
    for rank in range(layout.world_size):
        indices = layout.global_indices(rank)
        assert (owner[indices] == -1).all()
        assert len(np.unique(indices)) == len(indices)
        owner[indices] = rank
    assert (owner >= 0).all()
    return owner


def check_consistent(layout, lengths, world_size):
    """Everything a layout says about itself follows from its spans."""
    assert layout.lengths == tuple(lengths)
    assert layout.world_size == len(layout.spans) == world_size
    assert layout.num_tokens == sum(lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    for rank, spans in enumerate(layout.spans):
        assert all(0 <= span.start < span.stop <= lengths[span.document] for span in spans)
        positions = [position for span in spans for position in range(span.start, span.stop)]
        indices = [starts[span.document] + p for span in spans for p in range(span.start, span.stop)]
        assert layout.positions(rank).dtype == layout.global_indices(rank).dtype == np.int64
        np.testing.assert_array_equal(layout.positions(rank), np.array(positions, np.int64))
        np.testing.assert_array_equal(layout.global_indices(rank), np.array(indices, np.int64))
        assert layout.tokens_per_rank[rank] == len(positions)
    assert len(layout.tokens_per_rank) == world_size
    owners(layout)


@quick
@given(batches, world_sizes)
@example((1,), 9)
@example((7, 1, 1), 4)
def test_contiguous_holds_every_token_once_in_order_and_balanced(lengths, world_size):
    layout = contiguous(lengths, world_size)
    check_consistent(layout, lengths, world_size)
    assert max(layout.tokens_per_rank) - min(layout.tokens_per_rank) <= 1
    in_order = np.concatenate([layout.global_indices(rank) for rank in range(world_size)])
    np.testing.assert_array_equal(in_order, np.arange(sum(lengths)))


@quick
@given(batches, world_sizes)
@example((1,), 9)
@example((1,) * 10, 4)
def test_zigzag_holds_every_token_once_and_balanced(lengths, world_size):
    layout = zigzag(lengths, world_size)
    check_consistent(layout, lengths, world_size)
    assert max(layout.tokens_per_rank) - min(layout.tokens_per_rank) <= 1


def causal_pairs(layout):
    return [int((layout.positions(rank) + 1).sum()) for rank in range(layout.world_size)]


@quick
@given(st.integers(1, 40), world_sizes)
def test_zigzag_pairs_head_and_tail_so_that_causal_pairs_are_equal(chunk, world_size):
    layout = zigzag((2 * world_size * chunk,), world_size)
    assert len(set(causal_pairs(layout))) == 1
    for rank, indices in enumerate(map(layout.global_indices, range(world_size))):
        last = 2 * world_size - 1 - rank
        expected = {*range(rank * chunk, (rank + 1) * chunk), *range(last * chunk, (last + 1) * chunk)}
        assert set(indices) == expected


@quick
@given(st.integers(1, 5000), world_sizes)
def test_zigzag_causal_pairs_are_nearly_equal_at_any_length(length, world_size):
    pairs = causal_pairs(zigzag((length,), world_size))
    assert max(pairs) - min(pairs) <= 3 * length  # A token more and borders off by at most one token per chunk.


@quick
@given(batches, world_sizes)
def test_zigzag_balances_causal_pairs_of_every_document(lengths, world_size):
    pairs = causal_pairs(zigzag(lengths, world_size))
    assert max(pairs) - min(pairs) <= 3 * sum(lengths)


def ranks_of(layout):
    """The ranks that hold some of each document, ascending."""
    ranks = [[] for _ in layout.lengths]
    for rank, spans in enumerate(layout.spans):
        for document in dict.fromkeys(span.document for span in spans):
            ranks[document].append(rank)
    return ranks


@quick
@given(batches, world_sizes)
@example((1,), 9)
@example((1,) * 10, 4)
@example((1,) * 200, 7)
@example((300, 1, 1, 1), 3)
def test_balanced_holds_every_token_once_and_cuts_few_documents(lengths, world_size):
    layout = balanced(lengths, world_size)
    check_consistent(layout, lengths, world_size)
    assert max(layout.tokens_per_rank) - min(layout.tokens_per_rank) <= 1
    assert all(list(spans) == sorted(spans) for spans in layout.spans)
    check_few_pieces(layout)


def check_few_pieces(layout):
    """Each border between ranks is inside one long document and one other at most, and adds two spans to each."""
    borders, ranks = layout.world_size - 1, ranks_of(layout)
    assert sum(len(holders) - 1 for holders in ranks) <= 2 * borders
    assert sum(map(len, layout.spans)) <= len(layout.lengths) + 4 * borders
    assert all(sum(len(ranks[span.document]) > 1 for span in spans) <= 6 for spans in layout.spans)


long_batches = st.lists(
    st.one_of(st.integers(1, 40), st.integers(1, 3000), st.integers(1, 100_000), st.sampled_from([1, 4096, 65_537])),
    min_size=1, max_size=60,
)  # fmt: skip


@quick
@given(long_batches, st.integers(1, 80))
@example([100_000] * 5, 64)
@example([300_000, *[2048] * 60], 16)
def test_balanced_has_equal_attention_on_all_ranks(lengths, world_size):
    """Within 1 %, and a token here or there: one more on some ranks, borders between whole tokens, odd shares."""
    layout = balanced(lengths, world_size)
    pairs = attention_pairs(layout)
    assert max(pairs) <= 1.01 * sum(pairs) / world_size + 8 * max(lengths)
    assert max(layout.tokens_per_rank) - min(layout.tokens_per_rank) <= 1
    check_few_pieces(layout)


@quick
@given(st.integers(1, 300), world_sizes)
def test_balanced_is_zigzag_for_one_document(length, world_size):
    assert balanced((length,), world_size) == zigzag((length,), world_size)


def test_balanced_cuts_documents_over_the_ranks_that_their_work_needs():
    assert ranks_of(balanced((80, 80), 8)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert ranks_of(balanced((5, 5, 5, 5), 4)) == [[0], [1], [2], [3]]
    # Two of 2.1 times the pairs of a rank, one of 3.7; borders share a rank between two of them.
    first, *_, second, third = ranks_of(balanced((30_000, *[1000] * 80, 40_000, 30_000), 8))
    assert (second, first, third) == ([0, 1, 2, 3], [3, 4, 5], [5, 6, 7])


def test_balanced_draws_borders_between_documents_where_that_is_near_enough():
    """Of documents of similar lengths, which weigh about the same, one at a border is cut, where exact ones cut two."""
    found = []
    for seed in range(4):
        lengths = np.random.default_rng(seed).integers(900, 1101, 128)
        found.append(sum(len(holders) > 1 for holders in ranks_of(balanced(lengths.tolist(), 16))))
    assert np.mean(found) <= 20, found


def test_balanced_lays_thousands_of_documents_evenly():
    """Of all lengths on every rank, so that none has far more documents than others."""
    lengths = draw("magi", np.random.default_rng(0), 64 * 32_768, 64 * 32_768)
    layout = balanced(lengths, 64)
    assert max(map(len, layout.spans)) < 2 * len(lengths) / 64
    ones = balanced((1,) * 5000, 512)
    assert {len(spans) for spans in ones.spans} == {9, 10} and ones == balanced([1] * 5000, 512)


def test_balanced_shares_the_attention_of_mixed_lengths():
    rng = np.random.default_rng(0)
    lengths = [max(1, int(length)) for length in rng.lognormal(9, 1, 64)]
    pairs = causal_pairs(balanced(lengths, 8))
    assert max(pairs) * 8 <= 1.01 * sum(pairs)
    assert max(causal_pairs(contiguous(lengths, 8))) * 8 > 1.5 * sum(pairs)


@quick
@given(batches, world_sizes, st.integers(0, 1000))
def test_hand_made_layouts_are_accepted(lengths, world_size, seed):
    check_consistent(random_layout(lengths, world_size, seed), lengths, world_size)


def test_ten_million_tokens_are_laid_out_without_touching_every_token():
    layout = zigzag((10_000_000, 3), 64)
    assert max(layout.tokens_per_rank) - min(layout.tokens_per_rank) <= 1
    assert sum(len(spans) for spans in layout.spans) <= 64 * 4
    assert layout.positions(0).max() >= 9_900_000


def test_layouts_are_values():
    assert zigzag((10, 3), 2) == zigzag((10, 3), 2)
    assert hash(contiguous((10, 3), 2)) == hash(contiguous((10, 3), 2))
    assert contiguous((10,), 2) != contiguous((10,), 1)


# Rebalance


def topology_sizes(nodes_and_ranks):
    return nodes_and_ranks[0] * nodes_and_ranks[1] <= 8


topologies = st.tuples(st.integers(1, 4), st.integers(1, 4)).filter(topology_sizes)


def fewest_moves(counts, nodes, ranks_per_node):
    """(tokens moved, tokens moved between nodes): the least possible, in this order, over all balanced targets."""
    base, extra = divmod(sum(counts), len(counts))
    best = None
    for richer in combinations(range(len(counts)), extra):
        surplus = np.array([count - base - (rank in richer) for rank, count in enumerate(counts)])
        across = surplus.reshape(nodes, ranks_per_node).sum(1)
        moves = (int(surplus.clip(0).sum()), int(across.clip(0).sum()))
        best = moves if best is None else min(best, moves)
    return best


@settings(max_examples=300, deadline=None)
@given(batches, topologies, st.integers(0, 1000), st.data())
def test_rebalance_moves_the_fewest_tokens_and_stays_inside_nodes(lengths, topology, seed, data):
    nodes, ranks_per_node = topology
    world_size = nodes * ranks_per_node
    empty = data.draw(st.sets(st.integers(0, world_size - 1), max_size=world_size - 1))
    source = random_layout(lengths, world_size, seed, empty)
    target = rebalance(source, Topology(nodes, ranks_per_node))
    check_consistent(target, lengths, world_size)
    assert max(target.tokens_per_rank) - min(target.tokens_per_rank) <= 1
    before, after = owners(source), owners(target)
    moved = int((before != after).sum())
    across = int((before // ranks_per_node != after // ranks_per_node).sum())
    assert (moved, across) == fewest_moves(source.tokens_per_rank, nodes, ranks_per_node)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([(1, 10), (1, 64), (8, 8), (16, 4), (5, 13), (16, 8)]), st.integers(0, 1000), st.data())
def test_rebalance_gives_no_rank_tokens_of_many_others(topology, seed, data):
    """Some ranks have a little too much or far too much, some nothing; few tokens more move than where they may come
    from anywhere."""
    ranks, rng = topology[0] * topology[1], np.random.default_rng(seed)
    least = data.draw(st.sampled_from([0, 10, 500]))
    counts = rng.integers(least, 510, ranks)
    counts[rng.permutation(ranks)[: data.draw(st.integers(0, ranks // 4))]] = 0
    starts = [0, *np.cumsum(counts).tolist()]
    spans = tuple((Span(0, *ends),) if ends[0] < ends[1] else () for ends in zip(starts, starts[1:]))
    source = Layout((starts[-1],), spans)
    target = rebalance(source, Topology(*topology))
    before, after = owners(source), owners(target)
    moved = before != after
    givers = [len(set(before[moved & (after == rank)])) for rank in range(ranks)]
    assert max(givers) <= SOURCES
    assert max(len(spans) for spans in target.spans) <= 1 + SOURCES
    assert max(target.tokens_per_rank) - min(target.tokens_per_rank) <= 1
    assert moved.sum() <= 3 * np.abs(counts - counts.mean()).sum() / 2 + ranks


@quick
@given(batches, world_sizes)
def test_rebalance_leaves_a_balanced_layout_alone(lengths, world_size):
    layout = contiguous(lengths, world_size)
    assert rebalance(layout, Topology(1, world_size)) == layout


def test_rebalance_refuses_a_topology_of_another_size():
    with pytest.raises(ValueError, match="3"):
        rebalance(contiguous((12,), 3), Topology(2, 2))


# Refusals


@pytest.mark.parametrize("make", [contiguous, zigzag, balanced])
@pytest.mark.parametrize(
    "lengths, world_size, found",
    [((5, 0, 3), 2, "0"), ((-4,), 2, "-4"), ((), 2, "length|document|empty"), ((5,), 0, "0"), ((5,), -1, "-1"),
     (("a",), 2, "'a'"), ((5,), "b", "'b'")],
)  # fmt: skip
def test_bad_lengths_and_world_sizes_are_refused(make, lengths, world_size, found):
    with pytest.raises(ValueError, match=found):
        make(lengths, world_size)


@pytest.mark.parametrize(
    "case, lengths, spans",
    [
        ("missing at the end", (10,), (((0, 0, 5),), ((0, 5, 9),))),
        ("missing in the middle", (10,), (((0, 0, 4),), ((0, 5, 10),))),
        ("missing document", (10, 2), (((0, 0, 5),), ((0, 5, 10),))),
        ("twice on two ranks", (10,), (((0, 0, 6),), ((0, 5, 10),))),
        ("twice on one rank", (10,), (((0, 0, 5), (0, 0, 5)), ((0, 5, 10),))),
        ("overlap and gap of equal size", (10,), (((0, 0, 6),), ((0, 5, 9),))),
        ("beyond the end", (10,), (((0, 0, 5),), ((0, 5, 11),))),
        ("before the start", (10,), (((0, -1, 5),), ((0, 5, 10),))),
        ("unknown document", (10,), (((0, 0, 10),), ((1, 0, 1),))),
        ("negative document", (10, 10), (((0, 0, 10),), ((-1, 0, 10),))),
        ("empty span", (10,), (((0, 0, 10),), ((0, 5, 5),))),
        ("backward span", (10,), (((0, 0, 10),), ((0, 7, 5),))),
        ("no ranks", (10,), ()),
        ("zero length", (10, 0), (((0, 0, 10),),)),
    ],
)
def test_layouts_that_do_not_hold_every_token_once_are_refused(case, lengths, spans):
    with pytest.raises(ValueError):
        Layout(lengths, tuple(tuple(Span(*span) for span in rank) for rank in spans))
