"""The trainer on 1, 2 and 4 ranks: the same run whatever the split, resumed as if never stopped, stopped by NaN."""

import json
import logging
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks
from tiny_runs import rows, start, tiny_config, train, write_corpus

from longspan.launcher.config import Config
from longspan.launcher.engines.optimizer import build_optimizer
from longspan.launcher.errors import UserError
from longspan.launcher.schedule import learning_rate

TOLERANCE = 1e-5
SPLITS = {1: (1,), 2: (1, 2), 4: (2, 4)}  # ranks per sequence, by ranks
NAMES = [f"{n} ranks, sp {sp}" for n in SPLITS for sp in SPLITS[n]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All runs of this module, by name: their rows and samples. Each world size is spawned once; order matters."""
    folder = tmp_path_factory.mktemp("runs")
    corpus = write_corpus(folder)
    results = {}
    for world_size in (1, 2, 4):
        results |= run_ranks(_runs_on, world_size, folder, corpus, timeout=300)[0]
    results |= run_ranks(_late_runs_on_one_rank, 1, folder, corpus, timeout=120)[0]
    return results


def _runs_on(rank, world_size, folder, corpus):
    results = {}
    for sp in SPLITS[world_size]:
        name = f"{world_size} ranks, sp {sp}"
        results[name] = _observe(tiny_config(corpus, folder / name, f"parallel.sp={sp}", "log.validation_interval=4"))
    if world_size == 2:
        results["resumed"] = _resume(folder, corpus, "2 ranks, sp 2", "resumed", "parallel.sp=2")
        results["1 -> 2"] = _resume(folder, corpus, "1 ranks, sp 1", "1 to 2", "parallel.sp=1")
        results["2, sp 1 -> 2"] = _resume(folder, corpus, "2 ranks, sp 1", "sp 1 to 2", "parallel.sp=2")
        results["recompute"] = _observe(
            tiny_config(corpus, folder / "recompute", "train.checkpointing=full", "log.validation_interval=4")
        )
        results["bfloat16"] = _observe(tiny_config(corpus, folder / "bfloat16", "train.dtype=bfloat16"))
        results["documents"] = _observe(
            tiny_config(corpus, folder / "documents", "data.packing=documents", "parallel.sp=1")
        )
        for softmax in ("ring", "zeppelin"):  # every sample on both ranks
            settings = ("data.packing=documents", f"parallel.softmax={softmax}", "log.attention_time=true")
            results[f"documents, {softmax}"] = _observe(tiny_config(corpus, folder / softmax, *settings))
    if world_size == 4:
        results["2 -> 4"] = _resume(folder, corpus, "2 ranks, sp 2", "2 to 4", "parallel.sp=2")
        os.environ["LOCAL_WORLD_SIZE"] = "2"
        results["hsdp"] = _observe(
            tiny_config(corpus, folder / "hsdp", "parallel.sp=2", "parallel.sharding=hsdp", "log.validation_interval=4")
        )
    return results


def _late_runs_on_one_rank(rank, world_size, folder, corpus):
    return {"2 -> 1": _resume(folder, corpus, "2 ranks, sp 2", "2 to 1")}


def _resume(folder, corpus, source, name, *settings):
    """Continues a copy of run `source` whose last checkpoint is lost, as after a crash: from step 3 of 6."""
    if dist.get_rank() == 0:
        shutil.copytree(folder / source, folder / name)
        shutil.rmtree(folder / name / "checkpoints" / "step-00000006")
    dist.barrier()
    return _observe(tiny_config(corpus, folder / name, *settings))


def _observe(config):
    """The rows of the run, the samples of each step, put together again from what every rank got, and how many keys the
    queries see that each rank has in softmax attention."""
    trainer = start(config)
    next_step, steps, seen = trainer.loader.next_step, [], []

    def recording():
        batches = next_step()
        mine = [(b.seq.layout.global_indices(b.seq.rank), b.tokens.numpy(), b.labels.numpy()) for b in batches]
        everyone, keys = ([None] * dist.get_world_size() for _ in range(2))
        dist.all_gather_object(everyone, mine)
        positions = [b.seq.attention_layout().positions(b.seq.rank) for b in batches]
        dist.all_gather_object(keys, sum(int((x + 1).sum()) for x in positions))
        seen.append(keys)
        sp = trainer.mesh.sp
        groups = [everyone[first : first + sp] for first in range(0, len(everyone), sp)]
        steps.append(sorted(_joined(parts) for group in groups for parts in zip(*group)))
        return batches

    trainer.loader.next_step = recording
    trainer.train()
    trainer.close()
    dist.barrier()
    return {"rows": rows(Path(config.run.dir)), "samples": steps, "keys": seen}


def _joined(parts):
    """The tokens and labels of one sample from the parts of its SP group's ranks."""
    return tuple(sorted((int(i), int(t), int(label)) for part in parts for i, t, label in zip(*part)))


def _losses(run):
    return [row["loss"] for row in run["rows"]]


def _imbalance(run):
    return [max(keys) * len(keys) / sum(keys) for keys in run["keys"]]


@pytest.mark.parametrize("split", [*NAMES[1:], "recompute", "hsdp"])
def test_every_split_trains_the_same_run(runs, split):
    one, other = runs[NAMES[0]], runs[split]
    assert other["samples"] == one["samples"]
    assert [row["tokens"] for row in other["rows"]] == [row["tokens"] for row in one["rows"]] == [4 * 96] * 6
    for key in ("loss", "grad_norm", "lr"):
        assert [row[key] for row in other["rows"]] == pytest.approx([row[key] for row in one["rows"]], rel=TOLERANCE)
    validation = [(row["step"], row["val_loss"]) for row in other["rows"] if "val_loss" in row]
    assert [step for step, _ in validation] == [4, 6]
    expected = [row["val_loss"] for row in one["rows"] if "val_loss" in row]
    assert [loss for _, loss in validation] == pytest.approx(expected, rel=TOLERANCE)


def test_loss_falls(runs):
    losses = _losses(runs[NAMES[0]])
    assert losses[-1] < losses[0] - 0.3, losses
    assert losses[0] == pytest.approx(math.log(257), abs=0.2)


def test_bfloat16_stays_near_float32(runs):
    losses = _losses(runs["bfloat16"])
    assert losses != _losses(runs["2 ranks, sp 2"])
    assert losses == pytest.approx(_losses(runs["2 ranks, sp 2"]), rel=5e-3)


def test_documents_of_mixed_lengths(runs):
    run = runs["documents"]
    assert all(0 < row["tokens"] <= 4 * 96 for row in run["rows"])
    assert len({row["tokens"] for row in run["rows"]}) > 1
    imbalance = _imbalance(run)
    assert [row["imbalance"] for row in run["rows"]] == pytest.approx(imbalance) and max(imbalance) > 1.01


@pytest.mark.parametrize("softmax", ["ring", "zeppelin"])
def test_documents_over_two_ranks(runs, softmax):
    one, two = runs["documents"], runs[f"documents, {softmax}"]
    assert two["samples"] == one["samples"]
    assert _losses(two) == pytest.approx(_losses(one), rel=TOLERANCE)
    assert [row["imbalance"] for row in two["rows"]] == pytest.approx(_imbalance(two))
    assert all(1 <= row["attention_imbalance"] <= 2 and row["attention_s"] > 0 for row in two["rows"])
    assert not any("attention_s" in row for row in one["rows"])


def test_resumed_equals_uninterrupted_bitwise(runs):
    resumed, straight = runs["resumed"], runs["2 ranks, sp 2"]
    assert [row["step"] for row in resumed["rows"]] == [1, 2, 3, 4, 5, 6]
    assert resumed["samples"] == straight["samples"][3:]
    assert _losses(resumed) == _losses(straight)
    for key in ("grad_norm", "lr"):
        assert [row[key] for row in resumed["rows"]] == [row[key] for row in straight["rows"]]


@pytest.mark.parametrize("change", ["1 -> 2", "2 -> 1", "2 -> 4", "2, sp 1 -> 2"])
def test_resumes_on_another_split(runs, change):
    resumed, straight = runs[change], runs[NAMES[0]]
    assert resumed["samples"] == straight["samples"][3:]
    assert [row["step"] for row in resumed["rows"]] == [1, 2, 3, 4, 5, 6]
    assert _losses(resumed) == pytest.approx(_losses(straight), rel=TOLERANCE)


def test_nan_on_one_rank_stops_all_before_the_update(tmp_path):
    corpus = write_corpus(tmp_path)
    for message, unchanged in run_ranks(_nan_on_rank_one, 2, tmp_path, corpus, timeout=120):
        assert "the loss is nan (from rank 1) at step 2" in message
        assert "optim.lr" in message
        assert unchanged
    assert [row["step"] for row in rows(tmp_path / "run")] == [1]


def test_a_rank_that_is_asked_to_stop_ends_all_after_the_same_step(tmp_path):
    corpus = write_corpus(tmp_path)
    for stopped, late, resumed, straight in run_ranks(_stop_and_go_on, 2, tmp_path, corpus, timeout=240):
        assert stopped == ([1, 2, 3, 4], ["step-00000004"])  # asked in step 4; interval 0: saved for that alone
        assert late == ([1, 2, 3, 4, 5], ["step-00000005"])  # a step is read when the next has been started
        assert resumed == straight  # bitwise
    assert sorted(path.name for path in tmp_path.glob("marker *")) == ["marker 0", "marker 1"]  # none of a finished run


def _stop_and_go_on(rank, world_size, folder, corpus):
    settings, results = ("checkpoint.interval=0", "log.validation_interval=5"), []
    for in_flight in (0, 1):
        config = tiny_config(corpus, folder / f"run {in_flight}", *settings)
        os.environ["LONGSPAN_STOPPED"] = str(folder / f"marker {in_flight}")
        trainer = start(config, stop_asked=lambda: rank == 1 and trainer.step == 4)
        trainer._steps_in_flight = in_flight  # 1: as on a GPU
        trainer.train()
        trainer.close()
        dist.barrier()
        saved = [path.name for path in (folder / f"run {in_flight}" / "checkpoints").iterdir()]
        results.append(([row["step"] for row in rows(folder / f"run {in_flight}")], saved))
    os.environ["LONGSPAN_STOPPED"] = str(folder / "marker of finished runs")
    for name in ("run 1", "straight"):
        found = train(tiny_config(corpus, folder / name, *settings))
        results.append([{key: row.get(key) for key in ("step", "loss", "val_loss")} for row in found])
    return results


def _nan_on_rank_one(rank, world_size, folder, corpus):
    trainer = start(tiny_config(corpus, folder / "run"))
    next_step, snapshots = trainer.loader.next_step, []

    def observed():
        snapshots.append([parameter.full_tensor().clone() for parameter in trainer.model.parameters()])
        return next_step()

    def poison(module, inputs, output):
        return output * math.nan if rank == 1 and trainer.step == 2 else output

    trainer.loader.next_step = observed
    trainer.model.register_forward_hook(poison)
    with pytest.raises(UserError) as error:
        trainer.train()
    trainer.close()
    after = [parameter.full_tensor() for parameter in trainer.model.parameters()]
    assert not all(torch.equal(a, b) for a, b in zip(snapshots[0], after)), "step 1 was an update"
    return str(error.value), all(torch.equal(a, b) for a, b in zip(snapshots[-1], after))


def test_run_directory(tmp_path):
    run_ranks(_write_a_run, 2, tmp_path, timeout=120)
    run = tmp_path / "run"
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock", "checkpoints", "config.yaml", "environment.json", "metrics.jsonl", "tensorboard",
    ]  # fmt: skip
    assert len(list((run / "tensorboard").glob("events.*"))) == 1
    assert Config.load(run / "config.yaml") == tiny_config(tmp_path / "corpus", run, *_SHORT)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["world_size"] == 2 and environment["sp"] == 2 and environment["torch"] == torch.__version__
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]  # interval 0: at the end
    assert not (tmp_path / "unsaved" / "checkpoints").exists()
    keys = {"step", "loss", "tokens", "tokens_per_s", "tokens_per_s_per_gpu", "mfu", "step_time_s", "grad_norm", "lr",
            "peak_mem_gb", "imbalance"}  # fmt: skip
    assert [set(row) for row in rows(run)] == [keys, keys]
    assert all(row["mfu"] is None and row["imbalance"] >= 1 for row in rows(run))


def test_a_run_that_could_not_save_does_not_begin(tmp_path):
    corpus, run = write_corpus(tmp_path), tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").write_text("in the way")
    for message in run_ranks(_refused_at_the_start, 2, corpus, run, timeout=120):
        assert f"{run}/checkpoints/.saving-step-trial: the checkpoint cannot be written" in message
    assert not (run / "metrics.jsonl").exists()


def _refused_at_the_start(rank, world_size, corpus, run):
    trainer = start(tiny_config(corpus, run))
    with pytest.raises(UserError) as error:
        trainer.train()
    trainer.close()
    return str(error.value)


_SHORT = ("train.steps=2", "checkpoint.interval=0", "log.tensorboard=true", "run.name=config")


def _write_a_run(rank, world_size, folder):
    if rank == 0:
        write_corpus(folder)
    dist.barrier()
    train(tiny_config(folder / "corpus", folder / "run", *_SHORT))
    again = train(tiny_config(folder / "corpus", folder / "run", *_SHORT))  # nothing is left to do
    assert [row["step"] for row in again] == [1, 2]
    unsaved = train(tiny_config(folder / "corpus", folder / "unsaved", *_SHORT, "checkpoint.at_end=false"))
    assert [row["step"] for row in unsaved] == [1, 2]


def test_says_what_is_trained_and_when_nothing_is_left(tmp_path):
    corpus = write_corpus(tmp_path)
    settings = ("data.packing=documents", "train.steps=2")
    lines = run_ranks(_messages, 1, corpus, tmp_path / "run", settings, timeout=120)[0]
    assert any("4 samples of up to 96 tokens a step" in line for line in lines)
    last = tmp_path / "run" / "checkpoints" / "step-00000002"
    assert lines[-1] == f"nothing to do: {last} holds 2 steps, train.steps=2; a larger one continues it"


def _messages(rank, world_size, corpus, run_dir, settings):
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("longspan")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    for _ in range(2):
        train(tiny_config(corpus, run_dir, *settings))
    return lines


def test_schedule():
    optim = Config().optim
    optim.lr, optim.min_lr_ratio, optim.warmup_steps = 1.0, 0.1, 10
    for schedule, middle, last in (("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)):
        optim.schedule = schedule
        assert [learning_rate(optim, step, 110) for step in (1, 10, 60, 110)] == pytest.approx([0.1, 1, middle, last])
    optim.warmup_steps = 0
    assert learning_rate(optim, 1, 1) == 1.0
    optim.schedule, optim.warmup_steps = "cosine", 5
    assert learning_rate(optim, 5, 5) == 1.0
    assert learning_rate(optim, 3, 3) == 0.6  # a run shorter than its warm-up


def test_norms_and_biases_do_not_decay():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    decayed, plain = build_optimizer(model, Config().optim).param_groups
    assert [p.shape for p in decayed["params"]] == [(2, 2)] and decayed["weight_decay"] == 0.1
    assert len(plain["params"]) == 3 and plain["weight_decay"] == 0
