"""The benchmark of losses: what is judged, and that a run which trains differently is found."""

import json
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tiny_runs import SETTINGS, write_corpus

from longspan.benchmarks import loss_parity
from longspan.benchmarks.loss_parity import End, Planned, compare, judge
from longspan.benchmarks.loss_sets import SETS, Variant
from longspan.models.flops import num_parameters


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", list(SETS))
def test_variants_of_a_set_differ_from_one_another_and_see_the_same_data(name, device):
    arguments = SimpleNamespace(device=device, corpus="data/stdlib", settings=[], ranks=None)
    runs = [Planned(name, variant, arguments) for variant in SETS[name].variants]
    for run in runs:
        run.config.validate(run.ranks)
    assert len({run.config.to_yaml() + str(run.ranks) for run in runs}) == len(runs)
    assert len({str((run.config.data, run.config.train.global_batch, run.config.train.steps)) for run in runs}) == 1
    assert len({str((run.config.optim.lr, run.config.run.seed)) for run in runs if not run.about.control}) == 1
    parameters = num_parameters(runs[0].config.model)
    if device == "cpu":
        assert parameters < 2e6
    elif name == "sparse":
        assert 12e6 < parameters < 30e6


def steps(losses, validation=None):
    rows = [{"step": i, "loss": loss, "grad_norm": 1.0} for i, loss in enumerate(losses, 1)]
    return rows[:-1] + [rows[-1] | ({"val_loss": validation} if validation else {})]


def test_comparison_is_of_the_steps_that_both_took():
    reference = steps([4.0] * 10 + [2.0] * 10, validation=2.5)
    found = compare(steps([4.0] * 10 + [2.0] * 9 + [2.2], validation=2.4), reference)
    assert found["final"] == pytest.approx(2.1) and found["ratio"] == pytest.approx(1.05)
    assert found["difference"] == pytest.approx(0.1) and found["val_ratio"] == pytest.approx(0.96)
    assert found["fall"] == pytest.approx(1.9 / 2)
    short = compare(steps([4.0] * 10), reference)
    assert short["ratio"] == 1 and short["val_ratio"] is None and short["steps"] == 10


def verdicts(name, losses, notes=None):
    """By variant, of runs with these losses; the others of the set are not there."""
    runs = {
        f"{name}: {variant}": {"set": name, "variant": variant, "steps": steps(values) if values else []}
        | ({"note": notes[variant]} if variant in (notes or {}) else {})
        for variant, values in losses.items()
    }
    judge(runs, "cpu")
    return {run["variant"]: run["verdict"] for run in runs.values()}


def test_verdicts():
    # Below the reference is as good, 2 % above it is not; the control may be anything.
    falling = [4.0, 2.0]
    found = verdicts("sparse", {"softmax": falling, "llsa": [4.0, 1.8], "sla": [4.0, 2.05], "linear alone": [4.0, 3.0]})
    assert found == {"softmax": "reference", "llsa": "within", "sla": "above", "linear alone": "control"}
    # What must be the same in every step must not be lower either, nor differ in an early step alone.
    found = verdicts("engines", {"fsdp2": falling, "ddp": [4.0, 1.99], "deepspeed 1": [4.001, 2.0]})
    assert found == {"fsdp2": "reference", "ddp": "above", "deepspeed 1": "above"}
    # A loss that falls half as far as the reference's; one that is not a number.
    found = verdicts("diffusion", {"softmax": falling, "sla": [4.0, 3.0], "llsa": [4.0, float("nan")]})
    assert found == {"softmax": "reference", "sla": "above", "llsa": "above"}
    assert verdicts("diffusion", {"softmax": [4.0, 3.9], "sla": [4.0, 3.9]})["sla"] == "above"  # neither has fallen
    # One that falls nearly as far, though to more than 1.1 times as much.
    assert verdicts("diffusion", {"softmax": [4.0, 0.5], "sla": [4.0, 0.6]})["sla"] == "within"


def test_verdicts_of_what_did_not_run_to_the_end():
    notes = {"llsa": "1 of 2 steps: took longer", "sla": "skipped: no GPU"}
    found = verdicts("sparse", {"softmax": [4.0, 2.0], "llsa": [4.0], "sla": []}, notes)
    assert found == {"softmax": "reference", "llsa": "incomplete", "sla": "skipped"}
    assert verdicts("sparse", {"llsa": [4.0, 2.0]}) == {"llsa": "incomplete"}  # nothing to compare it with
    cut = verdicts("sparse", {"softmax": [4.0], "llsa": [4.0, 2.0]}, {"softmax": "1 of 2 steps: stopped"})
    assert cut == {"softmax": "incomplete", "llsa": "incomplete"}


def test_everything_ends_at_a_signal_or_the_budget():
    end = End(100.0)
    with end:
        assert end.reason() is None
        os.kill(os.getpid(), signal.SIGTERM)  # as `timeout` does
        assert end.reason() == "ended by a signal"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert End(-1.0).reason() == "--budget -1 s"


def test_a_run_that_trains_differently_is_found(tmp_path, monkeypatch, capsys):
    variants = {
        "none": Variant(),
        "full": Variant(("train.checkpointing=full", "train.mlp_tile=7")),
        "faster": Variant(("optim.lr=0.02",)),
        "absent": Variant(package="no_such_package"),
    }
    few = replace(SETS["memory"], variants=variants, small=(*SETTINGS, "train.steps=3"))
    monkeypatch.setitem(SETS, "memory", few)
    path, corpus = tmp_path / "record.json", write_corpus(tmp_path)
    given = ["--sets", "memory", "--device", "cpu", "--corpus", str(corpus), "--output", str(path)]
    assert loss_parity.main(given) == 1
    runs = {run["variant"]: run for run in json.loads(path.read_text())["runs"].values()}
    found = {name: run["verdict"] for name, run in runs.items()}
    expected = {"none": "reference", "full": "within", "faster": "above", "absent": "skipped"}
    assert found == expected and list(found) == list(expected)
    assert len(runs["full"]["steps"]) == 3 and runs["full"]["environment"]["world_size"] == 1
    assert str(tmp_path) not in str(runs["full"]["environment"]["command"])
    assert "no_such_package" in runs["absent"]["note"]
    assert "above" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="train.step"):  # before anything runs
        loss_parity.main([*given, "train.step=3"])
