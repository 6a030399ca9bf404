"""Hybrid context parallelism as in Megatron-LM: every document over a power of two of ranks, here for comparison.

A document gets the smallest group that leaves no rank more of it than `room` tokens, and of the groups of that size
(ranks in a row that start at a multiple of it) the one whose ranks have least work so far, counted as the square of its
length over the group. Megatron runs such groups one after the other where they do not fit side by side; here they add
up.
"""

import numpy as np

from longspan.parallel.shares import Share, even_share
from longspan.parallel.topology import Topology


def power_of_two_groups(lengths, topology: Topology, room: int) -> list[Share]:
    work, shares = np.zeros(topology.world_size), []
    for document in sorted(range(len(lengths)), key=lambda d: (-lengths[d], d)):
        size = 1
        while size * room < lengths[document]:
            size *= 2
        size = min(size, topology.world_size)
        groups = work[: topology.world_size // size * size].reshape(-1, size)
        first = int(groups.max(1).argmin()) * size
        ranks = range(first, first + size)
        work[first : first + size] += lengths[document] ** 2 / size
        shares.append(even_share(document, lengths[document], ranks))
    return shares
