"""None, fixed and scalar decay in fused Triton kernels: a sum per split, a fold along the splits, one sweep per split.

No state of a chunk goes to memory. Launches: 3 forward and 4 backward (5 if widths or token strides differ), with a
scalar gate 4 and 6 (on Hopper 3 and 5), and 2 more each where spans are linked to other ranks. On Hopper, where none
are, a gate takes 1 and 3: sums, folds and sweeps of a direction in one.
"""

import torch

from longspan.kernels.fold import fold_chains, summarize
from longspan.kernels.linear import hopper
from longspan.kernels.linear.gate import STEP, gate_kernel
from longspan.kernels.linear.splits import Splits, padded, split_size, unit_stride
from longspan.kernels.linear.sweep import decay_kernel, reverse_kernel, sum_kernel, sweep_kernel

CHUNK = 64
# Bytes of an element, width of x and y (padded): (columns of z per program, warps, stages). Measured on H200 for
# (2, 128); fp32, whose products are three of tf32, is laid out to fit.
SUM = {
    (2, 16): (64, 4, 2), (2, 32): (64, 4, 2), (2, 64): (64, 4, 3), (2, 128): (64, 4, 4), (2, 256): (64, 8, 2),
    (4, 16): (64, 4, 1), (4, 32): (64, 4, 1), (4, 64): (64, 4, 1), (4, 128): (64, 8, 1),
}  # fmt: skip
SWEEP = {
    (2, 16): (64, 4, 2), (2, 32): (64, 4, 2), (2, 64): (64, 4, 2), (2, 128): (64, 4, 2), (2, 256): (64, 8, 2),
    (4, 16): (64, 4, 1), (4, 32): (64, 4, 1), (4, 64): (64, 4, 1), (4, 128): (32, 4, 1),
}  # fmt: skip
# Stages of the sweep forward in time of (2, 128), measured on H100. Not for scalar gates, whose exponentials want two
# programs per multiprocessor.
LONE_STAGES = 4


class Fused:
    """The Form (kernels.linear.form) of no, fixed and scalar decay on CUDA: bf16 with K, V up to 256, fp32
    up to 128."""

    @staticmethod
    def tables(spans, heads, key_size, value_size) -> Splits:
        columns = -(-value_size // SWEEP[2, padded(key_size)][0])
        return Splits.of(spans, split_size(spans, heads * columns, CHUNK), CHUNK)

    def __init__(self, tables, q, k, v, log_decay, beta, scale):
        assert beta is None, "the delta rule has its own form"
        self.splits, self.scale = tables, scale
        self.q, self.k, self.v = (unit_stride(x) for x in (q, k, v))
        self.decay = "none" if log_decay is None else "fixed" if log_decay.ndim == 1 else "scalar"
        self.num_tokens, self.heads, self.key_size = q.shape
        self.value_size = v.shape[2]
        self.precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
        self.sums = None
        # Kernels compute addresses from every pointer they get, so what a variant does not read is some other tensor.
        self.decays = q if log_decay is None else log_decay
        if self.decay == "fixed":
            self.decays = log_decay.contiguous()
        self.decay_strides = log_decay.stride() if self.decay == "scalar" else (0, 0)

    def summary(self):
        self._sum_forward()
        return summarize(*self.sums, self.splits.forward.summary, self.parts)

    def ahead(self):
        if not hopper.takes_at_once(self, "forward"):
            self._sum_forward()

    def _sum_forward(self):
        """Where the gate is scalar, its decays inside chunks, too, which the backward pass gets from here; the kernels
        for Hopper form them where they are used."""
        if self.sums is not None:
            return
        if self.decay == "scalar" and not hopper.takes(self):
            self.decays = self._chunk_decays(self.decays)
        self.sums = self._sum(self.k, self.v, 1.0, self.splits.forward, reverse=False)

    def output(self, entry, dtype):
        out, inner = self.v.new_empty(self.v.shape, dtype=dtype), self.splits.forward.inner
        if self.sums is None:
            from longspan.kernels.linear.hopper import at_once

            entries = self._states(inner.num_out)
            at_once.launch(self, out, entries)
        else:
            entries = fold_chains(*self.sums, inner, entry, self.parts)
            self._sweep(self.q, self.k, self.v, out, entries, self.q, transposed=False)
        return out, (entries, self.decays) if self.decay == "scalar" and not hopper.takes(self) else (entries,)

    def start_backward(self, saved, d_out, gate):
        self.entries, *decays = saved
        if decays:
            (self.decays,) = decays
        self.gate = gate
        self.d_out = unit_stride(d_out.to(self.q.dtype))

    def gradient_summary(self):
        self.sums = self._sum(self.q, self.d_out, self.scale, self.splits.backward, reverse=True)
        return fold_chains(*self.sums, self.splits.backward.summary, parts=self.parts)

    def gradient_ahead(self):
        if self.sums is None and not hopper.takes_at_once(self, "backward"):
            self.sums = self._sum(self.q, self.d_out, self.scale, self.splits.backward, reverse=True)
        self.dq = self.reads = self.k.new_empty(self.k.shape)
        if self.gate:
            self.reads = self._row_sums(self.value_size)
        self._sweep(self.d_out, self.v, self.k, self.dq, self.entries, self.reads, transposed=True)

    def gradients(self, exit_grad):
        splits, (q, k, v, d_out) = self.splits, (self.q, self.k, self.v, self.d_out)
        exits = None
        if self.sums is not None:
            exits = fold_chains(*self.sums, splits.backward.inner, exit_grad, self.parts)
        dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
        writes = through = dk
        if self.gate:
            writes = self._row_sums(self.value_size)
            through = writes.new_empty(len(writes), splits.num_chunks, self.heads)

        def launch(which, x_size, z_size):
            block, warps, stages = self._config(SWEEP, x_size)
            columns = -(-z_size // block) * (2 if which == "both" else 1)
            reverse_kernel[(columns * self.heads * splits.num_splits,)](
                v, d_out, q, k, self.decays, dk, dv, exits, writes, through,
                splits.first, splits.length, splits.backward.row, splits.split_chunk,
                *v.stride()[:2], *d_out.stride()[:2], *q.stride()[:2], *k.stride()[:2],
                self.scale, 1.0 / self.scale if self.scale else 0.0, self.num_tokens, splits.num_chunks,
                self.heads, x_size, z_size, padded(x_size), block, CHUNK,
                self.decay, which, self.gate and which == "dk", self.precision, num_warps=warps, num_stages=stages,
            )  # fmt: skip

        alike = self.key_size == self.value_size and len({x.stride(0) for x in (q, k, v, d_out)}) == 1
        if splits.num_splits and hopper.takes(self):
            if self.gate:  # all columns at once; beside what passes the end of a chunk, its decay
                writes, through = writes[:1], through[:2]
            if exits is None:
                from longspan.kernels.linear.hopper import at_once

                exits = self._states(splits.backward.inner.num_out)
                at_once.launch_reverse(self, dk, dv, exits, writes, through)
            else:
                from longspan.kernels.linear.hopper import sweep_reverse

                sweep_reverse.launch(self, dk, dv, exits, writes, through)
        elif splits.num_splits and alike and not self.gate:
            launch("both", self.key_size, self.key_size)
        elif splits.num_splits:  # row sums for the gate leave no registers to choose between the two while running
            launch("dk", self.value_size, self.key_size)
            launch("dv", self.key_size, self.value_size)
        return self.dq, dk, dv, self._gate_gradient(writes, through, exits) if self.gate else None, None

    def _row_sums(self, x_size):
        """[column blocks, H, T], of a sweep whose result is as wide as the keys."""
        columns = -(-self.key_size // self._config(SWEEP, x_size)[0])
        return self.k.new_empty(columns, self.heads, self.num_tokens, dtype=torch.float32)

    def _gate_gradient(self, writes, through, exits):
        splits, reads = self.splits, self.reads
        gradient = reads.new_empty(self.heads, self.num_tokens)
        if splits.num_splits:
            gate_kernel[(splits.num_splits * self.heads,)](
                reads, writes, through, None if hopper.takes(self) else self.decays, self.entries, exits, gradient,
                splits.first, splits.length, splits.split_chunk, splits.forward.next_row, splits.backward.row,
                self.num_tokens, splits.num_chunks, self.heads,
                self.key_size * self.value_size, len(reads), len(writes), CHUNK, STEP, num_warps=8,
            )  # fmt: skip
        return gradient.t()

    def _config(self, table, width):
        return table[self.q.dtype.itemsize, padded(width)]

    def _chunk_decays(self, gate):
        """[H, T, 2], see decay_kernel: fp64 for fp32 tensors, whose weights are differences of these, else fp32."""
        splits, heads_per_program = self.splits, 16
        dtype = torch.float64 if self.q.dtype == torch.float32 else torch.float32
        decays = gate.new_empty(self.heads, self.num_tokens, 2, dtype=dtype)
        if splits.num_chunks:
            decay_kernel[(splits.num_chunks, -(-self.heads // heads_per_program))](
                gate, decays, splits.chunk_first, splits.chunk_length, *gate.stride(),
                self.num_tokens, self.heads, heads_per_program, CHUNK,
            )  # fmt: skip
        return decays

    def _sum(self, y, z, scale, direction, *, reverse):
        """(states [num_sums, H, K, V], log decays [num_sums, H] or None) of the splits the direction needs. Where
        `self.parts` [num_sums, H] is not None, a state is the sum of so many [num_sums, parts, H, K, V]."""
        splits, shape, self.parts = self.splits, (self.heads, y.shape[2], z.shape[2]), None
        totals = self.q.new_empty(splits.num_sums, self.heads, dtype=torch.float32)
        if hopper.takes(self):
            from longspan.kernels.linear.hopper import sweep_sum

            if sweep_sum.PARTS[self.decay] > 1:
                shape = sweep_sum.PARTS[self.decay], *shape
                self.parts = totals.new_empty(totals.shape, dtype=torch.int32)
            states = totals.new_empty(splits.num_sums, *shape)
            if len(direction.splits):
                sweep_sum.launch(self, y, z, scale, direction, states, totals, self.parts, reverse=reverse)
            return states, None if self.decay == "none" else totals
        states = totals.new_empty(splits.num_sums, *shape)
        block, warps, stages = self._config(SUM, y.shape[2])
        if len(direction.splits):
            sum_kernel[(-(-z.shape[2] // block) * self.heads * len(direction.splits),)](
                y, z, self.decays, states, totals, direction.splits, splits.first, splits.length, splits.sum_row,
                *y.stride()[:2], *z.stride()[:2], scale, self.num_tokens,
                self.heads, y.shape[2], z.shape[2], padded(y.shape[2]), block, CHUNK,
                self.decay, reverse, self.precision, num_warps=warps, num_stages=stages,
            )  # fmt: skip
        return states, None if self.decay == "none" else totals

    def _states(self, rows):
        return self.q.new_empty(rows, self.heads, self.key_size, self.value_size, dtype=torch.float32)

    def _sweep(self, x, y, z, out, entries, reads, *, transposed):
        splits = self.splits
        if splits.num_splits and hopper.takes(self):
            from longspan.kernels.linear.hopper import sweep

            return sweep.launch(self, x, y, z, out, entries, reads, transposed=transposed)
        block, warps, stages = self._config(SWEEP, x.shape[2])
        if self.decay != "scalar" and (x.dtype.itemsize, padded(x.shape[2])) == (2, 128):
            stages = LONE_STAGES
        if splits.num_splits:
            sweep_kernel[(-(-z.shape[2] // block) * self.heads * splits.num_splits,)](
                x, y, z, self.decays, out, entries, self.q, reads, splits.first, splits.length, splits.forward.row,
                *x.stride()[:2], *y.stride()[:2], *z.stride()[:2], *self.q.stride()[:2],
                *((1, self.value_size) if transposed else (self.value_size, 1)), self.scale, self.num_tokens,
                self.heads, x.shape[2], z.shape[2], padded(x.shape[2]), block, CHUNK,
                self.decay, transposed and self.gate, self.precision, num_warps=warps, num_stages=stages,
            )  # fmt: skip
