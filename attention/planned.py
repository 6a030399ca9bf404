"""Softmax attention in the layout of a plan: queries, keys and values move there, outputs and gradients back."""

from dataclasses import dataclass

import torch

from longspan.attention.schedules import Schedule, softmax_schedule
from longspan.parallel.geometry import Mask
from longspan.parallel.layout import Layout
from longspan.parallel.planner import AttentionPlan, plan_attention
from longspan.parallel.routes import Route, RouteTable, route_table

STRATEGY = "ring"  # inside a plan's layout


@dataclass(frozen=True)
class Planned:
    """schedule: of the plan's layout. there, back: to that layout and home again; None where it is the same."""

    schedule: Schedule
    there: RouteTable | None
    back: RouteTable | None

    def map(self, move) -> "Planned":
        """The same with every tensor passed through `move`."""
        ways = (way and way.map(move) for way in (self.there, self.back))
        return Planned(self.schedule.map(move), *ways)

    def move(self, q, k, v, group):
        """q, k and v in the plan's layout, by one exchange."""
        if self.there is None:
            return q, k, v
        heads = [x.shape[1] for x in (q, k, v)]
        return Route(self.there, group)(torch.cat([q, k, v], 1)).split(heads, 1)

    def move_back(self, out, group):
        return out if self.back is None else Route(self.back, group)(out)


def planned_schedule(layout: Layout, rank: int, mask: Mask, strategy, topology, costs, token_cap) -> Planned:
    """The same on every rank, as the plan is a pure function of the lengths and of what is given here."""
    return schedule_of(layout, rank, plan_attention(layout.lengths, topology, costs, token_cap, strategy), mask)


def schedule_of(layout: Layout, rank: int, plan: AttentionPlan, mask: Mask) -> Planned:
    """Raises ValueError for a plan of other documents or of another number of ranks."""
    if plan.layout.lengths != layout.lengths or plan.layout.world_size != layout.world_size:
        raise ValueError(
            f"plan is for {len(plan.layout.lengths)} documents of {plan.layout.num_tokens} tokens on "
            f"{plan.layout.world_size} ranks, the layout has {len(layout.lengths)} of {layout.num_tokens} on "
            f"{layout.world_size}"
        )
    schedule = softmax_schedule(plan.layout, rank, STRATEGY, mask)
    if plan.layout == layout:
        return Planned(schedule, None, None)
    there = route_table(layout, rank, map(plan.layout.global_indices, range(layout.world_size)))
    back = route_table(plan.layout, rank, map(layout.global_indices, range(layout.world_size)))
    return Planned(schedule, there, back)
