"""Which ranks of a node carry keys to another node, so that its links are loaded evenly.

A node's keys for another node lie where the layout put them, perhaps all on one rank. Some of its ranks, the proxies,
then share the crossing: rows are dealt out to them inside the node, cross over the proxies' own links to the ranks in
the same places of the other node, and are passed round there (dispatch, transfer and combine of Zeppelin's routing
layer, arXiv 2509.21841). Rows stay with their owner as far as an even load allows.
"""

from longspan.parallel.costs import Costs
from longspan.parallel.rebalance import match

# What dealing out must win at least: its own messages in three passes, and a share. Assumed, not measured.
EXCHANGE_S, LEAST_GAIN = 5e-5, 0.05


def route(rows, readers, costs: Costs) -> tuple[tuple[int, int, int], ...]:
    """(owner, proxy, rows) of everything that is dealt out, by places in the node; () where that does not pay.

    rows: for every rank of the sending node, document -> rows of it that must cross. readers: for every rank of the
    receiving node, the documents it holds parts of. With x proxies the x most loaded ranks carry equally many rows, up
    to one, and the others their own; x is the number with which the most loaded links take least (`transfer_seconds`).
    A pure function: every rank finds the same.
    """
    loads = [sum(of_document.values()) for of_document in rows]
    order = sorted(range(len(loads)), key=lambda place: (-loads[place], place))
    best, least = (), (1 - LEAST_GAIN) * transfer_seconds(rows, readers, (), costs) - EXCHANGE_S
    if least <= 0:  # so little crosses that nothing can be won
        return ()
    for count in range(2, len(loads) + 1):
        moves = _level(loads, order[:count])
        seconds = transfer_seconds(rows, readers, moves, costs)
        if moves and seconds < least:
            best, least = moves, seconds
    return best


def transfer_seconds(rows, readers, moves, costs: Costs) -> float:
    """Of the most loaded link while rows are dealt out, then while they cross, then while they are passed round the
    receiving node; forward and backward. What is dealt out is taken to be of all documents alike."""
    places = range(len(rows))
    read = [[sum(of.get(document, 0) for document in wanted) for wanted in readers] for of in rows]
    kept = [sum(of.values()) for of in rows]
    share = [[count / load if load else 0.0 for count in counts] for counts, load in zip(read, kept)]
    given, taken, crossing, passed, received = ([0] * len(rows) for _ in range(5))
    for owner, proxy, count in moves:
        given[owner] += count
        taken[proxy] += count
        kept[owner] -= count
    for owner, carrier, count in (*zip(places, places, kept), *moves):
        crossing[carrier] += count
        for reader in places:
            if reader != carrier:
                passed[carrier] += count * share[owner][reader]
                received[reader] += count * share[owner][reader]
    return costs.key_s * (max(given + taken) + max(passed + received)) + costs.remote_key_s * max(crossing)


def _level(loads, places) -> tuple[tuple[int, int, int], ...]:
    """The fewest moves of rows after which the ranks in `places`, most loaded first, have equally many up to one."""
    level, extra = divmod(sum(loads[place] for place in places), len(places))
    excess = [0] * len(loads)
    for number, place in enumerate(places):
        excess[place] = loads[place] - level - (number < extra)
    return tuple(match([max(x, 0) for x in excess], [max(-x, 0) for x in excess], sorted(places)))
