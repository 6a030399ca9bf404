"""The shipped presets: as large as their comments say, and each learns when shrunk to a few thousand parameters."""

import pytest
from spawn import run_ranks
from tiny_runs import train, write_corpus

from longspan.launcher.config import Config, shipped_configs
from longspan.models.flops import num_parameters

IMAGES = ["diffusion-tiny", "diffusion-128", "diffusion-256"]
PRESETS = [
    "hybrid-0.4b", "hybrid-1b", "hybrid-8b", "hybrid-gdn", "hybrid-hgrn2", "hybrid-kda", "hybrid-lightning",
    "mamba2-hybrid",
]  # fmt: skip
FAMILIES = {
    "hybrid-0.4b": "scalar", "hybrid-1b": "scalar", "hybrid-8b": "scalar", "hybrid-gdn": "gated_delta",
    "hybrid-hgrn2": "hgrn2", "hybrid-kda": "kda", "hybrid-lightning": "fixed", "mamba2-hybrid": "mamba2",
}  # fmt: skip
TINY = (
    "model.hidden_size=32", "model.num_heads=2", "model.num_kv_heads=1", "model.mlp_size=48",
    "model.linear_num_heads=4", "model.vocab_size=300", "model.linear_value_dim=8", "model.state_size=16",
    "data.seq_len=64", "data.validation_fraction=0", "optim.lr=0.02", "optim.warmup_steps=2", "train.steps=8",
    "train.global_batch=4", "train.dtype=float32", "checkpoint.interval=0", "log.tensorboard=false",
)  # fmt: skip


def test_every_shipped_config_is_covered():
    assert {*shipped_configs()} == {*PRESETS, *IMAGES, "quickstart"}


@pytest.mark.parametrize("name", PRESETS)
def test_size_and_family(name):
    model = Config.load(name).model
    assert {*model.layer_kinds} == {"softmax", f"linear:{FAMILIES[name]}"}
    low, high = {"hybrid-1b": (0.9e9, 1.05e9), "hybrid-8b": (8e9, 9.1e9)}.get(name, (0.38e9, 0.44e9))
    assert low < num_parameters(model) < high
    text = shipped_configs()[name].read_text()
    assert f"{num_parameters(model) / 1e9:.2f}B" in text or name in ("hybrid-0.4b", "hybrid-1b")


def run_all(rank, world_size, folder, corpus):
    """The losses of a shrunken run of a preset of every family; one shrinks to the same whatever its size."""
    losses = {}
    for name in dict(zip(FAMILIES.values(), FAMILIES)).values():
        layers = f"model.num_layers={len(Config.load(name).model.pattern)}"
        data = f"data.corpora=[{{path: {corpus}}}]"
        config = Config.load(name, [*TINY, layers, data, f"run.dir={folder / name}"])
        losses[name] = [row["loss"] for row in train(config)]
    return losses


def test_presets_of_every_family_learn(tmp_path):
    """With activations recomputed, as the presets do."""
    corpus = write_corpus(tmp_path)
    (losses, *_) = run_ranks(run_all, 1, tmp_path, corpus, timeout=300)
    for name, (first, *_, last) in losses.items():
        assert last < 0.7 * first, f"{name}: loss went from {first:.2f} to {last:.2f}"
