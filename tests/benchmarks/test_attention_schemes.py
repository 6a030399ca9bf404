"""The benchmark of schemes runs on CPU ranks, records every scheme and goes on where one cannot run."""

import json
import sys

import pytest
from spawn import run_ranks

from longspan.benchmarks import attention_schemes, scheme_parity
from longspan.parallel import Costs


def run_benchmark(rank, world_size, path):
    sys.argv = ["attention_schemes", "--output", str(path), "--device", "cpu", "--mixes", "magi", "one"]
    sys.argv += ["--tokens", "96", "--heads", "3", "--kv-heads", "1", "--head-dim", "8", "--short", "16"]
    sys.argv += ["--long", "64", "--seconds", "0.01", "--repetitions", "2", "--exposed"]
    return attention_schemes.main()


def run_parity(rank, world_size, path):
    sys.argv = ["scheme_parity", "--output", str(path), "--device", "cpu", "--tokens", "512"]
    sys.argv += ["--heads", "3", "--kv-heads", "1", "--head-dim", "8", "--schemes", "ulysses", "zeppelin"]
    return scheme_parity.main()


def test_every_scheme_is_recorded(tmp_path):
    path = tmp_path / "schemes.json"
    assert run_ranks(run_benchmark, 2, path) == [1, 1]  # three heads cannot be shared by two ranks
    rows = json.loads(path.read_text())["rows"]
    assert [row["scheme"] for row in rows] == 2 * list(attention_schemes.SCHEMES)
    for row in rows:
        if row["scheme"] == "ulysses":
            assert "shares 3 query heads among 2 ranks" in row["error"]
            continue
        assert row["ms"]["forward+backward"] > row["ms"]["forward"] > 0 and row["received_mib"] >= 0
        assert row["pairs"] >= 1 and row["of_ideal"] > 0
        assert row["layer_ms"]["forward"] > 0 and abs(row["exposed_of_layer"]) < 10
    assert {row["documents"] for row in rows if row["mix"] == "one"} == {1}


def test_errors_over_ranks_are_recorded(tmp_path):
    path = tmp_path / "parity.json"
    assert run_ranks(run_parity, 2, path) == [1, 1]
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 8 and all(sum(row["lengths"]) == 512 for row in rows)
    for row in rows:
        assert row["broken"] == (row["scheme"] == "ulysses")
        assert row["broken"] or ("time" in row) == (row["case"] == "one document")
        assert row["broken"] or (row["repeats"] and 0 < max(row["many"]) < 1e-5), row


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--nodes", "-1"], "--nodes -1 must be 0"),
        (["--megabits", "0"], "--megabits 0.0 must be greater than 0"),
        (["--heads", "3", "--kv-heads", "2"], "--kv-heads 2 does not divide --heads 3"),
        (["--short", "64", "--long", "100"], "--long 100 must be at least twice --short 64"),
        (["--costs", "nowhere.json"], "nowhere.json: No such file or directory; write it with `longspan bench"),
    ],
)
def test_refusals(arguments, expected, capsys):
    with pytest.raises(SystemExit):
        attention_schemes.parse_attention_schemes(arguments)
    assert expected in capsys.readouterr().err


def test_ideal_is_every_document_alone_shared_out():
    costs = Costs(pair_s=2.0, start_tokens=3)
    assert attention_schemes.ideal_seconds([4, 1], 2, costs) == pytest.approx(2 * (10 * 1.75 + 1 * 4) / 2)
