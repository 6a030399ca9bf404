"""None, fixed and scalar decay in fused Triton kernels: a sum per split, a fold along the splits, one sweep per split.

Nothing per chunk goes to memory but the states that a data-dependent gate's gradient needs. Launches: 3 forward, 5
backward, and 2 more in each direction where spans are linked to other ranks.
"""

import torch

from longspan.kernels.fold import compose, fold_chains
from longspan.kernels.linear.splits import Splits, split_size
from longspan.kernels.linear.sweep import reverse_kernel, sum_kernel, sweep_kernel

CHUNK = 64
# Width of x and y, padded: (columns of z per program, warps, stages); SUM: tokens per step in front.
SUM = {16: (64, 64, 4, 2), 32: (64, 64, 4, 2), 64: (64, 64, 4, 3), 128: (64, 128, 8, 3), 256: (64, 64, 8, 2)}
SWEEP = {16: (64, 4, 2), 32: (64, 4, 2), 64: (64, 4, 2), 128: (64, 4, 2), 256: (64, 8, 1)}


class Fused:
    """The Form (kernels.linear.form) of no, fixed and scalar decay on CUDA, fp16, bf16 and fp32; K, V up to 256."""

    @staticmethod
    def tables(spans, heads, key_size, value_size) -> Splits:
        columns = -(-value_size // SWEEP[padded(key_size)][0])
        return Splits.of(spans, split_size(spans, heads * columns, CHUNK), CHUNK)

    def __init__(self, tables, q, k, v, log_decay, beta, scale):
        assert beta is None, "the delta rule has its own form"
        self.splits, self.scale = tables, scale
        self.q, self.k, self.v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        self.g = log_decay
        self.decay = "none" if self.g is None else "fixed" if self.g.ndim == 1 else "scalar"
        self.num_tokens, self.heads, self.key_size = q.shape
        self.value_size = v.shape[2]
        self.precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
        self.sums = None
        # Kernels compute addresses from every pointer they get, so what a variant does not read is some other tensor.
        self._gate = q if log_decay is None else log_decay
        self.chunk_states = self.q_sums = self.k

    def summary(self):
        self.sums = self._sum(self.k, self.v, 1.0, self.splits.forward, reverse=False)
        states, decays = self.sums
        chains = self.splits.forward.summary
        return fold_chains(states, decays, chains), compose(decays, chains.sources)

    def ahead(self):
        if self.sums is None:
            self.sums = self._sum(self.k, self.v, 1.0, self.splits.forward, reverse=False)

    def output(self, entry, dtype):
        entries = fold_chains(*self.sums, self.splits.forward.inner, entry)
        out = self.v.new_empty(self.v.shape, dtype=dtype)
        self._sweep(self.q, self.k, self.v, out, entries, transposed=False)
        return out, (entries,)

    def start_backward(self, saved, d_out, gate):
        (self.entries,), self.gate = saved, gate
        d_out = d_out.to(self.q.dtype)
        self.d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()

    def gradient_summary(self):
        self.sums = self._sum(self.q, self.d_out, self.scale, self.splits.backward, reverse=True)
        return fold_chains(*self.sums, self.splits.backward.summary)

    def gradient_ahead(self):
        if self.sums is None:
            self.sums = self._sum(self.q, self.d_out, self.scale, self.splits.backward, reverse=True)
        self.dq = self.k.new_empty(self.k.shape)
        if self.gate:
            shape = (self.splits.num_chunks, self.heads, self.value_size, self.key_size)
            self.chunk_states = self.k.new_empty(shape)
            columns = -(-self.key_size // SWEEP[padded(self.value_size)][0])
            self.q_sums = self.k.new_empty(columns, self.num_tokens, self.heads, dtype=torch.float32)
        self._sweep(self.d_out, self.v, self.k, self.dq, self.entries, transposed=True)

    def gradients(self, exit_grad):
        splits, (q, k, v, d_out) = self.splits, (self.q, self.k, self.v, self.d_out)
        exits = fold_chains(*self.sums, splits.backward.inner, exit_grad)
        dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
        gates = torch.empty_like(self.q_sums) if self.gate else self.q_sums

        def launch(x_size, z_size, only_dv, both):
            block, warps, stages = SWEEP[padded(x_size)]
            columns = -(-z_size // block) * (2 if both else 1)
            reverse_kernel[(columns, self.heads, splits.num_splits)](
                v, d_out, q, k, self._gate, dk, dv, exits, self.chunk_states, self.q_sums, gates,
                splits.first, splits.length, splits.backward.row, splits.split_chunk,
                *v.stride()[:2], *d_out.stride()[:2], *q.stride()[:2], *k.stride()[:2], *self._decay_strides(),
                self.scale, 1.0 / self.scale if self.scale else 0.0, self.num_tokens, only_dv,
                self.heads, x_size, z_size, padded(x_size), block, CHUNK,
                self.decay, self.gate and not only_dv, self.precision, num_warps=warps, num_stages=stages,
            )  # fmt: skip

        if splits.num_splits and self.key_size == self.value_size:
            launch(self.key_size, self.key_size, False, both=True)
        elif splits.num_splits:
            launch(self.value_size, self.key_size, False, both=False)
            launch(self.key_size, self.value_size, True, both=False)
        return self.dq, dk, dv, gates.sum(0) if self.gate else None, None

    def _sum(self, y, z, scale, direction, *, reverse):
        """(states [num_sums, H, K, V], log decays [num_sums, H] or None) of the splits the direction needs."""
        splits = self.splits
        states = y.new_empty(splits.num_sums, self.heads, y.shape[2], z.shape[2], dtype=torch.float32)
        decays = states.new_empty(splits.num_sums, self.heads)
        step, block, warps, stages = SUM[padded(y.shape[2])]
        if len(direction.splits):
            sum_kernel[(-(-z.shape[2] // block), self.heads, len(direction.splits))](
                y, z, self._gate, states, decays, direction.splits, splits.first, splits.length, splits.sum_row,
                *y.stride()[:2], *z.stride()[:2], *self._decay_strides(), scale,
                self.heads, y.shape[2], z.shape[2], padded(y.shape[2]), block, step,
                self.decay, reverse, self.precision, num_warps=warps, num_stages=stages,
            )  # fmt: skip
        return states, None if self.g is None else decays

    def _sweep(self, x, y, z, out, entries, *, transposed):
        splits, gate = self.splits, transposed and self.gate
        block, warps, stages = SWEEP[padded(x.shape[2])]
        if splits.num_splits:
            sweep_kernel[(-(-z.shape[2] // block), self.heads, splits.num_splits)](
                x, y, z, self._gate, out, entries, self.q, self.chunk_states, self.q_sums,
                splits.first, splits.length, splits.forward.row, splits.split_chunk,
                *x.stride()[:2], *y.stride()[:2], *z.stride()[:2], *self._decay_strides(), *self.q.stride()[:2],
                *((1, self.value_size) if transposed else (self.value_size, 1)), self.scale, self.num_tokens,
                self.heads, x.shape[2], z.shape[2], padded(x.shape[2]), block, CHUNK,
                self.decay, gate, self.precision, num_warps=warps, num_stages=stages,
            )  # fmt: skip

    def _decay_strides(self):
        return (0, 0) if self.g is None else (0, self.g.stride(0)) if self.g.ndim == 1 else self.g.stride()


def padded(size: int) -> int:
    """The next power of two, at least 16: what tl.dot takes."""
    return max(16, 1 << (size - 1).bit_length())
