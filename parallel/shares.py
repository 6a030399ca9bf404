"""What of a document each of some ranks takes: what planners give."""

from dataclasses import dataclass


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
