"""Trying other launch options: names, values, and that each is really in force while it is measured."""

import json

import pytest

from longspan.benchmarks import linear_options
from longspan.kernels.linear import chunked


def test_options_are_set_and_put_back():
    option = linear_options.Option("chunked.BLOCK['cpu']")
    assert option.value == chunked.BLOCK["cpu"]
    with option.set_to(7):
        assert chunked.BLOCK["cpu"] == 7
    assert chunked.BLOCK["cpu"] == option.value


def test_every_value_is_measured_while_it_is_in_force(tmp_path, monkeypatch, capsys):
    seen, measure = [], linear_options.measure

    def measured(*arguments):
        seen.append(chunked.BLOCK["cpu"])
        return measure(*arguments) if seen[-1] != 16 else {"error": "OutOfResources: shared memory"}

    monkeypatch.setattr(linear_options, "measure", measured)
    file = tmp_path / "options.json"
    words = ["--device", "cpu", "--output", str(file), "--seconds", "0.01", "--tokens", "128"]
    monkeypatch.setattr("sys.argv", ["linear_options", *words, "--try", "chunked.BLOCK['cpu']", "32", "16", "32"])
    assert linear_options.main() == 0
    assert seen == [chunked.BLOCK["cpu"], 32, 16]
    rows = json.loads(file.read_text())["rows"]
    assert [row["in use"] for row in rows] == [True, False, False] and rows[1]["largest error"] < 1e-5
    out = capsys.readouterr().out
    assert "(1.000)" in out and "OutOfResources" in out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--try", "fused", "1"], "no name like"),
        (["--try", "chunked.NONE", "1"], "has no chunked.NONE"),
        (["--try", "chunked.BLOCK['cpu']", "a b"], "no Python literal"),
        (["--try", "chunked.BLOCK['cpu']", "32", "--heads", "0"], "--heads 0 must be greater than 0"),
    ],
)
def test_bad_arguments_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit):
        linear_options.parse_arguments(words)
    assert message in capsys.readouterr().err.splitlines()[-1]
