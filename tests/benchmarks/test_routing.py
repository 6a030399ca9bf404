"""The benchmark of routing runs on emulated nodes and records both ways; layouts and predictions by hand."""

import json
import sys

import pytest

from longspan.attention.double_ring import double_ring_schedule
from longspan.benchmarks import routing
from longspan.benchmarks.emulated_nodes import unavailable
from longspan.parallel import Costs, Mask, Topology


def test_both_ways_are_recorded(tmp_path, monkeypatch):
    reason = unavailable()
    if reason:
        pytest.skip(f"no emulated nodes here: {reason}")
    path = tmp_path / "routing.json"
    options = "--tokens 128 --heads 2 --kv-heads 2 --head-dim 8 --short 16 --long 64 --seconds 0.01 --megabytes 1"
    monkeypatch.setattr(sys, "argv", ["routing", "--output", str(path), "--repetitions", "2", *options.split()])
    sys.argv += ["--cases", "lopsided", "zeppelin magi"]
    assert routing.main() == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["case"] for row in rows] == ["lopsided"] * 2 + ["zeppelin magi"] * 2
    assert [row["routing"] for row in rows] == ["off", "on"] * 2
    by_case = {(row["case"], row["routing"]): row for row in rows}
    off, on = by_case["lopsided", "off"], by_case["lopsided", "on"]
    assert off["keys_over_link"] == [0, 256, 0, 0] and on["keys_over_link"] == [128, 128, 0, 0]
    assert off["link_mib"][1] > 1.7 * on["link_mib"][1]  # the counters of the interfaces agree
    for row in rows:
        assert row["ms"]["forward+backward"] > row["ms"]["forward"] > 0 and row["transfer_ms"] > 0
        assert len(row["step_ms"]) == len(row["predicted_step_ms"]) == 5
        assert row["predicted_ms"] == pytest.approx(sum(row["predicted_step_ms"]))


def test_predicted_steps_by_hand():
    """16 tokens on rank 1, 8 on ranks 2 and 3 each: on the way out 8 are dealt to rank 0, and 8 cross each link."""
    topology, costs = Topology(2, 2), Costs(key_s=1.0, remote_key_s=10.0)
    layout = routing.lopsided((32,), topology)
    assert layout.tokens_per_rank == (0, 16, 8, 8)
    for by, seconds in ((costs, [0, 8, 8, 80, 8]), (Costs.pairs_only(), [0, 0, 8, 160, 16])):
        schedules = [double_ring_schedule(layout, rank, Mask(), topology, by) for rank in range(4)]
        assert routing.step_seconds(schedules, topology, costs) == seconds


def test_uneven_shards_hold_every_token():
    layout = routing.uneven((160, 3), Topology(2, 2))  # `Layout` itself checks that each is placed once
    first, second, *_ = layout.tokens_per_rank
    assert 2.5 < first / second < 3.5


def test_refusals(capsys):
    for arguments, expected in [
        (["--nodes", "0"], "--nodes 0 must be greater than 0"),
        (["--cases", "ring"], "invalid choice: 'ring'"),
        (["--megabits", "-1"], "--megabits -1.0 must be greater than 0"),
    ]:
        with pytest.raises(SystemExit):
            routing.parse_arguments(arguments)
        assert expected in capsys.readouterr().err
