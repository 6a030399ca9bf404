"""The command line: flags and words become settings, help lists all of them, mistakes are one line on stderr."""

import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import longspan
from longspan.launcher import cli
from longspan.launcher.arguments import writable, writable_folder
from longspan.launcher.config import Config
from longspan.launcher.errors import UserError
from longspan.launcher.parsing import settings_of

CORPUS = "data.corpora=[{path: data/x}]"


def printed(capsys, argv):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    captured = capsys.readouterr()
    return caught.value.code or 0, captured.out, captured.err


def test_flags_set_settings_and_beat_key_value_words():
    flags = ["--seq-len", "2M", "--steps", "500", "--run-dir", "out", "--resume", "none"]
    config = cli.train_config([CORPUS, *flags, "train.steps=700", "data.seq_len=1K"])
    assert (config.data.seq_len, config.train.steps) == (2**21, 500)
    assert (config.run.dir, config.checkpoint.resume) == ("out", "none")


def test_words_and_flags_mix_in_any_order():
    argv = ["optim.lr=1e-3", "--config", "quickstart", "optim.beta1=0.5", "--steps", "90", "run.seed=3"]
    config = cli.train_config(argv)
    assert (config.run.name, config.optim.lr, config.optim.beta1, config.run.seed) == ("quickstart", 1e-3, 0.5, 3)


def test_train_help_lists_every_setting_with_default_and_help(capsys):
    code, out, _ = printed(capsys, ["train", "--help"])
    assert code == 0
    for setting in settings_of(Config()):
        assert f"  {setting.path}=" in out and setting.help in out
    assert "data.seq_len=4096" in out and "train.compile=false" in out


def test_help_says_what_every_command_and_benchmark_does(capsys):
    code, out, _ = printed(capsys, ["--help"])
    assert code == 0 and all(f"  {name} " in out and command.summary in out for name, command in cli.COMMANDS.items())
    code, out, _ = printed(capsys, ["bench", "--help"])
    assert code == 0 and all(f"({module})" in out for module in cli.BENCHMARKS.values())
    assert "Linear attention on one GPU" in out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(capsys, command):
    code, out, _ = printed(capsys, [command, "--help"])
    assert code == 0 and out.startswith(f"usage: longspan {command} ")


def test_version(capsys):
    assert printed(capsys, ["--version"])[:2] == (0, f"longspan {longspan.__version__}\n")


@pytest.mark.parametrize(
    "argv, expected",
    [
        ([], "longspan: error: the following arguments are required: COMMAND; see `longspan --help`"),
        (["trian"], "longspan: error: argument COMMAND: invalid choice: 'trian'"),
        (["train", "--seqlen", "2M"], "unknown option --seqlen: did you mean --seq-len?"),
        (["train", "--optim.lr", "1"], "unknown option --optim.lr: settings are written key=value"),
        (["train", "--seq-len"], "longspan: error: train: argument --seq-len: expected one argument"),
        (["train", "--seq-len", "2MB", CORPUS], "data.seq_len: expected a number of tokens"),
        (["train", "optim.lrr=1"], "did you mean optim.lr?"),
        (["train"], "data.corpora is empty"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--config", "/"], "--config /: that is a folder; shipped are"),
        (["train", "--config", "x" * 300], "there is no such file"),
        (["bench"], "longspan: error: bench: the following arguments are required: BENCHMARK; see `longspan bench"),
        (["bench", "calibrat"], "longspan: error: bench: argument BENCHMARK: invalid choice: 'calibrat'"),
        (["plan", "--document", "-5"], "longspan: error: plan: argument --document: '-5' is no number of tokens"),
        (["prepare", "--input", "x"], "the following arguments are required: --output"),
        (["prepare", "--input", "x", "--output", "data/"], "output data/: that is a folder; name the corpus in it"),
        (
            ["prepare", "--input", "x", "--output", ""],
            "output : that is a folder; name the corpus in it",
        ),
        (["prepare", "--input", "x", "--output", ".."], "output ..: that is a folder; name the corpus in it"),
        (["verify", "x", "--run", "y"], "longspan: error: verify: unknown option --run: see `longspan verify --help`"),
        (["generate", "x", "--top_p=1"], "longspan: error: generate: unknown option --top_p: did you mean --top-p?"),
        (["verify", "x", "y"], "longspan: error: verify: unrecognized arguments: y; see `longspan verify --help`"),
        (["generate", "x", "--tokens", "many"], "generate: argument --tokens: invalid int value: 'many'; see"),
        (["evaluate"], "longspan: error: evaluate: the following arguments are required: MODEL; see"),
        (["evaluate", "x", "--lengths", "1K", "run.seed=1"], "'run.seed=1' is no number of tokens; write it like"),
        (["evaluate", "x", "--lengths", "1K", "run.seed=1"], "settings stand in front of options"),
    ],
)
def test_mistakes_are_one_line_without_a_traceback(argv, expected, capsys):
    code, _, err = printed(capsys, argv)
    assert code != 0
    assert err.startswith("longspan: error: ") and err.count("\n") == 1 and expected in err


def test_train_hands_the_resolved_config_to_the_trainer(monkeypatch):
    started = []
    monkeypatch.setattr("longspan.launcher.trainer.run", started.append)
    cli.main(["train", CORPUS, "--steps", "300"])
    assert started == [Config.load(None, [CORPUS, "train.steps=300"])]


@pytest.mark.parametrize(
    "function, argv, given",
    [
        (
            "corpus.prepare",
            ["prepare", "--input", "a", "b", "--output", "data/x", "--bos", "<s>", "--suffix", ".py", ".md"],
            {"inputs": ["a", "b"], "output_prefix": "data/x", "tokenizer": "bytes", "bos": "<s>", "eod": None,
             "suffixes": [".py", ".md"]},
        ),
        (
            "evaluation.evaluate_run",
            ["evaluate", "r", "model.rope_scaling=4", "--lengths", "4K", "16K", "--samples", "2"],
            {"run": "r", "overrides": ["model.rope_scaling=4"], "lengths": [4096, 16384], "samples": 2, "corpora": [],
             "output": None},
        ),
        ("weights.import_model", ["import", "w", "--output", "x.yaml"], {"path": "w", "output": "x.yaml"}),
        (
            "export.export_run",
            ["export", "--output", "d", "r", "--layout", "huggingface"],
            {"run": "r", "output": "d", "layout": "huggingface", "dtype": "float32"},
        ),
        (
            "generation.generate_run",
            ["generate", "r", "--temperature", "0", "--tokens", "3"],
            {"run": "r", "prompt": "", "prompt_file": None, "tokens": 3, "temperature": 0.0, "top_p": 1.0, "seed": 0,
             "tokenizer": None, "overrides": []},
        ),
        ("profile_report.show", ["profile", "r"], {"run_dir": Path("r")}),
        (
            "sampling.sample_run",
            ["sample", "r", "--output", "x.png"],
            {"run": "r", "output": "x.png", "images": 4, "steps": 50, "size": None, "seed": 0},
        ),
        (
            "report.write_report",
            ["report", "a", "b", "--plan"],
            {"results": ["a", "b"], "output": "report.md", "warmup": 2, "plan": True, "record": None, "recipes": None},
        ),
    ],
)  # fmt: skip
def test_commands_hand_their_arguments_over_by_name(function, argv, given, monkeypatch):
    module, name = function.split(".")
    module, calls = import_module(f"longspan.launcher.{module}"), []
    signature = inspect.signature(getattr(module, name))
    monkeypatch.setattr(module, name, lambda **named: calls.append(signature.bind(**named).arguments) or [])
    cli.main(argv)
    assert calls == [given]


@pytest.mark.parametrize("command", ["prepare", "plan", "verify", "import", "export", "generate", "sample", "report"])
def test_commands_for_one_rank_refuse_several(command, monkeypatch):
    """Which would write the same files, or print the same lines."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = {"prepare": ["--input", "x"], "plan": [CORPUS]}.get(command, ["x"])
    words += ["--output", "x"] if command in ("prepare", "import", "export", "sample") else []
    with pytest.raises(UserError, match=f"longspan {command} is for one rank, and WORLD_SIZE=2: start it without"):
        cli.COMMANDS[command](words)


OUTPUTS = [
    ("evaluate", "--output"), ("import", "--output"), ("export", "--output"), ("sample", "--output"),
    ("report", "--output"), ("report", "--record"), ("report", "--recipes"),
]  # fmt: skip


@pytest.mark.parametrize("command, flag", OUTPUTS)
def test_an_output_is_tried_before_anything_else(command, flag, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    needed = ["--output", str(tmp_path / "x")] if command in ("import", "export", "sample") else []
    bad = {"/proc/none/x": "No such file or directory", str(tmp_path / "file" / "x"): "Not a directory"}
    bad |= {} if command == "export" else {str(tmp_path): "it is a folder", "/dev/null": "it is no file but a device"}
    for path, why in bad.items():
        code, _, err = printed(capsys, [command, "no such run", *needed, flag, path])
        assert code == 1 and err.count("\n") == 1
        assert f"argument {flag}: {path} cannot be written ({why}" in err and "name another" in err
    _, _, err = printed(capsys, [command, "no such run", *needed, flag, str(tmp_path / "new" / "x.md")])
    assert "no such run" in err and [path.name for path in tmp_path.iterdir()] == ["file"]
    monkeypatch.setenv("RANK", "1")  # on whose machine the folder need not be
    assert cli.COMMANDS[command].read(["x", *needed, flag, "/proc/none/x"])[flag.strip("-")] == "/proc/none/x"


def test_every_output_is_tried():
    """But for that of `prepare`, which opens its files before it reads any text."""
    found = [(command.name, *argument) for command in cli.COMMANDS.values() for argument in command.arguments]
    tried = [(name, flag) for name, flag, options in found if options.get("type") in (writable, writable_folder)]
    assert sorted(tried) == sorted(OUTPUTS)
    assert {(name, flag) for name, flag, _ in found if flag == "--output"} - {*tried} == {("prepare", "--output")}


def test_help_does_not_wait_for_torch():
    asked = [[], *([command] for command in cli.COMMANDS), *(["bench", name] for name in cli.BENCHMARKS)]
    code = (
        f"import sys; from longspan.launcher import cli\nfor argv in {asked}:\n    try: cli.main([*argv, '--help'])\n"
        "    except SystemExit: assert 'torch' not in sys.modules, argv"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=60)
    assert done.returncode == 0 and done.stdout.count("usage: longspan") == len(asked), done.stderr


@pytest.mark.parametrize("name", cli.BENCHMARKS)
def test_every_benchmark_can_be_asked_for_help(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["longspan"])
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", name, "--help"])
    assert ended.value.code == 0 and f"usage: longspan bench {name}" in capsys.readouterr().out
