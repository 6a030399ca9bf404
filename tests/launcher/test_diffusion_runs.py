"""Diffusion transformers in the trainer: the same run on every split, resumed as if never stopped, sampled from."""

import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from spawn import run_ranks
from tiny_runs import train

from longspan.launcher import checkpoint, cli
from longspan.launcher.config import Config
from longspan.launcher.errors import UserError
from longspan.launcher.sampling import png, sample_run

SETTINGS = (
    "model.task=images", "model.num_layers=2", "model.hidden_size=16", "model.num_heads=2", "model.sla_keep=2",
    "model.pattern=[sla, llsa]", "model.sla_query_block=8", "model.sla_key_block=4", "model.llsa_block=4",
    "model.llsa_keep=2", "data.image_size=8", "data.seq_len=256", "optim.lr=0.01", "optim.warmup_steps=2",
    "train.steps=6", "train.global_batch=2", "train.timeout_s=60", "checkpoint.interval=3", "checkpoint.keep_last=9",
    "log.tensorboard=false", "log.validation_interval=3", "log.validation_samples=2",
)  # fmt: skip


def config_of(run_dir, *settings):
    return Config.load(None, [*SETTINGS, f"run.dir={run_dir}", *settings])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The rows of all runs, by name, and the folder that they are in."""
    folder = tmp_path_factory.mktemp("runs")
    results = {"folder": folder}
    for world_size in (1, 2, 4):
        results |= run_ranks(_runs_on, world_size, folder, timeout=300)[0]
    return results


def _runs_on(rank, world_size, folder):
    if world_size == 1:
        bf16 = config_of(folder / "bfloat16", "train.dtype=bfloat16", "train.checkpointing=full")
        return {"one": train(config_of(folder / "one")), "bfloat16": train(bf16)}
    if world_size == 4:
        return {"sp 2": train(config_of(folder / "sp 2", "parallel.sp=2"))}
    if rank == 0:
        shutil.copytree(folder / "one", folder / "resumed")
        shutil.rmtree(folder / "resumed" / "checkpoints" / "step-00000006")
    dist.barrier()
    return {
        "two": train(config_of(folder / "two", "train.checkpointing=full")),
        "resumed": train(config_of(folder / "resumed")),
    }


@pytest.mark.parametrize("name", ["two", "sp 2", "resumed"])
def test_every_split_trains_the_same_run(runs, name):
    assert [row["step"] for row in runs[name]] == [1, 2, 3, 4, 5, 6]
    assert {row["tokens"] for row in runs[name]} == {2 * 256}
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in runs[name]] == pytest.approx([row[key] for row in runs["one"]], rel=2e-5)
    validation = [[row["val_loss"] for row in runs[run] if "val_loss" in row] for run in (name, "one")]
    assert len(validation[0]) == 2 and validation[0] == pytest.approx(validation[1], rel=2e-5)
    assert {row["imbalance"] for row in runs[name]} == {1.0}


def test_loss_falls_in_bfloat16_as_in_float32(runs):
    for name in ("one", "bfloat16"):
        first, last = (row["val_loss"] for row in runs[name] if "val_loss" in row)
        assert last < first, name
    assert [row["loss"] for row in runs["bfloat16"]] == pytest.approx([row["loss"] for row in runs["one"]], rel=2e-2)


def test_samples_are_written_as_a_picture(runs, tmp_path):
    for run, name, more in ((runs["folder"] / "one", "a.png", []), (runs["folder"] / "two", "b.png", ["--size", "16"])):
        cli.main(["sample", str(run), "--output", str(tmp_path / name), "--images", "3", "--steps", "2", *more])
    small, large = decoded(tmp_path / "a.png"), decoded(tmp_path / "b.png")
    assert small.shape == (8, 24, 3) and large.shape == (16, 48, 3)
    assert len({tuple(small[:, 8 * i : 8 * i + 8].flat) for i in range(3)}) == 3


def decoded(path):
    data, chunks = Path(path).read_bytes()[8:], {}
    while data:
        (length,) = struct.unpack(">I", data[:4])
        chunks[data[4:8]] = data[8 : 8 + length]
        assert struct.unpack(">I", data[8 + length : 12 + length]) == (zlib.crc32(data[4 : 8 + length]),)
        data = data[12 + length :]
    columns, rows, *kind = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert kind == [8, 2, 0, 0, 0]
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(rows, 1 + 3 * columns)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(rows, columns, 3)


def test_png_round_trip(tmp_path):
    picture = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    (tmp_path / "x.png").write_bytes(png(picture))
    np.testing.assert_array_equal(decoded(tmp_path / "x.png"), picture)


def test_what_cannot_be_sampled(runs, tmp_path):
    options = dict(output=str(tmp_path / "x.png"), images=1, steps=1, size=None, seed=0)
    with pytest.raises(UserError, match="nowhere: no complete checkpoint there"):
        sample_run(str(tmp_path / "nowhere"), **options)
    with pytest.raises(UserError, match="--size 12: use a power of two"):
        sample_run(str(runs["folder"] / "one"), **options | {"size": 12})
    with pytest.raises(UserError, match="--steps 0: use 1 or more"):
        sample_run(str(runs["folder"] / "one"), **options | {"steps": 0})
    with pytest.raises(UserError, match="--seed -1: use 0 or more"):
        sample_run(str(runs["folder"] / "one"), **options | {"seed": -1})
    damaged = shutil.copytree(checkpoint.named(runs["folder"] / "one").path, tmp_path / "step-00000001")
    for shard in damaged.glob("*.distcp"):
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    with pytest.raises(UserError, match="step-00000001 is damaged .*has other bytes"):
        sample_run(str(damaged), **options)
