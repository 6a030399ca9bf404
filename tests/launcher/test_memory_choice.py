"""train.checkpointing=auto: the quickest settings that fit, in plans and in runs, whose numbers stay those without."""

import json
from dataclasses import replace

import pytest
from spawn import run_ranks
from tiny_runs import tiny_config, train, write_corpus

from longspan.launcher import cli, cpu_limits, memory_choice
from longspan.launcher.config import Config
from longspan.launcher.estimate import Job, estimate
from longspan.launcher.fitting import largest, largest_of
from longspan.launcher.gpus import GIB, GPUS, Cluster
from longspan.launcher.memory_choice import RUNGS, SPARE, choices, settle, smallest

SMALL = [
    "data.corpora=[{path: x}]", "model.num_layers=8", "model.hidden_size=512", "model.vocab_size=1000",
    "train.dtype=bfloat16", "data.seq_len=256K",
]  # fmt: skip
WINDOWED = "model.pattern=[linear,sparse]", "model.sparse_selection={name: window, window: 16}"
NAMES = ("checkpointing", "mlp_tile", "offload_activations")


def job_of(memory, *settings, host=2**40):
    gpu = replace(GPUS["H200"], memory=memory)
    config = Config.load(None, [*SMALL, "train.checkpointing=auto", *settings])
    return Job(config, Cluster("H200", 2, 2, host, gpu))


def rung(config):
    return {name: value for name in NAMES if (value := getattr(config.train, name))}


def test_of_what_fits_the_quickest_is_taken():
    """Memory from plenty to little: every rung in turn, none whose predecessor fits, by estimates of its own."""
    layers = "model.num_layers=16"  # so many that what they keep is more than one of them holds
    needs = [estimate(replace(job_of(64 * GIB), config=config)) for config in choices(job_of(GIB, layers).config)]
    seconds = [found.step_s for found in needs]
    assert seconds[:3] == sorted(seconds[:3]) and seconds[0] < 0.98 * seconds[2]
    assert max(seconds[3:]) < 1.05 * seconds[2]
    taken = []
    for memory in (50, 40, 10, 8.8, 7.6, 6.5):
        job = settle(job_of(memory * GIB, layers))
        found, limit = estimate(job), estimate(job).limit
        index = RUNGS.index(rung(job.config))
        assert sum(found.memory.values()) <= (1 - SPARE) * limit or index == len(RUNGS) - 1
        assert all(sum(needs[i].memory.values()) > (1 - SPARE) * limit for i in range(index))
        taken.append(index)
    assert taken == [0, 1, 2, 3, 4, 5]


def test_offload_needs_host_memory():
    """Machines that have none keep to the GPU, where nothing leaves SPARE with what takes least, also to be refused."""
    plenty, none, too_little = (
        settle(job_of(memory * GIB, host=host * GIB)) for memory, host in ((6.5, 1024), (6.5, 14), (5, 14))
    )
    assert plenty.config.train.offload_activations and estimate(plenty).fits
    assert rung(none.config) == RUNGS[3] and estimate(none).fits
    assert not estimate(too_little).fits


def test_a_machine_that_is_nearly_full_gets_no_more():
    """Of host memory that states and processes take to 95 %: nothing is put there besides, and the longest sequence is
    that of the GPU."""
    settings = 64 * GIB, "optim.offload=cpu", "model.num_layers=4"
    taken = sum(estimate(settle(job_of(*settings))).host.values())
    tight = job_of(*settings, host=taken / 0.95)
    assert rung(settle(tight).config) == RUNGS[0] and estimate(settle(tight)).fits
    with_offload, without = map(largest, smallest(tight))
    assert largest_of(smallest(tight)) == without > with_offload


def test_what_the_config_says_itself_stays():
    assert [rung(config) for config in choices(job_of(GIB, "train.mlp_tile=4K").config)] == [
        {"checkpointing": "none", "mlp_tile": 4096},
        {"checkpointing": "selective", "mlp_tile": 4096},
        {"checkpointing": "full", "mlp_tile": 4096},
        {"checkpointing": "full", "mlp_tile": 4096, "offload_activations": True},
    ]
    kept = [*choices(job_of(GIB, "train.checkpoint_layers=[softmax]").config)]
    assert [config.train.checkpointing for config in kept] == ["selective", "full", "full", "full", "full"]
    assert all(config.train.checkpoint_layers == ["softmax"] for config in kept)
    away = [*choices(job_of(GIB, "train.offload_activations=true").config)]
    assert all(config.train.offload_activations and config.train.checkpointing != "none" for config in away)
    assert [rung(job.config) for job in smallest(job_of(GIB))] == [RUNGS[-1], RUNGS[3]]
    assert [rung(job.config) for job in smallest(job_of(GIB, "train.offload_activations=true"))] == [RUNGS[-1]]


def test_plan_says_what_is_taken_and_the_longest_is_that_of_the_least_memory(capsys):
    def plan(*more):
        cli.main(["plan", "--config", "hybrid-0.4b", "--gpus", "2xH200", "--seq-len", "64K", *more])
        return capsys.readouterr().out

    assert "note: train.checkpointing=auto is checkpointing=none here" in plan("train.checkpointing=auto")
    shown = json.loads(plan("train.checkpointing=auto", "--json"))
    assert shown["settings"] == {"checkpointing": "none", "mlp_tile": 0, "offload_activations": False}
    full = json.loads(plan("train.checkpointing=full", "--json"))
    assert shown["step_time_s"] < full["step_time_s"] and shown["largest_seq_len"] > 1.3 * full["largest_seq_len"]
    assert "auto" not in plan("train.checkpointing=full")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return run_ranks(_train_all, 2, folder, write_corpus(folder), timeout=300)[0], folder


def _train_all(rank, world_size, folder, corpus):
    found = {"none": train(tiny_config(corpus, folder / "none"))}
    for name, had, settings in (
        ("plenty", 16 * GIB, ()),
        ("little", 1, ()),
        ("not counted", 16 * GIB, WINDOWED),
    ):
        memory_choice.memory_here = lambda had=had: (had, 2)  # each rank is a process of its own
        found[name] = train(tiny_config(corpus, folder / name, "train.checkpointing=auto", *settings))
    memory_choice.memory_here = cpu_limits.memory_here
    return found


@pytest.mark.parametrize(
    "name, wanted",
    [("plenty", RUNGS[0]), ("little", RUNGS[2]), ("not counted", {"checkpointing": "full"})],
)
def test_runs_take_it_and_say_what_they_took(runs, name, wanted):
    rows, folder = runs
    assert rung(Config.load(folder / name / "config.yaml")) == wanted
    chosen = json.loads((folder / name / "environment.json").read_text())["chosen"]
    assert chosen == [f"train.{setting}" for setting in NAMES]
    if name != "not counted":
        for key in ("loss", "grad_norm"):
            assert [row[key] for row in rows[name]] == pytest.approx([row[key] for row in rows["none"]], rel=1e-5)
