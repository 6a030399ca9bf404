"""Who holds which tokens and how they move: layouts, routes, exchanges, the state scan and the sequence context."""

from longspan.parallel.balanced import balanced
from longspan.parallel.context import SequenceContext, SequenceParallel
from longspan.parallel.costs import Costs
from longspan.parallel.geometry import Mask, attention_pairs
from longspan.parallel.layout import Layout, Span, contiguous, zigzag
from longspan.parallel.planner import AttentionPlan, plan_attention
from longspan.parallel.rebalance import rebalance
from longspan.parallel.routes import Remap, Route, RouteTable, route_table
from longspan.parallel.topology import Topology

__all__ = [
    "AttentionPlan", "Costs", "Layout", "Mask", "Remap", "Route", "RouteTable", "SequenceContext",
    "SequenceParallel", "Span", "Topology", "attention_pairs", "balanced", "contiguous", "plan_attention",
    "rebalance", "route_table", "zigzag",
]  # fmt: skip
