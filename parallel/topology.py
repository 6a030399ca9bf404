"""Machines as the planner sees them: nodes of equally many ranks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """`nodes` machines with `ranks_per_node` ranks each; rank r sits on node r // ranks_per_node."""

    nodes: int
    ranks_per_node: int

    def __post_init__(self):
        for name in ("nodes", "ranks_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"Topology.{name}={getattr(self, name)} must be at least 1")

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    def node(self, rank: int) -> int:
        return rank // self.ranks_per_node
