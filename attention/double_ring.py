"""Keys cross between nodes once, over the links of all ranks of a node, and are passed round the node they come to.

Around the nodes in an outer ring, and for every node of it around the ranks of one's own in an inner ring. What any
rank of a node sees is fetched for it: each rank gets what the one in its place on the other node carries, which are
that one's own rows and, where links would be loaded unevenly, rows dealt out to it (parallel.routing). What it passes
on is cut to what the receiver sees. Rows are dealt out beside the last turn of the inner ring before.
"""

from dataclasses import dataclass
from functools import cache

from longspan.attention.schedules import Schedule, by_document, local_step, make_step, needed
from longspan.parallel.costs import Costs
from longspan.parallel.geometry import Mask
from longspan.parallel.layout import Layout, Span
from longspan.parallel.routing import route
from longspan.parallel.topology import Topology


def ring_of(topology: Topology) -> str:
    """The strategy that fits where ranks are."""
    return "ring" if topology.nodes == 1 else "double_ring"


def double_ring_schedule(layout: Layout, rank: int, mask: Mask, topology: Topology, costs: Costs) -> Schedule:
    """The schedule of `rank`: a pure function of layout, topology and costs."""
    size, nodes = topology.ranks_per_node, topology.nodes
    node, place = divmod(rank, size)
    held = [[by_document(layout, n * size + p) for p in range(size)] for n in range(nodes)]
    on_node, documents = [_together(of_node) for of_node in held], [list(map(set, of_node)) for of_node in held]
    queries, steps = held[node][place], [local_step(layout, rank, mask)]

    @cache
    def loads(sender, receiver):
        own = [needed(on_node[receiver], keys, mask) for keys in held[sender]]
        return _loads(own, documents[receiver], costs)

    def deal(target, **options):
        """Rows for `target` go to the ranks of this node that carry them; nobody attends to them here."""
        to = loads(node, target)
        sent = [(node * size + p, pieces, None) for p in range(size) for owner, pieces in to[p].dealt if owner == place]
        arriving = [(node * size + owner, pieces) for owner, pieces in to[place].dealt]
        return make_step({}, sent, arriving, mask, **options)

    def cross(origin, target, dealt_in, **options):
        """Rows for `target` leave, own ones and those of step `dealt_in`; those of `origin` arrive."""
        there, here = loads(node, target)[place], loads(origin, node)[place]
        fetcher, owner = target * size + place, origin * size + place
        sent = [(fetcher, there.own, None), (fetcher, _in_buffer(there.foreign), dealt_in)]
        return make_step(queries, sent, [(owner, here.own), (owner, here.foreign)], mask, **options)

    def pass_on(turn, source, passed_on):
        before, after = (place - turn) % size, (place + turn) % size
        arriving = [(node * size + before, needed(queries, passed_on[before], mask))]
        sent = [(node * size + after, needed(held[node][after], passed_on[place], mask), source)]
        return make_step(queries, sent, arriving, mask)

    for hop in range(nodes):
        source, passed_on, more = None, held[node], size > 1 and hop + 1 < nodes
        if hop:
            origin, target, source = (node - hop) % nodes, (node + hop) % nodes, len(steps)
            passed_on = [_documents(_in_buffer(load.own + load.foreign)) for load in loads(origin, node)]
            last = source + size - 1 + more if size > 1 else None  # the last turn, behind the step that deals
            steps.append(cross(origin, target, source - 2, last_to_send=last))
        for turn in range(1, size):
            if more and turn == size - 1:
                steps.append(deal((node + hop + 1) % nodes, last_to_send=len(steps) + 2, beside=True))
            steps.append(pass_on(turn, source, passed_on))
    return Schedule.of(steps)


@dataclass(frozen=True)
class _Load:
    """What a rank carries to another node, pieces as `needed` gives them: own rows, and (owner's place, its pieces)."""

    own: list
    dealt: list

    @property
    def foreign(self):
        return [piece for _, pieces in self.dealt for piece in pieces]


def _loads(own, readers, costs) -> list[_Load]:
    """Of every rank of a node, for another node. own: the pieces of each that the other node sees; readers: for each
    rank there, the documents it holds parts of."""
    rows = [{} for _ in own]
    for of_document, pieces in zip(rows, own):
        for span, _ in pieces:
            of_document[span.document] = of_document.get(span.document, 0) + len(span)
    dealt = [[] for _ in own]
    for owner, proxy, count in route(rows, readers, costs):
        own[owner], taken = _split(own[owner], count)
        dealt[proxy].append((owner, taken))
    return list(map(_Load, own, dealt))


def _split(pieces, count):
    """The pieces without their last `count` rows, and those rows."""
    kept, taken = list(pieces), []
    while count:
        span, row = kept.pop()
        cut = max(span.start, span.stop - count)
        if cut > span.start:
            kept.append((Span(span.document, span.start, cut), row))
        taken.insert(0, (Span(span.document, cut, span.stop), row + cut - span.start))
        count -= span.stop - cut
    return kept, taken


def _in_buffer(pieces):
    """The same, as rows of the buffer that they arrive in one after another."""
    end, arrived = 0, []
    for span, _ in pieces:
        arrived.append((span, end))
        end += len(span)
    return arrived


def _documents(pieces):
    held = {}
    for span, row in pieces:
        held.setdefault(span.document, []).append((span, row))
    return held


def _together(holdings):
    """document -> [(span, row)] of several ranks, to ask what any of them sees."""
    return _documents(piece for held in holdings for pieces in held.values() for piece in pieces)
