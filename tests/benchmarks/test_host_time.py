"""The benchmark of the host's time runs without a GPU, and by the code that runs on one."""

import json
import os
import subprocess
import sys

import pytest


def test_launches_are_counted_without_a_gpu(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    words = ["--layers", "softmax", "llsa", "--output", str(tmp_path / "rows.json"), "--functions", "25"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "longspan.benchmarks.host_time", *words]
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    launches = {(row["layer"], row["form"]): row["launches"] for row in rows}
    for kind in ("softmax", "llsa"):
        eager, registered, longspan = (launches[kind, form] for form in ("eager", "registered", "longspan"))
        assert registered == longspan == eager + 14, (
            launches
        )  # two norms, two rotations, SwiGLU, each way; weights of norms
    assert launches["softmax", "eager"] == 0 and "kernels/launch.py" in done.stdout
