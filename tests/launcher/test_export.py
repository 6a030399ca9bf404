"""Weights as safetensors: read back by a reader of the format written here, and run as a Llama and a Qwen3."""

import json
import struct

import numpy as np
import pytest
import torch
from devices import DEVICES, only_rank
from llama_oracle import llama_logits
from spawn import run_ranks
from tiny_runs import tiny_config, train, write_corpus

from longspan.launcher import checkpoint, cli
from longspan.launcher.config import Config
from longspan.launcher.export import export_run
from longspan.launcher.parsing import update
from longspan.launcher.stored_models import load_model, stored
from longspan.models.build import build_model
from longspan.models.config import ModelConfig
from longspan.parallel import SequenceParallel

SOFTMAX = ("model.pattern=[softmax]", "model.rope_scaling=2", "data.respect_documents=false", "train.steps=3")
MODELS = {
    "hybrid": (),
    "llama": (*SOFTMAX, "model.num_heads=4", "model.num_kv_heads=2"),
    "qwen": (*SOFTMAX, "model.qk_norm=true", "model.head_dim=12", "model.tie_embeddings=true"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(_train, 2, folder, write_corpus(folder), timeout=300)
    return folder


def _train(rank, world_size, folder, corpus):
    for name, settings in MODELS.items():
        train(tiny_config(corpus, folder / name, *settings))


def read_safetensors(path):
    """Tensors by name and the metadata, as the format's description says."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    assert size % 8 == 0
    header = json.loads(content[8 : 8 + size])
    metadata, data, tensors, covered = header.pop("__metadata__"), content[8 + size :], {}, 0
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        assert begin == covered
        covered = end
        numbers = np.frombuffer(data[begin:end], {"F32": np.float32, "BF16": np.uint16}[entry["dtype"]])
        if entry["dtype"] == "BF16":
            numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = torch.from_numpy(numbers.copy()).reshape(entry["shape"])
    assert covered == len(data)
    return tensors, metadata


@pytest.mark.parametrize("name", MODELS)
def test_weights_and_settings_make_the_same_model_again(runs, tmp_path, name):
    export_run(str(runs / name), str(tmp_path / "out"), "longspan", "float32")
    tensors, metadata = read_safetensors(tmp_path / "out" / "model.safetensors")
    model = build_model(ModelConfig(**json.loads((tmp_path / "out" / "config.json").read_text())))
    model.load_state_dict(tensors, strict=True)
    info = checkpoint.named(runs / name)
    assert metadata["longspan_step"] == str(info.step)
    trained = load_model(*stored(str(runs / name))).state_dict()
    assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())
    start = build_model(update(Config(), info.config, "").model).state_dict()
    assert not torch.equal(start["norm.weight"], trained["norm.weight"])  # trained ones, not initial ones


@pytest.mark.parametrize("device", DEVICES)
def test_weights_of_a_device_lose_on_the_cpu_what_its_validation_lost(tmp_path, device):
    corpus, output = write_corpus(tmp_path), tmp_path / "evaluated.json"
    with only_rank(device) as place:
        rows = train(tiny_config(corpus, tmp_path / "run", "log.validation_interval=6"), place)
    export_run(str(tmp_path / "run"), str(tmp_path / "out"), "longspan", "float32")
    tensors, _ = read_safetensors(tmp_path / "out" / "model.safetensors")
    wanted = load_model(*stored(str(tmp_path / "run"))).state_dict()
    assert tensors.keys() == wanted.keys() and all(torch.equal(x, wanted[name]) for name, x in tensors.items())
    cli.main(["evaluate", str(tmp_path / "run"), "run.device=cpu", "--samples", "4", "--output", str(output)])
    (found,) = json.loads(output.read_text())["lengths"]
    assert found["loss"] == pytest.approx(rows[-1]["val_loss"], rel=1e-6 if device == "cpu" else 1e-4)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_bfloat16_rounds_to_nearest(runs, tmp_path):
    export_run(str(runs / "hybrid"), str(tmp_path), "longspan", "bfloat16")
    tensors, _ = read_safetensors(tmp_path / "model.safetensors")
    for name, value in load_model(*stored(str(runs / "hybrid"))).state_dict().items():
        assert torch.equal(tensors[name], value.bfloat16().float())


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_the_layout_of_transformers_computes_the_same_logits(runs, tmp_path, name):
    """By the formulas of Llama and Qwen3 over the exported names, in fp64."""
    cli.main(["export", str(runs / name), "--output", str(tmp_path), "--layout", "huggingface"])
    weights, _ = read_safetensors(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [{"llama": "LlamaForCausalLM", "qwen": "Qwen3ForCausalLM"}[name]]
    tokens = torch.randint(config["vocab_size"], (50,), generator=torch.Generator().manual_seed(0))
    model = load_model(*stored(str(runs / name))).double()
    with torch.no_grad():
        wanted = model.logits(tokens, SequenceParallel(device="cpu").context([50]))
    found = llama_logits({key: value.double() for key, value in weights.items()}, config, tokens)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_transformers_reads_it(runs, tmp_path, name):
    transformers = pytest.importorskip("transformers")
    export_run(str(runs / name), str(tmp_path), "huggingface", "float32")
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    tokens = torch.randint(250, (40,), generator=torch.Generator().manual_seed(0))
    model = load_model(*stored(str(runs / name)))
    with torch.no_grad():
        wanted = model.logits(tokens, SequenceParallel(device="cpu").context([40]))
        torch.testing.assert_close(other(tokens[None]).logits[0].float(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layout", "huggingface", "--output", "x"], "transformers has no model with layers of linear:scalar: use"),
        (["--output", "/proc/none"], "--output: /proc/none cannot be written"),
        ([], "the following arguments are required: --output"),
    ],
)
def test_what_does_not_fit_is_one_line(runs, capsys, arguments, said):
    with pytest.raises(SystemExit):
        cli.main(["export", str(runs / "hybrid"), *arguments])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("longspan: error: ") and said in error
