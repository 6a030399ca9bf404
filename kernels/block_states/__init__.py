"""Normalised linear attention with a state for every block of queries, projected and added to another output.

A state of K x V numbers and K more, the sums of phi(k) v^T and of phi(k) over some keys, is what one block of queries
reads; blocks may share one. Which keys are in it is up to the caller: those of whole documents, those before the block,
and without the blocks that a plan lists (SLA, arXiv 2509.24006). With S, z of a query's state:

    o = phi(q) S / (phi(q) z)            out = sparse + o W^T + b

and with d_o = d_out W, where a state's gradient is a sum over its queries like the state over its keys:

    d_num = d_o / (phi(q) z)    d_den = -d_num . o    d phi(q) = d_num S^T + d_den z^T
    (dS, dz) = sum phi(q)^T (d_num, d_den)            d phi(k) = v dS^T + dz^T    dv = phi(k) dS

Where whole documents share a state, it is projected first (whole.py).

Sums of blocks are rounded once, in the dtype of the tensors; states add and subtract the rounded ones in fp32, so that
a block that is taken out again leaves nothing behind. A query whose weight is below what such sums resolve (LOST of
what it was before blocks were taken out) reads nothing and gets no gradient.

States are [rows, heads, 1, K * V + K], as kernels.fold takes them.
"""

import torch

from longspan.kernels.block_states import plain
from longspan.kernels.block_states.maps import MAPS

__all__ = ["LOST", "MAPS", "choose", "state_dtype"]

LOST = {torch.float32: 2.0**-17, torch.float64: 2.0**-46}


def choose(device_type: str, dtype: torch.dtype, key_size: int, value_size: int, sizes):
    """The module that computes a case, and why it is not the Triton kernels, or None. sizes: rows of the blocks."""
    if device_type != "cuda":
        return plain, f"Triton kernels run on cuda, not on {device_type}"
    try:
        from longspan.kernels.block_states import fused
    except ImportError as error:
        return plain, f"Triton does not load: {error}"
    refusal = fused.refusal(dtype, key_size, value_size, sizes)
    return (plain, refusal) if refusal else (fused, None)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which sums of single blocks are kept: fp16 would overflow."""
    return torch.float32 if dtype == torch.float16 else dtype
