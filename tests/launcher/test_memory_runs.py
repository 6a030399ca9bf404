"""Runs with memory options: the numbers of the run without, resumed as if never stopped, and what is refused."""

import shutil

import pytest
import torch.distributed as dist
from spawn import run_ranks
from tiny_runs import tiny_config, train, write_corpus

from longspan.launcher.config import Config
from longspan.launcher.errors import UserError

OPTIONS = (
    "train.checkpointing=selective", "train.checkpoint_layers=[linear]", "train.mlp_tile=16",
    "train.offload_activations=true", "optim.offload=cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    corpus = write_corpus(folder)
    return run_ranks(_train_all, 2, folder, corpus, timeout=300)[0]


def _train_all(rank, world_size, folder, corpus):
    def rows_of(name, *settings):
        return train(tiny_config(corpus, folder / name, "log.validation_interval=3", *settings))

    results = {"plain": rows_of("plain"), "host": rows_of("host", "optim.offload=cpu"), "all": rows_of("all", *OPTIONS)}
    for name, source, settings in (("plain to all", "plain", OPTIONS), ("all to plain", "all", ())):
        if rank == 0:
            shutil.copytree(folder / source, folder / name)
            shutil.rmtree(folder / name / "checkpoints" / "step-00000006")
        dist.barrier()
        results[name] = rows_of(name, *settings)
    bf16 = ("train.dtype=bfloat16",)
    results["bf16"] = rows_of("bf16", *bf16)
    results["bf16, reduced"] = rows_of("reduced", *bf16, "train.reduce_dtype=bfloat16")
    return results


@pytest.mark.parametrize(
    "name, tolerance", [("host", 0), ("all", 1e-5), ("plain to all", 1e-5), ("all to plain", 1e-5)]
)
def test_memory_options_train_the_same_run(runs, name, tolerance):
    assert [row["step"] for row in runs[name]] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "grad_norm", "val_loss", "lr"):
        found, wanted = ([row[key] for row in runs[run] if key in row] for run in (name, "plain"))
        assert found == (pytest.approx(wanted, rel=tolerance) if tolerance else wanted), key


def test_gradients_reduced_in_bfloat16(runs):
    """The first loss is the same, what follows is near, and not equal: the setting is in force."""
    exact, rounded = ([row["loss"] for row in runs[name]] for name in ("bf16", "bf16, reduced"))
    assert rounded[0] == exact[0] and rounded != exact
    assert rounded == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize(
    "settings, message",
    [
        ("train.mlp_tile=-1", "expected a number of tokens"),
        (
            "train.checkpoint_layers=[linear]",
            "train.checkpoint_layers is for checkpointed layers, but train.checkpoint",
        ),
        ("train.offload_activations=true", "train.offload_activations is for checkpointed layers, but train.checkpoi"),
        (
            "train.checkpointing=full train.checkpoint_layers=[lin]",
            "train.checkpoint_layers has lin, but no layer is of that kind: use some of linear:fixed, softmax",
        ),
        ("train.reduce_dtype=bfloat16", "use train.reduce_dtype=float32, or train.dtype=bfloat16"),
        ("optim.offload=disk", "expected none | cpu, found 'disk'"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(UserError) as error:
        Config.load(None, ["data.corpora=[{path: x}]", *settings.split()])
    assert message in str(error.value)
