"""The sequence context: all that layers need to know about where the tokens of a batch are, built once per batch."""

from collections import OrderedDict
from threading import Lock

import torch

from longspan.parallel.balanced import balanced
from longspan.parallel.costs import Costs
from longspan.parallel.exchange import group_rank, group_size, to_device
from longspan.parallel.geometry import Mask
from longspan.parallel.layout import Layout, contiguous, zigzag
from longspan.parallel.planner import STRATEGIES, AttentionPlan, plan_attention
from longspan.parallel.rebalance import rebalance
from longspan.parallel.topology import Topology

MEMO = 4  # latest contexts kept for batches of equal lengths; each holds device memory for every local token


class SequenceParallel:
    """One SP group as seen from this rank: its communicators and the strategies its layers use.

    group: process group that carries tokens, keys and values; state_group: a second communicator over the same ranks
    for linear-attention states, so that they never queue behind other traffic (default: group). None is one rank.
    peers: the group's PeerMemory, through which states travel where it takes them, or None.
    topology: which of the ranks share a machine (default: all). rank: None, or one of the ranks of `topology`, as which
    it is seen without a group, by plans for ranks that are not there. layout: "auto", "contiguous" or "zigzag". linear,
    softmax, sparse, backend: names that the attention layers resolve. costs, token_cap: what plans for softmax
    attention go by, where `softmax` is one of parallel.planner.STRATEGIES. head_groups: into how many softmax attention
    divides its heads, to work on one after the other; 0: by the number of tokens (attention.head_groups). mark: what is
    called before and after every call of a softmax kernel, to time them; None unless it is set.
    """

    def __init__(
        self,
        group=None,
        state_group=None,
        *,
        peers=None,
        topology=None,
        rank=None,
        layout="auto",
        linear="auto",
        softmax="auto",
        sparse="auto",
        backend="auto",
        costs=None,
        token_cap=1.5,
        head_groups=0,
        device="cpu",
    ):
        if layout not in BASE_LAYOUTS:
            raise ValueError(f"layout={layout!r} is unknown; use one of {', '.join(BASE_LAYOUTS)}")
        self.group, self.state_group = group, group if state_group is None else state_group
        self.peers = peers
        self.rank = group_rank(group) if rank is None else rank
        self.world_size = group_size(group) if rank is None else topology.world_size
        self.topology = Topology(1, self.world_size) if topology is None else topology
        if self.topology.world_size != self.world_size:
            found = self.topology.world_size
            raise ValueError(f"topology={self.topology} has {found} ranks but the group has {self.world_size}")
        self.layout, self.linear, self.softmax, self.sparse, self.backend = layout, linear, softmax, sparse, backend
        self.costs, self.token_cap = Costs() if costs is None else costs, token_cap
        self.head_groups = head_groups
        self.device, self.mark = torch.device(device), None
        self._contexts, self._derivations, self._lock = OrderedDict(), {}, Lock()
        self.masks = {Mask()}  # that layouts of softmax attention were asked for

    def base_layout(self, lengths) -> Layout:
        """The layout with equal tokens per rank in which everything but softmax attention runs. With a planned strategy
        "auto" is the plan's for causal attention, with what is too much on some ranks moved."""
        if self.layout == "auto" and self.softmax in STRATEGIES:
            return rebalance(self.plan(lengths).layout, self.topology)
        return BASE_LAYOUTS[self.layout](tuple(lengths), self.world_size)

    def plan(self, lengths, mask=Mask()) -> AttentionPlan | None:
        """What `softmax` plans for these documents under a mask; None for a strategy without plans."""
        if self.softmax not in STRATEGIES:
            return None
        return plan_attention(lengths, self.topology, self.costs, self.token_cap, self.softmax, mask)

    def attention_layout(self, layout: Layout, mask: Mask = Mask()) -> Layout:
        """The layout in which softmax attention with this mask runs, where all else runs in `layout`."""
        plan = self.plan(layout.lengths, mask)
        return layout if plan is None else plan.layout

    def context(self, lengths_or_layout) -> "SequenceContext":
        """The context of a batch: lengths of its documents (placed by `base_layout`) or a ready Layout.

        Memoised. What layers derived from earlier contexts is derived for a new one at once, so that a thread which
        reads ahead does that work. Raises ValueError for a layout of another number of ranks.
        """
        if isinstance(lengths_or_layout, Layout):
            layout = lengths_or_layout
        else:
            layout = self.base_layout(lengths_or_layout)
        with self._lock:
            if layout in self._contexts:
                self._contexts.move_to_end(layout)
                return self._contexts[layout]
        seq = SequenceContext(layout, self)
        for function, arguments in list(self._derivations):
            seq.derive(function, *arguments)
        with self._lock:
            self._contexts[layout] = seq
            if len(self._contexts) > MEMO:
                self._contexts.popitem(last=False)
        return seq

    def remember(self, function, arguments):
        self._derivations[function, arguments] = None


class SequenceContext:
    """Where the tokens of one batch are, as this rank sees them; immutable. Models pass it down as `seq`.

    layout: the base layout. rank, world_size: in the SP group. num_tokens: of the whole batch; num_tokens_local: here.
    positions: int64 [T_local] on the device, position of each local token within its document.
    """

    def __init__(self, layout: Layout, parallel: SequenceParallel):
        if layout.world_size != parallel.world_size:
            raise ValueError(f"the layout has {layout.world_size} ranks but the group has {parallel.world_size}")
        self.layout, self.parallel = layout, parallel
        self.rank, self.world_size = parallel.rank, parallel.world_size
        self.num_tokens, self.num_tokens_local = layout.num_tokens, layout.tokens_per_rank[parallel.rank]
        self.positions = to_device(torch.from_numpy(layout.positions(self.rank)), parallel.device)
        self._layouts = {mask: parallel.attention_layout(layout, mask) for mask in list(parallel.masks)}
        self._derived = {}

    def attention_layout(self, mask: Mask = Mask()) -> Layout:
        """The layout in which softmax attention with this mask runs."""
        if mask not in self._layouts:
            self._layouts[mask] = self.parallel.attention_layout(self.layout, mask)
            self.parallel.masks.add(mask)  # contexts to come plan for it when they are made
        return self._layouts[mask]

    def derive(self, function, *arguments):
        """function(layout, rank, *arguments), computed once; its `.map(move)` moves its tensors to the device.

        `function` must be pure and `arguments` hashable: schedules, segment tables and the like.
        """
        key = function, arguments
        if key not in self._derived:
            value = function(self.layout, self.rank, *arguments)
            self._derived[key] = value.map(lambda x: to_device(x, self.parallel.device))
            self.parallel.remember(*key)
        return self._derived[key]


BASE_LAYOUTS = {"auto": balanced, "contiguous": contiguous, "zigzag": zigzag}
