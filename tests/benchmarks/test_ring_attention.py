"""The benchmark script itself, on two gloo ranks: it checks gradients, measures and writes a whole record."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "ring_attention.py"


def test_two_ranks_on_cpu(tmp_path):
    output = tmp_path / "results" / "ring.json"
    command = (
        f"-m torch.distributed.run --standalone --nproc-per-node 2 {SCRIPT} --device cpu --lengths 64 128 --heads 2"
    )
    command += f" --kv-heads 1 --head-dim 8 --check-length 32 --case-seconds 0.1 --output {output}"
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "PYTHONSAFEPATH": "1"}
    run = subprocess.run(
        [sys.executable, *command.split()], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stdout + run.stderr
    record = json.loads(output.read_text())
    assert {"commit", "date", "command", "versions", "machine", "arguments", "seconds"} <= record.keys()
    assert [check["error"] for check in record["checks"]] == [None] * 5
    assert [(row["tokens"], row["gpus"]) for row in record["results"]] == [
        (tokens, gpus) for tokens in (64, 128) for gpus in (2, 2, 2, 1, 1)
    ]
    for row in record["results"]:
        assert row["fwd+bwd ms"] > row["fwd ms"] > 0 and (row["received GiB"] > 0) == (row["gpus"] > 1)


def test_one_rank_without_torchrun():
    command = "--device cpu --lengths 64 --heads 1 --head-dim 8 --check-length 32 --case-seconds 0.1 --strategies ring"
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    run = subprocess.run(
        [sys.executable, SCRIPT, *command.split()], env=environment | {"PYTHONPATH": str(SCRIPT.parents[1]),
        "PYTHONSAFEPATH": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
