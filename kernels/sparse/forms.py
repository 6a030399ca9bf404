"""Which form of choosing blocks and of making lists a tensor gets."""

import importlib.util
from functools import cache

import torch


def takes(x: torch.Tensor) -> bool:
    """Whether the Triton kernels take x: on a GPU, in no more than fp32. All else runs in plain PyTorch."""
    return x.is_cuda and x.dtype != torch.float64 and _triton_loads()


@cache
def _triton_loads() -> bool:
    return importlib.util.find_spec("triton") is not None
