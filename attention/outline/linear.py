"""Linear attention: states, and what the kernels of each form keep."""

from dataclasses import dataclass

import torch

from longspan.attention.outline.context import Outline
from longspan.attention.outline.stand_in import Call, StandIn
from longspan.kernels.linear import hopper
from longspan.kernels.linear.form import Spans
from longspan.kernels.linear.groups import CHUNK, ROWS
from longspan.kernels.linear.splits import split_size
from longspan.kernels.wide import wide_dtype

# Of the fused kernels of linear attention (kernels.linear), which need Triton to be asked: multiprocessors that splits
# are made for; columns of a program and programs per multiprocessor, and those of the delta rule with wide keys; fp32
# numbers per token and head that the delta rule keeps beside two matrices of chunks; numbers in the states of chunks in
# one wave of decay per channel; columns of scores kept there.
PROCESSORS, COLUMNS, ROUNDS, WIDE_DELTA = 132, 64, 2, (32, 1)
DELTA_ROW_NUMBERS, CHANNEL_WAVE_NUMBERS, CHANNEL_SCORES = 8, 1 << 27, 64


def outlined_linear(outline: Outline, q, k, v, log_decay, beta, causal, dtype):
    return StandIn.apply(Linear(outline, causal, dtype), q, k, v, log_decay, beta)


@dataclass(frozen=True)
class Linear:
    """States travel; of each span, or split, the state that enters is saved."""

    outline: Outline
    causal: bool
    dtype: torch.dtype

    def travels(self, q, k, v, log_decay, beta):
        rows = len(self.outline.lengths) if not self.causal else self.outline.linked
        return self._states(rows, q, v)

    def output(self, kept, q, k, v, log_decay, beta):
        form = self._note(q, v, log_decay, beta, backward=False)
        out = v.new_empty(v.shape, dtype=self.dtype)
        scratch = self._scratch(form, q, v, log_decay)
        if form in ("whole", "chunked"):
            return out, (kept,)
        if form == "general":
            return out, (kept, *(self._states(rows, q, v) for rows in self._blocks(len(q))))
        splits = self._splits(form, q, v)
        saved = [self._states(splits, q, v)]
        if form in ("delta", "kda"):
            matrices = q.new_empty(len(q), q.shape[1], 2 * CHUNK)
            rows = q.new_empty(len(q), q.shape[1], DELTA_ROW_NUMBERS, dtype=torch.float32)
            saved += [self._states(splits, q, q), matrices, rows]
        if form in ("fused", "kda"):
            saved += scratch
        return out, tuple(saved)

    def hold(self, d_out, q, k, v, log_decay, beta):
        form = self._note(q, v, log_decay, beta, backward=True)
        held = [self._states(self._splits(form, q, v), q, v)]
        if form not in ("fused", "kda"):  # they save it
            held += self._scratch(form, q, v, log_decay)
        if form == "fused" and log_decay is not None and log_decay.requires_grad:
            columns = -(-q.shape[2] // COLUMNS)  # sums of rows, of the reading and of the writing side
            held += [q.new_empty(columns, q.shape[1], len(q), dtype=torch.float32) for _ in range(2)]
        if form == "channel":
            held += [q.new_empty(self._wave(q, v), q.shape[1], q.shape[2], v.shape[2]) for _ in range(2)]
        return held

    def _scratch(self, form, q, v, log_decay):
        if form == "fused" and log_decay is not None and log_decay.ndim == 2:
            if self.outline.hopper and hopper.takes_heads(q, v):  # its kernels form decays where they use them
                return []
            dtype = torch.float64 if q.dtype == torch.float32 else torch.float32
            return [log_decay.new_empty(*log_decay.shape, 2, dtype=dtype)]
        if form == "channel":
            return [torch.empty_like(q), torch.empty_like(q), q.new_empty(*q.shape[:2], CHANNEL_SCORES)]
        if form == "kda":  # q and k with their decays, and what decays in a chunk
            total = q.new_empty(-(-len(q) // CHUNK), *q.shape[1:], dtype=torch.float32)
            return [*(torch.empty_like(q) for _ in range(3)), total]
        if form == "whole":
            return [torch.empty_like(v, dtype=wide_dtype(v.dtype))]
        return []

    def _note(self, q, v, log_decay, beta, backward):
        form, name = self._form(log_decay, beta)
        self.outline.record(Call("linear", name, backward, q.shape[1], q.shape[1], q.shape[2], v.shape[2]))
        return form

    def _form(self, log_decay, beta):
        """Which code runs, and the family by its arithmetic."""
        decay = {None: "none", 1: "fixed", 2: "scalar", 3: "channel"}[getattr(log_decay, "ndim", None)]
        name = {"none": "delta", "scalar": "gated_delta"}.get(decay, "kda") if beta is not None else decay
        if not self.causal:
            return "whole", "whole"
        if not self.outline.gpu:
            return "general" if decay == "channel" or beta is not None else "chunked", name
        forms = {"delta": "delta", "gated_delta": "delta", "kda": "kda", "channel": "channel"}
        return forms.get(name, "fused"), name

    def _splits(self, form, q, v):
        wide = form in ("delta", "kda") and q.shape[2] > 128
        columns, rounds = WIDE_DELTA if wide else (COLUMNS, ROUNDS)
        tokens = min(len(q), self._wave(q, v) * CHUNK) if form == "channel" else len(q)
        programs = q.shape[1] * -(-v.shape[2] // columns)
        size = split_size(Spans((0, tokens)), programs, CHUNK, rounds, PROCESSORS)
        return max(self.outline.spans, -(-len(q) // size))

    def _wave(self, q, v):
        """Chunks whose states exist at once, with a decay per channel."""
        most = max(1, CHANNEL_WAVE_NUMBERS // (q.shape[1] * q.shape[2] * v.shape[2]))
        return min(-(-len(q) // CHUNK), most)

    def _blocks(self, tokens):
        """States kept of every block of chunks but the first, which is what enters."""
        spans = self.outline.spans
        steps = -(-(-(-tokens // spans)) // CHUNK)
        per_block = max(1, ROWS // spans)
        return [spans] * (-(-steps // per_block) - 1)

    def _states(self, rows, q, v):
        return q.new_empty(rows, q.shape[1], q.shape[2], v.shape[2], dtype=wide_dtype(q.dtype))
