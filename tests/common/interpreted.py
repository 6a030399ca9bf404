"""Triton kernels in the interpreter."""

import importlib

import pytest
import torch


def interpreted(name: str):
    """The module `name` of longspan.kernels; skips the test where its kernels cannot be interpreted."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("kernels are interpreted only where there is no GPU")
    return importlib.import_module(f"longspan.kernels.{name}")
