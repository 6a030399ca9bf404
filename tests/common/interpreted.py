"""Triton kernels in the interpreter, and how often they were compiled where they are not."""

import importlib

import pytest
import torch


def interpreted(name: str, monkeypatch=None, **constants):
    """The module `name` of longspan.kernels, with other constants while the test runs; skips it where kernels cannot be
    interpreted."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("kernels are interpreted only where there is no GPU", allow_module_level=True)
    module = importlib.import_module(f"longspan.kernels.{name}")
    for constant, value in constants.items():
        monkeypatch.setattr(module, constant, value)
    return module


def compilations(*kernels) -> int:
    """How many forms of these kernels are compiled."""
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())
