"""Linear attention across ranks: local chunked kernels interleaved with the scan of states (LASP-2 and relatives).

Schedule: forward, the summaries travel while `Form.ahead` does what needs no other rank: in PyTorch every segment from
a zero state, to which what enters is added at the end; the Triton forms have nothing left to do. Backward, the gradient
summaries need no forward state, so they travel while dq, which needs forward states only, is computed; dk, dv and the
gate's gradient come last. Derivation: docs/linear-attention.md.
"""

import torch
from torch.autograd.function import once_differentiable

from longspan.attention.arguments import pick_transport, resolve, without_autocast
from longspan.attention.outline import Outline
from longspan.attention.outline.linear import outlined_linear
from longspan.attention.ranges import LINEAR, of_component
from longspan.attention.recompute import keep, recall
from longspan.kernels.fold import fold_chains, step, summarize
from longspan.kernels.linear import choose_form, chunked
from longspan.kernels.linear.form import Spans
from longspan.kernels.segments import Segments
from longspan.kernels.wide import wide_dtype
from longspan.parallel.scan import scan_plan, start_scan


@torch.compiler.disable
@of_component(LINEAR)
def linear_attention(
    q, k, v, *, log_decay=None, beta=None, causal=True, normalize=False, scale=None, layout=None, group=None,
    strategy="auto", seq=None,
):  # fmt: skip
    """S_t = decay_t S_{t-1} + k_t v_t^T and o_t = scale * S_t^T q_t, from S = 0 at each document's start.

    q, k: [T, H, K]; v: [T, H, V]: this rank's tokens in the order of `layout`, one floating dtype; returns [T, H, V] in
    it. fp64 is computed and sent in fp64, everything else in fp32. scale defaults to K**-0.5.
    log_decay: None, [H] (fixed, without gradient), [T, H] or [T, H, K] (per key channel), <= 0; -inf forgets all.
    beta: None or [T, H]: the delta rule, S_t = D S_{t-1} + beta_t k_t (v_t - (D S_{t-1})^T k_t)^T with D = decay_t, for
    keys of norm at most 1. causal=False: every token reads its whole document's state (no decay, no beta).
    normalize: divides by scale * q_t^T sum(k), as with positive feature maps.
    layout, group: a Layout and its process group (None: one rank, by default one document). strategy: auto or a name
    in parallel.transports.TRANSPORTS. seq: a SequenceContext instead of those three. Raises ValueError, on all ranks,
    for what does not fit.
    """

    def check():
        _check(q, k, v, log_decay, beta, causal)
        if normalize and beta is not None:
            raise ValueError("normalize does not go with beta: the delta rule's weights do not add up to a sum of keys")

    options = (causal, normalize, scale, getattr(log_decay, "ndim", None), beta is None)
    seq = resolve(seq, layout, group, {"q": q, "k": k, "v": v}, check, options, linear=strategy)
    transport = pick_transport(seq, causal)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not normalize:
        return _attend(q, k, v, log_decay, beta, causal, seq, scale, transport, q.dtype)
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    out = _attend(q, k, v, log_decay, beta, causal, seq, scale, transport, wide_dtype(q.dtype))
    return (out[..., :-1] / out[..., -1:]).to(q.dtype)


def _attend(q, k, v, log_decay, beta, causal, seq, scale, transport, dtype):
    if isinstance(seq, Outline):
        return outlined_linear(seq, q, k, v, log_decay, beta, causal, dtype)
    with without_autocast(q.device.type):
        if causal:
            form = choose_form(q, v, log_decay, beta)
            return _Causal.apply(q, k, v, log_decay, beta, form, seq, scale, transport, dtype)
        return _Whole.apply(q, k, v, seq, scale, transport, dtype)


def local_tables(layout, rank: int, make, *sizes):
    """The kernels' tables of this rank's spans: make(spans, *sizes)."""
    plan = scan_plan(layout, rank)
    spans = Spans(tuple(layout.local_offsets(rank)), plan.linked, plan.forward.which, plan.backward.which)
    return make(spans, *sizes)


class _Causal(torch.autograd.Function):
    """The schedule of every causal family; `form` (kernels.linear.form) does the arithmetic."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, beta, form, seq, scale, transport, dtype):
        work = _local(form, seq, q, k, v, log_decay, beta, scale)
        plan = seq.derive(scan_plan, seq.parallel.topology)
        kept, pending = recall(), None
        if kept is None and plan.connected:
            pending = _scan(transport, plan, "forward", *work.summary(), seq)
        work.ahead()
        if kept is None:
            kept = keep(pending.wait() if pending else (_nothing(q, v), None))
        entry, transitions = kept
        out, saved = work.output(entry, dtype)
        ctx.save_for_backward(q, k, v, log_decay, beta, transitions, *saved)
        ctx.form, ctx.seq, ctx.scale, ctx.transport = form, seq, scale, transport
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, k, v, log_decay, beta, transitions, *saved = ctx.saved_tensors
        work = _local(ctx.form, ctx.seq, q, k, v, log_decay, beta, ctx.scale)
        plan = ctx.seq.derive(scan_plan, ctx.seq.parallel.topology)
        pending = None
        work.start_backward(saved, d_out, gate=ctx.needs_input_grad[3])
        if plan.connected:
            if transitions is not None and transitions.ndim == 4:
                transitions = transitions.mT
            pending = _scan(ctx.transport, plan, "backward", work.gradient_summary(), transitions, ctx.seq)
        work.gradient_ahead()
        exit_grad = pending.wait()[0] if pending else _nothing(q, v)
        grads = work.gradients(exit_grad)
        inputs = (q, k, v, log_decay, beta)
        grads = (None if grad is None else grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True))
        return *grads, None, None, None, None, None


def _local(form, seq, q, k, v, log_decay, beta, scale):
    tables = seq.derive(local_tables, form.tables, q.shape[1], q.shape[2], v.shape[2])
    return form(tables, q, k, v, log_decay, beta, scale)


def _nothing(q, v):
    """No states: [0, H, K, V]."""
    return q.new_empty(0, *q.shape[1:], v.shape[2], dtype=wide_dtype(q.dtype))


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
    @once_differentiable
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
    state = chunked.weighted_outer(x, y, None, seq.derive(local_segments))
    plan = seq.derive(scan_plan, seq.parallel.topology)
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


def local_segments(layout, rank: int) -> Segments:
    """This rank's spans as segments."""
    return Segments.of(layout.local_offsets(rank))


def _scan(transport, plan, direction, state, transition, seq):
    return start_scan(
        transport, plan, direction, state, transition, seq.parallel.state_group, fold=fold_chains,
        summarize=summarize, step=step, peers=seq.parallel.peers,
    )  # fmt: skip


def _check(q, k, v, log_decay, beta, causal):
    if q.shape != k.shape:
        raise ValueError(f"q has shape {tuple(q.shape)} but k has {tuple(k.shape)}; they must be equal")
    if v.shape[:2] != q.shape[:2]:
        raise ValueError(f"v has shape {tuple(v.shape)}; its tokens and heads must be those of q, {tuple(q.shape[:2])}")
    if not causal and (log_decay is not None or beta is not None):
        name = "beta" if log_decay is None else "log_decay"
        raise ValueError(f"{name} needs causal=True: decays and the delta rule have a direction")
    _check_gate("log_decay", log_decay, q, (q.shape[1:2], q.shape[:2], q.shape))
    _check_gate("beta", beta, q, (q.shape[:2],))
    if log_decay is not None and log_decay.ndim == 1 and log_decay.requires_grad:
        raise ValueError("log_decay of shape [H] is fixed and takes no gradient; expand it to [T, H] or detach it")


def _check_gate(name, x, q, shapes):
    if x is None:
        return
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name} is a {type(x).__name__}; give a tensor")
    if not x.is_floating_point():
        raise ValueError(f"{name} has dtype {x.dtype}; use a floating-point dtype")
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device} but q is on {q.device}")
    if x.shape not in shapes:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; use {' or '.join(str(list(shape)) for shape in shapes)}")
