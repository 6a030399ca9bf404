"""Softmax attention across ranks: one engine that runs any schedule, forward and backward.

While a step's calls run, the next step's keys are under way. Partial results merge in at least fp32; in the backward
pass the keys travel again, and each owner gets the gradients of its keys back and adds them in step order.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any

import torch

from longspan.attention.arguments import pick, resolve, without_autocast
from longspan.attention.double_ring import double_ring_schedule
from longspan.attention.head_groups import by_groups, head_groups
from longspan.attention.moved import (
    HEAD_PARALLEL,
    Moved,
    head_parallel_schedule,
    planned_schedule,
    ranks_that_share_heads,
    schedule_of,
)
from longspan.attention.outline import Outline
from longspan.attention.outline.softmax import outlined_softmax
from longspan.attention.ranges import SOFTMAX, of_component
from longspan.attention.recompute import keep, recall
from longspan.attention.schedules import STRATEGIES as KEYS_TRAVEL
from longspan.attention.schedules import softmax_schedule
from longspan.kernels.gather_add import gather_add
from longspan.kernels.merge import merge
from longspan.kernels.scatter import scatter_rows
from longspan.kernels.softmax import choose
from longspan.kernels.wide import wide_dtype
from longspan.parallel.context import MEMO
from longspan.parallel.exchange import start_exchange, to_device
from longspan.parallel.geometry import Mask
from longspan.parallel.planner import STRATEGIES as PLANNERS
from longspan.parallel.planner import AttentionPlan

STRATEGIES = (*KEYS_TRAVEL, "double_ring", *HEAD_PARALLEL, *PLANNERS)

log = logging.getLogger(__name__)


@torch.compiler.disable
@of_component(SOFTMAX)
def softmax_attention(
    q, k, v, *, causal=True, window=None, scale=None, layout=None, group=None, plan=None, strategy="auto", seq=None
):
    """softmax(scale * q k^T) v within each document, over all ranks that hold parts of it.

    q: [T, Hq, D]; k, v: [T, Hkv, D] with Hq a multiple of Hkv: this rank's tokens in the order of `layout`, one
    floating dtype; returns [T, Hq, D] in it. fp64 is computed and sent in fp64; log-sum-exp and merges are at least
    fp32. window: a query sees the last `window` keys of its document, itself included (None: all; needs causal).
    scale defaults to D**-0.5. layout, group: a Layout and its process group (None: one rank, by default one
    document). seq: a SequenceContext instead of layout, group, strategy and plan. strategy:

        ring, double_ring, grouped_ring,   keys travel to the queries; double_ring: between nodes once, grouped_ring:
        all_gather                         from several ranks at a time. auto: ring, on several nodes double_ring
        ulysses                            every rank gets all tokens and a part of the heads
        usp                                the same among as many ranks of a node as share the heads evenly, and a ring
        zeppelin, zeppelin_even, hybrid    a ring where a plan for mixed lengths puts the tokens (parallel.planner)

    plan: an AttentionPlan instead of a strategy. Raises ValueError, on all ranks, for what does not fit.
    """

    def check():
        _check(q, k, v, plan, seq, strategy)
        Mask(causal, window)

    options = causal, window, scale, None if plan is None else getattr(plan, "digest", None)
    seq = resolve(seq, layout, group, {"q": q, "k": k, "v": v}, check, options, softmax=strategy)
    if isinstance(seq, Outline):
        return outlined_softmax(seq, q, k, v, Mask(causal, window))
    parallel = seq.parallel
    repeatable = torch.are_deterministic_algorithms_enabled()
    backend = _backend(parallel.backend, q.device.type, q.dtype, q.shape[-1], repeatable)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    groups = head_groups(parallel.head_groups, seq.num_tokens // seq.world_size, q.shape[1], k.shape[1])
    moved = _moved(seq, plan, Mask(causal, window), q.shape[1], k.shape[1])
    q, k, v = moved.move(q, k, v, parallel.group)
    groups = gcd(groups, k.shape[1])  # where ranks share out heads, each has fewer
    marked = _Marked.of(backend, parallel.mark)
    with without_autocast(q.device.type):
        out = _Attention.apply(q, k, v, groups, moved.schedule, marked, scale, parallel.group)
    return moved.move_back(out, parallel.group)


def _moved(seq, plan, mask, heads, kv_heads) -> Moved:
    """The schedule, and where tokens go for it."""
    parallel = seq.parallel
    topology, default = parallel.topology, "ring" if parallel.topology.nodes == 1 else "double_ring"
    strategy = pick(STRATEGIES, parallel.softmax, default, "softmax strategy")
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


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, groups, *rest):
        kept = recall()
        out, lse = kept if kept is not None else keep(by_groups(_forward, groups, (q, k, v), *rest))
        out = out.detach()  # what is kept must not lead back to the graph that keeps it
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.groups, ctx.rest = groups, rest
        return out

    @staticmethod
    def backward(ctx, d_out):
        tensors = d_out.contiguous(), *ctx.saved_tensors
        return *by_groups(_backward, ctx.groups, tensors, *ctx.rest), None, *(None for _ in ctx.rest)


def _forward(q, k, v, schedule, backend, scale, group):
    """(out [T, Hq, D] in q's dtype, lse [T, Hq])."""
    if q.shape[0] == 0:
        for _ in arriving(
            k, v, schedule.steps, group
        ):  # a rank without queries still sends (nothing) and stays in step
            pass
        return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=wide_dtype(q.dtype))
    out = lse = None
    for step, keys, values in arriving(k, v, schedule.steps, group):
        for call in step.calls:
            rows = call.query_rows
            part = backend.forward(q[rows], keys[call.key_rows], values[call.key_rows], call.pack, scale)
            if out is None:  # the first call covers every query: each sees at least itself
                out, lse = part
            else:
                if not schedule.queries_in_two[0]:
                    out = out.to(lse.dtype)
                merge(out, lse, *part, rows)
    return out.to(q.dtype), lse


def _backward(d_out, q, k, v, out, lse, schedule, backend, scale, group):
    """dq, dk, dv in the dtypes of q, k, v. What is rounded once at the end, or to be sent, is summed in that dtype, all
    else in fp32 at least."""
    steps, wide = schedule.backward, wide_dtype(q.dtype)
    query_sums = None if schedule.queries_in_two[1] else wide
    dq = dk = dv = None
    kept, returning = {}, []
    for number, (step, keys, values) in enumerate(arriving(k, v, steps, group)):
        dkeys, dvalues = (dk, dv) if step.local else (None, None)
        key_sums = None if step.keys_in_two and step.last_to_send is None and not step.local else wide
        for call in step.calls:
            rows, key_rows = call.query_rows, call.key_rows
            part = backend.backward(
                d_out[rows], q[rows], keys[key_rows], values[key_rows], out[rows], lse[rows], call.pack, scale
            )
            dq = _added(dq, rows, part[0], q, query_sums)
            dkeys, dvalues = (
                _added(total, key_rows, grad, keys, key_sums) for total, grad in zip((dkeys, dvalues), part[1:])
            )
            del part  # before the next call
        if len(steps) == 1:
            return tuple(_like(x, total) for x, total in ((q, dq), (k, dkeys), (v, dvalues)))
        dkeys, dvalues = (
            torch.zeros_like(keys, dtype=key_sums) if x is None else x if key_sums is None else x.to(key_sums)
            for x in (dkeys, dvalues)
        )
        if step.local:
            dk, dv = kept[None] = dkeys, dvalues
        while returning:
            _add_returned(*returning.pop(0))
        for source in _answered(kept, steps, number):
            returning.append(_return(steps[source], kept.pop(source), kept, k, v, group))
        if step.last_to_send is not None:
            kept[number] = dkeys, dvalues
        elif not step.local:
            returning.append(_return(step, (dkeys, dvalues), kept, k, v, group))
    while returning or len(kept) > 1:
        while returning:
            _add_returned(*returning.pop(0))
        for source in _answered(kept, steps, len(steps)):
            returning.append(_return(steps[source], kept.pop(source), kept, k, v, group))
    return _like(q, dq), _like(k, dk), _like(v, dv)


def _like(x, total):
    return torch.zeros_like(x) if total is None else total.to(x.dtype)


def _added(total, rows, part, like, dtype):
    """`total` with `part` added at `rows`, in `dtype`, None for the part's own. A total of None stands for zeros; a
    first part of all rows stays itself."""
    covers = (rows.stop - rows.start if isinstance(rows, slice) else len(rows)) == len(like)
    if total is None and covers and isinstance(rows, slice):
        return part
    if total is None:
        total = (torch.empty_like if covers else torch.zeros_like)(like, dtype=dtype or part.dtype)
        scatter_rows(total, rows, part, add=not covers)
        return total
    total = total if dtype is None else total.to(dtype)
    scatter_rows(total, rows, part)
    return total


def arriving(k, v, steps, group):
    """(step, keys, values) of every step, the next step's transfer started before this one is handed out."""
    kept = {None: (k, v)}

    def start(step):
        if step.local:
            return None, k, v
        keys, values = (x.new_empty(step.num_keys, *x.shape[1:]) for x in (k, v))
        sends = [(peer, x[rows].contiguous()) for peer, rows, source in step.sends for x in kept[source]]
        receives = [(peer, x[rows]) for peer, rows in step.receives for x in (keys, values)]
        return start_exchange(sends, receives, group), keys, values

    coming = [start(steps[0])]
    for number, step in enumerate(steps):
        pending, keys, values = coming.pop(0)
        if pending is not None:
            pending.wait()
        if step.last_to_send is not None:
            kept[number] = keys, values
        while number + len(coming) + 1 < len(steps) and (not coming or steps[number + len(coming)].beside):
            coming.append(start(steps[number + len(coming) + 1]))
        for source in [n for n in kept if n is not None and steps[n].last_to_send <= number + len(coming)]:
            del kept[source]
        yield step, keys, values


def _answered(kept, steps, number):
    """The kept steps whose gradients are complete before step `number`: all they were passed on to have answered, also
    where those passed it on again."""
    last = {n: steps[n].last_to_send for n in kept if n is not None}
    return [n for n in last if last[n] < number and last[n] not in kept]


def _return(step, gradients, totals, k, v, group):
    """Starts sending the gradients of a step's keys back to where they came from, the exchange of the step transposed;
    what comes is to be added to the totals of where they came from."""
    sends = [(peer, x[rows].to(k.dtype)) for peer, rows in step.receives for x in gradients]
    counts = [rows.stop - rows.start if isinstance(rows, slice) else len(rows) for _, rows, _ in step.sends]
    parts = [x.new_empty(sum(counts), *x.shape[1:]) for x in (k, v)]
    pieces = zip(*(x.split(counts) for x in parts))
    receives = [(peer, x) for (peer, _, _), of_peer in zip(step.sends, pieces) for x in of_peer]
    return start_exchange(sends, receives, group), [(totals[back.source], back, parts) for back in step.returns]


def _add_returned(pending, targets):
    pending.wait()
    for totals, back, parts in targets:
        for total, part in zip(totals, parts, strict=True):
            gather_add(total, back.rows, back.places, part)


@dataclass(frozen=True)
class _Marked:
    """A back end whose every call is between two marks."""

    backend: Any
    mark: Callable[[], None]

    @classmethod
    def of(cls, backend, mark):
        return backend if mark is None else cls(backend, mark)

    def forward(self, *args):
        return self._between(self.backend.forward, args)

    def backward(self, *args):
        return self._between(self.backend.backward, args)

    def _between(self, call, args):
        self.mark()
        result = call(*args)
        self.mark()
        return result


@lru_cache
def _backend(name, device_type, dtype, head_dim, repeatable):
    """repeatable: whether torch asks for deterministic algorithms, on which the choice depends."""
    backend, refusals = choose(name, device_type, dtype, head_dim)
    log.info("softmax attention on %s in %s with head_dim %d: back end %s", device_type, dtype, head_dim, backend.name)
    for refusal in refusals:
        log.info("not used: %s", refusal)
    return backend


def _check(q, k, v, plan, seq, strategy):
    if plan is not None and not isinstance(plan, AttentionPlan):
        raise ValueError(f"plan must be a longspan.parallel.AttentionPlan, got {type(plan).__name__}")
    if plan is not None and (seq is not None or strategy != "auto"):
        raise ValueError("plan goes with layout and group; a seq, or a strategy, has its own")
    if k.shape != v.shape:
        raise ValueError(f"k has shape {tuple(k.shape)} but v has {tuple(v.shape)}; they must be equal")
    if k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(f"k has shape {tuple(k.shape)}; its tokens and head_dim must be those of q, {tuple(q.shape)}")
    if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k has {k.shape[1]} heads, which does not divide the {q.shape[1]} heads of q")
