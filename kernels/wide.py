"""The dtype in which sums are made and what follows from them is kept."""

import torch


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """At least fp32: fp64 for fp64, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
