"""Decay per key channel (GLA, HGRN-2) in Triton kernels.

One pass over q, k and the gates puts all decays into the operands (`prepare_kernel`). What follows is plain matrix
products: a sum per split, a fold along the splits, one sweep per split for the outputs. Backward, a chain per split
writes the state before each chunk, a sweep back writes dv and the gradient after each chunk, and dq, dk and the gate's
gradient are formed chunk by chunk. Those states are larger than the inputs, so that they exist for a run of splits at a
time (`WAVE`). Derivation: docs/linear-attention.md.
"""

from dataclasses import dataclass, replace

import torch

from longspan.kernels.fold import fold_chains, summarize
from longspan.kernels.linear.channel_gradients import COLUMNS, GRADIENTS, gradients_kernel
from longspan.kernels.linear.channel_prepare import PREPARE, prepare_kernel
from longspan.kernels.linear.channel_states import STATES, states_kernel
from longspan.kernels.linear.channel_sweep import SWEEP, sweep_kernel
from longspan.kernels.linear.form import Spans
from longspan.kernels.linear.splits import Splits, padded, split_size, unit_stride

LEVELS = 6
CHUNK = 1 << LEVELS
WAVE = 1 << 27  # numbers in the states of chunks that exist at once, per direction of time


@dataclass(frozen=True)
class Tables:
    """splits: on the device; edges: on the host, the first chunk of every split, and the number of chunks."""

    splits: Splits
    edges: tuple[int, ...]

    def map(self, move) -> "Tables":
        return replace(self, splits=self.splits.map(move))

    def waves(self, limit: int) -> list[tuple[int, int]]:
        """The splits in runs [start, stop) of at most `limit` chunks, or of one split."""
        waves, start = [], 0
        for stop in range(1, len(self.edges)):
            if stop + 1 == len(self.edges) or self.edges[stop + 1] - self.edges[start] > limit:
                waves.append((start, stop))
                start = stop
        return waves


class Channel:
    """The Form (kernels.linear.form) of decay per key channel on CUDA: K and V up to 256 (fp32: 128).

    Operands are bf16 for bf16 inputs; fp16 has too little range for decayed operands and states, so fp16 inputs are
    computed in tf32, which has fp16's precision, and fp32 inputs in three tf32 products for each.
    """

    @staticmethod
    def tables(spans: Spans, heads: int, key_size: int, value_size: int) -> Tables:
        columns = -(-value_size // SWEEP[2, padded(key_size)][0][0])
        wave = Spans((0, CHUNK * max(1, WAVE // (heads * key_size * value_size))))
        size = min(split_size(x, heads * columns, CHUNK) for x in (spans, wave))  # a wave, too, fills the GPU
        splits = Splits.of(spans, size, CHUNK)
        return Tables(splits, (*splits.split_chunk.tolist(), splits.num_chunks))

    def __init__(self, tables, q, k, v, log_decay, beta, scale):
        assert beta is None, "the delta rule has its own form"
        self.tables, self.splits, self.scale = tables, tables.splits, scale
        self.q, self.k, self.v, self.g = (unit_stride(x) for x in (q, k, v, log_decay))
        self.num_tokens, self.heads, self.key_size = q.shape
        self.value_size = v.shape[2]
        self.work = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
        self.precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
        self._prepare()

    def summary(self):
        self.ahead()
        return summarize(*self.sums, self.splits.forward.summary)

    def ahead(self):
        if self.sums is None:
            self.sums = self._sum(self.write, self.v, self.splits.forward, reverse=False)

    def output(self, entry, dtype):
        entries = fold_chains(*self.sums, self.splits.forward.inner, entry)
        out = self.v.new_empty(self.v.shape, dtype=dtype)
        self._sweep(out, entries, None, (0, self.splits.num_splits), reverse=False)
        return out, (entries,)

    def start_backward(self, saved, d_out, gate):
        (self.entries,), self.gate, self.d_out = saved, gate, unit_stride(d_out.to(self.q.dtype))

    def gradient_summary(self):
        self.sums = self._sum(self.read, self.d_out, self.splits.backward, reverse=True)
        return fold_chains(*self.sums, self.splits.backward.summary)

    def gradient_ahead(self):
        if self.sums is None:
            self.sums = self._sum(self.read, self.d_out, self.splits.backward, reverse=True)
        limit = max(1, WAVE // (self.heads * self.key_size * self.value_size))
        self.waves = self.tables.waves(limit)
        self.states = self._chunk_states(self.waves[0]) if self.waves else None

    def gradients(self, exit_grad):
        exits = fold_chains(*self.sums, self.splits.backward.inner, exit_grad)
        dq, dk, dv = (x.new_empty(x.shape) for x in (self.q, self.k, self.v))
        dg = torch.empty_like(dk, dtype=torch.float32) if self.gate else None
        for wave in self.waves:
            states = self._chunk_states(wave) if self.states is None else self.states
            self.states, d_states = None, torch.empty_like(states)
            self._sweep(dv, exits, d_states, wave, reverse=True)
            self._gradients(dq, dk, dg, states, d_states, wave)
        return dq, dk, dv, dg, None

    def _prepare(self):
        shape = self.heads, self.num_tokens
        self.read, self.write = (self.q.new_empty(*shape, self.key_size, dtype=self.work).transpose(0, 1) for _ in "rw")
        self.scores = self.q.new_empty(*shape, CHUNK, dtype=self.work).transpose(0, 1)
        self.totals = self.q.new_empty(self.splits.num_chunks, self.heads, self.key_size, dtype=torch.float32)
        self.sums = None
        block, strong, warps, registers = PREPARE[self.work.itemsize, padded(self.key_size)]
        if self.num_tokens:
            prepare_kernel[(self.splits.num_chunks * self.heads,)](
                self.q, self.k, self.g, self.read, self.write, self.scores, self.totals,
                self.splits.chunk_first, self.splits.chunk_length,
                *self.q.stride()[:2], *self.k.stride()[:2], *self.g.stride()[:2], *self.read.stride()[:2],
                *self.scores.stride()[:2], self.scale, self.heads, self.key_size, block, strong, LEVELS,
                self.precision, num_warps=warps, num_stages=1, maxnreg=registers,
            )  # fmt: skip

    def _sum(self, x, y, direction, *, reverse):
        """(states [num_sums, H, K, V], log decays [num_sums, H, K]) of the splits that the direction needs, fp32."""
        splits = self.splits
        states = x.new_empty(splits.num_sums, self.heads, self.key_size, self.value_size, dtype=torch.float32)
        decays = states.new_empty(states.shape[:3])
        which = direction.splits
        self._run_states(len(which), x, y, None, states, decays, which, splits.sum_row, (0, 0), reverse)
        return states, decays

    def _chunk_states(self, wave):
        """[chunks, H, K, V]: the state entering each chunk of a wave."""
        start, stop = (self.tables.edges[split] for split in wave)
        states = self.write.new_empty(stop - start, self.heads, self.key_size, self.value_size)
        args = self.write, self.v, self.entries, states, None, None, self.splits.forward.row, (wave[0], start), False
        self._run_states(wave[1] - wave[0], *args)
        return states

    def _run_states(self, num_splits, x, y, entries, out, decays, which, rows, firsts, reverse):
        splits = self.splits
        block, warps, stages = STATES[self.work.itemsize, padded(self.key_size)]
        programs = num_splits * self.heads * -(-self.value_size // block)
        if programs:
            states_kernel[(programs,)](
                x, y, self.totals, entries, out, decays,
                which, splits.first, splits.length, splits.split_chunk, rows, *firsts,
                *x.stride()[:2], *y.stride()[:2], self.heads, self.key_size, self.value_size,
                padded(self.key_size), block, CHUNK, reverse, which is None, self.precision,
                num_warps=warps, num_stages=stages,
            )  # fmt: skip

    def _sweep(self, out, entries, states, wave, *, reverse):
        splits = self.splits
        direction = splits.backward if reverse else splits.forward
        x, y, z = (self.write, self.read, self.d_out) if reverse else (self.read, self.write, self.v)
        block, warps, stages = SWEEP[self.work.itemsize, padded(self.key_size)][reverse]
        programs = (wave[1] - wave[0]) * self.heads * -(-self.value_size // block)
        if programs:
            sweep_kernel[(programs,)](
                x, y, self.scores, z, self.totals, entries, out, states,
                splits.first, splits.length, splits.split_chunk, direction.row, wave[0], self.tables.edges[wave[0]],
                *x.stride()[:2], *self.scores.stride()[:2], *z.stride()[:2],
                self.heads, self.key_size, self.value_size, padded(self.key_size), block, CHUNK, reverse,
                self.precision, num_warps=warps, num_stages=stages,
            )  # fmt: skip

    def _gradients(self, dq, dk, dg, states, d_states, wave):
        q, k, v, g, d_out = self.q, self.k, self.v, self.g, self.d_out
        columns = min(COLUMNS[self.work.itemsize], padded(self.value_size))
        group, block, strong, warps, stages = GRADIENTS[self.work.itemsize, columns]
        group = min(group, padded(self.key_size))
        for column in range(0, self.value_size, columns):
            gradients_kernel[(len(states) * self.heads * -(-self.key_size // group),)](
                q, k, v, g, d_out, self.totals, states, d_states, dq, dk, dg,
                self.splits.chunk_first, self.splits.chunk_length, self.tables.edges[wave[0]],
                *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *g.stride()[:2], *d_out.stride()[:2],
                self.scale, self.heads, self.key_size, self.value_size,
                min(block, group), min(strong, group), group, columns,
                LEVELS, column, self.gate, self.precision, num_warps=warps, num_stages=stages,
            )  # fmt: skip
