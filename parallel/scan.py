"""The scan of linear-attention states over spans: who publishes, who passes what on, in which order.

Each span of tokens maps its entry state to an exit state, `S_out = A(S_in) + S_ext`. A rank publishes (S_ext, A) of
the spans whose document continues on another rank; what they weigh does not depend on the sequence length. The plan is
pure data; `start_scan` runs it with one of the transports in TRANSPORTS. Arithmetic (folding, one step) is passed in.
"""

from collections import defaultdict
from dataclasses import dataclass, replace

import torch

from longspan.parallel.exchange import group_rank, start_all_gather, start_exchange
from longspan.parallel.layout import Layout


@dataclass(frozen=True)
class Chains:
    """What one direction of the scan needs. which: local spans that something enters. sources: int64
    [len(which), L], rows of the table of summaries (published by rank, then linked) in passing order, -1 in front."""

    which: tuple[int, ...]
    sources: torch.Tensor


@dataclass(frozen=True)
class Link:
    """Two successive spans of a document: (rank, local span) of the earlier and of the later one."""

    earlier: tuple[int, int]
    later: tuple[int, int]


@dataclass(frozen=True)
class ScanPlan:
    """One rank's part of the state scan.

    linked: local spans of documents that have several spans anywhere; only these are summarised, in this order.
    published: int64, which of them lie on documents of several ranks, filled up to `num_slots` on every rank.
    forward, backward: chains of predecessors and of successors; whole: chains over all spans of the document (attention
    that is not causal). links: successive spans in which this rank takes part, in an order all ranks share.
    """

    linked: tuple[int, ...]
    published: torch.Tensor
    num_slots: int
    forward: Chains
    backward: Chains
    whole: Chains
    links: tuple[Link, ...]

    @property
    def connected(self) -> bool:
        """Whether a state enters or leaves any span here, or this rank takes part in a collective."""
        return bool(self.num_slots or self.links)

    def map(self, move) -> "ScanPlan":
        """The same plan with every tensor passed through `move`."""
        moved = {
            name: replace(getattr(self, name), sources=move(getattr(self, name).sources))
            for name in ("forward", "backward", "whole")
        }
        return replace(self, published=move(self.published), **moved)


def scan_plan(layout: Layout, rank: int) -> ScanPlan:
    """The plan of `rank`: a pure function of the layout."""
    members = defaultdict(list)  # places (rank, local span) of each document's spans, in document order
    for _, place in sorted((span, (r, n)) for r, spans in enumerate(layout.spans) for n, span in enumerate(spans)):
        members[layout.spans[place[0]][place[1]].document].append(place)
    members = {document: places for document, places in members.items() if len(places) > 1}
    split = {document for document, places in members.items() if len({r for r, _ in places}) > 1}
    linked = [n for n, span in enumerate(layout.spans[rank]) if span.document in members]

    published = [[n for n, span in enumerate(spans) if span.document in split] for spans in layout.spans]
    num_slots = max(map(len, published))
    position = {n: i for i, n in enumerate(linked)}
    row = {(rank, n): layout.world_size * num_slots + i for n, i in position.items()}
    row |= {(r, n): r * num_slots + slot for r, spans in enumerate(published) for slot, n in enumerate(spans)}

    forward, backward, whole, links = {}, {}, {}, []
    for document in sorted(members):
        places = members[document]
        if document not in split and places[0][0] != rank:
            continue
        rows = [row[place] for place in places]
        for depth, (r, n) in enumerate(places):
            if r == rank:
                forward[n], backward[n], whole[n] = rows[:depth], rows[:depth:-1], rows
        links += [(depth, document, Link(*pair)) for depth, pair in enumerate(zip(places, places[1:]))]
    mine = tuple(link for _, _, link in sorted(links, key=lambda x: x[:2]) if rank in (link.earlier[0], link.later[0]))
    mine_published = torch.tensor([position[n] for n in published[rank]], dtype=torch.int64)
    return ScanPlan(tuple(linked), mine_published, num_slots, *map(_chains, (forward, backward, whole)), mine)


def _chains(chains: dict[int, list[int]]) -> Chains:
    which = tuple(sorted(n for n, rows in chains.items() if rows))
    longest = max((len(chains[n]) for n in which), default=0)
    padded = [[-1] * (longest - len(chains[n])) + chains[n] for n in which]
    return Chains(which, torch.tensor(padded, dtype=torch.int64).reshape(len(which), longest))


class GatherScan:
    """lasp2: one asynchronous all-gather of the published summaries; every rank folds what its spans need
    (LASP-2, arXiv 2502.07563). Transitions travel with the forward states and are reused backward."""

    causal_only = False

    def __init__(self, plan, direction, state, transition, group, fold, step):
        self.chains, self.fold = getattr(plan, direction), fold
        self.state, self.transition, self.pending = state, transition, None
        self.sends_transition = transition is not None and direction != "backward"
        if plan.num_slots:
            payload = [state, transition] if self.sends_transition else [state]
            rows = torch.cat([x.index_select(0, plan.published).flatten(1) for x in payload], dim=1)
            unused = rows.new_zeros(plan.num_slots - len(rows), rows.shape[1])  # all that is gathered is finite
            self.pending = start_all_gather(torch.cat([rows, unused]), group)

    def wait(self):
        state, transition = self.state, self.transition
        if self.pending is not None:
            rows, width = self.pending.wait().flatten(0, 1), state.shape[1:].numel()
            state = torch.cat([rows[:, :width].reshape(-1, *state.shape[1:]), state])
            if self.sends_transition:
                transition = torch.cat([rows[:, width:].reshape(-1, *transition.shape[1:]), transition])
        return self.fold(state, transition, self.chains.sources), transition


class RingScan:
    """lasp: states passed on from span to span in document order, one hop at a time (LASP, arXiv 2404.02882)."""

    causal_only = True

    def __init__(self, plan, direction, state, transition, group, fold, step):
        assert direction in ("forward", "backward"), direction
        self.plan, self.backward, self.chains = plan, direction == "backward", getattr(plan, direction)
        self.state, self.transition, self.group, self.step = state, transition, group, step

    def wait(self):
        me, entry, sending = group_rank(self.group), {}, []
        row = {span: i for i, span in enumerate(self.plan.linked)}
        for link in self.plan.links[::-1] if self.backward else self.plan.links:
            (source, span), (target, next_span) = (
                (link.later, link.earlier) if self.backward else (link.earlier, link.later)
            )
            if source == me:
                transition = None if self.transition is None else self.transition[row[span]]
                passed = self.step(self.state[row[span]], transition, entry.get(span))
                if target == me:
                    entry[next_span] = passed
                else:
                    sending.append(start_exchange([(target, passed.contiguous())], [], self.group))
            else:
                entry[next_span] = torch.empty_like(self.state[row[next_span]])
                start_exchange([], [(source, entry[next_span])], self.group).wait()
        for pending in sending:
            pending.wait()
        entries = [entry[span] for span in self.chains.which]
        return torch.stack(entries) if entries else self.state[:0], self.transition


TRANSPORTS = {"lasp2": GatherScan, "lasp": RingScan}


def start_scan(transport, plan, direction, state, transition, group, *, fold, step):
    """Starts an exclusive scan over the spans of every document; `wait()` gives (entries, transitions).

    transport: a key of TRANSPORTS. direction: "forward" (what enters a span from its predecessors), "backward" (the
    gradient that comes back from its successors) or "whole" (all spans of the document together).
    state: [N, ...] for the linked spans; transition: [N, ...] or None going forward, and what the forward scan returned
    as transitions going backward. fold(states, transitions, sources) and step(state, transition, entry or None) are the
    arithmetic. entries: [len(chains.which), ...] for the chains of that direction.
    """
    return TRANSPORTS[transport](plan, direction, state, transition, group, fold, step)
