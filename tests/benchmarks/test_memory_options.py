"""The benchmark of memory options: what is kept is less the more an option computes again."""

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
    for less, more in (("mlp_tile", "none"), ("selective", "none"), ("full, layers [linear]", "selective"),
                       ("selective, mlp_tile", "mlp_tile"), ("full", "selective, mlp_tile")):  # fmt: skip
        assert 0 < rows[less]["kept_gib"] < rows[more]["kept_gib"], (less, more)
    assert rows["none"]["kept_gib"] > 3 * rows["full"]["kept_gib"]
    assert len({round(row["loss"], 2) for row in rows.values()}) == 1
