"""Plans where the tokens of softmax attention go on a batch of mixed lengths: a pure function of lengths and machine.

Short documents stay whole on a rank, longer ones spread over ranks of a node or of several nodes, so that the slowest
rank's attention, the transfer that it cannot hide, and moving tokens there from the base layout and back take least.
Every rank computes the same plan by itself; `digest` tells whether it did.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil, inf

import numpy as np

from longspan.parallel.balanced import balanced
from longspan.parallel.costs import Costs, Predicted, predict
from longspan.parallel.geometry import Mask
from longspan.parallel.hybrid import power_of_two_groups
from longspan.parallel.layout import Layout, check_lengths
from longspan.parallel.shares import spans_of
from longspan.parallel.topology import Topology
from longspan.parallel.water_fill import water_fill
from longspan.parallel.zeppelin_even import even_rings

ZONES = ("inter", "intra", "local")
MEMO = 8  # latest plans
CAPS = (0.5, 0.25, 0.0)  # caps to try besides `token_cap` (1): shares of the way there from the mean (0)
NODE_ROOM = 1.03  # tokens of a node, in units of the mean: what is more must cross to other nodes and back
UNBALANCED = 1.12  # from here on it is tried again, closer, and with more room
TRIES = ((NODE_ROOM, 0.02), (1.15, 0.005), (NODE_ROOM, 0.005))  # rooms of a node, precision
FEW_RANKS = 16
SLOW_LINKS = 1.5  # a plan's time over its slowest rank's attention from which on another is tried on many ranks, too
BASE_UNBALANCED = 1.1  # up to here the default layout is one to choose: it balances pairs, not what pieces cost besides
BALANCE = 1.5  # what is x out of balance must take 1.5 x less: transfers are the less certain part of a prediction
EVEN_ROOM = 1.03  # tokens per rank of the others, in units of the mean: the published scheme has batches 97 % full


@dataclass(frozen=True)
class AttentionPlan:
    """layout: where every token of the batch is during softmax attention. costs: what it was planned with, and its keys
    are routed with. predicted: what that costs."""

    layout: Layout
    topology: Topology
    costs: Costs
    predicted: Predicted

    @cached_property
    def queues(self) -> tuple[dict[str, tuple[int, ...]], ...]:
        """For every rank the documents it holds parts of, by zone in the order of execution: `inter` lie on several
        nodes, `intra` on several ranks of one, `local` on one rank."""
        held = [sorted({span.document for span in spans}) for spans in self.layout.spans]
        ranks, nodes = {}, {}
        for rank, documents in enumerate(held):
            for document in documents:
                ranks.setdefault(document, set()).add(rank)
                nodes.setdefault(document, set()).add(self.topology.node(rank))
        zone = {d: "inter" if len(nodes[d]) > 1 else "intra" if len(ranks[d]) > 1 else "local" for d in ranks}
        return tuple(
            {name: tuple(d for d in documents if zone[d] == name) for name in ZONES} for documents in held
        )  # fmt: skip

    @cached_property
    def digest(self) -> str:
        """Equal on all ranks that made the same plan."""
        made = self.layout.lengths, self.layout.spans, self.topology, self.costs
        return hashlib.sha256(repr(made).encode()).hexdigest()


def plan_attention(
    lengths, topology: Topology, costs: Costs | None = None, token_cap: float = 1.5, strategy: str = "zeppelin",
    mask: Mask = Mask(),
) -> AttentionPlan:  # fmt: skip
    """The placement of a batch for softmax attention.

    costs: None for `Costs()`, an H200. token_cap: tokens on a rank at most, in units of the mean (more where that is
    less than one whole token). strategy: `zeppelin`, uneven shards for equal time, or where less time is predicted for
    them (on few ranks, or over slow links) one of the other two or `balanced`, which remaps nothing; `zeppelin_even`,
    the published scheme of even shards; `hybrid`, groups of powers of two. Raises ValueError for lengths below 1, a cap
    below 1 and unknown strategies. The latest plans are kept.
    """
    lengths, costs = check_lengths(lengths), Costs() if costs is None else costs
    if not 1 <= token_cap < float("inf"):
        raise ValueError(f"token_cap={token_cap} must be a finite number of at least 1, the mean of all ranks")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is unknown; use one of {', '.join(STRATEGIES)}")
    return _plan(lengths, topology, costs, token_cap, strategy, mask)


@lru_cache(MEMO)
def _plan(lengths, topology, costs, token_cap, strategy, mask):
    mean = sum(lengths) / topology.world_size
    return STRATEGIES[strategy](_Batch(lengths, topology, costs, mask, mean, token_cap * mean))


@dataclass(frozen=True)
class _Batch:
    """mean, most: tokens of a rank."""

    lengths: tuple[int, ...]
    topology: Topology
    costs: Costs
    mask: Mask
    mean: float
    most: float

    def plan(self, shares) -> AttentionPlan:
        """`rebalance` takes from the end of a rank's spans: of the shortest documents."""
        spans = spans_of(self.lengths, self.topology.world_size, shares)
        return self.planned(Layout(self.lengths, tuple(map(tuple, spans))))

    def planned(self, layout) -> AttentionPlan:
        return AttentionPlan(layout, self.topology, self.costs, predict(layout, self.topology, self.costs, self.mask))


def _zeppelin(batch):
    """Filled up to the cap. On few ranks also with lower caps and by the other strategies, which move fewer tokens or
    none, at the price of balance; on many, where that takes long, by even rings if links are slow and they may win."""
    few = batch.topology.world_size <= FEW_RANKS
    fill, found = _Fill(batch), None
    for attempt in TRIES:
        plan = batch.plan(fill(1.0, *attempt))
        found = min(found, plan, key=score) if found else plan
        if found.predicted.imbalance < UNBALANCED:
            break
    slow = found.predicted.slowest_s > SLOW_LINKS * max(found.predicted.attention_s)
    if not batch.costs.token_s or not (slow or few):
        return found
    if few:
        for share in CAPS if slow else CAPS[:-1]:
            shares = fill(share, limit=found.predicted.slowest_s)
            if shares is not None:
                found = min(found, batch.plan(shares), key=score)
    elif _even_rings_take(batch) > found.predicted.slowest_s:
        return found
    rivals = [other(batch) for other in ((_even_rings, _hybrid) if few else (_even_rings,))]
    if few and (base := _balanced(batch)).predicted.imbalance <= BASE_UNBALANCED:
        rivals.append(base)
    for rival in rivals:
        if max(rival.layout.tokens_per_rank) <= max(batch.most, max(found.layout.tokens_per_rank)):
            found = min(found, rival, key=score)
    return found


def _even_rings_take(batch) -> float:
    """Seconds of one rank, about: what fits on a node is seldom cut over several."""
    size, ranks = batch.topology.ranks_per_node, batch.topology.world_size
    lengths = np.array(batch.lengths)
    parts = np.where(lengths <= EVEN_ROOM * batch.mean * size, size, ranks)
    return (batch.costs.weights(batch.mask, lengths) * (lengths / parts + batch.costs.start_tokens)).max()


def score(plan: AttentionPlan) -> float:
    """Of two plans the one with less is chosen."""
    return plan.predicted.slowest_s * plan.predicted.imbalance**BALANCE


class _Fill:
    """Shares for a cap."""

    def __init__(self, batch):
        self.batch, self.weights = batch, batch.costs.weights(batch.mask, batch.lengths).tolist()
        self.keys = batch.costs.keys(batch.mask, batch.topology)

    def __call__(self, share, node_room=NODE_ROOM, precision=0.02, limit=None):
        """With a cap so far from the mean (0) to the most that is allowed (1); None above `limit` seconds."""
        batch, costs, topology = self.batch, self.batch.costs, self.batch.topology
        cap = min(sum(batch.lengths), max(ceil(batch.mean), int(batch.mean + share * (batch.most - batch.mean))))
        node_cap = node_room * batch.mean * topology.ranks_per_node if costs.remote_token_s else inf
        machine = costs.start_tokens, self.keys, topology
        return water_fill(
            batch.lengths, self.weights, *machine, cap, node_cap, costs.min_shard, precision, limit
        )  # fmt: skip


def _balanced(batch):
    """The default base layout, which has equal tokens on all ranks."""
    return batch.planned(balanced(batch.lengths, batch.topology.world_size))


def _even_rings(batch):
    return batch.plan(even_rings(batch.lengths, batch.topology, ceil(EVEN_ROOM * batch.mean)))


def _hybrid(batch):
    return batch.plan(power_of_two_groups(batch.lengths, batch.topology, ceil(EVEN_ROOM * batch.mean)))


STRATEGIES = {"zeppelin": _zeppelin, "zeppelin_even": _even_rings, "hybrid": _hybrid}
