"""Rows of a part written to, or added to, rows of a whole: how calls over some of the tokens come together."""

import torch


def scatter_rows(total: torch.Tensor, rows: slice | torch.Tensor, part: torch.Tensor, *, add: bool = True) -> None:
    """total[rows] += part, or = part where not `add`, in place.

    total: [T, ...]; part: [T', ...] of any float dtype; rows: a slice, or distinct indices (int64 [T']).
    """
    if total.is_meta:  # no data
        return
    if isinstance(rows, torch.Tensor) and total.is_cuda and total.is_contiguous() and total.dtype != torch.float64:
        from longspan.kernels.scatter_triton import scatter_rows_triton

        scatter_rows_triton(total, rows, part, add=add)
    elif add:
        total[rows] += part
    else:
        total[rows] = part.to(total.dtype)
