"""Operators in torch's registry: a name for arithmetic that depends on the device.

To torch.compile each is one opaque operation, and tensors without data (device meta) get shapes and nothing else.
"""

import importlib
from collections.abc import Callable
from functools import cache

import torch
from torch import library

LIBRARY = library.Library("longspan", "DEF")


def operator(schema: str, *, naive: Callable, fused: str, shapes: Callable):
    """Registers torch.ops.longspan.<name of schema> and returns it. It is not differentiable by itself.

    naive: plain PyTorch, for CPUs and fp64; fused: "module.function" in longspan.kernels, what runs on GPUs, so that
    Triton is imported where it is needed; shapes: the outputs, empty. All take the arguments of `schema`, which has no
    defaults.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, naive, "CPU")
    LIBRARY.impl(name, lambda x, *others: (naive if x.dtype == torch.float64 else kernel(fused))(x, *others), "CUDA")
    LIBRARY.impl(name, shapes, "Meta")
    return getattr(torch.ops.longspan, name).default


@cache
def kernel(path: str) -> Callable:
    """The function "module.function" of longspan.kernels."""
    module, _, function = path.partition(".")
    return getattr(importlib.import_module(f"longspan.kernels.{module}"), function)
