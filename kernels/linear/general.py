"""Linear attention of every family in plain PyTorch: any decay, with or without the delta rule; gradients by autograd.

Work comes in blocks of chunks (kernels.linear.groups): one batched product for each thing that chunks do on their own,
then the recurrence of states step by step. Going back, a block is computed anew from the states that entered it and
differentiated by autograd: kept is one state per span and block, and scratch memory, some ROWS * H * (K * V + CHUNK *
(K + V + CHUNK)) numbers, does not grow with the sequence. The gradient that outputs alone give to the state entering a
span (`gradient_summary`) is the same with nothing else asked for. Derivation: docs/linear-attention.md.

Log decays are summed, and their differences formed, in fp64; what is exponentiated is never above 0. As both sides of
a difference get the very same gradient, they cancel exactly, and what the gate receives is a sum over paths.
"""

from dataclasses import dataclass

import torch

from longspan.kernels.linear.form import CLOSED
from longspan.kernels.linear.groups import Groups
from longspan.kernels.wide import wide_dtype


class General:
    """The Form (kernels.linear.form) of every family in plain PyTorch."""

    tables = Groups.of

    def __init__(self, tables, q, k, v, log_decay, beta, scale):
        self.table, self.scale = tables, scale
        self.dtype = wide_dtype(q.dtype)
        self.num_tokens, self.heads, self.key_size = q.shape
        self.value_size = v.shape[2]
        self.by_head = log_decay is not None and log_decay.ndim < 3
        if self.by_head:
            log_decay = log_decay[..., None].expand(self.num_tokens, self.heads, 1)
        self.inputs = q, k, v, log_decay, None if beta is None else beta[..., None]
        self.states = {}

    def summary(self):
        _, _, _, g, beta = self.inputs
        # Started from the identity and without writing anything, the columns of a state become the transition.
        matrix = self.key_size if beta is not None else 0
        shape = (self.table.num_linked, self.heads, self.key_size, self.value_size + matrix)
        end = self._new(shape)
        log_decay = None if g is None or matrix else self._new((*shape[:2], g.shape[2]))
        for group in self.table.groups:
            if group.linked is None:
                continue
            start = self._new((group.num_spans * self.heads, *shape[2:])).zero_()
            start[:, :, self.value_size :] = torch.eye(self.key_size, matrix, dtype=self.dtype, device=start.device)
            state, total = start, 0.0
            for block in group.blocks:
                _, k, v, decay, strength = self._gather(block)
                v = torch.nn.functional.pad(v, (0, matrix))
                chunks = _Chunks.of(None, k, v, decay, strength)
                _, _, state = _recur(chunks, state, self._sizes(block))
                if log_decay is not None:
                    total = total + _per_span(decay.sum(1), self._sizes(block), len(start))
            end[group.linked] = state.unflatten(0, (-1, self.heads))
            if log_decay is not None:
                log_decay[group.linked] = total.to(self.dtype).unflatten(0, (-1, self.heads))
        if matrix:
            return end[..., : self.value_size].contiguous(), end[..., self.value_size :].contiguous()
        return end, log_decay[..., 0] if self.by_head else log_decay

    def ahead(self):
        self.out = self._new((self.num_tokens, self.heads, self.value_size))
        self._forward(None, False)

    def output(self, entry, dtype):
        self._forward(entry, True)
        states = (self.states[block.start] for group in self.table.groups for block in group.blocks[1:])
        return self.out.to(dtype), (entry, *states)

    def start_backward(self, saved, d_out, gate):
        self.entry, *states = saved
        starts = (block.start for group in self.table.groups for block in group.blocks[1:])
        self.states = dict(zip(starts, states, strict=True))
        self.d_out, self.gate = d_out, gate

    def gradient_summary(self):
        d_state = self._new((self.table.num_linked, self.heads, self.key_size, self.value_size))
        for group in self.table.groups:
            if group.linked is not None:
                d_state[group.linked] = self._backward(group, None, only_state=True).unflatten(0, (-1, self.heads))
        return d_state

    def gradient_ahead(self):
        self.grads = [None if x is None else self._new(x.shape) for x in self.inputs]
        if not self.gate:
            self.grads[3] = None
        for group in self.table.groups:
            if group.left is None:
                self._backward(group, None)

    def gradients(self, exit_grad):
        for group in self.table.groups:
            if group.left is not None:
                self._backward(group, exit_grad)
        dq, dk, dv, dg, d_beta = self.grads
        dg = dg[..., 0] if dg is not None and self.by_head else dg
        return dq, dk, dv, dg, None if d_beta is None else d_beta[..., 0]

    def _forward(self, entry, entered):
        """Outputs of the groups that a state enters, or of the others; keeps the state entering each block."""
        for group in self.table.groups:
            if (group.entered is not None) != entered:
                continue
            state = self._start(group, entry)
            for number, block in enumerate(group.blocks):
                if number:
                    self.states[block.start] = state
                out, state = _attend(*self._gather(block), state, self._sizes(block), self.scale)
                self._scatter(block, self.out, out)

    def _backward(self, group, exit_grad, *, only_state=False):
        """Gradient of the states entering a group, from that of the states leaving it; fills in those of the inputs."""
        if group.left is None or exit_grad is None:
            d_state = self._zeros(group)
        else:
            d_state = exit_grad[group.left].flatten(0, 1)
        for number, block in reversed(list(enumerate(group.blocks))):
            inputs = list(self._gather(block))
            if only_state:  # the map of states is affine: its gradient is the same everywhere
                state = self._zeros(group)
            else:
                state = self.states[block.start] if number else self._start(group, self.entry)
            wanted = [] if only_state else [n for n, grad in enumerate(self.grads) if grad is not None]
            leaves = [x.detach().requires_grad_() for x in (*(inputs[n] for n in wanted), state)]
            for n, leaf in zip(wanted, leaves):
                inputs[n] = leaf
            with torch.enable_grad():
                results = _attend(*inputs, leaves[-1], self._sizes(block), self.scale)
            d_out = self._pad(block, self.d_out).to(self.dtype)
            *grads, d_state = torch.autograd.grad(results, leaves, (d_out, d_state))
            for n, grad in zip(wanted, grads):
                self._scatter(block, self.grads[n], grad)
        return d_state

    def _start(self, group, entry):
        return self._zeros(group) if group.entered is None else entry[group.entered].flatten(0, 1)

    def _zeros(self, group):
        return self._new((group.num_spans * self.heads, self.key_size, self.value_size)).zero_()

    def _new(self, shape):
        return torch.empty(shape, dtype=self.dtype, device=self.inputs[0].device)

    def _sizes(self, block):
        return [count * self.heads for count in block.counts]

    def _gather(self, block):
        """q, k, v, log decay (fp64) and beta of one block, [chunks * H, C, ...]; zeros in the padding."""
        dtypes = (self.dtype, self.dtype, self.dtype, torch.float64, self.dtype)
        q, k, v, g, beta = (
            None if x is None else self._pad(block, x).to(dtype) for x, dtype in zip(self.inputs, dtypes)
        )
        return q, k, v, None if g is None else g.clamp(min=CLOSED), beta

    def _pad(self, block, x):
        """[T, H, D] -> [chunks * H, C, D]."""
        x = x.index_select(0, self.table.tokens[block.start : block.stop])
        shape = (sum(block.counts), block.length, *x.shape[1:])
        if block.padded:
            padded = x.new_zeros(shape[0] * shape[1], *x.shape[1:])
            x = padded.index_copy_(0, self.table.slots[block.start : block.stop], x)
        return x.view(shape).transpose(1, 2).flatten(0, 1)

    def _scatter(self, block, out, x):
        """Writes [chunks * H, C, D] to the block's tokens in `out`, [T, H, D]."""
        x = x.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(0, 1).to(out.dtype)
        if block.padded:
            x = x.index_select(0, self.table.slots[block.start : block.stop])
        out.index_copy_(0, self.table.tokens[block.start : block.stop], x)


@dataclass(frozen=True)
class _Chunks:
    """What chunks do, for the recurrence: `write` minus `read` times the state is added along `key`.

    key: [b, C, K], decayed to the chunk's end; write: [b, C, V]; read: [b, C, K] or None; keep: what a chunk leaves of
    the state's key rows, [b, K or 1, 1] or None; scores: [b, C, C], what each query reads of each write, None without
    queries; query: [b, C, K], decayed from the chunk's start.
    """

    key: torch.Tensor
    write: torch.Tensor
    read: torch.Tensor | None
    keep: torch.Tensor | None
    scores: torch.Tensor | None
    query: torch.Tensor | None

    @classmethod
    def of(cls, q, k, v, g, beta):
        inside = None if g is None else g.cumsum(1)
        end = None if g is None else inside[:, -1:]
        key, keep = (k, None) if g is None else (_decayed(k, end - inside), end.mT.to(k.dtype).exp())
        rows = [x for x in (q, None if beta is None else k) if x is not None]
        if not rows:
            return cls(key, v, None, keep, None, None)
        scores = [x.squeeze(2) for x in _scores(torch.stack(rows, 2), k, inside).split(1, 2)]
        query = None if q is None else _decayed(q, inside)
        if beta is None:
            return cls(key, v, None, keep, scores[0], query)
        # Within a chunk the writes solve (I + A) x = right, with A = beta k k^T decayed, strictly lower triangular.
        right = beta * torch.cat([v, _decayed(k, inside)], -1)
        solved = torch.linalg.solve_triangular(beta * scores[-1], right, upper=False, unitriangular=True)
        write, read = solved.split([v.shape[2], k.shape[2]], -1)
        return cls(key, write, read, keep, None if q is None else scores[0], query)


def _attend(q, k, v, g, beta, state, sizes, scale):
    """Outputs [b, C, V] of one block, and `state` [spans * H, K, V] after it. sizes: running spans * H of each step."""
    chunks = _Chunks.of(q, k, v, g, beta)
    entries, writes, state = _recur(chunks, state, sizes)
    out = torch.baddbmm(torch.bmm(chunks.query, entries), chunks.scores, writes, beta=scale, alpha=scale)
    return out, state


def _recur(chunks: _Chunks, state, sizes):
    """(state entering each chunk [b, K, V], what each chunk writes [b, C, V], state afterwards), step by step."""
    nothing = [None] * len(sizes)
    parts = (chunks.key, chunks.write, chunks.read, chunks.keep)
    entries, writes, finished = [], [], []
    for key, write, read, keep in zip(*(nothing if x is None else x.split(sizes) for x in parts)):
        if len(state) > len(key):
            finished.append(state[len(key) :])
            state = state[: len(key)]
        entries.append(state)
        writes.append(write if read is None else torch.baddbmm(write, read, state, alpha=-1.0))
        state = torch.baddbmm(state if keep is None else keep * state, key.mT, writes[-1])
    state = torch.cat([state, *reversed(finished)]) if finished else state
    return torch.cat(entries), chunks.write if chunks.read is None else torch.cat(writes), state


def _scores(rows, k, g):
    """sum_c rows_ic k_jc exp(G_ic - G_jc) for i >= j, else 0. rows: [b, C, m, K]; k: [b, C, K]; g: the inclusive sums
    G, [b, C, K or 1] in fp64, or None. Returns [b, C, m, C].
    """
    length = k.shape[1]
    if g is None or g.shape[2] == 1:
        scores = torch.bmm(rows.flatten(1, 2), k.mT).unflatten(1, (length, -1))
        return scores * _lower(g, length, scores)[:, :, None]
    if length == 1:
        return rows @ k[..., None]
    # The later half sees the earlier one through the sums between the two: both exponents are <= 0.
    half = length // 2
    middle = g[:, half - 1 : half]
    keys = _decayed(k[:, :half], middle - g[:, :half])
    late = _decayed(rows[:, half:], (g[:, half:] - middle)[:, :, None])
    across = torch.bmm(late.flatten(1, 2), keys.mT).unflatten(1, (half, -1))
    halves = (x.unflatten(1, (2, half)).flatten(0, 1) for x in (rows, k, g))
    early, late = _scores(*halves).unflatten(0, (-1, 2)).unbind(1)
    return torch.cat([torch.nn.functional.pad(early, (0, half)), torch.cat([across, late], -1)], 1)


def _lower(g, length, like):
    """exp(G_i - G_j) for i >= j, else 0, [b, C, C] in the dtype of `like`; without decay ones and zeros, [1, C, C]."""
    lower = torch.ones(1, length, length, dtype=torch.bool, device=like.device).tril()
    if g is None:
        return lower.to(like.dtype)
    return (g - g.mT).to(like.dtype).masked_fill(~lower, -torch.inf).exp()


def _decayed(x, log_decay):
    return x if log_decay is None else x * log_decay.to(x.dtype).exp()


def _per_span(x, sizes, num_rows):
    """Sums rows of steps onto the spans they belong to: [b, ...] -> [num_rows, ...]."""
    total = x.new_zeros(num_rows, *x.shape[1:])
    for part in x.split(sizes):
        total[: len(part)] += part
    return total
