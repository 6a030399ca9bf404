"""Merging partial softmax results over disjoint key sets (law 2): exact, in place, in the accumulator's precision."""

import torch


def merge(
    out_acc: torch.Tensor,
    lse_acc: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    rows: slice | torch.Tensor | None = None,
) -> None:
    """Merges a partial result into accumulators, in place.

    out_acc [T, H, D] and lse_acc [T, H] in fp32 (fp64 for fp64 attention; out_acc may be narrower, and is rounded by
    every merge); out [T', H, D] in any float dtype and lse [T', H]. `rows` says which T' of the T rows receive them: a
    slice, distinct indices (int64 [T']), or None for all. A side whose lse is -inf has seen no keys: what its out
    holds is ignored, so that accumulators need no zeros.
    """
    if out_acc.is_meta:  # no data
        return
    if out_acc.is_cuda and lse_acc.dtype == torch.float32:
        from longspan.kernels.merge_triton import merge_triton

        merge_triton(out_acc, lse_acc, out, lse, rows)
    else:
        merge_naive(out_acc, lse_acc, out, lse, rows)


def merge_naive(out_acc, lse_acc, out, lse, rows=None):
    """merge in plain PyTorch, any device and dtype."""
    rows = slice(None) if rows is None else rows
    old_lse, lse = lse_acc[rows], lse.to(lse_acc.dtype)
    new_lse = torch.logaddexp(old_lse, lse)
    finite_lse = new_lse.masked_fill(new_lse == float("-inf"), 0.0)  # keeps -inf - -inf out
    old_weight, weight = (old_lse - finite_lse).exp()[..., None], (lse - finite_lse).exp()[..., None]
    old_part = torch.where(old_weight > 0, out_acc[rows] * old_weight, 0.0)
    merged = old_part + torch.where(weight > 0, out.to(lse_acc.dtype) * weight, 0.0)
    out_acc[rows] = merged.to(out_acc.dtype)
    lse_acc[rows] = new_lse
