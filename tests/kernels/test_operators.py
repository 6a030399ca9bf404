"""What the registry calls on GPUs exists, by the names that the operators give."""

import re
from pathlib import Path

import pytest

import longspan.kernels
from longspan.kernels.operators import kernel

FOLDER = Path(longspan.kernels.__file__).parent
FUSED = sorted(name for path in FOLDER.glob("*.py") for name in re.findall(r'fused="([\w.]+)"', path.read_text()))


def test_kernels_are_found():
    pytest.importorskip("triton", reason="Triton is not installed")
    assert len(FUSED) == len(set(FUSED)) >= 12
    assert all(callable(kernel(name)) for name in FUSED)
