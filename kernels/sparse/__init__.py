"""Softmax attention over lists of key blocks: one plan, its Triton kernels, and the same in plain PyTorch."""

from functools import cache

import torch

from longspan.kernels.sparse import gathered
from longspan.kernels.sparse.asking import ask, count, place, rename
from longspan.kernels.sparse.descend import Families, blocks_below, descend
from longspan.kernels.sparse.packing import READ_PAST, Packing, add_packed, add_shares, pack
from longspan.kernels.sparse.plan import BlockPlan, Blocks
from longspan.kernels.sparse.pool import mean_levels, pool, sum_levels
from longspan.kernels.sparse.rules import Boxes, Picks
from longspan.kernels.sparse.shares import Shares, Tree
from longspan.kernels.sparse.top import Ranges, kept_of, top

__all__ = [
    "READ_PAST",
    "BlockPlan",
    "Blocks",
    "Boxes",
    "Families",
    "Packing",
    "Picks",
    "Ranges",
    "Shares",
    "Tree",
    "add_packed",
    "add_shares",
    "ask",
    "blocks_below",
    "choose",
    "count",
    "descend",
    "kept_of",
    "mean_levels",
    "pack",
    "place",
    "pool",
    "rename",
    "sum_levels",
    "top",
]


def choose(device_type: str, dtype: torch.dtype, head_dim: int, plan: BlockPlan):
    """The module that computes a case (forward, backward), and why it is not the Triton kernels, or None."""
    return _choose(device_type, dtype, head_dim, plan.queries.size, plan.keys.size)


@cache
def _choose(device_type, dtype, head_dim, query_block, key_block):
    if device_type != "cuda":
        return gathered, f"Triton kernels run on cuda, not on {device_type}"
    try:
        from longspan.kernels.sparse import fused
    except ImportError as error:
        return gathered, f"Triton does not load: {error}"
    refusal = fused.refusal(dtype, head_dim, query_block, key_block)
    return (gathered, refusal) if refusal else (fused, None)
