"""Softmax attention: keys on their way, and sums."""

from dataclasses import dataclass

import torch

from longspan.attention.head_groups import head_groups
from longspan.attention.outline.context import Outline
from longspan.attention.outline.stand_in import Call, StandIn
from longspan.attention.schedules import ranks_at_once
from longspan.kernels.wide import wide_dtype
from longspan.parallel.geometry import Mask


def outlined_softmax(outline: Outline, q, k, v, mask: Mask):
    return StandIn.apply(_Softmax(outline, mask), q, k, v)


@dataclass(frozen=True)
class _Softmax:
    """Keys travel step by step; results of steps, and gradients, are added in fp32: of one group of heads after the
    other, whose results are copied to where those of all are."""

    outline: Outline
    mask: Mask

    def travels(self, q, k, v):
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=wide_dtype(q.dtype))
        (q, k, v), groups = self._group(q, k, v)
        self._note(q, k, groups, backward=False)
        if self.outline.world_size > 1:
            _held = self._arriving(q, k, v, groups), torch.empty_like(q, dtype=wide_dtype(q.dtype))
        elif groups > 1:
            _held = torch.empty_like(q)
        return out, lse

    def output(self, kept, q, k, v):
        return kept[0], kept

    def hold(self, d_out, q, k, v):
        (q, k, v), groups = self._group(q, k, v)
        self._note(q, k, groups, backward=True)
        held = [torch.empty_like(q, dtype=wide_dtype(q.dtype))] if self.outline.gpu else []  # kernels add up dq in fp32
        if groups > 1:
            held += [torch.empty_like(x) for x in (q, k, v)]
        if self.outline.world_size > 1:
            held += self._arriving(q, k, v, groups)
            held += [torch.empty_like(x, dtype=wide_dtype(x.dtype)) for x in (k, v, k, v)]
            held += [
                torch.empty_like(q),
                *(torch.empty_like(x) for x in (k, v) for _ in range(max(self._at_once(q, k)))),
            ]
        return held

    def _at_once(self, q, k):
        """Of how many ranks a step brings keys, for every step."""
        return ranks_at_once(self.outline.softmax_strategy, self.outline.world_size, q.shape[1] // k.shape[1])

    def _group(self, q, k, v):
        """(q, k, v of a group of heads, in place; groups)."""
        outline = self.outline
        tokens = outline.num_tokens // outline.world_size
        groups = head_groups(outline.head_groups, tokens, q.shape[1], k.shape[1])
        return [x[:, : x.shape[1] // groups] for x in (q, k, v)], groups

    def _arriving(self, q, k, v, groups):
        """Keys and values of the step under way and of the next. A rank that sees all of the others gets as many from
        each as it has. Of a group they are copied to be sent."""
        counts = self._at_once(q, k)
        most = max(map(sum, zip(counts, (*counts[1:], 0)))) + (groups > 1)
        return [torch.empty_like(x) for x in (k, v) for _ in range(most)]

    def _note(self, q, k, groups, backward):
        for _ in range(groups):
            self.outline.record(Call("softmax", self.mask, backward, q.shape[1], k.shape[1], q.shape[2], k.shape[2]))
