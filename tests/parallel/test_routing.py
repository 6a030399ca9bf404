"""Routing: every row carried once, the most loaded link as light as the costs make worth while, few moves."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.parallel import Costs
from longspan.parallel.routing import EXCHANGE_S, LEAST_GAIN, route, transfer_seconds

FAST_INSIDE = Costs(key_s=1e-5, remote_key_s=1e-2)


@st.composite
def hops(draw):
    """(rows, readers) of nodes of 1 to 8 ranks."""
    size, documents = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    count = st.one_of(st.just(0), st.integers(1, 40), st.integers(1, 10**6))
    of_rank = st.dictionaries(st.integers(0, documents - 1), count)
    readers = st.sets(st.integers(0, documents - 1))
    return [draw(of_rank) for _ in range(size)], [draw(readers) for _ in range(size)]


def carried(rows, moves):
    """Rows over each rank's link."""
    loads = [sum(of.values()) for of in rows]
    for owner, proxy, count in moves:
        loads[owner] -= count
        loads[proxy] += count
    return loads


@settings(deadline=None)
@given(hops(), st.floats(0, 1e-2), st.floats(0, 1e-2))
def test_rows_are_kept_and_moved_only_where_it_pays(hop, key_s, remote_key_s):
    (rows, readers), costs = hop, Costs(key_s=key_s, remote_key_s=remote_key_s)
    moves, loads = route(rows, readers, costs), carried(rows, ())
    after = carried(rows, moves)
    assert sum(after) == sum(loads) and all(count > 0 for _, _, count in moves)
    givers, takers = ({move[n] for move in moves} for n in range(2))
    assert not givers & takers  # else a row would move twice
    assert all(after[place] < loads[place] for place in givers) and all(min(after) >= 0 for _ in moves)
    if moves:
        alone = transfer_seconds(rows, readers, (), costs)
        assert transfer_seconds(rows, readers, moves, costs) < (1 - LEAST_GAIN) * alone - EXCHANGE_S
        assert max(after) < max(loads)
        proxies = givers | takers
        assert max(after[p] for p in proxies) - min(after[p] for p in proxies) <= 1
    assert moves == route(rows, readers, costs)


@settings(deadline=None)
@given(hops())
def test_with_fast_links_inside_all_ranks_carry_alike(hop):
    """No link carries more than the mean (a rank just below it may be left out), and no more moves than lies above."""
    rows, readers = hop
    loads = carried(rows, ())
    moves, mean = route(rows, readers, FAST_INSIDE), sum(loads) / len(loads)
    if max(loads) > 2 * len(loads) and max(loads) > 1.2 * mean:
        assert max(carried(rows, moves)) <= 1.02 * mean + 1
        assert sum(count for _, _, count in moves) <= sum(max(load - mean, 0) for load in loads) + len(loads)


ONE_RANK = [{0: 1000}, {}, {}, {}]


@pytest.mark.parametrize(
    ("key_s", "remote_key_s", "proxies"),
    [
        (1e-3, 1e-3, 1),  # 1 to cross; with two 1/2 to deal, 1/2 to cross, 1/2 to pass on
        (1e-3, 1.9e-3, 1),
        (1e-3, 2.5e-3, 4),  # x proxies: 2 (x - 1) / x inside and 2.5 / x between: less with every proxy
        (0.0, 1e-3, 4),
        (1e-3, 0.0, 1),
        (0.0, 0.0, 1),
    ],
)
def test_the_number_of_proxies_follows_the_links(key_s, remote_key_s, proxies):
    """All rows on one rank, and only the rank in its place reads them: inside links have to be twice as fast."""
    costs = Costs(key_s=key_s, remote_key_s=remote_key_s)
    moves = route(ONE_RANK, [{0}, set(), set(), set()], costs)
    assert sorted(carried(ONE_RANK, moves)) == sorted([0] * (4 - proxies) + [1000 // proxies] * proxies)


def test_fewer_proxies_than_ranks():
    """Only rank 1 reads. With x proxies 900 (x - 1) / x are dealt out and 900 / x cross; what rank 1 did not carry
    itself is passed on to it: 2250, 1575, 1650 and 1687.5 with one to four."""
    moves = route([{0: 900}, {}, {}, {}], [set(), {0}, set(), set()], Costs(key_s=1.0, remote_key_s=1.5))
    assert moves == ((0, 1, 450),)


def test_by_hand():
    """Rank 0 has 6 rows of document 0, rank 1 has 2 of document 1; both ranks read document 0, rank 1 alone the other.

    Off: 6 cross, rank 0 passes 6 on. On: 2 are dealt out, 4 cross; rank 0 passes 4 on, rank 1 the 2 back."""
    rows, readers, costs = [{0: 6}, {1: 2}], [{0}, {0, 1}], Costs(key_s=1.0, remote_key_s=10.0)
    assert transfer_seconds(rows, readers, (), costs) == 60 + 6
    assert route(rows, readers, costs) == ((0, 1, 2),)
    assert transfer_seconds(rows, readers, ((0, 1, 2),), costs) == 2 + 40 + 4
    assert route(rows, readers, replace(costs, remote_key_s=0.0, key_s=0.0)) == ()
    assert route([{0: 8}], [{0}], costs) == ()


def test_what_wins_less_than_a_message_stays_off():
    rows, readers = [{0: 100}, {}], [{0}, {0}]
    assert route(rows, readers, Costs(key_s=0.0, remote_key_s=1e-3))
    assert not route(rows, readers, Costs(key_s=0.0, remote_key_s=EXCHANGE_S / 100))
    assert not route([{0: 10_000}, {0: 9_500}], readers, Costs(key_s=0.0, remote_key_s=1.0))  # less than a share
