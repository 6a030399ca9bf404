"""Runs with tensor parallelism: the same run as on one rank, checkpoints that either continues, and what is refused."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks
from tiny_runs import SETTINGS, rows, start, tiny_config, write_corpus

from longspan.launcher.config import Config
from longspan.launcher.errors import UserError
from longspan.parallel.mesh import build_mesh

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
# A vocabulary of 257 that two ranks share unevenly, gates, a convolution, grouped keys; every step is clipped.
COMMON = (
    "model.num_layers=3", "model.num_heads=4", "model.num_kv_heads=2", "model.hidden_size=16", "model.llsa_block=8",
    "model.pattern=[linear:gated_delta, softmax, llsa]", "data.seq_len=64", "optim.clip_grad_norm=0.5", "train.steps=4",
    "checkpoint.interval=2", "log.validation_interval=4", "log.validation_samples=2",
)  # fmt: skip
TP = "parallel.tp=2"
# name: (ranks, settings, run that it continues after step 2)
RUNS = {
    "one": (1, (), None),
    "tp": (2, (TP,), None),
    "one to tp": (2, (TP, "parallel.engine=ddp", "train.checkpointing=full"), "one"),
    "tp x dp, hsdp": (4, (TP, "parallel.sp=1", "parallel.sharding=hsdp", "optim.offload=cpu"), None),
    "tp to tp x sp": (4, (TP,), "tp"),
    "tp to one": (1, (), "tp"),
    "tp x sp to one": (1, (), "tp x sp"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    corpus = write_corpus(folder)
    found = {"tp x sp": _torchrun(corpus, folder / "tp x sp")}
    for world_size, last in ((1, False), (2, False), (4, False), (1, True)):
        names = [
            name for name, (ranks, _, _) in RUNS.items() if ranks == world_size and (name.endswith("to one") == last)
        ]
        found |= run_ranks(_runs, world_size, folder, corpus, names, timeout=200)[0]
    return found


def _torchrun(corpus, run_dir):
    """Four processes of launcher/train.py, tp=2 and sp=2."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    paths = f"data.corpora=[{{path: {corpus}}}]", f"run.dir={run_dir}"
    settings = [*SETTINGS, *COMMON, TP, "parallel.sp=2", *paths, "run.device=cpu"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "--master-port", str(port)]
    done = subprocess.run(
        [*command, str(ROOT / "launcher" / "train.py"), *settings],
        capture_output=True, text=True, timeout=200, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.search(
        r"4 ranks = 1 data-parallel x 2 sequence-parallel x 2 tensor-parallel on .* CPU; ([\d,]+) parameters",
        done.stdout,
    )
    assert json.loads((run_dir / "environment.json").read_text())["tp"] == 2
    return {"first": 0, "rows": rows(run_dir), "parameters": int(said[1].replace(",", ""))}


def _runs(rank, world_size, folder, corpus, names):
    return {name: _run(corpus, folder, name) for name in names}


def _run(corpus, folder, name):
    _, settings, source = RUNS[name]
    if source and dist.get_rank() == 0:
        shutil.copytree(folder / source, folder / name)
        shutil.rmtree(folder / name / "checkpoints" / "step-00000004")
    os.environ["LOCAL_WORLD_SIZE"] = "2" if "hsdp" in name else str(dist.get_world_size())
    dist.barrier()
    trainer = start(tiny_config(corpus, folder / name, *COMMON, *settings))
    first = trainer.step
    trainer.train()
    trainer.close()
    dist.barrier()
    weights = {name: shard.full_tensor() for name, shard in trainer.engine.state_dict()["model"].items()}
    return {"first": first, "rows": rows(folder / name), "parameters": trainer.num_parameters, "weights": weights}


@pytest.mark.parametrize("name", ["tp x sp", *(name for name in RUNS if name != "one")])
def test_the_run_is_that_of_one_rank(runs, name):
    one, other = runs["one"], runs[name]
    assert other["first"] == (2 if name in RUNS and RUNS[name][2] else 0) and other["parameters"] == one["parameters"]
    assert all(row["grad_norm"] > 0.5 for row in one["rows"]), "nothing was clipped"
    for key in ("step", "loss", "grad_norm", "lr", "tokens"):
        assert [row[key] for row in other["rows"]] == pytest.approx([row[key] for row in one["rows"]], rel=1e-5), key
    assert other["rows"][-1]["val_loss"] == pytest.approx(one["rows"][-1]["val_loss"], rel=1e-5)
    if "dp" not in name:  # whose samples have other documents
        assert all(row["imbalance"] == pytest.approx(1, abs=0.05) for row in other["rows"])
    if "weights" in other:
        found, wanted = (torch.cat([x.flatten() for x in run["weights"].values()]) for run in (other, one))
        assert ((found - wanted).norm() / wanted.norm()).item() < 1e-4


@pytest.mark.parametrize(
    "settings, world_size, message",
    [
        (["parallel.tp=3"], 0, "parallel.tp=3 does not divide model.mlp_size=1408; use parallel.tp=1, 2"),
        (["model.num_kv_heads=2", "parallel.tp=4"], 0, "parallel.tp=4 does not divide model.num_kv_heads=2; use par"),
        (["model.linear_num_heads=6", "parallel.tp=4"], 0, "does not divide model.linear_num_heads=6; use p"),
        (["model.vocab_size=9", "parallel.tp=8"], 0, "parallel.tp=8 leaves a rank without any of model.vocab_size=9"),
        (["parallel.tp=0"], 0, "parallel.tp=0: use 1 or more"),
        (["parallel.tp=2", "parallel.engine=deepspeed"], 0, "parallel.tp=2 is for parallel.engine=fsdp2 and ddp"),
        (["parallel.tp=2"], 3, "parallel.tp=2 does not divide the 3 ranks: use one of 1, 3"),
        (["parallel.tp=2", "parallel.sp=4"], 4, "parallel.sp=4 does not divide the 4 ranks / parallel.tp=2: use one"),
        (["parallel.tp=4", "parallel.sp=4", "parallel.softmax=ulysses"], 16, "num_heads=8 / parallel.tp=4 among par"),
        (["parallel.tp=2", "parallel.sp=1"], 4, r"the 2 data-parallel groups \(4 ranks / parallel.tp=2 / parallel.sp"),
        (["parallel.tp=2", "model.hidden_size=48"], 64, "32 ranks that shard parameters must divide model.hidden_size"),
    ],
)  # fmt: skip
def test_refusals(settings, world_size, message):
    with pytest.raises(UserError, match=message) as error:
        Config.load(None, ["data.corpora=[{path: x}]", *settings]).validate(world_size or None)
    assert "\n" not in str(error.value)


def test_images_are_refused():
    with pytest.raises(UserError, match="parallel.tp=2 is for model.task=text, not images: use parallel.tp=1"):
        Config.load("diffusion-tiny", ["parallel.tp=2"])


def _meshes(rank, world_size):
    os.environ["LOCAL_WORLD_SIZE"] = "4"
    mesh = build_mesh(sp=2, sharding="hsdp", device=torch.device("cpu"), timeout_s=60, tp=2)
    groups = [dist.get_process_group_ranks(group) for group in (mesh.sp_group, mesh.sp_state_group)]
    topology = mesh.sp_topology.nodes, mesh.sp_topology.ranks_per_node
    os.environ["LOCAL_WORLD_SIZE"] = "3"
    with pytest.raises(ValueError) as error:
        build_mesh(sp=1, sharding="fsdp", device=torch.device("cpu"), timeout_s=60, tp=2)
    places = mesh.dp_rank, mesh.sp_rank, mesh.tp_rank, list(mesh.fsdp_mesh.get_coordinate()), mesh.tp_mesh.mesh.tolist()
    return places, groups, topology, str(error.value)


def test_which_ranks_share_what():
    for rank, (places, groups, topology, refused) in enumerate(run_ranks(_meshes, 8, timeout=60)):
        first = rank // 2 * 2
        assert places == (rank // 4, rank // 2 % 2, rank % 2, [rank // 4, rank // 2 % 2], [first, first + 1])
        same = rank // 4 * 4 + rank % 2
        assert groups == [[same, same + 2]] * 2 and topology == (1, 2)
        assert "parallel.tp=2 makes ranks of different machines share layers, with 3 ranks on this one" in refused
