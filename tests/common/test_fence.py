"""fence.c finds what touches memory beside tensors and of tensors that are gone, and nothing else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs Linux and a C compiler"),
]


@pytest.fixture(scope="module")
def fence(tmp_path_factory):
    library = tmp_path_factory.mktemp("fence") / "fence.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", Path(__file__).with_name("fence.c"), "-o", library], check=True)
    return library


def run(fence, line):
    """Runs a line that has x, 25 floats: 100 bytes, which torch aligns to 128."""
    code = f"import ctypes, torch; x = torch.zeros(25); at = x.data_ptr(); {line}; del x; print('end')"
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"LD_PRELOAD": str(fence)}, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    "line, code, text",
    [
        ("x = torch.randn(300, 7); x = (x @ x.T).sort()[0].resize_(9).resize_(1000)", 0, ""),
        ("ctypes.memset(at + 96, 1, 4)", 0, ""),
        ("ctypes.memset(at + 100, 1, 1)", -6, "behind"),
        ("ctypes.memset(at - 1, 1, 1)", -6, "in front"),
        ("ctypes.memset(at + 128, 1, 1)", -11, ""),
        ("ctypes.string_at(at + 128, 1)", -11, ""),
        ("del x; x = torch.zeros(25); ctypes.string_at(at, 1)", -11, ""),
        ("x.untyped_storage().resize_(0); ctypes.memset(at, 1, 1)", -11, ""),
    ],
)
def test_touched(fence, line, code, text):
    found = run(fence, line)
    assert found.returncode == code and text in found.stderr and ("end" in found.stdout) == (code == 0), found
