"""Runs that start from published weights: a Llama and a Qwen3 written here by hand, by transformers, and by export."""

import json
import re
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from llama_oracle import llama_logits
from safetensors.torch import load_file, save_file
from spawn import run_ranks
from tiny_runs import SETTINGS, rows, start, tiny_config, train, write_corpus

from longspan.launcher import cli, trainer
from longspan.launcher.config import Config
from longspan.launcher.errors import UserError
from longspan.launcher.export import export_run
from longspan.launcher.facts import weights_in
from longspan.launcher.stored_models import load_model, stored
from longspan.launcher.weights import find, import_model, take_over
from longspan.models.build import build_model
from longspan.parallel import SequenceParallel

LLAMA = {
    "model_type": "llama", "vocab_size": 300, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "rms_norm_eps": 1e-5, "rope_theta": 1000,
    "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN = {"model_type": "qwen3", "head_dim": 8, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
MODELS = {
    "llama": LLAMA,
    "llama3": LLAMA | {"rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
    "qwen": LLAMA | QWEN,
    "yarn": LLAMA | QWEN | {"rope_scaling": YARN},
}
PARALLEL = {
    "ranks": (), "ddp": ("parallel.engine=ddp",), "tp": ("parallel.tp=2",), "data": ("parallel.sp=1",),
    "deepspeed": ("parallel.engine=deepspeed",),
}  # fmt: skip
TOKENS = torch.randint(300, (90,), generator=torch.Generator().manual_seed(0))


def random_weights(config):
    """Of a model with this config.json, by their names in transformers, in bf16."""
    chance = torch.Generator().manual_seed(1)
    hidden, size, inner = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    heads, groups = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    shapes = {"model.embed_tokens": (config["vocab_size"], hidden), "model.norm": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head"] = (config["vocab_size"], hidden)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.input_layernorm": (hidden,), f"{layer}.post_attention_layernorm": (hidden,)}
        shapes |= {
            f"{layer}.self_attn.{name}_proj": (rows, hidden) for name, rows in zip("qkv", (heads, groups, groups))
        }
        shapes |= {f"{layer}.mlp.{name}_proj": (inner, hidden) for name in ("gate", "up")}
        shapes |= {f"{layer}.self_attn.o_proj": (hidden, heads), f"{layer}.mlp.down_proj": (hidden, inner)}
        if config["model_type"] == "qwen3":
            shapes |= {f"{layer}.self_attn.{name}_norm": (size,) for name in "qk"}
    drawn = {name: torch.randn(shape, generator=chance) for name, shape in shapes.items()}
    return {
        f"{name}.weight": (1 + 0.3 * value if value.ndim == 1 else 0.3 * value).bfloat16()
        for name, value in drawn.items()
    }


def write(folder, config, weights, shards=1):
    """The files of a published model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder
    files = {name: f"model-{number % shards}.safetensors" for number, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def model_of(folder, *settings):
    """A model by the config that `longspan import` writes, with these weights."""
    output = Path(f"{folder}.{len(list(folder.parent.iterdir()))}.yaml")
    import_model(str(folder), str(output))
    config = Config.load(output, ["data.corpora=[{path: x}]", *settings])
    torch.manual_seed(0)
    model = build_model(config.model)
    take_over(find(Path(config.checkpoint.weights)), model)
    return model


def logits(model):
    with torch.no_grad():
        return model.logits(TOKENS, SequenceParallel(device="cpu").context([len(TOKENS)]))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_published_formulas(tmp_path, name, shards):
    weights = random_weights(MODELS[name])
    found = model_of(write(tmp_path / name, MODELS[name], weights, shards)).double()
    torch.testing.assert_close(logits(found), llama_logits(weights, MODELS[name], TOKENS), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    folder = write(tmp_path / name, MODELS[name] | {"max_position_embeddings": 1024}, random_weights(MODELS[name]))
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        wanted = other(TOKENS[None]).logits[0]
    torch.testing.assert_close(logits(model_of(folder)), wanted, rtol=1e-3, atol=1e-3)
    other.save_pretrained(tmp_path / "again")  # with the names of settings that its release writes
    assert torch.equal(logits(model_of(tmp_path / "again")), logits(model_of(folder)))


def test_keys_that_may_be_absent(tmp_path):
    config = {key: value for key, value in LLAMA.items() if key not in ("head_dim", "hidden_act", "torch_dtype")}
    weights = random_weights(LLAMA)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    model = model_of(write(tmp_path / "x", config | {"rope_scaling": None, "head_dim": None}, weights | extra))
    torch.testing.assert_close(logits(model.double()), llama_logits(weights, LLAMA, TOKENS), rtol=1e-9, atol=1e-9)
    tied = write(
        tmp_path / "tied",
        MODELS["qwen"],
        random_weights(MODELS["qwen"]) | {"lm_head.weight": weights["lm_head.weight"]},
    )
    assert model_of(tied).head is None


@pytest.mark.parametrize("kind", ["sla", "llsa", "softmax:window", "linear:gated_delta", "linear:gla", "linear:mamba2"])
@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_layers_of_other_kinds(tmp_path, caplog, name, kind):
    caplog.set_level("INFO")
    config, weights = MODELS[name], random_weights(MODELS[name])
    settings = [f"model.pattern=[softmax, {kind}, softmax]", "model.window=8"][: 1 + (kind == "softmax:window")]
    model = model_of(write(tmp_path / name, config, weights), *settings)
    torch.manual_seed(0)
    random = dict(build_model(model.config).named_parameters())
    layer, size, new = "model.layers.1", config["head_dim"], []
    own = {"mixer_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    own |= {f"mlp.{part}_proj": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    own |= {
        f"mixer.{part}": f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    }
    for name, parameter in model.blocks[1].named_parameters():
        stored = weights.get(f"{layer}.{own.get(name.removesuffix('.weight'))}.weight")
        if stored is None:
            new.append(name)
            assert torch.equal(parameter, random[f"blocks.1.{name}"]), name
        elif kind.startswith("linear") and name in ("mixer.k_proj.weight", "mixer.v_proj.weight"):
            rows = [stored[head // 2 * size :][:size] for head in range(4)]  # head h of queries has keys of head h // 2
            assert torch.equal(parameter, torch.cat(rows).float()), name
        else:
            assert torch.equal(parameter, stored.float()), name
    lines = [record.getMessage() for record in caplog.records]
    said = [line for line in lines if "initialised" in line]
    assert said == [f"1 layer of {kind}: initialised, without counterpart in the weights: {', '.join(new)}"] * bool(new)
    left = [line for line in lines if "not taken over" in line]
    names = ["q_norm", "k_norm"] if config["model_type"] == "qwen3" and kind.startswith("linear") else []
    names += ["q_proj", "k_proj", "v_proj"] if kind == "linear:mamba2" else []
    assert sorted(re.findall(r"mixer\.(\w+)\.", "".join(left))) == sorted(names)


def test_sla_starts_as_attention_to_chosen_blocks_alone(tmp_path):
    """All blocks chosen: the same function, since the projection of its linear part starts at zero."""
    folder = write(tmp_path / "x", LLAMA, random_weights(LLAMA))
    sparse = model_of(folder, "model.pattern=[sla]", "model.sla_keep=1000").double()
    torch.testing.assert_close(logits(sparse), logits(model_of(folder).double()))


CONFIGS = {
    "model_type=qwen2 cannot be read, only llama and qwen3: layers here have no biases": {"model_type": "qwen2"},
    "attention_bias is True there and is False in all models here": {"attention_bias": True},
    "hidden_act is gelu there and is silu": {"hidden_act": "gelu"},
    "use_sliding_window is True there": {"use_sliding_window": True},
    "positions of rope_type=dynamic are not known here: default, llama3, yarn": {"rope_scaling": {"type": "dynamic"}},
    "llama3's low_freq_factor is 2.0 there": {"rope_scaling": LLAMA3 | {"rope_type": "llama3", "low_freq_factor": 2.0}},
    "yarn's attention_factor is 2 there and has no counterpart": {"rope_parameters": YARN | {"attention_factor": 2}},
    "llama3 has no factor": {"rope_scaling": LLAMA3 | {"rope_type": "llama3", "factor": None}},
    "default's full_attention is {'rope_theta': 5} there and has no": {
        "rope_parameters": {"full_attention": {"rope_theta": 5}}
    },
    "rope_scaling is 8 there, and has settings": {"rope_scaling": 8},
    "model_type=['llama'] cannot be read": {"model_type": ["llama"]},
    "has no vocab_size, hidden_size, which": {"vocab_size": None, "hidden_size": None},
    "num_layers: expected an integer, found 'three'": {"num_hidden_layers": "three"},
    "model.num_kv_heads=3 does not divide model.num_heads=4": {"num_key_value_heads": 3},
    "model.layers.0.self_attn.q_proj.weight is [24, 24], by the settings of its config.json [32, 24]": {"head_dim": 8},
    "model.embed_tokens.weight is [300, 24], by the settings of its config.json [301, 24]": {"vocab_size": 301},
    "has no model.layers.3.": {"num_hidden_layers": 4},
    "model.layers.2.input_layernorm.weight has no counterpart here (and 8 more)": {"num_hidden_layers": 2},
}


@pytest.mark.parametrize("said", CONFIGS)
def test_models_that_are_not_known_here(tmp_path, said):
    with pytest.raises(UserError, match=re.escape(said)):
        find(write(tmp_path / "x", LLAMA | CONFIGS[said], random_weights(LLAMA)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model.layers.1.self_attn.q_proj.bias": torch.zeros(24)}, "q_proj.bias has no counterpart here"),
        ({"model.norm.weight": torch.zeros(23)}, "model.norm.weight is [23], by the settings of its config.json [24]"),
        ({"model.norm.weight": torch.zeros(24, dtype=torch.int8)}, "model.norm.weight is of dtype I8; use F64"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, change, said):
    with pytest.raises(UserError, match=re.escape(said)):
        find(write(tmp_path / "x", LLAMA, random_weights(LLAMA) | change))


def test_files_that_cannot_be_read(tmp_path, capsys):
    def error(*arguments):
        with pytest.raises(SystemExit):
            cli.main(["import", *map(str, arguments)])
        return capsys.readouterr().err.strip().splitlines()[-1]

    folder, output = write(tmp_path / "x", LLAMA, random_weights(LLAMA), 2), tmp_path / "x.yaml"
    assert "arguments are required: --output" in error(folder)
    assert f"{tmp_path / 'none'}: has no config.json; name a folder with" in error(
        tmp_path / "none", "--output", output
    )
    file = folder / "model-1.safetensors"
    assert f"{file}: is no folder; name a folder with config.json" in error(file, "--output", output)
    file.rename(tmp_path / "away")
    assert f"{folder}: has no model-1.safetensors; name" in error(folder, "--output", output)
    (folder / "model-1.safetensors").write_bytes((tmp_path / "away").read_bytes()[:-1])
    assert f"{folder}: cannot be read (SafetensorError" in error(folder, "--output", output)
    for content in ("{}", '{"weight_map": []}', '{"weight_map": {"x": 3}}'):
        (folder / "model.safetensors.index.json").write_text(content)
        assert "model.safetensors.index.json: has no weight_map, which" in error(folder, "--output", output)
    (folder / "model.safetensors.index.json").unlink()
    assert f"{folder}: has no model.safetensors.index.json; name" in error(folder, "--output", output)
    (folder / "config.json").write_text("[")
    assert f"{folder / 'config.json'}: is no JSON (" in error(folder, "--output", output)
    write(folder, LLAMA, random_weights(LLAMA))
    assert "--output: /proc/x cannot be written" in error(folder, "--output", "/proc/x")
    cli.main(["import", str(folder), "--output", str(output)])
    assert f"{output}: exists already" in error(folder, "--output", output)


def _settings(corpus, run_dir, *settings):
    return [
        *(text for text in SETTINGS if not text.startswith("model.")), "model.loss_chunk=32",
        f"data.corpora=[{{path: {corpus}}}]", f"run.dir={run_dir}", *settings,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with `run`, in which a Qwen3 learned something, `published`, that run in the layout of transformers, and
    `config.yaml` for what starts from it."""
    folder = tmp_path_factory.mktemp("trained")
    run_ranks(_pretrain, 1, folder, write_corpus(folder), timeout=300)
    export_run(str(folder / "run"), str(folder / "published"), "huggingface", "float32")
    weights = load_file(folder / "published" / "model.safetensors")
    (folder / "published" / "model.safetensors").unlink()
    write(folder / "published", json.loads((folder / "published" / "config.json").read_text()), weights, 2)
    import_model(str(folder / "published"), str(folder / "config.yaml"))
    return folder


def _pretrain(rank, world_size, folder, corpus):
    settings = ("model.pattern=[softmax]", "model.qk_norm=true", "model.num_heads=4", "model.num_kv_heads=2")
    settings += ("train.steps=30", "checkpoint.interval=0")
    train(tiny_config(corpus, folder / "run", *settings))


def test_export_and_import_are_bitwise(trained):
    config = Config.load(trained / "config.yaml", _settings(trained / "corpus", trained / "none"))
    model = build_model(config.model)
    take_over(find(Path(config.checkpoint.weights)), model)
    wanted, found = load_model(*stored(str(trained / "run"))).state_dict(), model.state_dict()
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.parametrize("settings", [("rope_type=llama3", "rope_trained=32", "rope_scaling=4.0"),
                                      ("rope_type=yarn", "rope_trained=64", "rope_scaling=2.0")])  # fmt: skip
def test_positions_survive_export(trained, tmp_path, monkeypatch, settings):
    info, config = stored(str(trained / "run"))
    values = {key: {"rope_type": str}.get(key, float)(value) for key, value in (text.split("=") for text in settings)}
    config.model = replace(config.model, **values | {"rope_trained": int(values["rope_trained"])})
    monkeypatch.setattr("longspan.launcher.export.stored", lambda run: (info, config))
    export_run("x", str(tmp_path / "out"), "huggingface", "float32")
    assert find(tmp_path / "out").model.rope == config.model.rope


def test_weights_of_layers_that_transformers_does_not_have(trained, tmp_path, caplog):
    """longspan's own layout, where a layer may change its kind too."""
    caplog.set_level("INFO")
    config = Config.load(trained / "config.yaml", ["data.corpora=[{path: x}]", "model.pattern=[linear:gla, softmax]"])
    wanted = build_model(config.model).state_dict()
    folder = tmp_path / "own"
    folder.mkdir()
    save_file(wanted, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({name: getattr(config.model, name) for name in config.model.__slots__})
    )
    found = model_of(folder).state_dict()
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert not [record for record in caplog.records if " layer of " in record.getMessage()]
    found = model_of(folder, "model.pattern=[linear:scalar, softmax]").state_dict()
    assert torch.equal(wanted["blocks.0.mixer.k_proj.weight"], found["blocks.0.mixer.k_proj.weight"])
    assert [record.getMessage() for record in caplog.records if "not taken over" in record.getMessage()] == [
        "1 layer of linear:gla: not taken over: mixer.decay.in_proj.weight, mixer.decay.out_proj.weight,"
        " mixer.decay.gate.bias"
    ]


@pytest.fixture(scope="module")
def continued(trained):
    """Losses of runs that start from the published weights, by number of ranks and name."""
    found = {}
    for world_size in (1, 2, 3):
        names = ["ranks"] if world_size != 2 else [name for name in PARALLEL if name != "deepspeed" or find_spec(name)]
        found |= run_ranks(_continue, world_size, trained, names, timeout=300)[0]
    return found


def _continue(rank, world_size, folder, names):
    found = {}
    for name in names:
        settings = (*PARALLEL[name], "train.steps=3", "train.global_batch=6", "checkpoint.interval=0")
        settings = _settings(folder / "corpus", folder / f"{name}-{world_size}", *settings)
        found[name, world_size] = [row["loss"] for row in train(Config.load(folder / "config.yaml", settings))]
    return found


def test_ranks_and_engines_start_alike(continued):
    wanted = continued["ranks", 1]
    assert len(wanted) == 3 and len(continued) >= 6
    for losses in continued.values():
        assert losses == pytest.approx(wanted, rel=1e-5)


def test_a_run_starts_where_the_published_model_is(trained, continued):
    random, losses = [row["loss"] for row in rows(trained / "run")], continued["ranks", 1]
    assert losses[0] < random[-1] + 0.1 < random[0] - 1


def test_the_same_command_continues_from_its_checkpoint(trained, tmp_path):
    run_ranks(_twice, 1, trained, tmp_path)
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]


def _twice(rank, world_size, folder, tmp_path):
    copied = shutil.copytree(folder / "published", tmp_path / "published")
    settings = [f"checkpoint.weights={copied}", "train.global_batch=2"]
    for steps in (2, 4):
        config = _settings(folder / "corpus", tmp_path / "run", *settings, f"train.steps={steps}")
        trainer = start(Config.load(folder / "config.yaml", config))
        assert trainer.step == steps - 2
        trainer.train()
        trainer.close()
        if steps == 2:
            shutil.rmtree(copied)  # only a new run reads it


def test_what_does_not_fit_is_one_line_on_every_rank(trained, tmp_path):
    for lines in zip(*run_ranks(_refused, 2, trained, tmp_path)):
        assert lines[0] == lines[1] and "\n" not in lines[0]


def _refused(rank, world_size, folder, tmp_path):
    place, lines = f"{folder / 'published'} holds another model: ", []
    for number, (setting, said) in enumerate(REFUSED.items()):
        config = Config.load(folder / "config.yaml", _settings(folder / "corpus", tmp_path / str(number), setting))
        with pytest.raises(UserError, match=re.escape(said.replace("PLACE ", place))) as error:
            start(config)
        lines.append(str(error.value))
    return lines


REFUSED = {
    "model.vocab_size=300": "PLACE model.vocab_size is 257 there and 300 here; `longspan import` writes its settings",
    "model.tie_embeddings=true": "PLACE model.tie_embeddings is False there and True here",
    "model.num_layers=3": "PLACE model.num_layers is 2 there and 3 here",
    "model.qk_norm=false": "PLACE model.qk_norm is True there and False here",
    "model.mlp_size=96": "PLACE model.mlp_size is 64 there and 96 here",
}


def test_ranks_compare_sizes_of_files_that_a_new_run_reads(trained, tmp_path):
    files = sorted(path for path in (trained / "published").iterdir() if path.name != "model.safetensors.index.json")
    sizes = {str(file): f"{file.stat().st_size} bytes" for file in files}
    assert len(sizes) == 3 and weights_in(trained / "published") == sizes
    for said in run_ranks(_other_files, 2, trained, tmp_path, timeout=300):
        assert "ranks differ: " in said
        assert f"{files[-1]} is {sizes[str(files[-1])]} on rank 0 and 7 bytes on rank 1" in said


def _other_files(rank, world_size, folder, tmp_path):
    def otherwise(place):
        found = weights_in(place)
        return found | {max(found): "7 bytes"} if rank else found

    settings = _settings(folder / "corpus", tmp_path / "run", "train.steps=2")
    same, trainer.weights_in = trainer.weights_in, otherwise
    with pytest.raises(UserError) as error:
        start(Config.load(folder / "config.yaml", settings))
    trainer.weights_in = same
    run = start(Config.load(folder / "config.yaml", settings))
    run.train()
    run.close()
    trainer.weights_in = otherwise
    run = start(Config.load(folder / "config.yaml", [*settings, "train.steps=3"]))  # reads its checkpoint alone
    assert run.step == 2
    run.close()
    return str(error.value)


def test_widths_of_linear_layers_that_do_not_fit(trained):
    said = "model.layers.0.self_attn.q_proj.weight is [16, 16] there, but blocks.0.mixer.q_proj.weight of a linear:gla"
    with pytest.raises(UserError, match=re.escape(said)):
        settings = ["data.corpora=[{path: x}]", "model.pattern=[linear:gla, softmax]", "model.linear_head_dim=8"]
        config = Config.load(trained / "config.yaml", settings)
        take_over(find(trained / "published"), build_model(config.model))


def test_settings_that_may_change_are_said(trained, caplog):
    settings = ["data.corpora=[{path: x}]", "model.rope_base=1e7", "model.norm_eps=1e-3"]
    config = Config.load(trained / "config.yaml", settings)
    take_over(find(trained / "published"), build_model(config.model))
    assert "changed since the weights: model.rope_base is 500000.0 there and 10000000.0 here" in caplog.text
    assert "changed since the weights: model.norm_eps is 1e-06 there and 0.001 here" in caplog.text
