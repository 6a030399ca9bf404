"""The linear branch beside chosen blocks: states of blocks."""

from dataclasses import dataclass
from typing import Any

import torch

from longspan.attention.linear_branch import WHOLE_BLOCK
from longspan.attention.outline.context import Outline
from longspan.attention.outline.stand_in import Call
from longspan.kernels.block_states import state_dtype
from longspan.kernels.wide import wide_dtype


@dataclass(frozen=True)
class Branch:
    """The linear branch beside chosen blocks (attention.linear_branch): a state for every block of queries that reads
    one of its own, or for every span, with the normalizers of what was summed before chosen blocks were taken out."""

    outline: Outline
    selection: Any
    causal: bool
    rest: bool

    def entry(self, weight, bias, own_q, own_k, k, v):
        return self._states(self.outline.linked, own_k, k, v, wide_dtype(k.dtype))

    def states(self, weight, bias, own_q, own_k, q, k, v):
        """(states, normalizers), saved; where all queries of a document read the same, the states times weight in place
        of normalizers. Sums of blocks exist meanwhile."""
        self._note(own_k, q, k, v, backward=False)
        _sums = self._sums(own_k, k, v, forward=True)
        folded = self._states(self._folded(), own_k, k, v, wide_dtype(k.dtype))
        states = folded
        if self.rest:
            states = self._states(self.outline.blocks(self.selection.query_block), own_k, k, v, state_dtype(k.dtype))
        if not (self.causal or self.rest):
            return states, torch.empty_like(states)
        size = (k if own_k is None else own_k).shape[2]
        return states, k.new_empty(len(states), k.shape[1], size, dtype=wide_dtype(k.dtype))

    def hold(self, weight, bias, own_q, own_k, q, k, v):
        """Gradients of numerators, denominators (where not all queries of a document read the same) and, to be added,
        of queries; their sums of blocks."""
        self._note(own_k, q, k, v, backward=True)
        d_q = [] if own_q is not None else [torch.empty_like(q)]
        if self.causal or self.rest:
            d_q += [q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=wide_dtype(q.dtype))]
        return [self._sums(own_k, k, v, forward=False), *d_q]

    def late(self, own_k, k, v):
        """Numbers of states of gradients, in fp32; those that chosen blocks are taken out of are half as wide."""
        rows = self._folded() + (self.outline.blocks(self.selection.key_block) // 2 if self.rest else 0)
        return rows * k.shape[1] * (k if own_k is None else own_k).shape[2] * (v.shape[2] + 1)

    def _note(self, own_k, q, k, v, backward):
        """Its work is taken as that of linear attention without decay."""
        size = (k if own_k is None else own_k).shape[2]
        self.outline.record(Call("linear", "none", backward, q.shape[1], k.shape[1], size, v.shape[2]))

    def _sums(self, own_k, k, v, forward):
        if self.rest:
            rows = self.outline.blocks(self.selection.key_block if forward else self.selection.query_block)
        else:
            rows = self.outline.blocks(self.selection.query_block if self.causal else WHOLE_BLOCK)
        return self._states(rows, own_k, k, v, state_dtype(k.dtype))

    def _folded(self):
        return self.outline.blocks(self.selection.query_block) if self.causal else self.outline.spans

    def _states(self, rows, own_k, k, v, dtype):
        """[rows, Hkv, 1, K V + K]: state_dtype for sums and what chosen blocks are taken out of, else at least fp32."""
        size = (k if own_k is None else own_k).shape[2]
        return k.new_empty(rows, k.shape[1], 1, size * (v.shape[2] + 1), dtype=dtype)
