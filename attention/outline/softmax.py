"""Softmax attention holds what its passes do: they are run on tensors without data, by the schedule of training.

How much a rank holds in either pass grows with its tokens and depends on its place, so documents are made small, in the
same proportions, and some ranks are asked.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import torch

from longspan.attention import softmax_passes
from longspan.attention.double_ring import double_ring_schedule
from longspan.attention.head_groups import group_of, head_groups
from longspan.attention.outline.context import Outline
from longspan.attention.outline.stand_in import Call, StandIn
from longspan.attention.outline.storages import Peak
from longspan.attention.schedules import softmax_schedule
from longspan.kernels.wide import wide_dtype
from longspan.parallel.balanced import balanced
from longspan.parallel.costs import Costs
from longspan.parallel.geometry import Mask
from longspan.parallel.topology import Topology

TOKENS = 1024  # of a rank, where there are more


def outlined_softmax(outline: Outline, q, k, v, mask: Mask):
    return StandIn.apply(_Softmax(outline, mask), q, k, v)


@dataclass(frozen=True)
class _Softmax:
    outline: Outline
    mask: Mask

    def travels(self, q, k, v):
        groups = self._note(q, k, backward=False)
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=wide_dtype(q.dtype))
        _held = self._scratch(q, k, groups, out, lse, backward=False)
        return out, lse

    def output(self, kept, q, k, v):
        return kept[0], kept

    def hold(self, d_out, q, k, v):
        groups = self._note(q, k, backward=True)
        return self._scratch(q, k, groups, q, k, v, backward=True)

    def _scratch(self, q, k, groups, *results, backward):
        """What exists at the peak of a pass beside its results, which have these sizes."""
        outline = self.outline
        with outline.uncounted():
            sizes = q.shape[1], k.shape[1], q.shape[2], q.dtype
            small = _small(outline.lengths, outline.world_size, self.mask)
            topology = outline.topology or Topology(1, outline.world_size)
            most = _peaks(*small, topology, outline.softmax_strategy, *sizes, groups, outline.gpu)[backward]
        size = ceil(most * len(q)) - sum(x.nbytes for x in results)
        return q.new_empty(max(0, size), dtype=torch.uint8)

    def _note(self, q, k, backward):
        """Groups of heads, each of which is a call."""
        outline = self.outline
        tokens = outline.num_tokens // outline.world_size
        sizes = tokens, q.shape[1], k.shape[1]
        groups = head_groups(outline.head_groups, *sizes, self.mask, outline.lengths)
        heads, kv_heads = q.shape[1] // groups, k.shape[1] // groups
        for _ in range(groups):
            outline.record(Call("softmax", self.mask, backward, heads, kv_heads, q.shape[2], k.shape[2]))
        return groups


def _small(lengths, world_size, mask):
    """(lengths, mask) with about TOKENS tokens of a rank."""
    shrink = max(1.0, sum(lengths) / (world_size * TOKENS))

    def small(count):
        return max(1, round(count / shrink))

    window = None if mask.window is None else small(mask.window)
    return tuple(map(small, lengths)), Mask(mask.causal, window)


@lru_cache(maxsize=256)
def _peaks(lengths, mask, topology, strategy, heads, kv_heads, size, dtype, groups, gpu) -> tuple[float, float]:
    """Bytes for each token of a rank, at the peak of the forward pass and of the backward pass, besides what they are
    given."""
    layout, most = balanced(lengths, topology.world_size), [0, 0]
    for rank in _ranks(topology.world_size):
        if strategy == "double_ring":
            schedule = double_ring_schedule(layout, rank, mask, topology, Costs())
        else:
            schedule = softmax_schedule(layout, rank, strategy, mask, heads // kv_heads)
        schedule = schedule.map(lambda x: x.to("meta"))
        tokens = layout.tokens_per_rank[rank]
        q, k, v = (torch.empty(tokens, n, size, dtype=dtype, device="meta") for n in (heads, kv_heads, kv_heads))
        given = q, k, v, torch.empty_like(q), q.new_empty(q.shape[:2], dtype=wide_dtype(dtype))
        passes = (softmax_passes.forward, given[:3]), (softmax_passes.backward, (torch.empty_like(q), *given))
        found = [_peak(run, groups, tensors, schedule, _Kernel(gpu)) for run, tensors in passes]
        most = list(map(max, most, found))
    tokens = max(layout.tokens_per_rank)
    return most[0] / tokens, most[1] / tokens


def _ranks(world_size: int) -> list[int]:
    """Those among which is, about, the one that holds most: the first where keys of many come at once, one near the
    middle in a ring, before it in the forward pass, behind it where there are fewer key heads."""
    return sorted({0, world_size // 4, world_size // 2, 5 * world_size // 8, world_size - 1})


def _peak(run, groups, tensors, schedule, kernel) -> int:
    """Of a group of heads, beside where results of all are if there are several."""
    of_group = [group_of(0, groups, x) for x in tensors]
    with Peak() as peak:
        for x in of_group:
            peak.ignore(x)
        results = run(*of_group, schedule, kernel, 1.0, None)
    return peak.most + (groups > 1) * groups * sum(x.nbytes for x in results)


@dataclass(frozen=True)
class _Kernel:
    """Allocates what back ends do: results, on GPUs in the dtype of the inputs. FlashAttention-4 sums dq in fp32, and
    dk and dv where query heads share them; results on CPUs are such sums."""

    gpu: bool

    def forward(self, q, k, v, pack, scale):
        return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=wide_dtype(q.dtype))

    def backward(self, d_out, q, k, v, out, lse, pack, scale):
        summed = (q, k, v) if not self.gpu or q.shape[1] > k.shape[1] else (q,)
        sums = tuple(torch.empty_like(x, dtype=wide_dtype(x.dtype)) for x in summed)
        return tuple(torch.empty_like(x) for x in (q, k, v)) if self.gpu else sums
