"""What attention may see: the one place that derives visibility and pair counts from a mask.

Positions are positions within one document; different documents never see each other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from longspan.parallel.layout import Layout, Span


class Piece(NamedTuple):
    """Some queries against some keys. full: each sees each. The others are squares: of lower, query i sees keys 0 to i;
    of upper, keys i and on. Turned around, queries and keys both in descending order, an upper piece is a lower one."""

    shape: Literal["full", "lower", "upper"]
    query: Span
    key: Span


@dataclass(frozen=True)
class Mask:
    """causal: a query sees no later key. window: it sees only the last `window` keys, itself included."""

    causal: bool = True
    window: int | None = None

    def __post_init__(self):
        if self.window is None:
            return
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window={self.window!r} must be a whole number of at least 1, or None for no window")
        if not self.causal:
            raise ValueError(f"window={self.window} needs causal attention; leave it out, or use causal=True")

    def cuts(self, length: int) -> bool:
        """Whether the window hides anything of a document of `length` tokens."""
        return self.window is not None and self.window < length

    def visible_keys(self, query: Span, key: Span) -> Span | None:
        """The part of `key` that at least one token of `query` sees, or None."""
        if query.document != key.document:
            return None
        start, stop = key.start, key.stop
        if self.causal:
            stop = min(stop, query.stop)
        if self.window is not None:
            start = max(start, query.start - self.window + 1)
        return Span(key.document, start, stop) if start < stop else None

    def sees_all(self, query: Span, key: Span) -> bool:
        """Whether every token of `query` sees every token of `key`."""
        if query.document != key.document:
            return False
        before = not self.causal or key.stop - 1 <= query.start
        return before and (self.window is None or query.stop - key.start <= self.window)

    def pieces(self, query: Span, key: Span) -> Iterator[Piece]:
        """What `query` sees of `key`, every pair in one piece. The two are equal or have no token in common."""
        if self.causal and query == key:
            yield from self._diagonal(query)
            return
        part = self.visible_keys(query, key)
        if part is None:
            return
        document = query.document
        if self.window is not None:  # later queries see nothing of the part
            query = Span(document, query.start, min(query.stop, part.stop + self.window - 1))
        if self.sees_all(query, part):
            yield Piece("full", query, part)
            return
        edge = part.start + self.window - 1  # the last query that sees the first key: from here on keys drop out
        below = part.start + query.stop - edge
        if query.start < edge:
            yield Piece("full", Span(document, query.start, edge), part)
        yield Piece("upper", Span(document, edge, query.stop), Span(document, part.start, below))
        if below < part.stop:
            yield Piece("full", Span(document, edge, query.stop), Span(document, below, part.stop))

    def _diagonal(self, span):
        """Blocks as long as the window: all that a token sees is in its own block and in the one before."""
        size = len(span) if self.window is None else self.window
        before = None
        for start in range(span.start, span.stop, size):
            block = Span(span.document, start, min(start + size, span.stop))
            yield Piece("lower", block, block)
            if before is not None:
                yield from self.pieces(block, before)
            before = block

    def pairs(self, query: Span, length: int) -> int:
        """Query-key pairs of `query` against its whole document of `length` tokens."""
        return self.pairs_between(query.start, query.stop, length)

    def pairs_between(self, start, stop, length):
        """The same of queries [start, stop), whole numbers or arrays of them."""
        if not self.causal:
            return (stop - start) * length

        def keys_before(position):  # sum over queries 0..position-1 of the keys each sees
            if self.window is None:
                return position * (position + 1) // 2
            beyond = (position - self.window) * (position > self.window)
            full = position - beyond
            return full * (full + 1) // 2 + beyond * self.window

        return keys_before(stop) - keys_before(start)


def attention_pairs(layout: Layout, mask: Mask = Mask()) -> tuple[int, ...]:
    """Query-key pairs whose query is on each rank: that rank's share of the attention work."""
    return tuple(sum(mask.pairs(span, layout.lengths[span.document]) for span in spans) for spans in layout.spans)
