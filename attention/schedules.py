"""Schedules of softmax attention: which keys arrive at which step, and the packed calls they allow.

Queries stay where they are; keys and values travel from their owners, cut to what the mask lets the receiver see. A
strategy only says of how many ranks keys arrive in a step (STRATEGIES); everything else follows from the layout.

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
    are of, None for the local keys; receives: (peer, rows of the step's buffer). last_to_send: the last step that sends
    of this one's buffer, None for no step. beside: while it is under way the next step's transfer starts, too. local:
    it works on the local keys, as the first step does, and neither sends nor receives. These three are the same on all
    ranks. keys_in_two: no key is in more than two calls; then gradients can be summed in the dtype in which they are
    sent, since they are rounded once. returns: what becomes of the gradients that come back."""

    sends: tuple[tuple[int, Rows, int | None], ...]
    receives: tuple[tuple[int, slice], ...]
    calls: tuple[Call, ...]
    last_to_send: int | None = None
    beside: bool = False
    local: bool = False
    keys_in_two: bool = False
    returns: tuple["Return", ...] = ()

    @property
    def num_keys(self) -> int:
        return max((rows.stop for _, rows in self.receives), default=0)


@dataclass(frozen=True)
class Return:
    """Where gradients come back to: of step `source` (None: of the local keys) the `rows` that were sent. places: int32
    [rows, n], where the gradients of each are in what comes, ordered as `sends` is; -1 for none."""

    source: int | None
    rows: Rows
    places: torch.Tensor


@dataclass(frozen=True)
class Schedule:
    """The steps of one rank, in order; all ranks have equally many. backward: those of the backward pass.
    queries_in_two: of either pass, whether no query is in more than two calls; then results can be summed in their own
    dtype, since they are rounded once."""

    steps: tuple[Step, ...]
    backward: tuple[Step, ...]
    queries_in_two: tuple[bool, bool]

    @classmethod
    def of(cls, steps, backward=None) -> "Schedule":
        """backward: None where it is the same."""
        steps = tuple(steps)
        backward = steps if backward is None else tuple(backward)
        calls = [[call.query_rows for step in half for call in step.calls] for half in (steps, backward)]
        return cls(steps, backward, tuple(map(_at_most_two, calls)))

    def map(self, move) -> "Schedule":
        """The same schedule with every tensor passed through `move`."""

        def rows(x):
            return x if isinstance(x, slice) else move(x)

        def moved(step):
            return replace(
                step,
                sends=tuple((peer, rows(sent), source) for peer, sent, source in step.sends),
                calls=tuple(Call(c.pack.map(move), rows(c.query_rows), rows(c.key_rows)) for c in step.calls),
                returns=tuple(Return(r.source, rows(r.rows), move(r.places)) for r in step.returns),
            )

        return self._each(moved)

    def with_peers(self, name) -> "Schedule":
        """The same among ranks of other numbers: peer r is name(r)."""

        def renamed(ends):
            return tuple((name(peer), *rows) for peer, *rows in ends)

        return self._each(lambda step: replace(step, sends=renamed(step.sends), receives=renamed(step.receives)))

    def _each(self, change):
        changed = {id(step): change(step) for step in (*self.steps, *self.backward)}  # most are in both
        steps, backward = ([changed[id(step)] for step in steps] for steps in (self.steps, self.backward))
        return replace(self, steps=tuple(steps), backward=tuple(backward))


def _at_most_two(rows: list[Rows]) -> bool:
    """Whether no row is in more than two of these sets of rows."""
    rows = [torch.arange(x.start, x.stop) if isinstance(x, slice) else x for x in rows]
    return len(rows) <= 2 or int(torch.bincount(torch.cat(rows)).max()) <= 2


# Of how many other ranks keys arrive in a step, at most: of all ranks, and of query heads per key head.
STRATEGIES = {
    # One neighbour further away at every step: least memory, and transfers hide behind the step before.
    "ring": lambda world_size, heads_per_key: 1,
    # Fewer and larger calls, whose keys and values take at most twice the memory of q, k, v and the output.
    "grouped_ring": lambda world_size, heads_per_key: 2 * (heads_per_key + 1),
    # Fewest steps, and memory for all visible keys.
    "all_gather": lambda world_size, heads_per_key: world_size,
}


def ranks_at_once(strategy: str, world_size: int, heads_per_key: int) -> tuple[int, ...]:
    """Of how many other ranks keys arrive in each step after the first, about as many in all."""
    others = world_size - 1
    steps = -(-others // STRATEGIES[strategy](world_size, heads_per_key))
    return tuple(others * (n + 1) // steps - others * n // steps for n in range(steps))


def softmax_schedule(layout: Layout, rank: int, strategy: str, mask: Mask, heads_per_key: int = 1) -> Schedule:
    """The schedule of `rank`: a pure function of the layout. strategy: a key of STRATEGIES."""
    world_size = layout.world_size
    holdings = [by_document(layout, r) for r in range(world_size)]
    remote, distance = [], 1
    for count in ranks_at_once(strategy, world_size, heads_per_key):
        away = range(distance, distance + count)
        sent = sorted((rank + n) % world_size for n in away)  # what they return is added in this order
        sent = [(peer, needed(holdings[peer], holdings[rank], mask), None) for peer in sent]
        arriving = [(rank - n) % world_size for n in away]
        arriving = [(peer, needed(holdings[rank], holdings[peer], mask)) for peer in arriving]
        remote.append(make_step(holdings[rank], sent, arriving, mask))
        distance += count
    steps = local_step(layout, rank, mask), *remote
    if strategy == "ring" or not remote:
        return Schedule.of(steps)
    first, last = local_halves(layout, rank, mask)
    return Schedule.of(steps, (first, *remote, last))


def local_step(layout: Layout, rank: int, mask: Mask) -> Step:
    """The first step: local queries, local keys."""
    return Step((), (), _local_calls(_runs(layout, rank, mask), mask), local=True)


def local_halves(layout: Layout, rank: int, mask: Mask) -> tuple[Step, Step]:
    """The same in two, for what arrives and what returns meanwhile: what either half of a run sees of itself, and what
    it sees of the other."""
    runs = []
    for run in _runs(layout, rank, mask):
        document, tokens = run[0][0].document, sum(len(span) for span, _ in run)
        elsewhere = tokens < layout.lengths[document] and not mask.cuts(layout.lengths[document])
        runs += _cut(run, tokens // 2) if elsewhere and tokens > 1 else [run]
    calls = _local_calls(runs, mask)
    return Step((), (), calls[:1], local=True), Step((), (), calls[1:], local=True)


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
    calls = _calls(_pieces(queries, keys, mask))
    in_two = _at_most_two([call.key_rows for call in calls])
    return Step(tuple(sends), tuple(receives), calls, keys_in_two=in_two, returns=_returns(sends), **options)


def _returns(sends) -> tuple[Return, ...]:
    sent, end = defaultdict(list), 0
    for _, rows, source in sends:
        rows = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows
        sent[source].append((rows, torch.arange(end, end + len(rows), dtype=torch.int32)))
        end += len(rows)
    return tuple(Return(source, *_places(parts)) for source, parts in sent.items())


def _places(parts):
    """(rows, places) from what every peer was sent: row numbers, and where they come back."""
    counts = torch.bincount(torch.cat([rows for rows, _ in parts]))
    places = torch.full((len(counts), int(counts.max())), -1, dtype=torch.int32)
    filled = torch.zeros_like(counts)
    for rows, back in parts:
        places[rows, filled[rows]] = back
        filled[rows] += 1
    rows = counts.nonzero().flatten()
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows, places[rows]


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


def _local_calls(runs, mask):
    """Local keys: one packed call in which every query sees itself, then what else there is to see."""
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


def _cut(run, count):
    """Its first `count` tokens and the others, a run each."""
    parts = [], []
    for span, row in run:
        cut = min(span.start + count, span.stop)
        count -= cut - span.start
        if cut > span.start:
            parts[0].append((Span(span.document, span.start, cut), row))
        if cut < span.stop:
            parts[1].append((Span(span.document, cut, span.stop), row + cut - span.start))
    return parts


def _calls(pieces) -> tuple[Call, ...]:
    """Packs pieces, as `_pieces` gives them, into as few calls as leave every row at most once in a call, those with
    most keys first: the last thread blocks, which run alone, are then short."""
    found = {"full": [], "upper": []}
    for shape, rectangle in pieces:
        found[shape].append(rectangle)
    full = _join(sorted(found["full"]), same=(0, 1), run=(2, 3))
    full = _join(sorted(full, key=lambda r: (r[2:], r[:2])), same=(2, 3), run=(0, 1))
    return (
        *(_call(pack, causal=False) for pack in sorted(_disjoint(full), key=_num_keys, reverse=True)),
        *(_call(pack, causal=True, descending=True) for pack in _disjoint(found["upper"])),
    )


def _num_keys(rectangles):
    return sum(stop - start for _, _, start, stop in rectangles)


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
