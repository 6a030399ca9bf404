"""Softmax attention across ranks: which schedule and which kernel, as an autograd function."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any

import torch

from longspan.attention import softmax_passes
from longspan.attention.arguments import resolve, without_autocast
from longspan.attention.head_groups import by_groups, head_groups
from longspan.attention.moved import moved_for
from longspan.attention.outline import Outline
from longspan.attention.outline.softmax import outlined_softmax
from longspan.attention.ranges import SOFTMAX, of_component
from longspan.attention.recompute import keep, recall
from longspan.kernels.softmax import choose
from longspan.parallel.geometry import Mask
from longspan.parallel.planner import AttentionPlan

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
    tokens = seq.num_tokens // seq.world_size
    mask = Mask(causal, window)
    groups = head_groups(parallel.head_groups, tokens, q.shape[1], k.shape[1], mask, seq.layout.lengths)
    moved = moved_for(seq, plan, mask, q.shape[1], k.shape[1])
    q, k, v = moved.move(q, k, v, parallel.group)
    groups = gcd(groups, k.shape[1])  # where ranks share out heads, each has fewer
    marked = _Marked.of(backend, parallel.mark)
    with without_autocast(q.device.type):
        out = _Attention.apply(q, k, v, groups, moved.schedule, marked, scale, parallel.group)
    return moved.move_back(out, parallel.group)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, groups, *rest):
        kept = recall()
        out, lse = kept if kept is not None else keep(by_groups(softmax_passes.forward, groups, (q, k, v), *rest))
        out = out.detach()  # what is kept must not lead back to the graph that keeps it
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.groups, ctx.rest = groups, rest
        return out

    @staticmethod
    def backward(ctx, d_out):
        tensors = d_out.contiguous(), *ctx.saved_tensors
        return *by_groups(softmax_passes.backward, ctx.groups, tensors, *ctx.rest), None, *(None for _ in ctx.rest)


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
