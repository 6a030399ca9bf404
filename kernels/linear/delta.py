"""The delta rule, with or without a gate per head, in fused Triton kernels. Formulas: docs/linear-attention.md.

Forward: what every chunk needs of its own tokens (`delta_prepare`, kept for the backward pass: 288 bytes per token and
head in 16 bits); per split its summary, an affine map; a fold along the splits; one sweep per split. Backward: a sweep
forwards writes the state entering every chunk, one backwards the gradient of the state leaving it, after which every
chunk is on its own. Launches: 4 forward, 5 backward, and 2 and 1 more where spans are linked to other ranks.
"""

from dataclasses import dataclass

import torch

from longspan.kernels.fold import fold_chains, summarize
from longspan.kernels.linear.delta_backward import backward_sums
from longspan.kernels.linear.delta_forward import CONFIGS, forward_output, forward_states, forward_sums
from longspan.kernels.linear.delta_gradients import input_gradients
from longspan.kernels.linear.delta_prepare import prepare
from longspan.kernels.linear.delta_tiles import CHUNK, Call, Prepared, config
from longspan.kernels.linear.splits import Splits, padded, split_size, unit_stride


@dataclass(frozen=True)
class DeltaTables:
    """summed: int32, the splits that have a row among the sums. needed: int32 [S], what is needed of each split: 0
    nothing, 1 the state it leaves when it starts from zero, 2 also the matrix that acts on the state entering it."""

    splits: Splits
    summed: torch.Tensor
    needed: torch.Tensor

    @classmethod
    def of(cls, splits: Splits) -> "DeltaTables":
        summed = (splits.sum_row >= 0).nonzero().flatten()
        chains, forward = splits.forward.summary.sources, splits.forward
        needed = torch.zeros(splits.num_splits, dtype=torch.int32)
        needed[forward.splits] = 1 + (forward.row[forward.splits] >= 0).int()
        needed[summed[chains[chains >= 0]]] = 2
        return cls(splits, summed.int(), needed)

    def map(self, move) -> "DeltaTables":
        """The same tables with every tensor passed through `move`."""
        return DeltaTables(self.splits.map(move), move(self.summed), move(self.needed))


class Delta:
    """The Form (kernels.linear.form) of the delta rule on CUDA: K, V up to 256 (fp32: 128); no decay of single key
    channels."""

    per_channel = False

    @classmethod
    def tables(cls, spans, heads, key_size, value_size) -> DeltaTables:
        columns, warps, *_ = config(CONFIGS["output"], 2, padded(key_size), cls.per_channel)
        size = split_size(spans, heads * -(-value_size // columns), CHUNK, rounds=max(1, 8 // warps))
        return DeltaTables.of(Splits.of(spans, size, CHUNK))

    def __init__(self, tables, q, k, v, log_decay, beta, scale):
        assert beta is not None and max(k.shape[2], v.shape[2]) <= 256, (k.shape, v.shape)
        q, k, v = (unit_stride(x) for x in (q, k, v))
        self.inputs = self.call = Call(tables.splits, q, k, v, log_decay, beta, scale)
        self.tables, self.splits = tables, tables.splits
        self.prepared = self.sums = None

    def summary(self):
        self.ahead()
        return summarize(*self.sums, self.splits.forward.summary)

    def ahead(self):
        if self.sums is None:
            self._prepare()
            self.sums = forward_sums(self.call, self.prepared, self.tables)

    def output(self, entry, dtype):
        states, transitions = self.sums
        entries = fold_chains(states, transitions, self.splits.forward.inner, entry)
        return forward_output(self.call, self.prepared, entries, dtype), (entries, transitions, *self.prepared)

    def start_backward(self, saved, d_out, gate):
        self.entries, transitions, *prepared = saved
        self.transitions, self.gate, self.prepared = transitions.mT, gate, Prepared(*prepared)
        self.d_out = unit_stride(d_out.to(self.call.q.dtype))

    def gradient_summary(self):
        self.sums = backward_sums(self.call, self.prepared, self.d_out)
        return fold_chains(self.sums, self.transitions, self.splits.backward.summary)

    def gradient_ahead(self):
        if self.sums is None:
            self.sums = backward_sums(self.call, self.prepared, self.d_out)
        self.entering = forward_states(self.call, self.prepared, self.entries)

    def gradients(self, exit_grad):
        exits = fold_chains(self.sums, self.transitions, self.splits.backward.inner, exit_grad)
        dq, dk, dv, d_beta, d_decay = self._input_gradients(exits)
        return dq, dk, dv, d_decay, d_beta

    def _prepare(self):
        self.prepared = prepare(self.call)

    def _input_gradients(self, exits):
        return input_gradients(self.call, self.prepared, self.d_out, self.entering, exits, self.gate)
