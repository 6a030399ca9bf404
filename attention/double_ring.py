"""Keys cross between nodes once: each rank fetches those of one rank of another node, and passes them on in its own.

Around the nodes in an outer ring, and for every node of it around the ranks of one's own in an inner ring. What a rank
fetches is what any rank of its node sees; what it passes on is cut to what the receiver sees. The outer transfers of
all ranks of a node run at the same time, each over its own link.
"""

from itertools import chain

from longspan.attention.schedules import Schedule, by_document, local_step, make_step, needed
from longspan.parallel.geometry import Mask
from longspan.parallel.layout import Layout
from longspan.parallel.topology import Topology


def double_ring_schedule(layout: Layout, rank: int, mask: Mask, topology: Topology) -> Schedule:
    """The schedule of `rank`: a pure function of layout and topology."""
    size, nodes = topology.ranks_per_node, topology.nodes
    node, place = divmod(rank, size)
    held = [by_document(layout, r) for r in range(layout.world_size)]
    on_node = [_together(held[n * size : (n + 1) * size]) for n in range(nodes)]
    steps = [local_step(layout, rank, mask)]

    def fetched(owner, to_node):
        """Of a rank's keys, what a node sees: (pieces at the owner, the same by document in the fetcher's buffer)."""
        pieces, buffer, end = needed(on_node[to_node], held[owner], mask), {}, 0
        for span, _ in pieces:
            buffer.setdefault(span.document, []).append((span, end))
            end += len(span)
        return pieces, buffer

    for hop in range(nodes):
        origin, target = (node - hop) % nodes, (node + hop) % nodes
        source, passed_on = None, held[node * size : (node + 1) * size]  # what each rank of the node passes on
        if hop:
            source = len(steps)
            owner, fetcher = origin * size + place, target * size + place
            pieces, passed_on = zip(*(fetched(origin * size + other, node) for other in range(size)))
            arriving, sent = [(owner, pieces[place])], [(fetcher, fetched(rank, target)[0])]
            last = source + size - 1 if size > 1 else None
            steps.append(make_step(held[rank], sent, arriving, mask, last_to_send=last))
        for turn in range(1, size):
            before, after = (place - turn) % size, (place + turn) % size
            arriving = [(node * size + before, needed(held[rank], passed_on[before], mask))]
            sent = [(node * size + after, needed(held[node * size + after], passed_on[place], mask))]
            steps.append(make_step(held[rank], sent, arriving, mask, source=source))
    return Schedule(tuple(steps))


def _together(holdings):
    """document -> [(span, row)] of several ranks, to ask what any of them sees."""
    merged = {}
    for document, pieces in chain.from_iterable(held.items() for held in holdings):
        merged.setdefault(document, []).extend(pieces)
    return merged
