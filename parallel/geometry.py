"""What attention may see: the one place that derives visibility and pair counts from a mask.

Positions are positions within one document; different documents never see each other.
"""

from dataclasses import dataclass

from longspan.parallel.layout import Layout, Span


@dataclass(frozen=True)
class Mask:
    """causal: a query sees no later key. window: it sees only the last `window` keys, itself included."""

    causal: bool = True
    window: int | None = None

    def __post_init__(self):
        if self.window is not None and (self.window < 1 or not self.causal):
            raise ValueError(f"window={self.window} needs causal attention and at least 1 token")

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

    def pairs(self, query: Span, length: int) -> int:
        """Query-key pairs of `query` against its whole document of `length` tokens."""
        if not self.causal:
            return len(query) * length

        def keys_before(position):  # sum over queries 0..position-1 of the keys each sees
            full = position if self.window is None else min(position, self.window)
            return full * (full + 1) // 2 + (position - full) * (self.window or 0)

        return keys_before(query.stop) - keys_before(query.start)


def attention_pairs(layout: Layout, mask: Mask = Mask()) -> tuple[int, ...]:
    """Query-key pairs whose query is on each rank: that rank's share of the attention work."""
    return tuple(sum(mask.pairs(span, layout.lengths[span.document]) for span in spans) for spans in layout.spans)
