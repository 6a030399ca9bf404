"""Configurations of peers are compiled before one is timed. No GPU: Triton compiles for one that is not there."""

import subprocess
import sys

import pytest

SCRIPT = """
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from longspan.benchmarks.parallel_tuning import compile_in_parallel

class Absent:
    get_current_device = get_current_stream = lambda self, *_: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_benchmarker = lambda self: lambda call, quantiles: timed.append(len(compiled())) or [float(len(timed))] * 3
    map_python_to_cpp_type = lambda self, kind: "int"

driver.set_active(Absent())
configs = [triton.Config({"BLOCK": 64}, num_warps=warps) for warps in (1, 2, 4)]

@triton.autotune(configs, key=["n"])
@triton.heuristics({"EVEN": lambda arguments: arguments["n"] % 2 == 0})
@triton.jit
def kernel(x, n, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), n)

def compiled():
    return [tuple(found) for found, *_ in kernel.fn.fn.device_caches.values()][0]

timed, done = [], []
compile_in_parallel(2)
compile_in_parallel(2)
compile_only = kernel.fn.run
kernel.fn.run = lambda *x, **y: compile_only(*x, **y) if y["warmup"] else done.append(y["num_warps"])
for n in (6, 6, 7):
    kernel[(1,)](torch.zeros(64), n)
assert timed == [3] * 3 + [6] * 3, timed  # all are there when the first is timed
assert done == [1, 1, 1], done
"""


def test_all_configurations_compile_before_one_is_timed(tmp_path):
    pytest.importorskip("triton.runtime._async_compile", reason="Triton is not installed, or older than 3.5")
    environment = {"PATH": "/usr/bin:/bin", "TRITON_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path)}
    script = tmp_path / "script.py"  # the source of kernels must be in a file
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
