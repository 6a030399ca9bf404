"""What a CPU is asked for, before the first step: a line about long steps, a refusal of what memory cannot hold."""

import json
import logging
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from spawn import run_ranks
from tiny_runs import start, tiny_config, train, write_corpus

from longspan.launcher import cpu_limits
from longspan.launcher.config import Config
from longspan.launcher.cpu_limits import check_model, check_step, memory
from longspan.launcher.errors import UserError
from longspan.launcher.gpus import GIB
from longspan.parallel import Costs, SequenceParallel
from longspan.parallel.topology import Topology

MODEL_ALONE = 80_000  # bytes that hold the weights of tiny_runs, and no step
COSTS = Costs()
MESH = SimpleNamespace(sp=2, tp=1, world_size=2, shards=2, sp_topology=Topology(1, 2))


def batch(*lengths):
    return SimpleNamespace(seq=SimpleNamespace(layout=SimpleNamespace(lengths=lengths)))


def config_of(*settings):
    return Config.load("quickstart", list(settings))


def test_long_steps_are_announced_and_those_that_memory_cannot_hold_refused(monkeypatch, caplog):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(cpu_limits, "memory_here", lambda: (12 * GIB, 2))
    with caplog.at_level(logging.WARNING, "longspan"):
        check_step(config_of(), MESH, [batch(2**12)] * 2, COSTS)
        assert not caplog.text
        check_step(config_of(), MESH, [batch(2**18)], COSTS)
        assert "data.seq_len=4096: a step will take about 0:1" in caplog.text and "GPUs" in caplog.text
    with pytest.raises(
        UserError, match=r"data.seq_len=2097152 takes at least 4\d.\d GiB a rank, and .* has 12.0"
    ) as no:
        check_step(config_of("data.seq_len=2M"), MESH, [batch(2**21)], COSTS)
    assert "train.checkpointing=full or train.mlp_tile=4K" in str(no.value)
    with pytest.raises(UserError, match="use a smaller data.seq_len, more machines") as no:
        check_step(config_of("train.checkpointing=full", "train.mlp_tile=4K"), MESH, [batch(2**23)], COSTS)
    documents = [batch(*[2**9] * 2**9)]  # as many tokens, but no long document
    caplog.clear()
    check_step(config_of(), MESH, documents, COSTS)
    assert not caplog.text


def test_memory_is_what_a_step_holds_and_all_states():
    short, long = (memory(config_of(), MESH, [size], COSTS) for size in (2**14, 2**15))
    states = 16 * 968_160 / 2
    assert long - states == pytest.approx(2 * (short - states), rel=0.02)
    assert memory(config_of("train.checkpointing=full"), MESH, [2**15], COSTS) < 0.7 * long
    whole = SimpleNamespace(**vars(MESH) | {"shards": 1})  # parallel.engine=ddp
    assert memory(config_of(), whole, [2**14], COSTS) - short == states
    away = memory(config_of("train.checkpointing=full", "train.offload_activations=true"), MESH, [2**20], COSTS)
    assert away == pytest.approx(memory(config_of("train.checkpointing=full"), MESH, [2**20], COSTS), rel=0.2)


def test_a_model_that_the_machine_cannot_hold_is_refused(monkeypatch):
    monkeypatch.setattr(cpu_limits, "memory_here", lambda: (16 * GIB, 1))
    check_model(config_of())
    with pytest.raises(UserError, match=r"9,040,046,592 parameters takes 33.7 GiB .* has 16.0 .*: use GPUs"):
        check_model(Config.load("hybrid-8b", ["data.corpora=[{path: x}]"]))


def test_what_a_container_or_a_job_may_have(tmp_path):
    def limits(text, **files):
        (tmp_path / "cgroup").write_text(text)
        for name, content in files.items():
            path = tmp_path / "root" / name.replace("__", "/").replace("memory_", "memory.")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return sorted(cpu_limits.allowed(tmp_path / "cgroup", tmp_path / "root"))

    assert limits("0::/\n") == [] == [*cpu_limits.allowed(tmp_path / "none", tmp_path)]
    assert limits("0::/\n", memory_max="max\n") == []
    assert limits("0::/seen/outside\n", memory_max="4096\n") == [4096]  # in a container
    assert limits("0::/job/step\n", memory_max="max\n", job__memory_max="2048\n", job__step__memory_max="max\n") == [
        2048
    ]
    assert limits("9:cpu:/job\n4:memory:/old\n", memory__old__memory_limit_in_bytes="512") == [512]
    assert cpu_limits.memory_here()[0] > 0


def test_a_run_asks_before_its_first_step(tmp_path):
    corpus = write_corpus(tmp_path)
    messages = run_ranks(refused, 2, corpus, tmp_path)
    assert messages[0] == messages[1] and "takes at least" in messages[0]


def refused(rank, world_size, corpus, folder):
    cpu_limits.SHORT_S, cpu_limits.memory_here = 0, lambda: (MODEL_ALONE, 2)
    trainer = start(tiny_config(corpus, folder / "run"))
    with pytest.raises(UserError) as refusal:
        trainer.train()
    trainer.close()
    return str(refusal.value)


def test_limits_are_planned_with_the_costs_of_the_run(tmp_path):
    measured = {"heads": 2, "kv_heads": 1, "head_dim": 8, "bytes_per_number": 4}
    costs = Costs(start_tokens=200_000)
    (tmp_path / "costs.json").write_text(json.dumps({"costs": asdict(costs), "model": measured}))
    assert run_ranks(costs_of_plans, 2, write_corpus(tmp_path), tmp_path) == [[costs] * 2, [costs]]
    config = config_of("parallel.softmax=zeppelin")
    default, other = (memory(config, MESH, [5000, 3000, 9000, 100, 20000], found) for found in (COSTS, costs))
    assert other != default


def costs_of_plans(rank, world_size, corpus, folder):
    """Of rank 0's choice of settings, and of every rank's step."""
    found = []

    def recorded(*, costs=None, **options):
        found.append(costs)
        return SequenceParallel(costs=costs, **options)

    cpu_limits.SHORT_S, cpu_limits.SequenceParallel = 0, recorded
    settings = f"parallel.costs={folder}/costs.json", "train.checkpointing=auto", "train.steps=1"
    train(tiny_config(corpus, folder / "run", *settings))
    return found
