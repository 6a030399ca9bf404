"""Shares of documents for ranks with equal work: short documents whole, long ones poured into what is left.

Every rank may take on work up to a level, as much time for keys that arrive, which hides behind work, and `cap` tokens,
every node `node_cap` tokens. Long documents are poured shortest first, as the longest fit anywhere: into the node with
most room where one has enough, else over several. A rank that fills up with light tokens can no longer reach its work:
so of each document a rank takes only as much as leaves the tokens that heavier documents, at their average weight, need
to bring it to the level; so does a node. The level is the lowest at which all fits, up to a precision. What that leaves
is the share of a whole rank or more where ranks are many: the last document is spread over all ranks with room.

Sums of fractions are exact or in sequence, so that every machine gets the same shares.
"""

import heapq
from math import fsum

import numpy as np

from longspan.parallel.costs import Keys
from longspan.parallel.shares import Share
from longspan.parallel.topology import Topology

FIRST_LEVELS = (1.0, 1.16, 1.24, 1.36)  # over the least one: first tries, then a tenth more each time, then more
LEAST_PRECISION = 0.005  # of the least level
EASES = (0.25, 0.5)  # parts of what is saved for heavier documents that are given up where a document does not fit


def water_fill(
    lengths, weights, start: float, keys: Keys, topology: Topology, cap: int, node_cap: float, min_shard: int,
    precision: float = 0.02, limit: float | None = None,
) -> list[Share] | None:  # fmt: skip
    """Shares of every document; None where the level is above `limit` seconds.

    x tokens of document d are weights[d] * (x + start) seconds of work. cap * ranks must hold all tokens; node_cap is
    exceeded where they do not fit otherwise. precision: to which the level is searched, as a part of it.
    """
    ranks, num_tokens = topology.world_size, sum(lengths)
    assert cap * ranks >= num_tokens, (cap, ranks, num_tokens)
    quota = sum(weight * (length + start) for weight, length in zip(weights, lengths)) / ranks
    shares, long, tokens, work = _place_short(lengths, weights, start, ranks, cap, quota)
    pour = _Pour(lengths, weights, start, keys, topology, cap, node_cap, min_shard, long, tokens, work)

    failed = least_level(lengths, weights, start, ranks, cap)  # at it everything has to fall into place
    for level in _tries(failed, start) if limit is None else (limit,):
        poured = pour(level)
        if poured is not None:
            break
        failed = level
    else:
        return None
    while level - failed > precision * level:
        middle = (failed + level) / 2
        better = pour(middle)
        if better is None:
            failed = middle
        else:
            poured, level = better, middle
    mean = (sum(work) + fsum(weights[d] * (lengths[d] + len(parts) * start) for d, _, parts in poured)) / ranks
    mean += 2 * max(weights)  # rooms are whole tokens
    if failed < mean < level:  # long documents may bring all ranks just there
        poured = pour(mean) or poured
    return shares + [_share(*taken) for taken in poured]


def least_level(lengths, weights, start: float, ranks: int, cap: float) -> float:
    """Seconds of work below which no plan brings the fullest rank: a rank that works for less takes only so many tokens
    of a document, which is then in so many pieces, each with its start, and all ranks together must have that time."""
    lengths, weights = np.array(lengths, np.float64), np.array(weights)

    def fits(level):
        most = np.minimum(level / weights - start, cap)  # tokens of one piece
        return most.min() >= 1 and fsum(weights * (lengths + np.ceil(lengths / most) * start)) <= level * ranks

    low = high = fsum(weights * (lengths + start)) / ranks
    while not fits(high):
        low, high = high, 1.25 * high
    while high - low > LEAST_PRECISION * high:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return low


def _tries(least, start):
    for factor in FIRST_LEVELS[bool(start) :]:  # with starts the least level is out of reach
        yield factor * least
    growth = 1.1
    while True:
        factor, growth = factor * growth, growth * 1.1
        yield factor * least


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


def _share(document, ranks, parts) -> Share:
    return Share(document, *(tuple(column) for column in zip(*sorted(zip(ranks, parts)))))


class _Pour:
    """Pours the long documents for a given level of work; None where they do not fit."""

    def __init__(self, lengths, weights, start, keys, topology, cap, node_cap, min_shard, long, tokens, work):
        long = sorted(long, key=lambda d: (weights[d], lengths[d], d))
        heavier = np.array([[lengths[d] * weights[d], lengths[d]] for d in long]).reshape(-1, 2)[::-1].cumsum(0)[::-1]
        average = (heavier[:, 0] / np.maximum(heavier[:, 1], 1)).tolist()  # weight of a document and those behind it
        waits = [(float(keys.near_s(lengths[d])), float(keys.far_s(lengths[d]))) for d in long]
        self.long = [(d, lengths[d], weights[d], *columns) for d, *columns in zip(long, [*average[1:], 0.0], waits)]
        self.start, self.keys, self.cap, self.node_cap, self.min_shard = start, keys, cap, node_cap, min_shard
        self.shape = topology.nodes, topology.ranks_per_node
        self.tokens, self.work = (np.array(x).reshape(self.shape) for x in (tokens, work))

    def __call__(self, top: float) -> list[tuple] | None:
        """(document, ranks, tokens on each) of all; arrays are [nodes, ranks of a node]."""
        missing, free, spare = top - self.work, self.cap - self.tokens, np.full(self.shape, top)  # spare: for keys
        flat_missing, flat_free, flat_spare = missing.ravel(), free.ravel(), spare.ravel()  # views
        poured, least_spare = [], top
        for document, length, weight, heavier, waits in self.long:
            usable = [None] if max(waits) <= least_spare else [seconds <= spare for seconds in waits]
            for room, on_node in self._rooms(weight, heavier, missing, free):
                taken = self._take(length, room, on_node, usable, last=not heavier)
                if taken is not None:
                    break
            else:
                return None
            poured.append((document, *taken))
            ranks, parts = map(np.array, taken)
            flat_free[ranks] -= parts
            flat_missing[ranks] -= weight * (parts + self.start)
            if len(ranks) > 1:
                nodes = ranks // self.shape[1]
                near = np.bincount(nodes, parts, self.shape[0])[nodes]
                flat_spare[ranks] -= self.keys.near_s(near - parts) + self.keys.far_s(length - near)
                least_spare = spare.min()
        return poured

    def _rooms(self, weight, heavier, missing, free):
        """What every rank, and every node, may take of a document, tighter first: (tokens, tokens or None)."""
        room = np.minimum(missing / weight - self.start, free)
        left = None
        if self.shape[0] > 1 and self.node_cap < self.shape[1] * self.cap:
            left = self.node_cap - (self.shape[1] * self.cap - free.sum(1))
        if heavier > 1.01 * weight:

            def saving(missing, free):  # of which heavier ones can still bring it to the level
                return (heavier * free - missing) / (heavier - weight)

            saved = np.minimum(room, saving(missing, free))
            yield saved, None if left is None else np.minimum(left, saving(missing.cumsum(1)[:, -1], left))
            for ease in EASES:
                yield saved + ease * (room - saved), left
        if left is not None:
            yield room, left
        yield room, None

    def _take(self, length, room, on_node, usable, last):
        """(ranks, tokens) that hold `length` tokens in this room, most room first; None if there is too little. usable:
        ranks with time for its keys, on one node and then on several, or None where all have. last: no document comes
        after this one."""
        room = np.maximum(room, 0).astype(np.int64)
        for has_time in usable:
            rooms = room if has_time is None else room * has_time
            by_node = rooms.sum(1)
            if on_node is not None:
                by_node = np.minimum(by_node, np.maximum(on_node, 0)).astype(np.int64)
            nodes = [int(by_node.argmax())]
            if by_node[nodes[0]] >= length:
                break
        else:
            if by_node.sum() < length:
                return None
            nodes = np.argsort(-by_node, kind="stable").tolist()
        for smallest in (min(self.min_shard, length), 1):
            if last:
                ranks, parts = self._spread(length, rooms, by_node, nodes, smallest)
            else:
                ranks, parts = self._offers(length, rooms, by_node, nodes, smallest)
            unused = sum(parts) - length
            if unused >= 0:
                return ranks, self._cut(parts, unused)
        return None

    def _offers(self, length, rooms, by_node, nodes, smallest):
        """Ranks and what each may take, until it is enough."""
        ranks, offered, missing = [], [], length
        for node in nodes:
            of_rank, left = rooms[node].tolist(), int(by_node[node])
            for rank in sorted(range(len(of_rank)), key=of_rank.__getitem__, reverse=True):
                offer = min(of_rank[rank], left)
                if offer < smallest:
                    break
                ranks.append(node * len(of_rank) + rank)
                offered.append(offer)
                left -= offer
                missing -= offer
                if missing <= 0:
                    return ranks, offered
        return ranks, offered

    def _spread(self, length, rooms, by_node, nodes, smallest):
        """The last document, over all ranks that may have some: none comes after it for those that it leaves out."""
        size, ranks, parts = self.shape[1], [], []
        for node in nodes:
            found = self._even(
                range(node * size, (node + 1) * size), rooms[node].tolist(), int(by_node[node]), smallest
            )
            ranks, parts = ranks + found[0], parts + found[1]
        return self._even(ranks, parts, length, smallest)

    def _even(self, ranks, parts, most, smallest):
        """Of what ranks may take, `most` tokens: as much less for each, and for as many as still get `smallest`."""
        offers = sorted((-part, rank) for rank, part in zip(ranks, parts) if part >= smallest)
        ranks, parts = [rank for _, rank in offers], [-part for part, _ in offers]
        unused = max(sum(parts) - most, 0)
        while parts and parts[-1] - -(-unused // len(parts)) < smallest and parts[-1] <= unused:
            unused -= parts.pop()
        if parts and parts[-1] - -(-unused // len(parts)) >= smallest:
            less, rest = divmod(unused, len(parts))
            parts = [part - less - (place < rest) for place, part in enumerate(parts)]
        return ranks[: len(parts)], parts

    def _cut(self, parts, unused):
        lacking = min(self.min_shard, parts[-1])
        parts[-1] -= unused
        lacking -= parts[-1]
        if len(parts) > 1 and 0 < lacking <= parts[-2] - self.min_shard:  # a remainder is not left a crumb
            parts[-2] -= lacking
            parts[-1] += lacking
        return parts
