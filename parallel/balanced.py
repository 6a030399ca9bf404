"""The default base layout: equal tokens on every rank, and nearly equal causal attention, for any mix of lengths."""

from longspan.parallel.layout import Layout, Span, check_lengths, check_world_size, zigzag
from longspan.parallel.rebalance import rebalance
from longspan.parallel.topology import Topology


def balanced(lengths, world_size: int) -> Layout:
    """Cuts only the documents that are too much work for one rank; totals differ by at most one token.

    A document with more than a rank's share of the query-key pairs is zig-zagged over all ranks (fewer than
    `world_size` documents can be). The others go whole, heaviest first, to the rank with least work so far. What makes
    tokens unequal after that is moved, which cuts a few documents once more. One document alone is plain zig-zag.
    """
    lengths, world_size = check_lengths(lengths), check_world_size(world_size)
    pairs = [length * (length + 1) // 2 for length in lengths]
    share = sum(pairs) / world_size
    cut = [document for document, work in enumerate(pairs) if work > share]
    spans = [[] for _ in range(world_size)]
    if cut:
        for rank, rank_spans in enumerate(zigzag([lengths[document] for document in cut], world_size).spans):
            spans[rank] = [Span(cut[span.document], span.start, span.stop) for span in rank_spans]
    load = [(0, 0, rank) for rank in range(world_size)]  # pairs and tokens of whole documents
    for document in sorted(set(range(len(lengths))) - set(cut), key=lambda d: (-lengths[d], d)):
        work, tokens, rank = min(load)
        load[rank] = work + pairs[document], tokens + lengths[document], rank
        spans[rank].append(Span(document, 0, lengths[document]))
    # What moves leaves from the end, where the lightest documents are.
    even = rebalance(Layout(lengths, tuple(map(tuple, spans))), Topology(1, world_size))
    return Layout(lengths, tuple(tuple(sorted(rank_spans)) for rank_spans in even.spans))
