"""Hybrid context parallelism as in Megatron-LM: every document over a power of two of ranks, here for comparison.

A document gets the smallest group that leaves no rank more of it than `room` tokens, and of the groups of that size
(ranks in a row that start at a multiple of it) the one whose ranks have least work so far, counted as the square of its
length over the group. Megatron runs such groups one after the other where they do not fit side by side; here they add
up.
"""

from longspan.parallel.shares import Share, even_share
from longspan.parallel.topology import Topology


def power_of_two_groups(lengths, topology: Topology, room: int) -> list[Share]:
    work, shares = [0.0] * topology.world_size, []
    for document in sorted(range(len(lengths)), key=lambda d: (-lengths[d], d)):
        size = 1
        while size * room < lengths[document]:
            size *= 2
        starts = range(0, topology.world_size - size + 1, size)
        groups = [range(start, start + size) for start in starts] or [range(topology.world_size)]
        ranks = min(groups, key=lambda group: (max(work[rank] for rank in group), group.start))
        for rank in ranks:
            work[rank] += lengths[document] ** 2 / len(ranks)
        shares.append(even_share(document, lengths[document], ranks))
    return shares
