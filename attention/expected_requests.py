"""How many keys ranks ask of one another in block-sparse attention, before there are any tokens.

Choices depend on the data. Here every chooser draws its blocks evenly and by itself from those that it may choose: for
given sizes of lists and candidates, what it asks for in expectation is then the most that independent choices can be
(a block that none names has chance prod(1 - p), at least when all p are equal). Choices that agree ask for less; only
choosers that avoid what others took ask for more.

Choices of a model agree: some blocks are what most queries want. Where the popularity of blocks is taken as exponential
around what even draws give, with n = -sum(log(1 - p)) a block is not named with chance 1 / (1 + n) in place of exp(-n).
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from longspan.attention.hierarchy import Hierarchical
from longspan.kernels.sparse import kept_of
from longspan.parallel.layout import Layout, Span

LEAST = 1e-20  # chance below which it makes no difference how small it is; its logarithm must be finite
CERTAIN = 0.99 * np.log(LEAST)  # of a block that a chooser takes in any case, but for rounding


@dataclass(frozen=True)
class _Choosers:
    """Those of one level, documents one after another. rows: of keys of that level; first, stop: those that each draws
    from by itself, beside what is under the choice of `parent`, its row above; share: of all of them that it takes.
    Where there is a level above, choosers are rows of keys."""

    rows: int
    first: np.ndarray
    stop: np.ndarray
    share: np.ndarray
    parent: np.ndarray | None = None


@lru_cache(maxsize=16)
def expected_requests(selection, layout: Layout, causal: bool, alike: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, listed): float [who, whom], of one list of blocks (a key head's): the tokens that rank `who` gets of
    rank `whom`, and the blocks of those that its lists name, each as often as it is named.

    selection: TopBlocks or Hierarchical. alike: whether choices agree as those of a model do. Blocks that the queries'
    own block meets are taken as held by their rank.
    """
    found = np.zeros((2, layout.world_size, layout.world_size))
    layout = _cut_documents(layout)
    if layout is None:
        return found[0], found[1]
    if isinstance(selection, Hierarchical):
        levels, sizes = _hierarchy(selection, layout.lengths, causal), (selection.block, selection.block)
    else:
        levels, sizes = _top(selection, layout.lengths, causal), (selection.query_block, selection.key_block)
    ends, block = np.cumsum([0, *(-(-n // sizes[1]) for n in layout.lengths)]), sizes[1]
    for who in range(layout.world_size):
        totals = [np.concatenate([[0], x.cumsum()]) for x in _named(levels, _held(layout, who, sizes[0]), alike)]
        for whom in set(range(layout.world_size)) - {who}:
            for span in layout.spans[whom]:  # of cut blocks a part
                at = ends[span.document] + np.array([span.start, span.stop]) / block
                found[:, who, whom] += [np.diff(_at(total, at))[0] for total in totals]
    return found[0] * block, found[1]


def _cut_documents(layout: Layout) -> Layout | None:
    """The documents that are on several ranks, None if none is: nothing else is asked for."""
    on = [set() for _ in layout.lengths]
    for rank, spans in enumerate(layout.spans):
        for span in spans:
            on[span.document].add(rank)
    number = {document: n for n, document in enumerate(d for d, ranks in enumerate(on) if len(ranks) > 1)}
    if not number:
        return None
    spans = (
        tuple(Span(number[span.document], span.start, span.stop) for span in spans if span.document in number)
        for spans in layout.spans
    )
    return Layout([layout.lengths[document] for document in number], tuple(spans))


def _at(total, places):
    """Of sums before every whole number, those before `places`."""
    below = np.minimum(places.astype(int), len(total) - 2)
    return total[below] + (places - below) * (total[below + 1] - total[below])


def _unnamed(draws, alike):
    """Chance that no chooser names a block. draws: sums of log(1 - p)."""
    if not alike:
        return np.exp(draws)
    return np.where(draws <= CERTAIN, 0.0, 1 / (1 - draws))


def _named(levels, here, alike):
    """(chance that a rank names each block of keys, how often it does). here: of the choosers of the first level, those
    that are the rank's."""
    spared, often = 1.0 - here, here.astype(float)  # of a chooser: chance that what it lists is not named below it
    chances, counts = [], []
    for level in levels:
        draws, times = np.log(np.maximum(1 - level.share * (1 - spared), LEAST)), level.share * often
        chances.append(_over(level, draws))
        counts.append(_over(level, times))
        if level.parent is not None:
            size = int(level.parent.max()) + 1
            spared = _unnamed(np.bincount(level.parent, draws, size), alike)
            often = np.bincount(level.parent, times, size)
    chance, count = chances[-1], counts[-1]
    for level, own, times in zip(levels[-2::-1], chances[-2::-1], counts[-2::-1]):
        chance, count = chance[level.parent] + own, count[level.parent] + times
    return 1 - _unnamed(chance, alike), count


def _over(level, values):
    """At every row the sum of the values of choosers that draw from it by themselves."""
    change = (np.bincount(bound, values, level.rows + 1) for bound in (level.first, level.stop))
    return np.subtract(*change).cumsum()[: level.rows]


def _held(layout, rank, size):
    """Of the blocks of all documents, those that this rank has tokens of."""
    counts = [-(-length // size) for length in layout.lengths]
    base, found = np.cumsum([0, *counts]), np.zeros(sum(counts), bool)
    for span in layout.spans[rank]:
        found[base[span.document] + span.start // size : base[span.document] + -(-span.stop // size)] = True
    return found


def _top(selection, lengths, causal):
    counts = -(-np.array(lengths) // selection.key_block)
    begins = [np.arange(0, length, selection.query_block) for length in lengths]
    first, past = (np.repeat(x, list(map(len, begins))) for x in (np.cumsum(counts) - counts, counts))
    if causal:
        past = np.concatenate(begins) // selection.key_block
    share = kept_of(past, selection.keep) / past.clip(1)
    return [_Choosers(int(counts.sum()), first, first + past, share)]


def _hierarchy(selection, lengths, causal):
    """From the level of fine blocks up."""
    block, levels = selection.block, range(1, selection.levels + 1)
    counts = {level: -(-np.array(lengths) // block**level) for level in levels}
    base = {level: np.cumsum(counts[level]) - counts[level] for level in levels}
    place = {level: np.concatenate([np.arange(n) for n in counts[level]]) for level in levels}
    found, listed = [], None
    for level in levels[::-1]:
        own, start = place[level], np.repeat(base[level], counts[level])
        if listed is None:
            parent, first = None, start
            candidates = own if causal else np.repeat(counts[level], counts[level])
            stop = first + candidates
        else:
            parent = np.repeat(base[level + 1], counts[level]) + own // block
            first, stop = start + own // block * block, start + (own if causal else own // block * block)
            candidates = listed[parent] * block + (stop - first)
        listed = np.minimum(selection.keep, candidates)
        found.insert(0, _Choosers(len(own), first, stop, listed / candidates.clip(1), parent))
    return found
