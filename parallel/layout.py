"""Who holds which tokens: spans, layouts and the two elementary layouts.

A batch is documents laid end to end. A `Layout` gives every rank an ordered list of spans; everything else about
token placement (positions, segments, routes, schedules) is derived from it.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import attrgetter, index

import numpy as np


@dataclass(frozen=True, order=True, slots=True)
class Span:
    """Tokens [start, stop) of one document."""

    document: int
    start: int
    stop: int

    def __len__(self):
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """The placement of a batch on ranks: pure data, hashable, the same object on every rank.

    lengths: tokens of each document, all >= 1. spans[rank]: that rank's spans in local order (may be empty).
    Spans of one rank that continue each other are joined. Raises ValueError unless every token is placed exactly once.
    """

    lengths: tuple[int, ...]
    spans: tuple[tuple[Span, ...], ...]

    def __post_init__(self):
        object.__setattr__(self, "lengths", check_lengths(self.lengths))
        spans = tuple(join_adjacent(rank_spans) for rank_spans in self.spans)
        object.__setattr__(self, "spans", spans)
        if not spans:
            raise ValueError("a layout needs at least one rank, got spans=()")
        self._check_cover()

    def _check_cover(self):
        reached = dict.fromkeys(range(len(self.lengths)), 0)
        spans = (span for rank_spans in self.spans for span in rank_spans)
        for span in sorted(spans, key=attrgetter("document", "start", "stop")):
            if span.document not in reached:
                raise ValueError(f"{span} names a document outside 0..{len(self.lengths) - 1}")
            if span.start >= span.stop:
                raise ValueError(f"{span} is empty; leave empty spans out")
            if span.start != reached[span.document]:
                kind = "more than once" if span.start < reached[span.document] else "by no rank"
                where = min(span.start, reached[span.document])
                raise ValueError(f"token {where} of document {span.document} is held {kind}")
            reached[span.document] = span.stop
        for document, (stop, length) in enumerate(zip(reached.values(), self.lengths)):
            if stop < length:
                raise ValueError(f"token {stop} of document {document} is held by no rank")
            if stop > length:
                raise ValueError(f"a span of document {document} ends at {stop}, beyond its length {length}")

    def __hash__(self):
        return self._hash

    @cached_property
    def _hash(self):
        return hash((self.lengths, self.spans))

    @property
    def world_size(self) -> int:
        return len(self.spans)

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of the whole batch, over all ranks."""
        return sum(self.lengths)

    @cached_property
    def tokens_per_rank(self) -> tuple[int, ...]:
        return tuple(sum(map(len, rank_spans)) for rank_spans in self.spans)

    @cached_property
    def document_offsets(self) -> tuple[int, ...]:
        """Where each document starts when documents are laid end to end; one more entry for the end."""
        return (0, *accumulate(self.lengths))

    def local_offsets(self, rank: int) -> tuple[int, ...]:
        """Where each span of `rank` starts among its local tokens; one more entry for the end."""
        return (0, *accumulate(map(len, self.spans[rank])))

    def positions(self, rank: int) -> np.ndarray:
        """int64 [T_local]: position of each local token within its document."""
        return _ranges((span.start, span.stop) for span in self.spans[rank])

    def global_indices(self, rank: int) -> np.ndarray:
        """int64 [T_local]: index of each local token on the documents laid end to end."""
        offsets = self.document_offsets
        return _ranges((offsets[s.document] + s.start, offsets[s.document] + s.stop) for s in self.spans[rank])


def contiguous(lengths, world_size: int) -> Layout:
    """Cuts the documents laid end to end into `world_size` consecutive parts whose sizes differ by at most a token."""
    lengths, world_size = check_lengths(lengths), check_world_size(world_size)
    total, starts = sum(lengths), (0, *accumulate(lengths))
    spans, document = [], 0
    for rank in range(world_size):
        begin, end = total * rank // world_size, total * (rank + 1) // world_size
        rank_spans = []
        while begin < end:
            while starts[document + 1] <= begin:
                document += 1
            stop = min(end, starts[document + 1])
            rank_spans.append(Span(document, begin - starts[document], stop - starts[document]))
            begin = stop
        spans.append(tuple(rank_spans))
    return Layout(lengths, tuple(spans))


def zigzag(lengths, world_size: int) -> Layout:
    """Gives every rank a head part and the mirrored tail part of every document, which balances causal attention.

    A document's tokens are shared out evenly; the ranks that get one token more rotate from document to document, so
    totals differ by at most one token.
    """
    lengths, world_size = check_lengths(lengths), check_world_size(world_size)
    spans = [[] for _ in range(world_size)]
    next_extra = 0
    for document, length in enumerate(lengths):
        share, extra = divmod(length, world_size)
        shares = [share + ((rank - next_extra) % world_size < extra) for rank in range(world_size)]
        next_extra = (next_extra + extra) % world_size
        for rank, pair in enumerate(head_tail(document, shares)):
            spans[rank] += pair
    return Layout(lengths, tuple(map(tuple, spans)))


def head_tail(document: int, shares) -> list[list[Span]]:
    """Cuts a document of sum(shares) tokens from both ends inwards: share n is a head part and the mirrored tail part.

    Under a causal mask a share's part of the query-key pairs is its part of the tokens (odd shares aside).
    """
    head, tail, cut = 0, sum(shares), []
    for tokens in shares:
        head_stop, tail_start = head + (tokens + 1) // 2, tail - tokens // 2
        cut.append([span for span in (Span(document, head, head_stop), Span(document, tail_start, tail)) if len(span)])
        head, tail = head_stop, tail_start
    return cut


def check_lengths(lengths) -> tuple[int, ...]:
    """The lengths as a tuple of ints; ValueError names the first that is not an integer >= 1."""
    lengths = tuple(lengths)
    if not lengths:
        raise ValueError("lengths is empty; a batch needs at least one document")
    for document, length in enumerate(lengths):
        if not _is_count(length):
            raise ValueError(f"document {document} has length {length!r}; lengths must be integers >= 1")
    return tuple(map(index, lengths))


def check_world_size(world_size: int) -> int:
    if not _is_count(world_size):
        raise ValueError(f"world_size={world_size!r} must be an integer >= 1")
    return index(world_size)


def _is_count(value) -> bool:
    try:
        return not isinstance(value, bool) and index(value) >= 1
    except TypeError:
        return False


def join_adjacent(spans) -> tuple[Span, ...]:
    """Joins neighbouring spans where one continues the other."""
    joined = []
    for span in spans:
        last = joined[-1] if joined else None
        if last is not None and last.document == span.document and last.stop == span.start:
            joined[-1] = Span(last.document, last.start, span.stop)
        else:
            joined.append(span)
    return tuple(joined)


def _ranges(bounds) -> np.ndarray:
    parts = [np.arange(start, stop, dtype=np.int64) for start, stop in bounds]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
