"""Plans where the tokens of softmax attention go on a batch of mixed lengths: a pure function of lengths and machine.

Short documents stay whole on a rank, longer ones spread over ranks of a node or of several nodes, so that the slowest
rank's attention, the transfer that it cannot hide, and moving tokens there from the base layout and back take least.
Every rank computes the same plan by itself; `digest` tells whether it did.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil

import numpy as np

from longspan.parallel.costs import Costs, Predicted, predict, remap_seconds
from longspan.parallel.geometry import Mask
from longspan.parallel.hybrid import power_of_two_groups
from longspan.parallel.layout import Layout, Span, check_lengths, head_tail
from longspan.parallel.topology import Topology
from longspan.parallel.water_fill import water_fill
from longspan.parallel.zeppelin_even import even_rings

ZONES = ("inter", "intra", "local")
MEMO = 8  # latest plans
CAPS = (1.0, 0.0)  # caps to try between the mean (0) and `token_cap` (1); with the first most work is balanced
SLOW_LINKS = 1.25  # a plan's time over its slowest rank's attention from which on other schemes are tried
FEW_RANKS = 16
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
    less than one whole token). strategy: `zeppelin`, uneven shards for equal time, or over slow links one of the other
    two where less time is predicted for it; `zeppelin_even`, the published scheme of even shards; `hybrid`, groups of
    powers of two. Raises ValueError for lengths below 1, a cap below 1 and unknown strategies. The latest plans are
    kept.
    """
    lengths, costs = check_lengths(lengths), Costs() if costs is None else costs
    if not 1 <= token_cap < float("inf"):
        raise ValueError(f"token_cap={token_cap} must be a finite number of at least 1, the mean of all ranks")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is unknown; use one of {', '.join(STRATEGIES)}")
    return _plan(lengths, topology, costs, token_cap, strategy, mask)


@lru_cache(MEMO)
def _plan(lengths, topology, costs, token_cap, strategy, mask):
    most = token_cap * sum(lengths) / topology.world_size

    def plan(shares):
        layout = _layout(lengths, topology, shares)
        return AttentionPlan(layout, topology, costs, predict(layout, topology, costs, mask))

    found = plan(STRATEGIES[strategy](lengths, topology, most, costs, mask))
    if strategy != "zeppelin" or not costs.token_s:
        return found
    if found.predicted.slowest_s > SLOW_LINKS * max(found.predicted.attention_s):
        # They cut fewer documents, at the price of balance. Groups of powers of two take long to plan on many ranks.
        for other in ("zeppelin_even", "hybrid") if topology.world_size <= FEW_RANKS else ("zeppelin_even",):
            rival = plan(STRATEGIES[other](lengths, topology, most, costs, mask))
            if max(rival.layout.tokens_per_rank) <= max(most, max(found.layout.tokens_per_rank)):
                found = min(found, rival, key=lambda plan: plan.predicted.slowest_s)
    return found


def _water_fill(lengths, topology, most, costs, mask):
    """With more tokens on a rank attention is balanced better, with fewer less is remapped: the faster of some caps."""
    weights = [costs.pair_s * mask.pairs(Span(0, 0, length), length) / length for length in lengths]
    keys = costs.keys(mask, topology)
    mean, best, seconds = sum(lengths) / topology.world_size, None, None
    for share in CAPS if costs.token_s else CAPS[:1]:
        cap = min(sum(lengths), max(ceil(mean), int(mean + share * (most - mean))))
        found = water_fill(lengths, weights, costs.start_tokens, keys, topology, cap, costs.min_shard, seconds)
        if found is None:
            continue
        level, shares = found
        total = level
        if costs.token_s:
            total += remap_seconds(_tokens(shares, topology), topology, costs).max()
        if seconds is None or total < seconds:
            best, seconds = shares, total
    return best


def _even_rings(lengths, topology, most, costs, mask):
    return even_rings(lengths, topology, ceil(EVEN_ROOM * sum(lengths) / topology.world_size))


def _hybrid(lengths, topology, most, costs, mask):
    return power_of_two_groups(lengths, topology, ceil(EVEN_ROOM * sum(lengths) / topology.world_size))


STRATEGIES = {"zeppelin": _water_fill, "zeppelin_even": _even_rings, "hybrid": _hybrid}


def _tokens(shares, topology):
    tokens = np.zeros(topology.world_size, np.int64)
    for share in shares:
        tokens[list(share.ranks)] += share.tokens
    return tokens


def _layout(lengths, topology, shares) -> Layout:
    """Every rank's spans, longest documents first: what `rebalance` moves away is taken from the end."""
    spans = [[] for _ in range(topology.world_size)]
    for share in sorted(shares, key=lambda share: (-lengths[share.document], share.document)):
        for rank, pair in zip(share.ranks, head_tail(share.document, share.tokens)):
            spans[rank] += pair
    return Layout(lengths, tuple(map(tuple, spans)))
