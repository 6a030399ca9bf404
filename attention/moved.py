"""Softmax attention elsewhere than where the tokens are: in the layout of a plan, or on other ranks head by head.

Queries, keys and values move there by one exchange, outputs and gradients back.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd

import torch

from longspan.attention.arguments import pick
from longspan.attention.double_ring import double_ring_schedule, ring_of
from longspan.attention.recompute import keep, keeping, recall
from longspan.attention.schedules import STRATEGIES as KEYS_TRAVEL
from longspan.attention.schedules import Schedule, softmax_schedule
from longspan.parallel.context import MEMO
from longspan.parallel.costs import Costs
from longspan.parallel.exchange import to_device
from longspan.parallel.geometry import Mask, attention_pairs
from longspan.parallel.layout import Layout
from longspan.parallel.planner import STRATEGIES as PLANNERS
from longspan.parallel.planner import AttentionPlan, plan_attention
from longspan.parallel.routes import Route, RouteTable, head_routes, route_table
from longspan.parallel.topology import Topology

HEAD_PARALLEL = ("ulysses", "usp")
STRATEGIES = (*KEYS_TRAVEL, "double_ring", *HEAD_PARALLEL, *PLANNERS)


@dataclass(frozen=True)
class Moved:
    """schedule: of the layout that tokens move to. there, back: to it and home again, None where it is the same; they
    move rows of a token's heads, of which `groups` equal groups go separate ways."""

    schedule: Schedule
    there: RouteTable | None = None
    back: RouteTable | None = None
    groups: int = 1

    def map(self, move) -> "Moved":
        """The same with every tensor passed through `move`."""
        there, back = (way and way.map(move) for way in (self.there, self.back))
        return replace(self, schedule=self.schedule.map(move), there=there, back=back)

    def move(self, q, k, v, group):
        """q, k and v where the schedule works on them. Key heads are repeated where there are too few to share out."""
        if self.there is None:
            return q, k, v
        repeats = self.groups // gcd(k.shape[1], self.groups)
        if repeats > 1:
            k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
        rows = [x.unflatten(1, (self.groups, -1)).flatten(0, 1) for x in (q, k, v)]
        heads = [x.shape[1] for x in rows]
        return self._along(self.there, torch.cat(rows, 1), group).split(heads, 1)

    def move_back(self, out, group):
        if self.back is None:
            return out
        return self._along(self.back, out, group).unflatten(0, (-1, self.groups)).flatten(1, 2)

    def _along(self, table, x, group):
        route = Route(table, group)
        return _MoveOnce.apply(x, route) if self.groups == 1 else route(x)


class _MoveOnce(torch.autograd.Function):
    """A route whose recomputation takes the rows of other ranks from the forward pass. Plans leave most where it is."""

    @staticmethod
    def forward(ctx, x, route):
        ctx.route = route
        foreign = recall()
        if foreign is not None:
            return route.place(route.with_own(x, foreign))
        received = route.receive(x)
        if keeping():
            keep(route.foreign(received))
        return route.place(received)

    @staticmethod
    def backward(ctx, grad):
        return ctx.route.transpose(grad), None


def moved_for(seq, plan, mask: Mask, heads: int, kv_heads: int) -> Moved:
    """The schedule of a context's rank, by its strategy or the plan that is given, and where tokens go for it."""
    parallel = seq.parallel
    topology = parallel.topology
    strategy = pick(STRATEGIES, parallel.softmax, ring_of(topology), "softmax strategy")
    if plan is not None:
        return _of_plan(seq.layout, seq.rank, plan, mask, parallel.device)
    if strategy in PLANNERS:
        return seq.derive(planned_schedule, mask, strategy, topology, parallel.costs, parallel.token_cap)
    if strategy in HEAD_PARALLEL:
        return seq.derive(head_parallel_schedule, mask, ranks_that_share_heads(strategy, topology, heads))
    if strategy == "double_ring":
        return Moved(seq.derive(double_ring_schedule, mask, topology, parallel.costs))
    return Moved(seq.derive(softmax_schedule, strategy, mask, heads // kv_heads))


@lru_cache(MEMO)
def _of_plan(layout, rank, plan, mask, device) -> Moved:
    """The schedule of a plan that was given, kept as a context keeps what it derived: every layer gives it again."""
    return schedule_of(layout, rank, plan, mask).map(lambda x: to_device(x, device))


def planned_schedule(layout: Layout, rank: int, mask: Mask, strategy, topology, costs, token_cap) -> Moved:
    """The same on every rank, as the plan is a pure function of the lengths and of what is given here."""
    return schedule_of(layout, rank, plan_attention(layout.lengths, topology, costs, token_cap, strategy, mask), mask)


def schedule_of(layout: Layout, rank: int, plan: AttentionPlan, mask: Mask) -> Moved:
    """Raises ValueError for a plan of other documents or of another number of ranks."""
    sizes = {plan.layout.world_size, plan.topology.world_size, layout.world_size}
    if plan.layout.lengths != layout.lengths or len(sizes) > 1:
        raise ValueError(
            f"plan is for {len(plan.layout.lengths)} documents of {plan.layout.num_tokens} tokens on "
            f"{plan.layout.world_size} ranks, the layout has {len(layout.lengths)} of {layout.num_tokens} on "
            f"{layout.world_size}"
        )
    schedule = ring_schedule(plan.layout, rank, mask, plan.topology, plan.costs)
    if plan.layout == layout:
        return Moved(schedule)
    there = route_table(layout, rank, map(plan.layout.global_indices, range(layout.world_size)))
    back = route_table(plan.layout, rank, map(layout.global_indices, range(layout.world_size)))
    return Moved(schedule, there, back)


def ring_schedule(layout: Layout, rank: int, mask: Mask, topology: Topology, costs: Costs) -> Schedule:
    """A ring over all ranks, on several nodes one that crosses between them once."""
    if topology.nodes == 1:
        return softmax_schedule(layout, rank, "ring", mask)
    return double_ring_schedule(layout, rank, mask, topology, costs)


def head_parallel_schedule(layout: Layout, rank: int, mask: Mask, groups: int) -> Moved:
    """`groups` ranks in a row exchange heads for tokens: each gets its group of heads of all their tokens. Ranks with
    the same heads then share keys as in a ring. groups = world_size is Ulysses (arXiv 2309.14509), less is USP (arXiv
    2405.07719)."""
    if groups == 1:
        return Moved(softmax_schedule(layout, rank, "ring", mask))
    place, number = rank // groups, rank % groups
    firsts = range(0, layout.world_size, groups)
    spans = (sorted(sum(layout.spans[first : first + groups], ())) for first in firsts)
    schedule = softmax_schedule(Layout(layout.lengths, tuple(map(tuple, spans))), place, "ring", mask)
    schedule = schedule.with_peers(lambda peer: peer * groups + number)
    return Moved(schedule, *head_routes(layout, rank, groups), groups)


def pairs_per_rank(seq, heads: int, mask: Mask = Mask()) -> tuple[float, ...]:
    """Query-key pairs, times the share of the heads, that each rank works on in a layer with this mask."""
    pairs, groups = attention_pairs(seq.attention_layout(mask), mask), head_parallel_ranks(seq.parallel, heads)
    return tuple(sum(pairs[rank // groups * groups :][:groups]) / groups for rank in range(len(pairs)))


def head_parallel_ranks(parallel, heads: int) -> int:
    """Of a SequenceParallel, those that exchange heads for tokens; 1 where its strategy is another."""
    shared = parallel.softmax in HEAD_PARALLEL
    return ranks_that_share_heads(parallel.softmax, parallel.topology, heads) if shared else 1


def ranks_that_share_heads(strategy: str, topology: Topology, heads: int) -> int:
    """Ranks that exchange heads for tokens, with usp ranks of one node. ValueError for ulysses where not all ranks can
    share the heads."""
    world_size = topology.world_size
    if strategy == "ulysses" and heads % world_size:
        raise ValueError(f"strategy 'ulysses' shares {heads} query heads among {world_size} ranks; use 'usp' or 'ring'")
    most = world_size if strategy == "ulysses" else topology.ranks_per_node
    return max(n for n in range(1, most + 1) if most % n == 0 and heads % n == 0)
