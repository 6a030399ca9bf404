"""The scan of linear-attention states over spans: who publishes, who passes what on, in which order.

Each span of tokens maps its entry state to an exit state, `S_out = A(S_in) + S_ext`. A rank publishes (S_ext, A) of
the spans whose document continues on another rank; what they weigh does not depend on the sequence length. The plan is
pure data; `start_scan` runs it with one of the transports in TRANSPORTS. Arithmetic (folding, composing, one step) is
passed in.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from longspan.parallel.layout import Layout
from longspan.parallel.topology import Topology
from longspan.parallel.transports import TRANSPORTS, choose_transport
from longspan.parallel.transports.background import Background

__all__ = ["TRANSPORTS", "Chains", "GatherPlan", "Link", "ScanPlan", "choose_transport", "scan_plan", "start_scan"]


@dataclass(frozen=True)
class Chains:
    """Folds along rows of a table of summaries, as kernels.fold takes them; each yields what its last row leaves.

    which: the local spans (of totals: the slots) that the chains belong to. sources, targets: int32 [N, L], rows read
    and rows written, -1 for none; initial: int32 [N], all -1; num_out: rows of the result.
    """

    which: tuple[int, ...]
    sources: torch.Tensor
    targets: torch.Tensor
    initial: torch.Tensor
    num_out: int

    @classmethod
    def of(cls, rows: dict[int, list[int]], num_out: int | None = None) -> "Chains":
        """Chains over the given rows; row n of the result is that of the n-th smallest key with any."""
        which = tuple(sorted(key for key, chain in rows.items() if chain))
        length = max((len(rows[key]) for key in which), default=0) + 1
        sources = torch.full((len(which), length), -1, dtype=torch.int32)
        targets = torch.full_like(sources, -1)
        for n, key in enumerate(which):
            sources[n, length - 1 - len(rows[key]) : length - 1] = torch.tensor(rows[key], dtype=torch.int32)
            targets[n, -1] = n
        initial = torch.full((len(which),), -1, dtype=torch.int32)
        return cls(which, sources, targets, initial, len(which) if num_out is None else num_out)

    def map(self, move) -> "Chains":
        return replace(self, sources=move(self.sources), targets=move(self.targets), initial=move(self.initial))


@dataclass(frozen=True)
class Link:
    """Two successive spans of a document: (rank, local span) of the earlier and of the later one, how many links come
    before this one and how many after it."""

    earlier: tuple[int, int]
    later: tuple[int, int]
    before: int
    after: int


@dataclass(frozen=True)
class GatherPlan:
    """Gathering summaries inside a node and totals over nodes; one node of all ranks has no totals.

    A total stands for a run, successive spans of a document on one node whose document also lives on other nodes.
    peers: the ranks of this node; counterparts: the ranks in the same place of every node. Rows of the table:

        len(peers) x num_slots            what the peers published
        len(counterparts) x num_totals    totals of every node
        linked                            this rank's own, if has_own_rows: some document's spans are all on this rank

    total_forward, total_backward: this node's totals from its peers' rows. forward, backward: from predecessors or
    successors; whole: from all spans of the document (attention that is not causal).
    """

    peers: tuple[int, ...]
    counterparts: tuple[int, ...]
    num_totals: int
    has_own_rows: bool
    total_forward: Chains
    total_backward: Chains
    forward: Chains
    backward: Chains
    whole: Chains

    def map(self, move) -> "GatherPlan":
        return replace(
            self, **{name: value.map(move) for name, value in vars(self).items() if isinstance(value, Chains)}
        )


@dataclass(frozen=True)
class ScanPlan:
    """One rank's part of the state scan.

    linked: local spans of documents that have several spans anywhere; only these are summarised, in this order.
    published: int64, which of them lie on documents of several ranks, filled up to `num_slots` on every rank.
    flat: gathering over all ranks at once; nodes: in two levels, by `topology`. links: successive spans in which this
    rank takes part, and num_hops, the most links of a document: for passing states on from span to span.
    """

    rank: int
    topology: Topology
    linked: tuple[int, ...]
    published: torch.Tensor
    num_slots: int
    flat: GatherPlan
    nodes: GatherPlan
    links: tuple[Link, ...]
    num_hops: int

    @property
    def forward(self) -> Chains:
        return self.flat.forward

    @property
    def backward(self) -> Chains:
        return self.flat.backward

    @property
    def whole(self) -> Chains:
        return self.flat.whole

    @property
    def connected(self) -> bool:
        """Whether a state enters or leaves any span here, or this rank takes part in a collective."""
        return bool(self.num_slots or self.links)

    def map(self, move) -> "ScanPlan":
        """The same plan with every tensor passed through `move`."""
        flat = self.flat.map(move)
        nodes = flat if self.nodes is self.flat else self.nodes.map(move)
        return replace(self, published=move(self.published), flat=flat, nodes=nodes)


def scan_plan(layout: Layout, rank: int, topology: Topology | None = None) -> ScanPlan:
    """The plan of `rank`: a pure function of the layout and of who shares a node (default: all)."""
    flat_topology = Topology(1, layout.world_size)
    topology = flat_topology if topology is None else topology
    assert topology.world_size == layout.world_size, (topology, layout.world_size)
    documents = defaultdict(list)  # places (rank, local span) of each document's spans, in document order
    for _, place in sorted((span, (r, n)) for r, spans in enumerate(layout.spans) for n, span in enumerate(spans)):
        documents[layout.spans[place[0]][place[1]].document].append(place)
    documents = {document: places for document, places in sorted(documents.items()) if len(places) > 1}
    split = {document: places for document, places in documents.items() if len({r for r, _ in places}) > 1}

    linked = {n: i for i, n in enumerate(n for n, s in enumerate(layout.spans[rank]) if s.document in documents)}
    published = [[n for n, span in enumerate(spans) if span.document in split] for spans in layout.spans]
    links = []
    for document, places in documents.items():
        last = len(places) - 2
        for hop, (earlier, later) in enumerate(zip(places, places[1:])):
            if rank in (earlier[0], later[0]):
                links.append((hop, document, Link(earlier, later, hop, last - hop)))
    gathered = {document: places for document, places in documents.items() if document in split or places[0][0] == rank}
    flat = _gather_plan(gathered, published, linked, rank, flat_topology)
    return ScanPlan(
        rank=rank,
        topology=topology,
        linked=tuple(linked),
        published=torch.tensor([linked[n] for n in published[rank]], dtype=torch.int64),
        num_slots=max(map(len, published)),
        flat=flat,
        nodes=flat if topology == flat_topology else _gather_plan(gathered, published, linked, rank, topology),
        links=tuple(link for _, _, link in sorted(links, key=lambda x: x[:2])),
        num_hops=max((len(places) - 1 for places in documents.values()), default=0),
    )


def _gather_plan(documents, published, linked, rank: int, topology: Topology) -> GatherPlan:
    """documents: places of the spans of each document that is on several ranks or on this one alone."""
    node, per_node, num_slots = topology.node(rank), topology.ranks_per_node, max(map(len, published))
    runs = {  # the runs (node, places) of each document
        document: [(n, list(run)) for n, run in groupby(places, lambda place: topology.node(place[0]))]
        for document, places in documents.items()
    }
    totals, num_used = {}, [0] * topology.nodes  # (document, run) -> place among its node's totals
    for document, document_runs in runs.items():
        for n, (run_node, _) in enumerate(document_runs if len(document_runs) > 1 else ()):
            totals[document, n] = num_used[run_node]
            num_used[run_node] += 1
    num_totals = max(num_used)

    first_total = per_node * num_slots
    first_own = first_total + topology.nodes * num_totals
    summary_row = {(rank, n): first_own + i for n, i in linked.items()}
    for place, peer in enumerate(range(node * per_node, (node + 1) * per_node)):
        summary_row |= {(peer, n): place * num_slots + slot for slot, n in enumerate(published[peer])}

    forward, backward, whole, total_forward, total_backward = {}, {}, {}, {}, {}
    for document, document_runs in runs.items():
        total_row = [
            first_total + run_node * num_totals + totals[document, n] if (document, n) in totals else None
            for n, (run_node, _) in enumerate(document_runs)
        ]
        for n, (run_node, places) in enumerate(document_runs):
            if run_node != node:
                continue
            rows = [summary_row[place] for place in places]
            if (document, n) in totals:
                total_forward[totals[document, n]], total_backward[totals[document, n]] = rows, rows[::-1]
            for depth, (r, span) in enumerate(places):
                if r == rank:
                    forward[span] = total_row[:n] + rows[:depth]
                    backward[span] = total_row[:n:-1] + rows[:depth:-1]
                    whole[span] = total_row if len(document_runs) > 1 else rows
    return GatherPlan(
        peers=tuple(range(node * per_node, (node + 1) * per_node)),
        counterparts=tuple(range(rank % per_node, topology.world_size, per_node)),
        num_totals=num_totals,
        has_own_rows=len(published[rank]) < len(linked),
        total_forward=Chains.of(total_forward, num_totals),
        total_backward=Chains.of(total_backward, num_totals),
        forward=Chains.of(forward),
        backward=Chains.of(backward),
        whole=Chains.of(whole),
    )


def resolve_transport(transport: str, plan: ScanPlan, direction: str, state) -> str:
    """`transport`, or what "auto" stands for: the same on all ranks, and forward and backward."""
    if transport != "auto":
        return transport
    payload_bytes = plan.num_slots * state.shape[1:].numel() * state.element_size()
    return choose_transport(payload_bytes, plan.topology, causal=direction != "whole")


def start_scan(transport, plan, direction, state, transition, group, *, fold, summarize, step, peers=None):
    """Starts an exclusive scan over the spans of every document; `wait()` gives (entries, transitions).

    transport: a key of TRANSPORTS, or "auto". direction: "forward" (what enters a span from its predecessors),
    "backward" (the gradient that comes back from its successors) or "whole" (all spans of the document together; not
    where TRANSPORTS says causal_only). state: [N, H, K, V] for the linked spans; transition: [N, H, ...] or None going
    forward, and what the forward scan returned as transitions (of matrices, the transposes) going backward.
    fold, summarize, step: the arithmetic, kernels.fold's fold_chains, summarize and step. peers: the group's PeerMemory
    or None. entries: [n, H, K, V], n = len(which) of the plan's chains of that direction.
    """
    name = resolve_transport(transport, plan, direction, state)
    chosen = TRANSPORTS[name]
    assert not (direction == "whole" and chosen.causal_only), (transport, direction)
    if peers is not None and not (name == "lasp2" and _fits(peers, plan, direction, state, transition)):
        peers = None
    steps = chosen.run(
        plan, direction, state, transition, group, fold=fold, summarize=summarize, step=step, peers=peers
    )
    return Background(steps, state.device, keep=(state, transition), aside=peers is None)


def _fits(peers, plan, direction, state, transition) -> bool:
    sent = [state] if transition is None or direction == "backward" else [state, transition]
    return peers.takes(*(plan.num_slots * x.shape[1:].numel() * x.element_size() for x in sent))
