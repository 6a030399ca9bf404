"""The benchmark of memory options: what is kept falls in the order in which options keep less."""

import json
import subprocess
import sys


def test_options_keep_less_and_lose_nothing(tmp_path):
    output = tmp_path / "record.json"
    settings = ["model.num_layers=4", "model.hidden_size=64", "model.num_heads=2", "model.num_kv_heads=1"]
    command = ["-m", "longspan.benchmarks.memory_options", "--config", "hybrid-0.4b", "--tokens", "128", "--tile", "32"]
    command += ["--steps", "1", "--device", "cpu", "--output", str(output), *settings]
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    rows = {row["option"]: row for row in json.loads(output.read_text())["rows"]}
    order = ["none", "mlp_tile", "selective", "full, layers [linear]", "selective, mlp_tile", "full"]
    kept = [rows[name]["kept_gib"] for name in order]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == len(kept) and kept[-1] > 0
    assert kept[0] > 3 * rows["full"]["kept_gib"]
    assert len({round(row["loss"], 2) for row in rows.values()}) == 1
