"""Fill scratch memory that longspan code asks for with NaN, so that reading it before writing shows in the results."""

import sys

import torch
from torch.utils._device import _device_constructors

_FACTORIES = [
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch, "empty_permuted"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
]


def install():
    """Patch torch's uninitialised allocations; calls from other packages are left as they are. Returns an undo."""
    _device_constructors()  # kept by torch: `with torch.device(...)` must know the originals, not what replaces them
    originals = [(owner, name, getattr(owner, name)) for owner, name in _FACTORIES]
    for owner, name, original in originals:
        setattr(owner, name, _poisoned(original))

    def undo():
        for owner, name, original in originals:
            setattr(owner, name, original)

    return undo


def _poisoned(original):
    def allocate(*args, **kwargs):
        tensor = original(*args, **kwargs)
        if sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] == "longspan":
            with torch.no_grad():
                fill(tensor)
        return tensor

    return allocate


def fill(tensor):
    """NaN for floats, half the largest value for integers; booleans have no value that could be told apart, and tensors
    without data none, of which operations are counted."""
    if tensor.is_meta:
        return tensor
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(float("nan"))
    elif tensor.dtype != torch.bool:
        tensor.fill_(torch.iinfo(tensor.dtype).max // 2)
    return tensor
