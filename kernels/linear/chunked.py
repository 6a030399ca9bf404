"""Linear attention in chunks (none, fixed or scalar decay): forward and hand-written backward in plain PyTorch.

Notation per chunk of C tokens: G = inclusive cumulative log decay, Lambda_ij = exp(G_i - G_j) for i >= j, U = the
chunk's own contribution to the state. States never go to memory per chunk: the sweep works in blocks of chunks,
inside which entry states come from one small matrix product with the decay between chunks, and carries one state from
block to block. Derivation: docs/linear-attention.md.

All functions take packed tensors [T, H, D], log_decay None or [T, H] (any float dtype) and `Segments`; they return
accumulation dtype (fp32, or fp64 for fp64 inputs). Summaries are [N, H, K, V], one per segment; states that enter or
leave are rows [len(which), H, K, V] for the segments listed in `which`, all others being zero.
"""

from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from longspan.kernels.linear.form import CLOSED, Spans
from longspan.kernels.segments import CHUNK, Segments
from longspan.kernels.wide import wide_dtype

# Chunks per sweep step: scratch memory is a few times BLOCK * H * (K * V + CHUNK^2) numbers. A CPU wants it in cache, a
# GPU wants few launches.
BLOCK = {"cpu": 64, "cuda": 256}


@dataclass(frozen=True)
class ChunkedTables:
    """Segments of all spans, and of the linked ones with their tokens among the local ones (None: all)."""

    spans: Spans
    segments: Segments
    linked: Segments
    rows: torch.Tensor | None

    @classmethod
    def of(cls, spans: Spans, *_) -> "ChunkedTables":
        lengths = [spans.offsets[n + 1] - spans.offsets[n] for n in spans.linked]
        rows = None
        if len(spans.linked) < len(spans.offsets) - 1:
            ranges = [torch.arange(spans.offsets[n], spans.offsets[n + 1]) for n in spans.linked]
            rows = torch.cat([torch.arange(0), *ranges])
        return cls(spans, Segments.of(spans.offsets), Segments.of((0, *accumulate(lengths))), rows)

    def map(self, move) -> "ChunkedTables":
        rows = None if self.rows is None else move(self.rows)
        return replace(self, segments=self.segments.map(move), linked=self.linked.map(move), rows=rows)

    def pick(self, x):
        """The rows of linked spans."""
        return x if x is None or self.rows is None else x.index_select(0, self.rows)


class Chunked:
    """The Form (kernels.linear.form) of no, fixed and scalar decay in plain PyTorch."""

    tables = ChunkedTables.of

    def __init__(self, tables, q, k, v, log_decay, beta, scale):
        assert beta is None, "the delta rule has its own form"
        self.segments, self.table, self.scale = tables.segments, tables, scale
        self.q, self.k, self.v = q, k, v
        self.g = None if log_decay is None else log_decay.clamp(min=CLOSED).expand(q.shape[:2])
        self.prefix = prefix_decay(self.g, self.segments)

    def summary(self):
        state = self._summary(self.k, self.v, suffix_decay(self.prefix, self.segments))
        transition = segment_decay(self.table.pick(self.prefix), self.table.linked)
        return state, None if transition is None else transition.to(state.dtype)

    def ahead(self):
        self.out = forward(self.q, self.k, self.v, self.g, self.segments, self.scale)

    def output(self, entry, dtype):
        add_entry(self.out, self.q, self.prefix, entry, self.table.spans.entered, self.segments, self.scale)
        return self.out.to(dtype), (entry,)

    def start_backward(self, saved, d_out, gate):
        (self.entry,), self.d_out, self.gate = saved, d_out, gate

    def gradient_summary(self):
        return self._summary(self.q, self.d_out, self.prefix).mul_(self.scale)

    def gradient_ahead(self):
        entered = self.table.spans.entered
        self.dq = backward_q(self.d_out, self.k, self.v, self.g, self.entry, entered, self.segments, self.scale)

    def gradients(self, exit_grad):
        spans = self.table.spans
        dk, dv, dg = backward_kv(
            self.d_out, self.q, self.k, self.v, self.g, self.entry, spans.entered, exit_grad, spans.left,
            self.segments, self.scale, self.gate,
        )  # fmt: skip
        return self.dq, dk, dv, dg, None

    def _summary(self, x, y, log_weight):
        pick = self.table.pick
        return weighted_outer(pick(x), pick(y), pick(log_weight), self.table.linked)


def prefix_decay(log_decay, segments: Segments):
    """fp64 [T, H]: log decay from the start of the segment to each token, the token's own included. None for None."""
    if log_decay is None:
        return None
    total = log_decay.double().t().contiguous().cumsum(1).t()  # scans are fast along rows
    before = (total - log_decay.double()).index_select(0, segments.first_tokens)
    return total - before.index_select(0, segments.token_segment)


def suffix_decay(prefix, segments: Segments):
    """fp64 [T, H]: log decay from after each token to the end of its segment, from `prefix_decay`. None for None."""
    if prefix is None:
        return None
    return segment_decay(prefix, segments).index_select(0, segments.token_segment) - prefix


def segment_decay(prefix, segments: Segments):
    """fp64 [N, H]: log decay over each whole segment, from `prefix_decay`. None for None."""
    return None if prefix is None else prefix.index_select(0, segments.last_tokens)


def weighted_outer(x, y, log_weight, segments: Segments):
    """Sum over each segment of exp(log_weight_t) x_t y_t^T: [N, H, K, V].

    With x, y = k, v and the suffix decay this is a segment's summary S_ext; with q, d_out and the prefix decay it is
    the summary dS_ext of the backward pass.
    """
    dtype = wide_dtype(x.dtype)
    result = torch.zeros(segments.num_segments, x.shape[1], x.shape[2], y.shape[2], dtype=dtype, device=x.device)
    x, y = segments.pad(x), segments.pad(y)
    weight = None if log_weight is None else segments.pad(log_weight.exp())
    for a, b in _blocks(segments):
        left = x[a:b].to(dtype)
        if weight is not None:
            left = left * weight[a:b, :, :, None].to(dtype)
        outer = torch.einsum("nchk,nchv->nhkv", left, y[a:b].to(dtype))
        first, last = segments.chunk_segment_range(a, b)
        ids = segments.chunk_segment[a:b]
        member = (ids == torch.arange(first, last + 1, device=ids.device)[:, None]).to(dtype)
        result[first : last + 1] += torch.einsum("sn,nhkv->shkv", member, outer)
    return result


def add_entry(out, q, prefix, entry, which, segments: Segments, scale: float):
    """out_t += scale * exp(prefix_t) * entry^T q_t, in place, for the segments listed in `which`."""
    for state, index in zip(entry, which):
        rows = slice(segments.offsets[index], segments.offsets[index + 1])
        part = torch.einsum("thk,hkv->thv", q[rows].to(out.dtype), state).mul_(scale)
        out[rows] += part if prefix is None else part.mul_(prefix[rows, :, None].exp().to(out.dtype))
    return out


def forward(q, k, v, log_decay, segments: Segments, scale: float):
    """Outputs [T, H, V] when every segment starts from the zero state; `add_entry` adds what came before."""
    dtype = wide_dtype(q.dtype)
    out = torch.empty(segments.num_chunks, CHUNK, v.shape[1], v.shape[2], dtype=dtype, device=q.device)
    q, k, v, g = segments.pad(q), segments.pad(k), segments.pad(v), _pad_decay(log_decay, segments)
    carry = None
    for a, b in _blocks(segments):
        qb, kb, vb = (_heads_first(x[a:b], dtype) for x in (q, k, v))
        decay = _Decay.of(g, a, b, segments, dtype)
        states, carry = _entry_states(kb, vb, decay, carry)
        scores = (qb @ kb.mT).mul_(decay.inside)
        result = scores @ vb + decay.weigh(qb, decay.from_start) @ states
        out[a:b] = result.mul_(scale).transpose(1, 2)
    return segments.unpad(out)


def backward_q(d_out, k, v, log_decay, entry, which, segments: Segments, scale: float):
    """dq [T, H, K]: the gradient that needs forward states only."""
    dtype = wide_dtype(k.dtype)
    dq = torch.empty(segments.num_chunks, CHUNK, k.shape[1], k.shape[2], dtype=dtype, device=k.device)
    d_out, k, v, g = segments.pad(d_out), segments.pad(k), segments.pad(v), _pad_decay(log_decay, segments)
    carry = None
    for a, b in _blocks(segments):
        kb, vb, dob = (_heads_first(x[a:b], dtype) for x in (k, v, d_out))
        decay = _Decay.of(g, a, b, segments, dtype)
        states, carry = _entry_states(kb, vb, decay, carry, _inject(entry, which, segments, a, b))
        d_scores = (dob @ vb.mT).mul_(decay.inside)
        result = d_scores @ kb + decay.weigh(dob @ states.mT, decay.from_start)
        dq[a:b] = result.mul_(scale).transpose(1, 2)
    return segments.unpad(dq)


def backward_kv(d_out, q, k, v, log_decay, entry, which_entry, exit_grad, which_exit, segments: Segments, scale, gate):
    """dk [T, H, K], dv [T, H, V] and, if `gate`, d_log_decay [T, H] (else None), from the last chunk down.

    exit_grad: gradient of the state leaving each segment of `which_exit`. d_log_decay needs the chunk entry states
    again: they are formed from one state per block.
    """
    dtype = wide_dtype(q.dtype)
    shape = (segments.num_chunks, CHUNK, q.shape[1])
    dk = torch.empty(*shape, k.shape[2], dtype=dtype, device=q.device)
    dv = torch.empty(*shape, v.shape[2], dtype=dtype, device=q.device)
    dg = torch.empty(shape, dtype=dtype, device=q.device) if gate else None
    q, k, v, d_out = segments.pad(q), segments.pad(k), segments.pad(v), segments.pad(d_out)
    g = _pad_decay(log_decay, segments)
    if gate:
        carries = _block_states(k, v, g, entry, which_entry, segments, dtype)

    carry = None
    for number, (a, b) in reversed(list(enumerate(_blocks(segments)))):
        qb, kb, vb, dob = (_heads_first(x[a:b], dtype) for x in (q, k, v, d_out))
        decay = _Decay.of(g, a, b, segments, dtype)
        own = (decay.weigh(qb, decay.from_start).mT @ dob).mul_(scale)
        exits, carry = _exit_gradients(own, decay, carry, _inject(exit_grad, which_exit, segments, a, b, at_end=True))
        scores, d_scores = (qb @ kb.mT).mul_(decay.inside), (dob @ vb.mT).mul_(decay.inside)
        dk_inter = decay.weigh(vb @ exits.mT, decay.to_end)
        dk_block = (d_scores.mT @ qb).mul_(scale).add_(dk_inter)
        dv_block = (scores.mT @ dob).mul_(scale).add_(decay.weigh(kb @ exits, decay.to_end))
        dk[a:b], dv[a:b] = dk_block.transpose(1, 2), dv_block.transpose(1, 2)
        if gate:
            inject = _inject(entry, which_entry, segments, a, b)
            states, _ = _entry_states(kb, vb, decay, carries[number], inject)
            dq_inter = decay.weigh(dob @ states.mT, decay.from_start).mul_(scale)
            dg[a:b] = _gate_gradient(
                scores.mul_(dob @ vb.mT).mul_(scale),
                (qb * dq_inter).sum(-1),
                (kb * dk_inter).sum(-1),
                decay.total.exp() * (states * exits).sum((-1, -2)),
            ).transpose(1, 2)
    return segments.unpad(dk), segments.unpad(dv), None if dg is None else segments.unpad(dg)


def _gate_gradient(pairs, q_dq_inter, k_dk_inter, through):
    """d_log_decay of one block [n, H, C]. Token t's decay lies on every path from before t to t or later: within the
    chunk (`pairs`, what each query-key pair adds to the loss per unit of log decay), from the entry state to queries
    at or after t, from keys before t to the exit state, and from entry to exit (`through` [n, H]).

    A sum over paths; the shorter rowsum(q dq) - rowsum(k dk) subtracts large numbers and loses two digits in fp32.
    """
    before = torch.ones_like(pairs[0, 0]).triu(1)  # [j, t]: j < t
    at_or_after = 1.0 - before  # [i, t]: i >= t
    crossing = ((pairs @ before) * at_or_after).sum(-2)
    return crossing + q_dq_inter @ at_or_after + k_dk_inter @ before + through[..., None]


@dataclass(frozen=True)
class _Decay:
    """Decay factors of one block of n chunks; without decay the factors are None (one) and only masks remain."""

    inside: torch.Tensor  # [n, H, C, C] or [C, C]: Lambda, lower triangular
    from_start: torch.Tensor | None  # [n, H, C, 1]: exp(G)
    to_end: torch.Tensor | None  # [n, H, C, 1]: exp(G_C - G)
    total: torch.Tensor | None  # [n, H]: G_C
    between: torch.Tensor  # [H or 1, n + 1, n]: factor from the state chunk j leaves to the one chunk i enters (j < i)
    from_carry: torch.Tensor  # [H or 1, n + 1]: factor from the block's entry to the state chunk i enters
    continues: bool  # the block's first chunk continues the previous block's segment

    @classmethod
    def of(cls, g, a, b, segments, dtype):
        ids = segments.chunk_segment[a:b]
        ids = torch.cat([ids, ids[-1:]])
        same = (ids[:, None] == ids[None, :-1]).tril(-1)
        continues = a > 0 and len(set(segments.chunk_segment_range(a - 1, a + 1))) == 1
        reached = ids == ids[0] if continues else torch.zeros_like(ids, dtype=torch.bool)
        triangle = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=ids.device).tril()
        if g is None:
            return cls(triangle.to(dtype), None, None, None, same.to(dtype)[None], reached.to(dtype)[None], continues)
        inclusive = g[a:b].cumsum(-1)  # [n, H, C], fp64: differences of long sums stay exact
        total = inclusive[..., -1]
        inside = (inclusive[..., :, None] - inclusive[..., None, :]).to(dtype)
        inside = inside.masked_fill_(~triangle, -torch.inf).exp_()
        chunks = torch.cat([total.new_zeros(1, total.shape[1]), total.cumsum(0)]).T  # [H, n + 1]: before chunk i
        between = (chunks[:, :, None] - chunks[:, None, 1:]).to(dtype).masked_fill_(~same, -torch.inf).exp_()
        return cls(
            inside,
            inclusive[..., None].exp().to(dtype),
            (total[..., None] - inclusive)[..., None].exp().to(dtype),
            total.to(dtype),
            between,
            torch.where(reached, chunks.exp().to(dtype), 0.0),
            continues,
        )

    def weigh(self, x, factor):
        return x if factor is None else x * factor


def _entry_states(k, v, decay: _Decay, carry, inject=()):
    """State entering each chunk of a block [n, H, K, V], and the one entering the next block.

    inject: (chunk, state) pairs that enter at the first chunk of a segment.
    """
    own = decay.weigh(k, decay.to_end).mT @ v
    for chunk, state in inject:
        own[chunk] += state if decay.total is None else decay.total[chunk].exp()[:, None, None] * state
    n, heads = own.shape[:2]
    states = torch.matmul(decay.between, own.transpose(0, 1).reshape(heads, n, -1))
    if carry is not None and decay.continues:
        states += decay.from_carry[:, :, None] * carry.reshape(heads, 1, -1)
    states = states.transpose(0, 1).reshape(n + 1, *own.shape[1:])
    for chunk, state in inject:
        states[chunk] += state
    # A segment that starts after the last chunk of this block takes nothing from it: the next block checks.
    return states[:n], states[n]


def _exit_gradients(own, decay: _Decay, carry, inject):
    """Gradient of the state leaving each chunk [n, H, K, V], and of the one entering this block.

    own: gradient that each chunk's outputs give to its entry state. carry: gradient of the state entering the next
    block, None if that block starts a new segment. inject: (chunk, gradient) pairs at the last chunks of segments.
    """
    n, heads = own.shape[:2]
    contributions = own
    if inject:
        contributions = own.clone()
        for chunk, grad in inject:
            contributions[chunk] += grad if decay.total is None else decay.total[chunk].exp()[:, None, None] * grad
    rows = contributions.transpose(0, 1).reshape(heads, n, -1)
    exits = torch.matmul(decay.between[:, :n].mT, rows)
    if carry is not None:
        exits += decay.between[:, n, :, None] * carry.reshape(heads, 1, -1)
    exits = exits.transpose(0, 1).reshape(own.shape)
    for chunk, grad in inject:
        exits[chunk] += grad
    if not decay.continues:
        return exits, None
    return exits, own[0] + (exits[0] if decay.total is None else decay.total[0].exp()[:, None, None] * exits[0])


def _block_states(k, v, g, entry, which, segments, dtype):
    """The state entering each block: one forward sweep over k and v."""
    carries, carry = [], None
    for a, b in _blocks(segments):
        carries.append(carry)
        kb, vb = _heads_first(k[a:b], dtype), _heads_first(v[a:b], dtype)
        decay = _Decay.of(g, a, b, segments, dtype)
        _, carry = _entry_states(kb, vb, decay, carry, _inject(entry, which, segments, a, b))
    return carries


def _inject(states, which, segments, a, b, *, at_end=False):
    """(chunk within the block, state) for the listed segments whose first (or last) chunk is in chunks a..b."""
    found = []
    for state, index in zip(states, which):
        chunk = segments.chunk_offsets[index + 1] - 1 if at_end else segments.chunk_offsets[index]
        if a <= chunk < b:
            found.append((chunk - a, state))
    return found


def _blocks(segments):
    step = BLOCK[segments.chunk_segment.device.type]
    return [(a, min(a + step, segments.num_chunks)) for a in range(0, segments.num_chunks, step)]


def _heads_first(x, dtype):
    """[n, C, H, D] -> [n, H, C, D] in the accumulation dtype, laid out so that products over (n, H) need no copies."""
    x = x.transpose(1, 2)
    return x.new_empty(x.shape, dtype=dtype).copy_(x)


def _pad_decay(log_decay, segments):
    """fp64 [n, H, C], contiguous; None for None."""
    return None if log_decay is None else segments.pad(log_decay.double()).transpose(1, 2).contiguous()
