"""train.checkpointing=auto: the quickest settings that fit, in plans and in runs, whose numbers stay those without."""

import gc
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from devices import only_rank
from spawn import run_ranks
from tiny_runs import tiny_config, train, write_corpus

from longspan.launcher import cli, cpu_limits, memory_choice
from longspan.launcher.config import Config
from longspan.launcher.estimate import Job, estimate, usable
from longspan.launcher.fitting import largest, largest_of
from longspan.launcher.gpus import CONTEXT, GIB, GPUS, Cluster
from longspan.launcher.memory_choice import RUNGS, SPARE, choices, cluster_here, settle, smallest

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


@pytest.mark.parametrize(
    "name, major, kind",
    [
        ("NVIDIA H200", 9, "H200"),
        ("NVIDIA A100-SXM4-80GB", 8, "A100"),
        ("NVIDIA L40S", 8, "NVIDIA L40S"),
        ("NVIDIA H100 PCIe", 9, "H100 PCIe"),
        ("NVIDIA H200 MIG 3g.71gb", 9, "NVIDIA H200 MIG 3g.71gb"),
    ],
)
def test_memory_is_that_of_this_gpu(monkeypatch, name, major, kind):
    """Of any kind, with its share of this machine for each of the ranks here."""
    found = SimpleNamespace(name=name, major=major, minor=0, total_memory=44 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: found)
    monkeypatch.setattr(memory_choice, "memory_here", lambda: (100 * GIB, 4))
    job = replace(job_of(GIB), cluster=cluster_here(8))
    assert (job.cluster.name, job.cluster.per_node, job.cluster.host_memory) == (kind, 4, 400 * GIB)
    assert job.cluster.gpu.hopper == (major == 9) and job.cluster.gpu.memory == 44 * GIB
    assert rung(settle(job).config) == RUNGS[0]


LONG = (
    *SMALL[1:], "model.num_heads=4", "model.num_kv_heads=4", "model.loss_chunk=8192", "data.seq_len=128K",
    "data.respect_documents=false", "data.validation_fraction=0", "train.global_batch=1", "train.steps=2",
    "checkpoint.interval=0", "checkpoint.at_end=false",
)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("memory, index", [(10.7, 2), (6.3, 5)])
def test_what_is_taken_trains_in_the_memory_of_a_smaller_gpu(tmp_path, monkeypatch, memory, index):
    """torch allocates no more than such a GPU has for it. There the run without these settings ends at once."""
    corpus, whole = write_corpus(tmp_path, documents=1000), cluster_here(1)
    small = replace(whole, known=replace(whole.gpu, memory=memory * GIB))

    def losses(name, *settings):
        with only_rank("cuda") as device:
            return [row["loss"] for row in train(tiny_config(corpus, tmp_path / name, *LONG, *settings), device)]

    wanted = losses("whole")
    monkeypatch.setattr(memory_choice, "cluster_here", lambda world_size: small)
    try:
        limit(memory * GIB - CONTEXT)
        found = losses("auto", "train.checkpointing=auto")
        assert torch.cuda.max_memory_allocated() <= usable(small)
        with pytest.raises(torch.OutOfMemoryError):
            losses("none")
    finally:
        limit(whole.gpu.memory)
    assert rung(Config.load(tmp_path / "auto" / "config.yaml")) == RUNGS[index]
    assert found == pytest.approx(wanted, rel=5e-3) and len(found) == 2


def limit(num_bytes):
    """What torch may allocate of the GPU, of which it holds nothing yet."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(num_bytes / torch.cuda.get_device_properties().total_memory)
