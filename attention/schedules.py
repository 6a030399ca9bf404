"""Schedules of softmax attention: which keys arrive at which step, and the packed calls they allow.

Queries stay where they are; keys and values travel from their owners, cut to what the mask lets the receiver see. A
strategy only says whose keys arrive at which step (STRATEGIES); everything else follows from the layout.

Kernels know full and causal calls, no windows: what a window leaves is cut into rectangles and triangles
(`Mask.pieces`), and a triangle of keys that drop out is causal with its rows in descending order.
"""

from bisect import bisect
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from longspan.kernels.softmax.pack import Pack
from longspan.parallel.geometry import Mask
from longspan.parallel.layout import Layout, Span

Rows = slice | torch.Tensor  # int64 row numbers where the rows are not one run


@dataclass(frozen=True)
class Call:
    """One packed kernel call: local query rows against rows of this step's keys; no row of either appears twice. Rows
    of a sequence may be in descending order."""

    pack: Pack
    query_rows: Rows
    key_rows: Rows


@dataclass(frozen=True)
class Step:
    """Keys sent, keys that arrive, and the calls on them. sends: (peer, rows, source), the step whose buffer the rows
    are of, None for the local keys; receives: (peer, rows of the step's buffer). The first step has neither: it works
    on the local keys. last_to_send: the last step that sends of this one's buffer, None for no step. beside: while it
    is under way the next step's transfer starts, too. The last two are the same on all ranks."""

    sends: tuple[tuple[int, Rows, int | None], ...]
    receives: tuple[tuple[int, slice], ...]
    calls: tuple[Call, ...]
    last_to_send: int | None = None
    beside: bool = False

    @property
    def num_keys(self) -> int:
        return max((rows.stop for _, rows in self.receives), default=0)


@dataclass(frozen=True)
class Schedule:
    """The steps of one rank, in order; all ranks have equally many."""

    steps: tuple[Step, ...]

    def map(self, move) -> "Schedule":
        """The same schedule with every tensor passed through `move`."""

        def rows(x):
            return x if isinstance(x, slice) else move(x)

        return Schedule(tuple(
            replace(
                step,
                sends=tuple((peer, rows(sent), source) for peer, sent, source in step.sends),
                calls=tuple(Call(c.pack.map(move), rows(c.query_rows), rows(c.key_rows)) for c in step.calls),
            )
            for step in self.steps
        ))  # fmt: skip

    def with_peers(self, name) -> "Schedule":
        """The same among ranks of other numbers: peer r is name(r)."""

        def renamed(ends):
            return tuple((name(peer), *rows) for peer, *rows in ends)

        return Schedule(tuple(
            replace(step, sends=renamed(step.sends), receives=renamed(step.receives)) for step in self.steps
        ))  # fmt: skip


def ring(rank: int, world_size: int) -> list[list[int]]:
    """One neighbour further away at every step: transfers are pairwise and hide behind the step before."""
    return [[(rank - step) % world_size] for step in range(1, world_size)]


def all_gather(rank: int, world_size: int) -> list[list[int]]:
    """Everybody's keys in one step: fewest steps, and memory for all visible keys at once."""
    return [[peer for peer in range(world_size) if peer != rank]]


STRATEGIES = {"ring": ring, "all_gather": all_gather}


def softmax_schedule(layout: Layout, rank: int, strategy: str, mask: Mask) -> Schedule:
    """The schedule of `rank`: a pure function of the layout. strategy: a key of STRATEGIES."""
    peers = STRATEGIES[strategy]
    holdings = [by_document(layout, r) for r in range(layout.world_size)]
    steps = [local_step(layout, rank, mask)]
    for number, sources in enumerate(peers(rank, layout.world_size)):
        sent = [peer for peer in range(layout.world_size) if rank in peers(peer, layout.world_size)[number]]
        sent = [(peer, needed(holdings[peer], holdings[rank], mask), None) for peer in sent]
        arriving = [(peer, needed(holdings[rank], holdings[peer], mask)) for peer in sources]
        steps.append(make_step(holdings[rank], sent, arriving, mask))
    return Schedule(tuple(steps))


def local_step(layout: Layout, rank: int, mask: Mask) -> Step:
    """The first step: local queries, local keys."""
    return Step((), (), _local_calls(layout, rank, mask))


def make_step(queries, sent, arriving, mask: Mask, **options) -> Step:
    """A step from (peer, pieces, source) sent and (peer, pieces) that arrive, pieces as `needed` gives them."""
    sends = [(peer, _rows([(row, row + len(span)) for span, row in pieces]), of) for peer, pieces, of in sent if pieces]
    receives, keys, end = [], [], 0
    for peer, pieces in arriving:
        start = end
        for span, _ in pieces:
            keys.append((span, end))
            end += len(span)
        if end > start:
            receives.append((peer, slice(start, end)))
    return Step(tuple(sends), tuple(receives), _calls(_pieces(queries, keys, mask)), **options)


def by_document(layout: Layout, rank: int) -> dict:
    """document -> [(span, first local row)] of one rank."""
    held = defaultdict(list)
    for span, start in zip(layout.spans[rank], layout.local_offsets(rank)):
        held[span.document].append((span, start))
    return held


def needed(queries, keys, mask: Mask) -> list:
    """The parts of some keys that some queries see, both by document: [(span, first row of the keys)]."""
    pieces = []
    for document in keys.keys() & queries.keys():
        for span, row in keys[document]:
            seen = [part for query, _ in queries[document] if (part := mask.visible_keys(query, span))]
            if seen:
                start, stop = min(part.start for part in seen), max(part.stop for part in seen)
                pieces.append((Span(document, start, stop), row + start - span.start))
    return sorted(pieces, key=lambda piece: piece[1])


def _pieces(queries, keys, mask):
    """(shape, rectangle) of all that queries, by document, see of keys of other runs. A rectangle: (query start, query
    stop, key start, key stop) in rows."""
    for span, key_row in keys:
        for query, query_row in queries.get(span.document, ()):
            yield from _in_rows(mask.pieces(query, span), query_row - query.start, key_row - span.start)


def _in_rows(pieces, query_shift, key_shift):
    for shape, query, key in pieces:
        yield shape, (query.start + query_shift, query.stop + query_shift, key.start + key_shift, key.stop + key_shift)


def _local_calls(layout, rank, mask):
    """Local keys: one packed call in which every query sees itself, then what else there is to see."""
    runs = _runs(layout, rank, mask)
    if not runs:
        return ()
    own, others = [], []
    for run in runs:
        first, row = run[0]
        rows = Span(first.document, 0, sum(len(span) for span, _ in run))  # where there are gaps, only the order counts
        for shape, rectangle in _in_rows(mask.pieces(rows, rows), row, row):
            if rectangle[:2] == rectangle[2:]:
                own.append(rectangle)
            else:
                others.append((shape, rectangle))
    for _, same_document in groupby(sorted(runs, key=lambda run: run[0][0].document), lambda run: run[0][0].document):
        same_document = list(same_document)
        for queries in same_document:
            for keys in same_document:
                if keys is not queries:
                    others += _pieces({keys[0][0].document: queries}, keys, mask)
    return (_call(own, mask.causal), *_calls(others))


def _runs(layout, rank, mask):
    """Lists of (span, first row): spans in ascending order that one causal call can take as one sequence. Where a
    window cuts the document, distances count, and a run is one span."""
    runs = []
    for span, row in zip(layout.spans[rank], layout.local_offsets(rank)):
        last = runs[-1][-1][0] if runs else None
        goes_on = last and last.document == span.document and last.stop <= span.start
        if goes_on and not mask.cuts(layout.lengths[span.document]):
            runs[-1].append((span, row))
        else:
            runs.append([(span, row)])
    return runs


def _calls(pieces) -> tuple[Call, ...]:
    """Packs pieces, as `_pieces` gives them, into as few calls as leave every row at most once in a call."""
    found = {"full": [], "upper": []}
    for shape, rectangle in pieces:
        found[shape].append(rectangle)
    full = _join(sorted(found["full"]), same=(0, 1), run=(2, 3))
    full = _join(sorted(full, key=lambda r: (r[2:], r[:2])), same=(2, 3), run=(0, 1))
    return (
        *(_call(pack, causal=False) for pack in _disjoint(full)),
        *(_call(pack, causal=True, descending=True) for pack in _disjoint(found["upper"])),
    )


def _call(rectangles, causal, descending=False):
    bounds = [[r[:2] for r in rectangles], [r[2:] for r in rectangles]]
    lengths = [_cumulative(stop - start for start, stop in side) for side in bounds]
    return Call(Pack(*lengths, causal), *(_rows(side, descending) for side in bounds))


def _join(rectangles, same, run):
    """Joins neighbours that agree in the `same` range and continue each other in the `run` range."""
    joined = []
    for rectangle in rectangles:
        last = joined[-1] if joined else None
        if last and all(last[i] == rectangle[i] for i in same) and last[run[1]] == rectangle[run[0]]:
            last[run[1]] = rectangle[run[1]]
        else:
            joined.append(list(rectangle))
    return joined


def _disjoint(rectangles):
    """The rectangles in few groups; in a group no two share a row."""
    groups = []  # (rectangles in the order of their queries, their key ranges in order)
    for rectangle in sorted(rectangles):
        start, stop = keys = tuple(rectangle[2:])
        for group, taken in groups:
            at = bisect(taken, keys)
            before, after = taken[at - 1][1] if at else 0, taken[at][0] if at < len(taken) else stop
            if group[-1][1] <= rectangle[0] and before <= start and stop <= after:
                group.append(rectangle)
                taken.insert(at, keys)
                break
        else:
            groups.append(([rectangle], [keys]))
    return [group for group, _ in groups]


def _cumulative(lengths):
    total = [0]
    for length in lengths:
        total.append(total[-1] + length)
    return tuple(total)


def _rows(bounds, descending=False) -> Rows:
    """A slice where the ranges are one run, else their row numbers."""
    if descending:
        return torch.cat([torch.arange(stop - 1, start - 1, -1) for start, stop in bounds])
    if all(stop == start for (_, stop), (start, _) in zip(bounds, bounds[1:])):
        return slice(bounds[0][0], bounds[-1][1])
    return torch.cat([torch.arange(start, stop) for start, stop in bounds])
