"""Training runs small enough for tests: a corpus, a config and one run of the trainer on the ranks of run_ranks."""

import json
import random
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from longspan.launcher.config import Config
from longspan.launcher.corpus import prepare
from longspan.launcher.trainer import Trainer
from longspan.parallel.mesh import build_mesh

SETTINGS = (
    "model.num_layers=2", "model.hidden_size=16", "model.num_heads=2", "model.num_kv_heads=1",
    "model.pattern=[linear:scalar, softmax]", "model.loss_chunk=32", "data.seq_len=96", "data.validation_fraction=0.2",
    "optim.lr=0.01", "optim.warmup_steps=2", "train.steps=6", "train.global_batch=4", "train.timeout_s=60",
    "checkpoint.interval=3", "checkpoint.keep_last=9", "log.tensorboard=false", "log.validation_samples=4",
)  # fmt: skip


def write_corpus(folder: Path, documents: int = 40) -> Path:
    """A corpus of documents of 2 to 200 words."""
    chance = random.Random(0)
    texts = folder / "texts"
    texts.mkdir()
    for number in range(documents):
        words = ("".join(chance.choices("abcdef", k=3)) for _ in range(chance.randint(2, 200)))
        (texts / f"{number:02d}.txt").write_text(" ".join(words))
    prepare([texts], folder / "corpus", progress=lambda line: None)
    return folder / "corpus"


def tiny_config(corpus: Path, run_dir: Path, *settings: str) -> Config:
    data = f"data.corpora=[{{path: {corpus}}}]"
    return Config.load(None, [*SETTINGS, data, f"run.dir={run_dir}", *settings])


CPU = torch.device("cpu")


def train(config: Config, device: torch.device = CPU) -> list[dict]:
    """Runs `config` on the ranks of the process group, or on this process where there is none; this rank's result is
    the rows of metrics.jsonl."""
    trainer = start(config, device)
    try:
        trainer.train()
    finally:
        trainer.close()
    torch.distributed.barrier()  # rank 0 has written the file
    return rows(Path(config.run.dir))


def start(config: Config, device: torch.device = CPU, **options) -> Trainer:
    mesh = build_mesh(
        sp=config.parallel.sp, sharding=config.parallel.mesh_sharding, device=device, timeout_s=60,
        tp=config.parallel.tp,
    )  # fmt: skip
    return Trainer(config, mesh, **options)


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def saved(run_dir, step):
    """Every tensor of a checkpoint, whole, by its name in the file."""
    path = run_dir / "checkpoints" / f"step-{step:08d}"
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for name, tensor in metadata.items()
        if isinstance(tensor, dcp.metadata.TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state
