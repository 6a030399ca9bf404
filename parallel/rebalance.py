"""Equal tokens on every rank by moving only the surplus, inside nodes first.

Matching surplus with deficit inside each node before going across is optimal whenever a hop between nodes costs at
least as much as one inside: no plan moves fewer tokens, and none sends fewer of them across nodes. Only a rank that
would so get tokens from many others gets those of the smallest by way of larger ones.
"""

from collections import Counter

from longspan.parallel.layout import Layout, Span
from longspan.parallel.topology import Topology

SOURCES = 8  # ranks that one gets tokens from: each adds pieces, whose states linear layers gather


def rebalance(layout: Layout, topology: Topology) -> Layout:
    """A layout with totals within one token that moves the fewest tokens, and the fewest of those across nodes; a few
    more where a rank would else get them from more than SOURCES others.

    Moved tokens leave from the end of a rank's spans; every rank's spans come out sorted by document and position when
    tokens arrive, and unchanged otherwise. Raises ValueError when topology and layout differ in size.
    """
    if topology.world_size != layout.world_size:
        raise ValueError(f"the layout has {layout.world_size} ranks but {topology} has {topology.world_size}")
    tokens = layout.tokens_per_rank
    targets = _targets(tokens, topology)
    surplus = [max(have - want, 0) for have, want in zip(tokens, targets)]
    deficit = [max(want - have, 0) for have, want in zip(tokens, targets)]
    moves = []
    nodes = [range(n * topology.ranks_per_node, (n + 1) * topology.ranks_per_node) for n in range(topology.nodes)]
    for ranks in (*nodes, range(topology.world_size)):
        moves += match(surplus, deficit, ranks)

    spans = [list(rank_spans) for rank_spans in layout.spans]
    arrived = [[] for _ in spans]
    for source, target, count in _relayed(moves):
        arrived[target] += _take_from_end(spans[source], count)
    return Layout(
        layout.lengths, tuple(tuple(sorted(kept + new)) if new else tuple(kept) for kept, new in zip(spans, arrived))
    )


def _targets(tokens, topology: Topology) -> list[int]:
    """Floor or ceil of the mean for each rank; the ceilings go where they save moves, across nodes first."""
    floor, num_ceil = divmod(sum(tokens), len(tokens))
    to_give = [0] * topology.nodes  # tokens a node has beyond its floors
    for rank, have in enumerate(tokens):
        to_give[topology.node(rank)] += have - floor
    targets = [floor] * len(tokens)
    for _ in range(num_ceil):
        candidates = [rank for rank, target in enumerate(targets) if target == floor]

        def saved(rank):  # a token that stays where it is; then one that stays on its node
            node = topology.node(rank)
            return tokens[rank] > floor, to_give[node] > 0, to_give[node], -rank

        rank = max(candidates, key=saved)
        targets[rank] += 1
        to_give[topology.node(rank)] -= 1
    return targets


def match(surplus, deficit, ranks) -> list[tuple[int, int, int]]:
    """Greedy matching among `ranks`, lowest ranks first; consumes surplus and deficit in place."""
    moves = []
    targets = [rank for rank in ranks if deficit[rank]]
    for source in ranks:
        while surplus[source] and targets:
            count = min(surplus[source], deficit[targets[0]])
            moves.append((source, targets[0], count))
            surplus[source] -= count
            deficit[targets[0]] -= count
            if not deficit[targets[0]]:
                targets.pop(0)
    return moves


def _relayed(moves) -> list[tuple[int, int, int]]:
    """The same totals, with tokens from at most SOURCES others on every rank: of more, the smallest give theirs to the
    largest, which pass on as many of their own. Ranks with several targets come last, so that they pass nothing on: no
    rank gives more than the whole deficit of one target, which is no more than it has."""
    targets, sources, relayed = Counter(source for source, _, _ in moves), {}, []
    for source, target, count in moves:
        sources.setdefault(target, []).append((targets[source] > 1, -count, source))
    for target, found in sources.items():
        _, counts, ranks = map(list, zip(*sorted(found)))
        for place in reversed(range(len(ranks))):
            above = place // SOURCES - 1
            if above >= 0:
                counts[above] += counts[place]
            relayed.append((ranks[place], ranks[above] if above >= 0 else target, -counts[place]))
    return relayed


def _take_from_end(spans: list[Span], count: int) -> list[Span]:
    taken = []
    while count:
        last = spans.pop()
        cut = max(last.start, last.stop - count)
        if cut > last.start:
            spans.append(Span(last.document, last.start, cut))
        taken.append(Span(last.document, cut, last.stop))
        count -= last.stop - cut
    return taken
