"""Tests are found where there is a GPU, too: what they need is looked for while they are collected."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, pytest, torch
torch.cuda.is_available = lambda: True
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_make_gpu_test_collects_all():
    root = Path(__file__).parents[1]
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, "-m", "gpu"], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    assert "tests/kernels/test_fused.py::" in found.stdout and "tests/models/test_waiting.py::" in found.stdout
