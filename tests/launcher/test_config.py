"""Loading settings: precedence, strict types, nearest names, every refused combination, and a lossless dump."""

from pathlib import Path
from typing import get_args

import pytest
import yaml

from longspan.kernels.softmax import BACKENDS
from longspan.launcher.config import Config, shipped_configs
from longspan.launcher.errors import UserError
from longspan.launcher.parsing import parse_tokens, settings_of

CORPUS = "data.corpora=[{path: data/x}]"


def load(*overrides):
    return Config.load(None, [CORPUS, *overrides])


def from_file(tmp_path, text, *overrides):
    (tmp_path / "run.yaml").write_text(text)
    return Config.load(tmp_path / "run.yaml", [CORPUS, *overrides])


def refusal(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_overrides_beat_the_file_and_the_file_beats_the_defaults(tmp_path):
    config = from_file(tmp_path, "optim: {lr: 1e-3, beta1: 0.8}\ntrain: {steps: 500}", "optim.lr=2e-3", "optim.lr=5e-3")
    assert (config.optim.lr, config.optim.beta1, config.optim.beta2, config.train.steps) == (5e-3, 0.8, 0.95, 500)


def test_lists_and_sections_of_lists_are_read_as_yaml():
    config = load("model.pattern=[linear, softmax]", "data.corpora=[{path: a, weight: 2}, {path: b}]")
    assert config.model.pattern == ["linear", "softmax"]
    assert [(corpus.path, corpus.weight) for corpus in config.data.corpora] == [("a", 2.0), ("b", 1.0)]


def test_text_is_taken_as_it_stands():
    assert load("run.name=123").run.name == "123"
    assert load("checkpoint.resume=none").checkpoint.resume == "none"
    assert load("checkpoint.resume=runs/a=b").checkpoint.resume == "runs/a=b"


def test_files_may_use_dotted_names_and_empty_sections(tmp_path):
    config = from_file(tmp_path, "optim.lr: 1e-3\noptim.beta1: 0.8\nlog:\n")
    assert (config.optim.lr, config.optim.beta1) == (1e-3, 0.8)


def test_run_is_named_after_the_file_or_by_the_user(tmp_path):
    assert from_file(tmp_path, "train: {steps: 500}").run.dir == "runs/run"
    assert from_file(tmp_path, "run: {name: mine}").run.dir == "runs/mine"
    assert load("run.name=mine", "run.dir=out/{name}/1").run.dir == "out/mine/1"


def test_paths_may_start_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load("run.dir=~/runs/{name}", "checkpoint.resume=~/old", "parallel.costs=~/costs.json")
    assert config.run.dir == "/home/me/runs/longspan"
    assert (config.checkpoint.resume, config.parallel.costs) == ("/home/me/old", "/home/me/costs.json")


@pytest.mark.parametrize(
    "text, count", [("131072", 131072), (7, 7), ("128K", 2**17), ("2M", 2**21), ("1G", 2**30), ("2m", 2**21)]
)
def test_token_counts(text, count):
    assert parse_tokens(text) == count


@pytest.mark.parametrize("text", ["", "K", "1.5K", "-1K", "2MB", "1e6", "2 M", 1.5, True, None])
def test_malformed_token_counts(text):
    assert repr(text) in refusal(parse_tokens, text)


def test_token_counts_in_files_and_overrides_become_exact_integers(tmp_path):
    assert from_file(tmp_path, "data: {seq_len: 128K}").data.seq_len == 131072
    assert "seq_len: 2097152" in load("data.seq_len=2M").to_yaml()


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configs_load_and_survive_a_dump(name, tmp_path):
    config = Config.load(name)
    assert config.run.name == name
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert Config.load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_runs_can_be_interrupted(name):
    config = Config.load(name)
    assert 0 < config.checkpoint.interval < config.train.steps


def test_backends_are_those_of_the_kernels():
    kind = next(setting.kind for setting in settings_of(Config()) if setting.path == "parallel.backend")
    assert get_args(kind) == ("auto", *BACKENDS)


def test_dump_holds_every_setting(tmp_path):
    config = load("optim.eps=1e-12", "run.name=no", "model.pattern=[softmax]", "train.compile=true", "data.seq_len=1K")
    (tmp_path / "dump.yaml").write_text(config.to_yaml())
    assert Config.load(tmp_path / "dump.yaml") == config
    dumped = yaml.safe_load(config.to_yaml())
    assert all(setting.path.split(".")[1] in dumped[setting.path.split(".")[0]] for setting in settings_of(config))


def test_every_setting_has_a_line_of_help():
    for setting in settings_of(Config()):
        assert setting.help and "\n" not in setting.help, setting.path


@pytest.mark.parametrize(
    "override, nearest",
    [
        ("optim.lrr=1", "optim.lr"),
        ("data.seq_length=1K", "data.seq_len"),
        ("seq_len=1K", "data.seq_len"),
        ("train.lr=1", "optim.lr"),
        ("optimizer.weight_decay=0", "optim.weight_decay"),
        ("model.num_head=2", "model.num_heads"),
        ("optim.lr.peak=2", "optim.lr"),
    ],
)
def test_unknown_settings_name_the_nearest(override, nearest):
    message = refusal(load, override)
    assert override.split("=")[0] in message and f"did you mean {nearest}?" in message


def test_unknown_settings_of_files_and_list_items_name_the_nearest(tmp_path):
    message = refusal(from_file, tmp_path, "optim:\n  warmup: 3\n")
    assert f"{tmp_path / 'run.yaml'}: unknown setting optim.warmup; did you mean optim.warmup_steps?" == message
    assert "did you mean data.corpora[0].path?" in refusal(load, "data.corpora=[{paht: x}]")
    message = refusal(from_file, tmp_path, "modle:\n  num_layers: 4\n")
    assert message.endswith("unknown setting modle; did you mean model?")


@pytest.mark.parametrize(
    "override, expected",
    [
        ("optim.lr=fast", "optim.lr: expected a number, found 'fast'"),
        ("optim.lr=.nan", "optim.lr: expected a number, found nan"),
        ("optim.lr=true", "optim.lr: expected a number, found True"),
        ("optim.lr=", "optim.lr: expected a number, found nothing"),
        ("train.steps=1.5", "train.steps: expected an integer, found 1.5"),
        ("train.steps=true", "train.steps: expected an integer, found True"),
        ("train.steps='7'", "train.steps: expected an integer, found '7'"),
        ("train.compile=1", "train.compile: expected true or false, found 1"),
        ("train.dtype=fp8", "train.dtype: expected float32 | bfloat16, found 'fp8'"),
        ("parallel.backend=fa5", "parallel.backend: expected auto | fa4 |"),
        ("data.seq_len=2MB", "data.seq_len: expected a number of tokens such as 131072, 128K or 2M, found '2MB'"),
        ("model.pattern=linear", "model.pattern: expected a list of text, in brackets: [one, other], found 'linear'"),
        ("model.pattern=[linear", "model.pattern=[linear is not valid YAML; expected a list of text"),
        ("model.pattern=[1]", "model.pattern[0]: expected text, found 1"),
        ("data.corpora=[data/x]", "data.corpora[0] is a section of settings, such as {path: ...}, found 'data/x'"),
        ("data.corpora=[{path: 3}]", "data.corpora[0].path: expected text, found 3"),
        ("optim=3", "optim is a section of settings, such as {lr: ...}, found 3"),
        ("data.corpora=[{path:data/x}]", "did you mean data.corpora[0].path? YAML wants a space behind a colon"),
        ("train.steps=!!int x", "train.steps=!!int x is not valid YAML; expected an integer"),
        ("=3", "'=3' is not of the form key=value"),
        (
            "mine.yaml",
            "such as optim.lr=3e-4; did you mean --config mine.yaml?",
        ),
        ("steps", "'steps' is not of the form key=value"),
    ],
)
def test_malformed_values_say_what_was_found_and_what_is_expected(override, expected):
    message = refusal(load, override)
    assert message.startswith("command line: ") and expected in message


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"optim: {lr: 1", "not valid YAML"),
        (b"run: {name: 2026-02-30}", "not valid YAML: day is out of range for month"),
        (b"[" * 2000, "not valid YAML: maximum recursion depth exceeded"),
        (b"optim:\n  lr: 1e-3\n  lr: 2e-3\n", "line 3: not valid YAML: lr is set twice"),
        (b"- optim\n", "the file is a section of settings, such as {run: ...}, found ['optim']"),
        (b"run: {name: no}\n", "run.name: expected text, found False"),
        (b"\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_malformed_files(content, expected, tmp_path):
    (tmp_path / "bad.yaml").write_bytes(content)
    message = refusal(Config.load, tmp_path / "bad.yaml")
    assert str(tmp_path / "bad.yaml") in message and expected in message


def test_missing_file_names_the_shipped_configs():
    message = refusal(Config.load, Path("configs/quikstart.yaml"))
    assert "configs/quikstart.yaml" in message and "quickstart" in message


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["data.corpora=[]"], "data.corpora is empty"),
        (["data.corpora=[{weight: 2}]"], "data.corpora[0].path is not set"),
        (["data.corpora=[{path: x, weight: 0}]"], "data.corpora[0].weight=0.0"),
        (["data.packing=documents", "data.respect_documents=false"], "data.respect_documents=false needs data.packing"),
        (["data.seq_len=0"], "data.seq_len=0: use 1 or more"),
        (["data.prefetch=0"], "data.prefetch=0"),
        (["data.validation_fraction=1"], "data.validation_fraction=1.0"),
        (["data.validation_corpora=[{weight: 2}]"], "data.validation_corpora[0].path is not set"),
        (["data.validation_corpora=[{path: x}]", "data.validation_fraction=0.1"], "has others: use one of them"),
        (["log.validation_interval=5"], "set data.validation_fraction"),
        (["log.interval=0"], "log.interval=0"),
        (["log.validation_samples=0"], "log.validation_samples=0"),
        (["log.validation_interval=-1"], "log.validation_interval=-1"),
        (["train.steps=0"], "train.steps=0"),
        (["parallel.key_blocks=-1"], "parallel.key_blocks=-1"),
        (["parallel.head_groups=-1"], "parallel.head_groups=-1: use 0 or more"),
        (["train.deterministic=true", "parallel.backend=cudnn"], "parallel.backend=cudnn is not deterministic"),
        (["train.deterministic=true", "parallel.backend=cudnn_ragged"], "backend=cudnn_ragged is not deterministic"),
        (["train.global_batch=0"], "train.global_batch=0"),
        (["train.timeout_s=0"], "train.timeout_s=0"),
        (["checkpoint.keep_last=0"], "checkpoint.keep_last=0"),
        (["checkpoint.interval=-1"], "checkpoint.interval=-1"),
        (["parallel.sp=-1"], "parallel.sp=-1"),
        (["parallel.token_cap=0.5"], "parallel.token_cap=0.5: use 1 or more"),
        (["run.seed=-1"], "run.seed=-1"),
        (["data.seq_len=100G"], "data.seq_len=107374182400: use 68719476736 or less"),
        (["run.seed=99999999999999999999"], "run.seed=99999999999999999999: use 9223372036854775807 or less"),
        (["train.timeout_s=99999999999999999999"], "train.timeout_s=99999999999999999999: use 1000000000 or less"),
        (["run.dir="], "run.dir is empty: leave it out for the default, runs/{name}"),
        (["checkpoint.resume="], "checkpoint.resume is empty: leave it out for the default, auto"),
        (["model.num_heads=100000000000000"], "does not divide model.hidden_size=512"),
        (["optim.lr=0"], "optim.lr=0.0"),
        (["optim.eps=0"], "optim.eps=0.0"),
        (["optim.warmup_steps=-1"], "optim.warmup_steps=-1"),
        (["optim.weight_decay=-0.1"], "optim.weight_decay=-0.1"),
        (["optim.clip_grad_norm=-1"], "optim.clip_grad_norm=-1.0"),
        (["optim.beta1=1"], "optim.beta1=1.0"),
        (["optim.beta2=-0.1"], "optim.beta2=-0.1"),
        (["optim.min_lr_ratio=2"], "optim.min_lr_ratio=2.0"),
        (["model.num_heads=4", "model.num_kv_heads=3"], "model.num_kv_heads=3"),
        (["model.pattern=[linear, softmacks]"], "softmacks"),
    ],
)
def test_refusals(overrides, expected):
    assert expected in refusal(load, *overrides)


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["data.corpora=[{path: x}]"], "data.corpora is for model.task=text"),
        (["data.image_size=12"], "data.image_size=12: use a power of two"),
        (["data.image_size=1"], "data.image_size=1: use a power of two"),
        (["data.seq_len=1000"], "data.seq_len=1000 holds no whole number of images of 1024 pixels"),
        (["data.respect_documents=false"], "data.respect_documents=false is for model.task=text"),
        (["model.pattern=[linear]"], "but linear:fixed layers look back; use softmax, sla, llsa or linear:none"),
    ],
)
def test_refusals_of_images(overrides, expected):
    images = ["model.task=images", "model.pattern=[softmax]"]
    assert Config.load(None, [*images, "log.validation_interval=1"]).data.image_size == 32
    assert expected in refusal(Config.load, None, [*images, *overrides])


def test_ranks_must_divide_into_dp_and_sp():
    load("parallel.sp=4").validate(world_size=4)
    load().validate(world_size=6)
    message = refusal(load("parallel.sp=3").validate, 8)
    assert message == "parallel.sp=3 does not divide the 8 ranks: use one of 1, 2, 4, 8"
    assert "parallel.sp=16" in refusal(load("parallel.sp=16").validate, 8)


def test_ulysses_needs_query_heads_for_every_rank():
    """Known before any rank starts; the other strategies and linear layers do not mind."""
    six = "model.num_heads=6", "model.head_dim=32"
    for sp in (1, 2):
        load(*six, "parallel.softmax=ulysses", f"parallel.sp={sp}", "train.global_batch=4").validate(world_size=4)
    load(*six, "parallel.softmax=usp").validate(world_size=4)
    message = refusal(load(*six, "parallel.softmax=ulysses").validate, 4)
    assert message == (
        "parallel.softmax=ulysses cannot share model.num_heads=6 among parallel.sp=4 ranks: use usp or ring, "
        "or parallel.sp=1 or 2"
    )


def test_head_groups_divide_the_key_heads_of_a_rank():
    heads = "model.pattern=[linear, softmax]", "model.num_heads=8", "model.num_kv_heads=4"
    for groups in (0, 1, 2, 4):
        assert load(*heads, f"parallel.head_groups={groups}").parallel.head_groups == groups
    assert refusal(load, *heads, "parallel.head_groups=8") == (
        "parallel.head_groups=8 does not divide the 4 key heads of a rank (model.num_kv_heads=4): "
        "use one of 1, 2, 4, or 0"
    )
    assert refusal(load, *heads, "parallel.tp=2", "parallel.head_groups=4") == (
        "parallel.head_groups=4 does not divide the 2 key heads of a rank (model.num_kv_heads=4 / parallel.tp=2): "
        "use one of 1, 2, or 0"
    )
    load("model.pattern=[linear]", *heads[1:], "parallel.head_groups=3")


def test_global_batch_must_be_shared_evenly_by_the_data_parallel_groups():
    load("parallel.sp=2", "train.global_batch=4").validate(world_size=4)
    message = refusal(load("parallel.sp=2", "train.global_batch=3").validate, 4)
    assert "train.global_batch=3" in message and "a multiple of 2" in message
    validating = "data.validation_fraction=0.1", "log.validation_interval=5", "train.global_batch=4"
    message = refusal(load("parallel.sp=2", "log.validation_samples=3", *validating).validate, 4)
    assert "log.validation_samples=3" in message and "a multiple of 2" in message


def test_a_run_directory_in_the_place_of_its_config(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match=f"that is a folder; did you mean {tmp_path}/config.yaml"):
        Config.load(tmp_path)
