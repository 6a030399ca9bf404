"""The hierarchy of Zeppelin (arXiv 2509.21841) as far as it is published: even shards and two thresholds.

Documents from one length on are cut over nodes, those from a shorter one on over ranks of a node, each evenly over a
ring; the rest stays whole. Both thresholds start at what fits and fall until all ranks fit. Here for comparison, and
reconstructed from the paper's description; where its rules leave a rank overfull, rings grow, and in the last resort
everything on a node, or everything, is cut over all of its ranks.
"""

from longspan.parallel.shares import Share, even_share
from longspan.parallel.topology import Topology


def even_rings(lengths, topology: Topology, cap: int) -> list[Share]:
    """Shares of every document, with `cap` tokens per rank where rounding to whole tokens allows."""
    nodes, size = topology.nodes, topology.ranks_per_node
    for first in _thresholds(lengths, size * cap):
        placed = _over_nodes(lengths, nodes, size * cap, first)
        if placed is not None:
            break
    else:
        return [even_share(document, length, range(topology.world_size)) for document, length in enumerate(lengths)]
    rings, whole = placed
    shares = []
    crossing = [[0.0] * size, [0.0] * size]  # tokens and squares that cross-node rings put on every rank of a node
    loads = [[list(column) for column in crossing] for _ in range(nodes)]
    for document, members in rings.items():
        ranks = [node * size + rank for node in members for rank in range(size)]
        shares.append(even_share(document, lengths[document], ranks))
        for node in members:
            for rank in range(size):
                loads[node][0][rank] += lengths[document] / len(ranks)
                loads[node][1][rank] += lengths[document] ** 2 / 2 / len(ranks)
    for node, documents in enumerate(whole):
        for first in _thresholds([lengths[d] for d in documents], cap):
            found = _over_ranks(lengths, documents, *(list(x) for x in loads[node]), cap, first)
            if found is not None:
                break
        else:
            found = {document: range(size) for document in documents}
        shares += [even_share(d, lengths[d], sorted(node * size + rank for rank in ring)) for d, ring in found.items()]
    return shares


def _thresholds(lengths, largest):
    """Lengths from which documents are cut: what does not fit at first, then one document more at a time."""
    yield largest + 1
    yield from sorted({length for length in lengths if length <= largest}, reverse=True)


def _over_nodes(lengths, nodes, room, first):
    """({document: nodes that share it}, documents of each node that stay on it), or None if they do not fit."""
    load, rings, whole = [0.0] * nodes, {}, [[] for _ in range(nodes)]
    cut = [d for d, length in enumerate(lengths) if length >= first]
    average = sum(lengths[d] for d in cut) / nodes
    for d in sorted(cut, key=lambda d: (-lengths[d], d)):
        count = min(max(-(-lengths[d] // max(average, 1)), -(-lengths[d] // room), min(2, nodes)), nodes)
        members = sorted(range(nodes), key=lambda n: (load[n], n))[: int(count)]
        for node in members:
            load[node] += lengths[d] / count
        rings[d] = sorted(members)
    if max(load) > room:
        rings = {d: range(nodes) for d in cut}
        load = [average] * nodes
    for d in sorted((d for d, length in enumerate(lengths) if length < first), key=lambda d: (-lengths[d], d)):
        node = min(range(nodes), key=lambda n: (load[n], n))
        if load[node] + lengths[d] > room:
            return None
        load[node] += lengths[d]
        whole[node].append(d)
    return (rings, whole) if max(load) <= room else None


def _over_ranks(lengths, documents, tokens, squares, cap, first):
    """{document: ranks of the node that share it}, or None if they do not fit."""
    size, rings = len(tokens), {}
    cut = [d for d in documents if lengths[d] >= first]
    average = sum(lengths[d] ** 2 for d in cut) / size
    for d in sorted(cut, key=lambda d: (-lengths[d], d)):
        count = min(max(-(-(lengths[d] ** 2) // max(average, 1)), -(-lengths[d] // cap), min(2, size)), size)
        for ranks in range(int(count), size + 1):  # as few as hold it
            ring = sorted(range(size), key=lambda r: (squares[r], r))
            ring = [r for r in ring if tokens[r] + lengths[d] / ranks <= cap][:ranks]
            if len(ring) == ranks:
                break
        else:
            return None
        for r in ring:
            tokens[r] += lengths[d] / len(ring)
            squares[r] += lengths[d] ** 2 / 2 / len(ring)
        rings[d] = ring
    for d in sorted((d for d in documents if lengths[d] < first), key=lambda d: (-lengths[d], d)):
        ranks = [r for r in range(size) if tokens[r] + lengths[d] <= cap]
        if not ranks:
            return None
        r = min(ranks, key=lambda r: (squares[r], r))
        tokens[r] += lengths[d]
        squares[r] += lengths[d] ** 2 / 2
        rings[d] = [r]
    return rings
