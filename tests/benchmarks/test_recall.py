"""The recall benchmark: what its batches hold, that models are trained and judged on it, and what is written."""

import json
import xml.etree.ElementTree
from types import SimpleNamespace

import pytest
import torch

from longspan.benchmarks import recall, recall_report, recall_task
from longspan.benchmarks.arguments import MODELS
from longspan.benchmarks.recall_task import Run, Task, layer_pattern, train

TASK = Task(pairs=(2, 5, 8), tokens=160, num_keys=12, num_values=9)


def draw(seed=0, count=3, task=TASK):
    return task.batches(torch.Generator().manual_seed(seed), count)


def tiny(model, **changes):
    run = dict(
        model=model, learning_rate=3e-3, seed=0, task=TASK, steps=20, num_layers=4, hidden_size=16, num_heads=2,
        conv_width=4, device="cpu", graphs=True,
    )  # fmt: skip
    return Run(**run | changes)


def documents():
    """(number of pairs, tokens, labels) of every document of three batches, as lists."""
    for tokens, labels in zip(*draw()):
        for own_tokens, own_labels in zip(tokens.split(TASK.lengths), labels.split(TASK.lengths), strict=True):
            yield len(own_tokens) // 4, own_tokens.tolist(), own_labels.tolist()


def test_every_answer_is_the_value_of_an_earlier_pair_and_nothing_else_has_a_label():
    counts = {n: 0 for n in TASK.pairs}
    for n, tokens, labels in documents():
        keys, values = tokens[: 2 * n : 2], tokens[1 : 2 * n : 2]
        assert len(set(keys)) == n and all(key < 12 for key in keys) and all(12 <= value < 21 for value in values)
        held = dict(zip(keys, values))
        asked = [place for place in range(2 * n, 4 * n) if tokens[place] in held]
        assert sorted(tokens[place] for place in asked) == sorted(keys)  # each key once
        assert [place for place, label in enumerate(labels) if label != -100] == asked
        assert all(labels[place] == held[tokens[place]] for place in asked)
        assert all(21 <= tokens[place] < TASK.vocab_size for place in range(2 * n, 4 * n) if place not in asked)
        counts[n] += 1
    assert counts == {n: 3 * 160 // (4 * n) for n in TASK.pairs}


def test_queries_are_spread_over_places_and_keys():
    tokens, labels = draw(count=200, task=Task((4,), 16, 8, 8))
    queries = labels[:, 8:] != -100
    assert queries.double().mean(0).sub(0.5).abs().max() < 0.15  # 200 draws of a coin: three standard deviations
    first = tokens[:, 8:].gather(1, queries.int().argmax(1, keepdim=True))
    order = (tokens[:, 0:8:2] == first).double().mean(0)  # which pair is asked for first
    assert order.sub(0.25).abs().max() < 0.12


def test_batches_follow_their_seed():
    again = draw()
    assert all(torch.equal(a, b) for a, b in zip(draw(), again))
    assert not torch.equal(draw(seed=1)[0], again[0])
    assert not torch.equal(again[0][0], again[0][1])


@pytest.mark.parametrize("pairs, tokens, remedy", [((3, 4), 64, "multiple of the 12.*use 48"), ((13,), 52, "1 to 12")])
def test_a_task_that_cannot_be_is_refused(pairs, tokens, remedy):
    with pytest.raises(ValueError, match=remedy):
        Task(pairs, tokens, num_keys=12, num_values=9)


def test_models_by_name():
    assert layer_pattern("softmax") == ["softmax"]
    assert layer_pattern("hgrn2") == ["linear:hgrn2"]
    assert layer_pattern("gated_delta-3:1") == ["linear:gated_delta"] * 3 + ["softmax"]
    for name in ("softmax-3:1", "linear:gla", "gla-2:1", "mamba"):
        with pytest.raises(ValueError, match="is unknown; use softmax, none"):
            layer_pattern(name)
    with pytest.raises(ValueError, match="multiple of 8 layers"):
        tiny("gla-7:1").validate()
    for name in MODELS:
        tiny(name, num_layers=8).validate()


def test_a_tiny_hybrid_learns_and_is_judged():
    reported = []
    result = train(tiny("gated_delta-3:1"), evaluation_batches=2, report=reported.append)
    assert reported == list(range(1, 21)) and [point["step"] for point in result["curve"]] == reported
    assert result["curve"][-1]["loss"] < result["curve"][0]["loss"] - 0.1
    assert result["state"] == 3 * 2 * 8 * 8
    for name in ("validation", "accuracy"):
        assert list(result[name]) == ["2", "5", "8"] and all(0 <= share <= 1 for share in result[name].values())


def test_accuracy_counts_right_answers_only():
    class Oracle:
        """Knows the values, but only in documents of five pairs."""

        def logits(self, tokens, seq):
            answers = torch.full_like(tokens, 12)
            for batch_tokens, labels in zip(*TASK.batches(torch.Generator().manual_seed(7), 2)):
                if torch.equal(batch_tokens, tokens):
                    answers[160:320] = labels[160:320].clamp(min=0)
            return torch.nn.functional.one_hot(answers, TASK.vocab_size)

    seq = SimpleNamespace(positions=torch.zeros(480))
    found = recall_task._accuracy(Oracle(), TASK, seq, 7, 2)
    assert found["5"] == 1 and found["2"] < 0.5 and found["8"] < 0.5


def test_schedule_rises_and_falls():
    rates = [recall_task._schedule(step, 100) for step in range(1, 101)]
    assert rates[9] == 1 == max(rates) and rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True) and rates[-1] == pytest.approx(recall_task.LAST_RATE)


def command(folder, *arguments):
    small = "--pairs 2 --tokens 32 --num-keys 8 --num-values 8 --layers 2 --hidden 16 --evaluation-batches 1".split()
    return ["recall", "--device", "cpu", "--output", str(folder), *small, *arguments]


def test_the_command_writes_results_as_they_come(tmp_path, monkeypatch, capsys):
    words = ["--models", "none", "fixed", "--steps", "2", "--jobs", "2"]
    monkeypatch.setattr("sys.argv", command(tmp_path, *words))
    assert recall.main() == 0
    record = json.loads((tmp_path / "results.json").read_text())
    assert {"benchmark", "commit", "versions", "machine", "command", "arguments"} <= set(record)
    assert sorted(run["model"] for run in record["runs"]) == ["fixed", "none"]
    assert "[2/2]" in capsys.readouterr().out
    (tmp_path / "recall.md").rename(tmp_path / "first.md")
    monkeypatch.setattr("sys.argv", ["recall", "--plot", str(tmp_path / "results.json")])
    assert recall.main() == 0
    text = (tmp_path / "recall.md").read_text()
    assert text == (tmp_path / "first.md").read_text() and "| none | 0.0% |" in text


def test_what_fails_or_is_late_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", command(tmp_path, "--models", "none", "--steps", "1000000", "--time-limit", "0"))
    assert recall.main() == 1
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert "of 1000000 steps: --time-limit 0 s" in run["error"]
    assert run["error"] in (tmp_path / "recall.md").read_text()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--models", "mamba3"], "'mamba3' is unknown"),
        (["--models", "none-7:1"], "multiple of 8 layers"),
        (["--heads", "3"], "model.num_heads=3 does not divide"),
        (["--steps", "0"], "--steps 0 must be greater than 0"),
    ],
)
def test_bad_arguments_are_one_line(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        recall.parse_recall(command(tmp_path, *words)[1:])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_results_to_join_want_a_folder(capsys):
    with pytest.raises(SystemExit):
        recall.parse_recall(["--plot", "a.json", "b.json"])
    assert "give --output DIR" in capsys.readouterr().err.splitlines()[-1]


def results(**runs):
    """A record of runs given as model=[(learning rate, seed, validation, accuracy), ...]."""
    rows = [
        {
            "model": model, "learning_rate": rate, "seed": seed, "parameters": 1000, "state": 64, "seconds": 1.0,
            "layers": layer_pattern(model), "validation": {"8": v, "16": v}, "accuracy": {"8": a, "16": a / 2},
        }
        for model, tried in runs.items()
        for rate, seed, v, a in tried
    ]  # fmt: skip
    arguments = vars(recall.parse_recall(["--output", "x", "--pairs", "8", "16"])) | {"models": list(runs)}
    machine, versions = {"gpus": [], "architecture": "any"}, {"torch": "2"}
    head = {"benchmark": "recall", "commit": "c", "date": "d", "command": "e", "machine": machine, "versions": versions}
    return head | {"arguments": arguments | {"learning_rates": [0.001, 0.01]}, "runs": rows}


def test_validation_chooses_the_learning_rate_and_seeds_are_averaged():
    record = results(fixed=[(0.001, 0, 0.5, 0.9), (0.01, 0, 0.6, 0.4), (0.01, 1, 0.8, 0.8)], softmax=[(0.01, 0, 1, 1)])
    fixed, softmax = recall_report.models(record)
    assert fixed["learning_rate"] == 0.01 and fixed["seeds"] == [0, 1]
    assert fixed["accuracy"] == pytest.approx({"8": 0.6, "16": 0.3}) and fixed["mean"] == pytest.approx(0.45)
    assert fixed["deviation"] == pytest.approx(0.2121, abs=1e-3) and softmax["deviation"] is None
    assert (fixed["softmax"], softmax["softmax"]) == (0, 1)
    text = recall_report.markdown(record, [fixed, softmax])
    assert "| fixed | 50.0 | 70.0 |" in text and "| softmax | - | 100.0 |" in text


def test_results_of_several_parts_are_joined(tmp_path, monkeypatch, capsys):
    first = results(fixed=[(0.001, 0, 0.5, 0.5)], softmax=[(0.001, 0, 0.1, 0.1)])
    first["runs"][0] = {"model": "fixed", "learning_rate": 0.001, "seed": 0, "layers": [], "error": "stopped"}
    second = results(fixed=[(0.001, 0, 0.5, 0.6)], softmax=[(0.003, 0, 0.9, 0.8), (0.001, 0, 1, 1)]) | {"date": "later"}
    second["arguments"] |= {"learning_rates": [0.001, 0.003], "jobs": 7}
    for name, record in {"a": first, "b": second}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    words = ["recall", "--plot", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--output", str(tmp_path / "c")]
    monkeypatch.setattr("sys.argv", words)
    assert recall.main() == 0
    joined = recall_report.load(tmp_path / "c" / "results.json")
    assert joined["arguments"]["learning_rates"] == [0.001, 0.003, 0.01] and len(joined["parts"]) == 2
    fixed, softmax = recall_report.models(joined)
    assert fixed["accuracy"]["8"] == 0.6 and softmax["learning_rate"] == 0.003
    assert softmax["validation"] == {0.001: 0.1, 0.003: 0.9}  # of a run that both have, the first that finished
    assert ", later: `e`" in (tmp_path / "c" / "recall.md").read_text()

    second["arguments"]["steps"] += 1
    (tmp_path / "b.json").write_text(json.dumps(second))
    assert recall.main() == 2
    assert "cannot be joined" in capsys.readouterr().err.splitlines()[-1]


def test_the_plot_is_drawn_from_the_record(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install 'longspan[plots]'")
    record = results(**{"fixed": [(0.01, 0, 1, 0.3)], "fixed-3:1": [(0.01, 0, 1, 0.5)], "softmax": [(0.01, 0, 1, 1)]})
    recall_report.write_report(record, tmp_path)
    text = " ".join(xml.etree.ElementTree.parse(tmp_path / "recall.svg").getroot().itertext())
    assert "fixed-3:1" in text and "pairs per document" in text and "share of softmax layers" in text
