"""Linear attention across ranks: local chunked kernels interleaved with the scan of states (LASP-2 and relatives).

Schedule: forward, the summaries start travelling and every segment is computed from a zero state meanwhile; what enters
it is added at the end. Backward, the gradient summaries need no forward state, so they travel while dq, which needs
forward states only, is computed; dk, dv and the gate's gradient come last. Derivation: docs/linear-attention.md.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch

from longspan.attention.arguments import pick, resolve
from longspan.attention.recompute import keep, recall
from longspan.kernels.fold import fold_scalar, step_scalar
from longspan.kernels.linear import chunked
from longspan.kernels.segments import Segments
from longspan.parallel.scan import TRANSPORTS, scan_plan, start_scan


@torch.compiler.disable
def linear_attention(
    q, k, v, *, log_decay=None, beta=None, causal=True, normalize=False, scale=None, layout=None, group=None,
    strategy="auto", seq=None,
):  # fmt: skip
    """S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T and o_t = scale * S_t^T q_t, from S = 0 at each document's start.

    q, k: [T, H, K]; v: [T, H, V]: this rank's tokens in the order of `layout`, one floating dtype; returns [T, H, V] in
    it. fp64 is computed and sent in fp64, everything else in fp32. scale defaults to K**-0.5.
    log_decay: None, [H] (fixed, without gradient) or [T, H], values <= 0. causal=False: every token reads its whole
    document's state (no decay). normalize: divides by scale * q_t^T sum(k), as with positive feature maps.
    layout, group: a Layout and its process group (None: one rank, by default one document). strategy: auto, lasp2 or
    lasp. seq: a SequenceContext instead of those three. Raises ValueError, on all ranks, for what does not fit.
    """

    def check():
        _check(q, k, v, log_decay, beta, causal)

    options = (causal, normalize, scale, None if log_decay is None else log_decay.ndim, beta is None)
    seq = resolve(seq, layout, group, {"q": q, "k": k, "v": v}, check, options, linear=strategy)
    transport = pick(TRANSPORTS, seq.parallel.linear, "lasp2", "linear strategy")
    if TRANSPORTS[transport].causal_only and not causal:
        raise ValueError(f"strategy {transport!r} passes states in causal order; with causal=False use 'lasp2'")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not normalize:
        return _attend(q, k, v, log_decay, causal, seq, scale, transport, q.dtype)
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    out = _attend(q, k, v, log_decay, causal, seq, scale, transport, chunked.accumulation_dtype(q.dtype))
    return (out[..., :-1] / out[..., -1:]).to(q.dtype)


def _attend(q, k, v, log_decay, causal, seq, scale, transport, dtype):
    if causal:
        return _Causal.apply(q, k, v, log_decay, seq, scale, transport, dtype)
    return _Whole.apply(q, k, v, seq, scale, transport, dtype)


def local_segments(layout, rank: int) -> Segments:
    """The kernels' table of this rank's spans."""
    return Segments.of(layout.local_offsets(rank))


@dataclass(frozen=True)
class Linked:
    """The spans that exchange states: their own segment table, and their tokens among the local ones (None: all)."""

    segments: Segments
    rows: torch.Tensor | None

    def map(self, move) -> "Linked":
        return Linked(self.segments.map(move), None if self.rows is None else move(self.rows))

    def pick(self, x):
        return x if x is None or self.rows is None else x.index_select(0, self.rows)

    def summary(self, x, y, log_weight):
        """Sum over each linked span of exp(log_weight_t) x_t y_t^T."""
        return chunked.weighted_outer(self.pick(x), self.pick(y), self.pick(log_weight), self.segments)


def linked_segments(layout, rank: int) -> Linked:
    offsets, spans = layout.local_offsets(rank), scan_plan(layout, rank).linked
    lengths = [offsets[n + 1] - offsets[n] for n in spans]
    rows = None
    if len(spans) < len(layout.spans[rank]):
        rows = torch.cat([torch.arange(0)] + [torch.arange(offsets[n], offsets[n + 1]) for n in spans])
    return Linked(Segments.of((0, *accumulate(lengths))), rows)


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, log_decay, seq, scale, transport, dtype):
        segments, plan = seq.derive(local_segments), seq.derive(scan_plan)
        g = None if log_decay is None else log_decay.expand(q.shape[0], q.shape[1])
        prefix, which = chunked.prefix_decay(g, segments), plan.forward.which
        kept, pending = recall(), None
        if kept is None and plan.connected:
            linked = seq.derive(linked_segments)
            state = linked.summary(k, v, chunked.suffix_decay(prefix, segments))
            transition = chunked.segment_decay(linked.pick(prefix), linked.segments)
            transition = None if transition is None else transition.to(state.dtype)
            pending = _scan(transport, plan, "forward", state, transition, seq)
        out = chunked.forward(q, k, v, g, segments, scale)
        if kept is None:
            kept = keep(pending.wait() if pending else ((), None))
        entry, transitions = kept
        chunked.add_entry(out, q, prefix, entry, which, segments, scale)
        ctx.save_for_backward(q, k, v, log_decay, transitions, *entry)
        ctx.seq, ctx.scale, ctx.transport = seq, scale, transport
        return out.to(dtype)

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, log_decay, transitions, *entry = ctx.saved_tensors
        seq, scale = ctx.seq, ctx.scale
        segments, plan, pending = seq.derive(local_segments), seq.derive(scan_plan), None
        g = None if log_decay is None else log_decay.expand(q.shape[0], q.shape[1])
        if plan.connected:
            d_state = seq.derive(linked_segments).summary(q, d_out, chunked.prefix_decay(g, segments)).mul_(scale)
            pending = _scan(ctx.transport, plan, "backward", d_state, transitions, seq)
        which = plan.forward.which
        dq = chunked.backward_q(d_out, k, v, g, entry, which, segments, scale)
        exit_grad = pending.wait()[0] if pending else ()
        dk, dv, dg = chunked.backward_kv(
            d_out, q, k, v, g, entry, which, exit_grad, plan.backward.which, segments, scale, ctx.needs_input_grad[3]
        )
        dg = None if dg is None else dg.to(log_decay.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dg, None, None, None, None


class _Whole(torch.autograd.Function):
    """Every token reads the state of its whole document: both directions are one sum over the document's spans."""

    @staticmethod
    def forward(ctx, q, k, v, seq, scale, transport, dtype):
        total = recall()
        if total is None:
            total = keep(_start_total(k, v, seq, transport)())
        ctx.save_for_backward(q, k, v, total)
        ctx.seq, ctx.scale, ctx.transport = seq, scale, transport
        return _read(total, q, seq.derive(local_segments), scale).to(dtype)

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, total = ctx.saved_tensors
        segments = ctx.seq.derive(local_segments)
        finish = _start_total(q, d_out, ctx.seq, ctx.transport)
        dq = _read(total.mT, d_out, segments, ctx.scale)
        d_total = finish().mul_(ctx.scale)
        dk, dv = _read(d_total.mT, v, segments, 1.0), _read(d_total, k, segments, 1.0)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _start_total(x, y, seq, transport):
    """Starts summing x_t y_t^T over whole documents; calling the result gives the sums [N, H, K, V] of local spans."""
    state, plan = chunked.weighted_outer(x, y, None, seq.derive(local_segments)), seq.derive(scan_plan)
    pending = None
    if plan.connected:
        linked = torch.cat([state[:0], *(state[span : span + 1] for span in plan.linked)])
        pending = _scan(transport, plan, "whole", linked, None, seq)

    def finish():
        for span, total in zip(plan.whole.which, pending.wait()[0] if pending else ()):
            state[span] = total
        return state

    return finish


def _read(state, x, segments, scale):
    out = torch.zeros(x.shape[0], x.shape[1], state.shape[-1], dtype=state.dtype, device=x.device)
    return chunked.add_entry(out, x, None, state, range(segments.num_segments), segments, scale)


def _scan(transport, plan, direction, state, transition, seq):
    group = seq.parallel.state_group
    return start_scan(transport, plan, direction, state, transition, group, fold=fold_scalar, step=step_scalar)


def _check(q, k, v, log_decay, beta, causal):
    if beta is not None:
        raise ValueError("beta (the delta rule) is not supported; leave it out")
    if q.shape != k.shape:
        raise ValueError(f"q has shape {tuple(q.shape)} but k has {tuple(k.shape)}; they must be equal")
    if v.shape[:2] != q.shape[:2]:
        raise ValueError(f"v has shape {tuple(v.shape)}; its tokens and heads must be those of q, {tuple(q.shape[:2])}")
    if log_decay is None:
        return
    if not causal:
        raise ValueError("log_decay needs causal=True: a decay has a direction")
    if not log_decay.is_floating_point():
        raise ValueError(f"log_decay has dtype {log_decay.dtype}; use a floating-point dtype")
    if log_decay.device != q.device:
        raise ValueError(f"log_decay is on {log_decay.device} but q is on {q.device}")
    if log_decay.ndim == 3:
        shape = tuple(log_decay.shape)
        raise ValueError(f"log_decay has shape {shape}; a decay per key channel is not supported, use [H] or [T, H]")
    if log_decay.shape not in (q.shape[1:2], q.shape[:2]):
        raise ValueError(f"log_decay has shape {tuple(log_decay.shape)}; use [{q.shape[1]}] or {list(q.shape[:2])}")
    if log_decay.ndim == 1 and log_decay.requires_grad:
        raise ValueError("log_decay of shape [H] is fixed and takes no gradient; expand it to [T, H] or detach it")
