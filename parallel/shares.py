"""What of a document each of some ranks takes: what planners give."""

from dataclasses import dataclass

from longspan.parallel.layout import Span, head_tail


@dataclass(frozen=True)
class Share:
    """ranks ascending, tokens > 0."""

    document: int
    ranks: tuple[int, ...]
    tokens: tuple[int, ...]


def even_share(document: int, length: int, ranks) -> Share:
    """A document over ranks in equal parts; the first ones get what is left of the division."""
    share, extra = divmod(length, len(ranks))
    tokens = [share + (place < extra) for place in range(len(ranks))]
    kept = [(rank, count) for rank, count in zip(ranks, tokens) if count]
    return Share(document, *(tuple(column) for column in zip(*kept)))


def spans_of(lengths, world_size: int, shares) -> list[list[Span]]:
    """Every rank's spans, longest documents first; documents on several ranks in head-tail pairs."""
    spans = [[] for _ in range(world_size)]
    for share in sorted(shares, key=lambda share: (-lengths[share.document], share.document)):
        if len(share.ranks) == 1:
            spans[share.ranks[0]].append(Span(share.document, 0, lengths[share.document]))
            continue
        for rank, pair in zip(share.ranks, head_tail(share.document, share.tokens)):
            spans[rank] += pair
    return spans
