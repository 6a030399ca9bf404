"""Which way keys of other ranks come sooner, forward and backward, by request or in a ring: predicted by arithmetic.

By request a rank gets less, in turns, the attention to one beside the transfer of the next, and gradients of keys go
back beside those of queries. In a ring the keys of the next rank travel beside the attention to those of the last, and
every part reads and writes what has been added so far.
"""

from dataclasses import dataclass

import numpy as np

from longspan.attention.requests import turns_of
from longspan.parallel.costs import LINK_RATE, REMOTE_RATE
from longspan.parallel.topology import Topology

# An H200. Operations of the kernels a second (benchmarks/results/sparse_kernels_H200.json), forward, and how many
# times as long the backward takes. Bytes a second of memory. Seconds until a transfer's first byte.
WORK, BACKWARD = 500e12, 2.9
QUERIES = 0.45  # the share of gradients of queries in the backward
MEMORY = 3.5e12
START = 1e-5
WIDE = 4  # bytes of a sum


@dataclass(frozen=True)
class Estimate:
    """Of one call: query and key heads, bytes of a number, and which ranks share a node."""

    heads: int
    key_heads: int
    head_dim: int
    itemsize: int
    topology: Topology

    def ring_is_faster(self, tokens, entries, held, lists: int, pairs: int) -> bool:
        """tokens, entries: int [who, whom], rows of others' keys that lists name, each of the heads of one of `lists`,
        and the blocks that are listed, of `pairs` of a query and a key each; held: tokens of every rank."""
        work = entries * (pairs * self.heads / lists * 4 * self.head_dim / WORK)
        return bool(max(self._ring(tokens > 0, work, held)) < max(self._fetch(tokens, work, held, lists)))

    def _fetch(self, tokens, work, held, lists):
        """Seconds of every rank."""
        row = 2 * self.key_heads // lists * self.head_dim * self.itemsize
        seconds = self._links(tokens * row)
        away = np.maximum(seconds.sum(0), seconds.sum(1)) + START
        copies = 2 * row * (tokens.sum(0) + 2 * tokens.sum(1)) / MEMORY  # what is packed, and added to what is here
        work, turns = work.sum(1), turns_of(lists)
        forward = np.maximum(away / turns + work, away + work / turns)
        backward = BACKWARD * work + np.maximum(0, away - QUERIES * BACKWARD * work)
        return forward + backward + copies + 2 * self._queries(held) * self.itemsize / MEMORY

    def _ring(self, wanted, work, held):
        """Seconds of every rank."""
        ranks, who = len(held), np.arange(len(held))
        keys = 2 * np.array(held) * self.key_heads * self.head_dim
        seconds = self._links(wanted * keys * self.itemsize) + START * wanted
        total = np.zeros(ranks)
        for step in range(1, ranks):  # the transfer of a step runs beside the attention of the one before
            beside, away = work[who, (who - step + 1) % ranks], seconds[who, (who - step) % ranks]
            total += np.maximum(beside, away) + np.maximum(BACKWARD * beside, away)
        passes = 4 * self._queries(held) * WIDE + keys * (2 * WIDE + self.itemsize)
        return total + (1 + BACKWARD) * work[who, (who + 1) % ranks] + (ranks - 1) * passes / MEMORY

    def _queries(self, held):
        return np.array(held) * self.heads * self.head_dim

    def _links(self, moved):
        """Seconds of each transfer alone."""
        node = np.arange(len(moved)) // self.topology.ranks_per_node
        return moved / np.where(node[:, None] == node, LINK_RATE, REMOTE_RATE)
