"""Operators: arithmetic that depends on the device, and has a name in torch's registry for those who trace it.

The registry takes the host 10 to 20 microseconds a call, as long as the call itself. So a tensor with data goes
straight to what its device runs. To torch.compile each operator is one opaque operation, and tensors without data
(device meta) get shapes and nothing else.
"""

import importlib
from collections.abc import Callable
from functools import cache

import torch
from torch import library

LIBRARY = library.Library("longspan", "DEF")
PLAIN = (torch.Tensor, torch.nn.Parameter)  # subclasses stand for something else, such as a tensor that is traced


def operator(schema: str, *, naive: Callable, fused: str, shapes: Callable) -> Callable:
    """Registers torch.ops.longspan.<name of schema>; returns what computes it. It is not differentiable by itself.

    naive: plain PyTorch, for CPUs and fp64; fused: "module.function" in longspan.kernels, what runs on GPUs, so that
    Triton is imported where it is needed; shapes: the outputs, empty. All take the arguments of `schema`, which has no
    defaults; the first is a tensor, on whose device the others are.
    """
    name = schema.partition("(")[0]

    def compute(x, *others):
        return (kernel(fused) if x.is_cuda and x.dtype != torch.float64 else naive)(x, *others)

    def call(x, *others):
        traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or type(x) not in PLAIN
        return (registered if traced or x.is_meta else compute)(x, *others)

    LIBRARY.define(schema)
    for key, function in {"CPU": compute, "CUDA": compute, "Meta": shapes}.items():
        LIBRARY.impl(name, function, key)
    registered = getattr(torch.ops.longspan, name).default
    return call


@cache
def kernel(path: str) -> Callable:
    """The function "module.function" of longspan.kernels."""
    module, _, function = path.partition(".")
    return getattr(importlib.import_module(f"longspan.kernels.{module}"), function)
