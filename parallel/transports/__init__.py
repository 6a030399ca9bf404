"""How states travel between the ranks that share documents: one exclusive scan, four transports, and the choice.

A transport is a generator function `run(plan, direction, state, transition, group, *, fold, summarize, step,
peers)`: it posts what needs nothing from other ranks, yields once, and returns (entries, transitions); see
parallel.scan.start_scan.
"""

from collections.abc import Callable
from dataclasses import dataclass

from longspan.parallel.transports.chain import all_scan, lasp
from longspan.parallel.transports.gather import hierarchical, lasp2


@dataclass(frozen=True)
class Transport:
    """causal_only: states are passed on in document order, so it cannot give every span its whole document's state."""

    run: Callable
    causal_only: bool


TRANSPORTS = {
    "lasp2": Transport(lasp2, causal_only=False),
    "lasp": Transport(lasp, causal_only=True),
    "all_scan": Transport(all_scan, causal_only=True),
    "hierarchical": Transport(hierarchical, causal_only=False),
}

MIB = 2**20
SMALL = 8 * MIB
LARGE = 512 * MIB


def choose_transport(payload_bytes, topology, causal: bool = True) -> str:
    """The transport for `payload_bytes` of states per rank; equal on all ranks because its arguments are.

    | what is gathered                    | transport     | why
    | one node, or at most SMALL in all   | lasp2         | one collective; 1 MiB from each of 4 H200 takes 48 us
    | several nodes                       | hierarchical  | each node's totals cross the network once
    | more than LARGE on every rank       | all_scan      | holds one state, whatever the number of ranks

    Gathering costs about 3 us per MiB received inside a node of H200 (16 MiB from each of 4: 0.19 ms) and 20 us across
    nodes (ZeCO, arXiv 2507.01004: 128 MiB over 64 GPUs in 2.5 ms); two more rounds of messages cost about 0.1 ms, and
    a chain about 20 us per rank.
    """
    gathered = payload_bytes * topology.world_size
    name = "lasp2"
    if topology.nodes > 1 and gathered > SMALL:
        name, gathered = "hierarchical", payload_bytes * (topology.ranks_per_node + topology.nodes)
    return "all_scan" if causal and gathered > LARGE else name
