"""Rows of a whole get the sum of several rows of a part each: how what other ranks return comes together."""

import torch


def gather_add(total: torch.Tensor, rows: slice | torch.Tensor, places: torch.Tensor, part: torch.Tensor) -> None:
    """total[rows] += part[places[:, 0]] + part[places[:, 1]] + ..., in place and in this order.

    total: [T, ...]; rows: a slice, or distinct indices (int64 [R]); places: int32 [R, n], rows of the part, -1 for
    none; part: [T', ...] of any float dtype.
    """
    if total.is_meta:  # no data
        return
    if total.is_cuda and total.is_contiguous() and total.dtype == torch.float32:
        from longspan.kernels.gather_add_triton import gather_add_triton

        gather_add_triton(total, rows, places, part)
    else:
        for place in places.t():
            there = (place >= 0).view(-1, *[1] * (part.ndim - 1))
            total[rows] += torch.where(there, part[place.clamp(min=0)], 0.0)
