"""Shares of documents for ranks with equal work: short documents whole, long ones poured into what is left.

Every rank may take on `level` times the mean work, as much time for keys that arrive, which hides behind work, and
`cap` tokens. Long documents are poured shortest first, as the longest fit anywhere: into the node with most room where
one has enough, else over several. A rank that fills up with light tokens can no longer reach its work: so of each
document a rank takes only as much as leaves the tokens that heavier documents, at their average weight, need to bring
it to the level. The level is the lowest at which all fits.

Only sums of integers depend on the order of summation, so that every machine gets the same shares.
"""

import heapq

import numpy as np

from longspan.parallel.costs import Keys
from longspan.parallel.shares import Share
from longspan.parallel.topology import Topology

LEVELS = (1.0, 1.08, 1.3)  # first tries, then twice the last
PRECISION = 0.01  # of the level, to which it is searched


def water_fill(
    lengths, weights, start: float, keys: Keys, topology: Topology, cap: int, min_shard: int, limit: float | None = None
) -> tuple[float, list[Share]] | None:  # fmt: skip
    """(seconds of the level, shares), or None where the level is above `limit`.

    x tokens of document d are weights[d] * (x + start) seconds of work. cap * ranks must hold all tokens.
    """
    ranks, num_tokens = topology.world_size, sum(lengths)
    assert cap * ranks >= num_tokens, (cap, ranks, num_tokens)
    quota = sum(weight * (length + start) for weight, length in zip(weights, lengths)) / ranks
    shares, long, tokens, work = _place_short(lengths, weights, start, ranks, cap, quota)
    pour = _Pour(lengths, weights, start, keys, topology, cap, min_shard, long, tokens, work)

    failed = None if limit is None else quota  # all of them just at the mean: not worth a try
    for level in _tries(quota) if limit is None else (limit,):
        poured = pour(level)
        if poured is not None:
            break
        failed = level
    else:
        return None
    while failed is not None and level - failed > PRECISION * level:
        middle = (failed + level) / 2
        better = pour(middle)
        if better is None:
            failed = middle
        else:
            poured, level = better, middle
    return level, shares + poured


def _tries(quota):
    for level in LEVELS:
        yield level * quota
    while True:
        level *= 2
        yield level * quota


def _place_short(lengths, weights, start, ranks, cap, quota):
    """Whole documents, longest first, to the rank with fewest tokens; (shares, those too long for that, tokens and work
    of every rank)."""
    tokens, work = [0] * ranks, [0.0] * ranks
    least, shares, long = [(0, rank) for rank in range(ranks)], [], []
    for document in sorted(range(len(lengths)), key=lambda d: (-lengths[d], d)):
        length, needed = lengths[document], weights[document] * (lengths[document] + start)
        taken, rank = least[0]
        if needed > quota or taken + length > cap:
            long.append(document)
            continue
        tokens[rank] += length
        work[rank] += needed
        heapq.heapreplace(least, (tokens[rank], rank))
        shares.append(Share(document, (rank,), (length,)))
    return shares, long, tokens, work


class _Pour:
    """Pours the long documents for a given level of work; None where they do not fit."""

    def __init__(self, lengths, weights, start, keys, topology, cap, min_shard, long, tokens, work):
        self.long = sorted(long, key=lambda d: (weights[d], lengths[d], d))
        self.lengths, self.weights, self.start, self.topology = lengths, weights, start, topology
        self.keys, self.cap, self.min_shard = keys, cap, min_shard
        self.tokens, self.work = np.array(tokens, np.int64), np.array(work, np.float64)
        self.node = np.repeat(np.arange(topology.nodes), topology.ranks_per_node)
        heavier = np.array([[lengths[d] * weights[d], lengths[d]] for d in self.long]).reshape(-1, 2)
        heavier = heavier[::-1].cumsum(0)[::-1]
        self.average = heavier[:, 0] / np.maximum(heavier[:, 1], 1)  # weight of a document and those behind it

    def __call__(self, top: float) -> list[Share] | None:
        tokens, work, shares = self.tokens.copy(), self.work.copy(), []
        arriving = np.zeros(len(work))
        for place, document in enumerate(self.long):
            length, weight = self.lengths[document], self.weights[document]
            room = np.minimum((top - work) / weight - self.start, self.cap - tokens)
            saving = self._saving(place, weight, top - work, self.cap - tokens)
            taken = None
            for limit in (saving, room) if saving is not None else (room,):
                taken = self._take(length, np.minimum(room, limit), top - arriving, place + 1 == len(self.long))
                if taken is not None:
                    break
            else:
                return None
            ranks, parts = taken
            tokens[ranks] += parts
            work[ranks] += weight * (parts + self.start)
            on_node = np.bincount(self.node[ranks], parts, self.topology.nodes)[self.node[ranks]]
            arriving[ranks] += self.keys.near_s(on_node - parts) + self.keys.far_s(length - on_node)
            order = np.argsort(ranks)
            shares.append(Share(document, tuple(ranks[order].tolist()), tuple(parts[order].tolist())))
        return shares

    def _saving(self, place, weight, missing, free):
        """Tokens that each rank may take so that heavier documents can still bring it to the level; None if there are
        none heavier."""
        if place + 1 == len(self.long):
            return None
        heavier = self.average[place + 1]
        return (heavier * free - missing) / (heavier - weight) if heavier > 1.01 * weight else None

    def _take(self, length, room, free, last):
        """(ranks, tokens) that hold `length` tokens in this room, most room first; None if there is too little. free:
        seconds for more keys that ranks have; last: no document comes after this one."""
        room = np.maximum(room, 0).astype(np.int64).reshape(self.topology.nodes, -1)
        for seconds, several in ((self.keys.near_s(length), False), (self.keys.far_s(length), True)):
            usable = room * (seconds <= free).reshape(room.shape)
            by_node = usable.sum(1)
            if several or by_node.max() >= length:
                break
        within, nodes = np.argsort(-usable, axis=1, kind="stable"), np.argsort(-by_node, kind="stable")
        order, room = (within[nodes] + nodes[:, None] * room.shape[1]).ravel(), usable.ravel()
        for smallest in (self.min_shard, 1):
            ranks = order[room[order] >= min(smallest, length)]
            reached = room[ranks].cumsum()
            needed = int(np.searchsorted(reached, length)) + 1
            if needed <= len(ranks):
                parts = room[ranks[:needed]]
                unused = int(reached[needed - 1]) - length
                less, rest = divmod(unused, needed)
                if last and parts.min() - less > smallest:  # all stay as far below the level
                    parts -= less + (np.arange(needed) < rest)
                    return ranks[:needed], parts
                parts[-1] -= unused
                lacking = min(self.min_shard, room[ranks[needed - 1]]) - parts[-1]
                if needed > 1 and 0 < lacking <= parts[-2] - self.min_shard:  # a remainder is not left a crumb
                    parts[-2:] += -lacking, lacking
                return ranks[:needed], parts
        return None
