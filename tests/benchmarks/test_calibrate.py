"""Calibration: what is fitted from times, what is measured over ranks, and the file that a run reads."""

import json

import pytest
from spawn import run_ranks

from longspan.benchmarks import calibrate
from longspan.launcher.calibration import load_costs
from longspan.launcher.config import Config
from longspan.launcher.errors import UserError
from longspan.parallel import Costs, Topology

HEADS = (32, 8, 128)


def measured(length, pair_s, start):
    pairs = length * (length + 1) // 2
    return {"length": length, "documents": 1, "pairs": pairs, "seconds": pair_s * pairs * (1 + start / length)}


def test_fit_finds_what_made_the_times():
    short, long = (measured(length, 2e-10, 700) for length in (4096, 32768))
    costs = calibrate.fit(short, long, {"near": 1e-11, "far": 1e-10}, HEADS, 2)
    assert costs.pair_s == pytest.approx(2e-10, rel=1e-3) and costs.start_tokens == pytest.approx(700, abs=1)
    assert costs.key_s == pytest.approx(12288e-11) and costs.remote_key_s == pytest.approx(12288e-10)
    assert costs.token_s == pytest.approx(40960e-11) and costs.remote_token_s == pytest.approx(40960e-10)


def test_fit_of_links_that_were_not_measured_and_of_odd_times():
    alike = [measured(length, 2e-10, 0) for length in (4096, 32768)]
    costs = calibrate.fit(*alike, {}, HEADS, 2)
    assert costs.start_tokens == 0 and costs.key_s == Costs.h200(*HEADS).key_s
    for slower in (0.5, 9, 1000):  # noise; more than any start explains
        odd = alike[0] | {"seconds": slower * alike[0]["seconds"]}
        costs = calibrate.fit(odd, alike[1], {}, HEADS, 2)
        assert costs.pair_s > 0 and 0 <= costs.start_tokens <= 40960


def test_peers_are_on_the_same_node_and_on_the_next():
    assert calibrate.peers(0, Topology(1, 1)) == {}
    assert [calibrate.peers(rank, Topology(1, 3)) for rank in range(3)] == [{"near": 1}, {"near": 2}, {"near": 0}]
    assert calibrate.peers(3, Topology(2, 2)) == {"near": 2, "far": 1}
    assert calibrate.peers(3, Topology(4, 1)) == {"far": 0}


def run_calibration(rank, world_size, path):
    import os
    import sys

    os.environ["LOCAL_WORLD_SIZE"] = "2"  # two nodes of two ranks
    sys.argv = ["calibrate", "--output", str(path), "--heads", "2", "--kv-heads", "1", "--head-dim", "8"]
    sys.argv += ["--device", "cpu", "--seconds", "0.05", "--megabytes", "1", "--short", "32", "--long", "128"]
    return calibrate.main()


def test_a_run_reads_what_was_measured(tmp_path):
    path = tmp_path / "costs.json"
    assert run_ranks(run_calibration, 4, path) == [0] * 4
    record = json.loads(path.read_text())
    assert set(record["measured"]["seconds_per_byte"]) == {"near", "far"}
    costs = load_costs(make_config(path))
    assert costs == Costs(**record["costs"]) and costs.key_s > 0 and costs.remote_key_s > 0
    assert load_costs(make_config("")) == Costs.h200(2, 1, 8, 4)

    other_heads = "is for a model with heads=2, .*, this one has heads=4, .*--heads 4 --kv-heads 1 --head-dim"
    with pytest.raises(UserError, match=other_heads):
        load_costs(make_config(path, "model.num_heads=4"))
    with pytest.raises(UserError, match="this one has .*bytes_per_number=2; write another with .*bf16 on GPUs"):
        load_costs(make_config(path, "train.dtype=bfloat16"))
    with pytest.raises(UserError, match="none.json: No such file or directory; write it with `longspan bench"):
        load_costs(make_config(tmp_path / "none.json"))
    whole = {"costs": record["costs"] | {"min_shard": 2.5}, "model": record["model"]}
    for content in ("[", "{}", '{"costs": {"pair_s": 1}, "model": {}}', json.dumps(whole)):
        path.write_text(content)
        with pytest.raises(UserError, match="is no file of costs"):
            load_costs(make_config(path))


def make_config(path, *settings):
    model = ["model.hidden_size=16", "model.num_heads=2", "model.num_kv_heads=1"]
    return Config.load(None, ["data.corpora=[{path: x}]", *model, f"parallel.costs={path}", *settings])
