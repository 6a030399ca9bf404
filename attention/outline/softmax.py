"""Softmax attention holds what its passes do: they are run on tensors without data, by the schedule of training.

How much a rank holds in either pass grows with its tokens and depends on its place, so layouts are made small, in the
same proportions, and some ranks are asked. Tokens move as in training, by tables that have sizes alone.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, gcd

import torch

from longspan.attention import softmax_passes
from longspan.attention.head_groups import group_of, head_groups
from longspan.attention.moved import Moved, head_parallel_ranks, moved_for
from longspan.attention.outline.context import Outline
from longspan.attention.outline.stand_in import Call, StandIn
from longspan.attention.outline.storages import Peak
from longspan.attention.recompute import recomputing
from longspan.attention.schedules import Schedule
from longspan.kernels.wide import wide_dtype
from longspan.parallel.context import SequenceParallel
from longspan.parallel.geometry import Mask
from longspan.parallel.layout import Layout, Span
from longspan.parallel.routes import RouteTable

TOKENS = 1024  # of a rank, where there are more
SOME = 8  # ranks to ask about


def outlined_softmax(outline: Outline, q, k, v, mask: Mask):
    way = _way(outline, mask, q.shape[1])
    with outline.uncounted():  # tables are made once for all layers
        moved = Moved(Schedule.of(())) if way is None else way.moved()
    tokens, sizes = outline.num_tokens // outline.world_size, (q.shape[1], k.shape[1])
    groups = head_groups(outline.parallel.head_groups, tokens, *sizes, mask, outline.lengths)
    q, k, v = moved.move(q, k, v, None)
    arrivals = () if way is None else tuple(way.arrivals(q, k, v))
    if moved.groups > 1 or not recomputing():
        for arrival in arrivals:
            outline.receive(*arrival)
    attention = _Softmax(outline, mask, moved.groups, gcd(groups, k.shape[1]), sizes, arrivals)
    return moved.move_back(StandIn.apply(attention, q, k, v), None)


@dataclass(frozen=True)
class _Way:
    """Of the rank that has most tokens in softmax attention. ranks: that exchange heads; held, kept, wanted: tokens
    times heads / ranks here, those of them that stay, and there; far: those there that come from other machines."""

    ranks: int
    held: int
    kept: int
    wanted: int
    far: int

    @lru_cache(maxsize=8)
    def moved(self) -> Moved:
        there = RouteTable.outline(self.held, self.kept, self.wanted)
        back = RouteTable.outline(self.wanted, self.kept, self.held)
        return Moved(Schedule.of(()), there, back, self.ranks)

    def arrivals(self, q, k, v):
        """Bytes that come from this machine and from others, in the same proportion: q, k and v on the way there, the
        output on the way back."""
        come, far = self.wanted - self.kept, self.far / max(1, self.wanted - self.kept)
        for count, row in ((come, sum(x[0].nbytes for x in (q, k, v))), (self.held - self.kept, q[0].nbytes)):
            yield count * row * (1 - far), count * row * far


def _way(outline: Outline, mask: Mask, heads: int) -> _Way | None:
    """Where tokens go for attention; None where they stay."""
    parallel, own = outline.parallel, outline.num_tokens_local
    if (ranks := head_parallel_ranks(parallel, heads)) > 1:
        far = max(0, ranks - parallel.topology.ranks_per_node) * own
        return _Way(ranks, ranks * own, own, ranks * own, far)
    here, there = outline.layout, parallel.attention_layout(outline.layout, mask)
    if here == there:
        return None
    fullest, size = _fullest(there), parallel.topology.ranks_per_node
    spans, first = there.spans[fullest], fullest // size * size
    near = sum(_common(spans, here.spans[rank]) for rank in range(first, first + size))
    wanted = there.tokens_per_rank[fullest]
    return _Way(1, own, min(own, _common(spans, here.spans[fullest])), wanted, wanted - near)


def _fullest(layout: Layout) -> int:
    return layout.tokens_per_rank.index(max(layout.tokens_per_rank))


def _common(some, others) -> int:
    """Tokens that are in spans of both."""
    held = {}
    for span in others:
        held.setdefault(span.document, []).append(span)
    both = ((one, other) for one in some for other in held.get(one.document, ()))
    return sum(max(0, min(a.stop, b.stop) - max(a.start, b.start)) for a, b in both)


@dataclass(frozen=True)
class _Softmax:
    """ranks: among which the heads of its inputs are shared out; groups: of them, each of which is a call; sizes: of
    query and key heads before; arrivals: of the exchanges around it."""

    outline: Outline
    mask: Mask
    ranks: int
    groups: int
    sizes: tuple[int, int]
    arrivals: tuple[tuple[float, float], ...]

    def travels(self, q, k, v):
        self._note(q, k, backward=False)
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=wide_dtype(q.dtype))
        _held = self._scratch(q, out, lse, backward=False)
        return out, lse

    def output(self, kept, q, k, v):
        return kept[0], kept

    def hold(self, d_out, q, k, v):
        self._note(q, k, backward=True)
        for arrival in self.arrivals:
            self.outline.receive(*arrival)
        return self._scratch(q, q, k, v, backward=True)

    def _scratch(self, q, *results, backward):
        """What exists at the peak of a pass beside its results, which have these sizes."""
        outline, parallel = self.outline, self.outline.parallel
        with outline.uncounted():
            shrink = max(1.0, outline.num_tokens / (outline.world_size * TOKENS))
            window = None if self.mask.window is None else max(1, round(self.mask.window / shrink))
            given = _small(outline.layout, shrink), Mask(self.mask.causal, window), parallel.topology, parallel.softmax
            costs, plan = parallel.costs, parallel.plan(outline.lengths, self.mask)
            if len(outline.lengths) > 1:  # one document loads all links alike, whatever a key costs
                costs = replace(costs, key_s=shrink * costs.key_s, remote_key_s=shrink * costs.remote_key_s)
            if plan is not None:
                plan = replace(plan, layout=_small(plan.layout, shrink), costs=costs)
            sizes = *self.sizes, q.shape[2], q.dtype, self.groups
            most = _peaks(*given, costs, plan, *sizes, _Kernel(outline.gpu, parallel.backend))[backward]
        size = ceil(most * outline.num_tokens_local) - sum(x.nbytes for x in results)
        return q.new_empty(max(0, size), dtype=torch.uint8)

    def _note(self, q, k, backward):
        """Calls do the work of this rank's tokens with as many heads as there are in all."""
        heads, kv_heads = (self.ranks * x.shape[1] // self.groups for x in (q, k))
        for _ in range(self.groups):
            self.outline.record(Call("softmax", self.mask, backward, heads, kv_heads, q.shape[2], k.shape[2]))


def _small(layout: Layout, shrink: float) -> Layout:
    """The same with fewer tokens."""

    def at(position):
        return position and max(1, round(position / shrink))

    def spans(of_rank):
        cut = ((span.document, at(span.start), at(span.stop)) for span in of_rank)
        return tuple(Span(document, start, stop) for document, start, stop in cut if stop > start)

    return Layout(tuple(map(at, layout.lengths)), tuple(map(spans, layout.spans)))


@lru_cache(maxsize=256)
def _peaks(layout, mask, topology, strategy, costs, plan, heads, kv_heads, size, dtype, groups, kernel):
    """Bytes for each token of a rank outside of attention, at the peak of the forward pass and of the backward pass,
    besides what they are given. plan: of the strategy, or None."""
    most = [0, 0]
    for rank in _ranks(layout if plan is None else plan.layout):
        strategy = strategy if plan is None else "auto"
        seq = SequenceParallel(rank=rank, topology=topology, softmax=strategy, costs=costs, device="meta")
        moved = moved_for(seq.context(layout), plan, mask, heads, kv_heads)
        tokens = layout.tokens_per_rank[rank] if moved.there is None else len(moved.there.source)
        keys = kv_heads // gcd(kv_heads, moved.groups)
        given = (torch.empty(tokens, n, size, dtype=dtype, device="meta") for n in (heads // moved.groups, keys, keys))
        q, k, v = given if moved.there is None else torch.cat([*given], 1).split((heads // moved.groups, keys, keys), 1)
        given = q, k, v, torch.empty_like(q), q.new_empty(q.shape[:2], dtype=wide_dtype(dtype))
        passes = (softmax_passes.forward, given[:3]), (softmax_passes.backward, (torch.empty_like(q), *given))
        found = [_peak(run, groups, tensors, moved.schedule, kernel) for run, tensors in passes]
        most = list(map(max, most, found))
    tokens = max(layout.tokens_per_rank)
    return most[0] / tokens, most[1] / tokens


def _ranks(layout: Layout) -> list[int]:
    """Those among which is, about, the one that holds most: the one with most tokens; of equal ones the first where
    keys of many come at once, one near the middle in a ring, before it in the forward pass, behind it where there are
    fewer key heads. Of several documents every rank has others: of all up to SOME."""
    count = layout.world_size
    some = range(0, count, -(-count // SOME)) if len(layout.lengths) > 1 else ()
    return sorted({_fullest(layout), 0, count // 4, count // 2, 5 * count // 8, count - 1, *some})


def _peak(run, groups, tensors, schedule, kernel) -> int:
    """Of a group of heads, beside where results of all are if there are several."""
    of_group = [group_of(0, groups, x) for x in tensors]
    with Peak() as peak:
        for x in of_group:
            peak.ignore(x)
        results = run(*of_group, schedule, kernel, 1.0, None)
    return peak.most + (groups > 1) * groups * sum(x.nbytes for x in results)


@dataclass(frozen=True)
class _Kernel:
    """Allocates what back ends do: results, on GPUs in the dtype of the inputs. FlashAttention-4 sums dq in fp32, and
    dk and dv where query heads share them, cuDNN then of every query head (kernels.softmax.cudnn_ragged); results on
    CPUs are such sums."""

    gpu: bool
    backend: str

    def forward(self, q, k, v, pack, scale):
        return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=wide_dtype(q.dtype))

    def backward(self, d_out, q, k, v, out, lse, pack, scale):
        heads = (q if self.gpu and self.backend.startswith("cudnn") else k).shape[1]
        keys = (len(k), heads, k.shape[2])
        summed = (q.shape, keys, keys) if not self.gpu or q.shape[1] > k.shape[1] else (q.shape,)
        sums = tuple(q.new_empty(shape, dtype=wide_dtype(q.dtype)) for shape in summed)
        return tuple(torch.empty_like(x) for x in (q, k, v)) if self.gpu else sums
