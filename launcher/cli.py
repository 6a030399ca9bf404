"""The `longspan` command: `prepare` writes corpora, `plan` estimates memory and time, `train` is launcher/train.py,
`verify` checks checkpoints, `evaluate` has perplexities, `import` and `export` are for weights, `generate` continues
text, `profile` shows what a step took, `sample` draws, `bench` measures, `report` shows what was measured."""

import argparse
import ast
import re
import sys
from dataclasses import asdict, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import longspan
from longspan.launcher.allocator import set_allocator
from longspan.launcher.config import Config, shipped_configs
from longspan.launcher.errors import UserError, main_guard
from longspan.launcher.gpus import parse_gpus
from longspan.launcher.parsing import describe, parse_tokens, settings_of

# Flags that set one setting: flag -> (setting, metavar).
FLAGS = {
    "--seq-len": ("data.seq_len", "TOKENS"),
    "--steps": ("train.steps", "N"),
    "--run-dir": ("run.dir", "DIR"),
    "--resume": ("checkpoint.resume", "auto|none|PATH"),
}


def main(argv: list[str] | None = None) -> None:
    """The `longspan` console command."""
    with main_guard():
        parser = _Parser("longspan", longspan.__doc__, **_listed(COMMAND_HELP))
        parser.add_argument("--version", action="version", version=f"longspan {longspan.__version__}")
        arguments = parser.parse_choice("command", COMMANDS, argv)
        COMMANDS[arguments.command](arguments.arguments)


def train_main(argv: list[str] | None = None) -> None:
    """What launcher/train.py runs on every rank."""
    with main_guard():
        train(sys.argv[1:] if argv is None else argv)


def train(argv: list[str]) -> None:
    """Trains as the arguments say. Raises UserError for arguments and settings that do not fit."""
    set_allocator()
    config = train_config(argv)
    from longspan.launcher.trainer import run  # imports torch, which `--help` need not wait for

    run(config)


def train_config(argv: list[str]) -> Config:
    """The settings that the arguments of `longspan train` ask for: file, then key=value words, then flags."""
    parser = _Parser(
        "longspan train",
        "Trains a model, alone or as one of the ranks that torchrun starts.",
        epilog=settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return _read_settings(parser, argv)[0]


def _read_settings(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[Config, argparse.Namespace]:
    """The settings, and the parser's own options."""
    own = [text for action in parser._actions for text in action.option_strings]
    shipped = ", ".join(shipped_configs())
    parser.add_argument("--config", metavar="FILE", help=f"YAML file of settings, or a shipped one by name: {shipped}")
    for flag, (path, metavar) in FLAGS.items():
        parser.add_argument(flag, dest=path, metavar=metavar, help=f"the same as {path}={metavar}, which it overrides")
    parser.add_argument("settings", nargs="*", default=[], metavar="key=value", help="settings, in YAML: optim.lr=3e-4")
    arguments, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        nearest = get_close_matches(unknown[0].partition("=")[0], ["--config", *FLAGS, *own], n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "settings are written key=value, such as optim.lr=3e-4"
        raise UserError(f"unknown option {unknown[0]}: {hint}")
    chosen = {path: getattr(arguments, path) for path, _ in FLAGS.values()}
    flags = [f"{path}={value}" for path, value in chosen.items() if value is not None]
    return Config.load(arguments.config, arguments.settings + flags), arguments


def plan(argv: list[str]) -> None:
    """Prints what a training step would hold and take. Raises UserError where it does not fit."""
    parser = _Parser(
        "longspan plan",
        "Estimates memory per rank and time per step of a config on given GPUs, without having them.",
        epilog="key=value settings are those of `longspan train --help`. The method: docs/planning.md",
    )
    parser.add_argument("--gpus", default="1xH200", metavar="NxTYPE", help="such as 64xH200 (default 1xH200)")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of a machine (default 8)")
    parser.add_argument(
        "--host-memory", type=_gib, default=0, metavar="GIB", help="of a machine (default 128 for each of its GPUs)"
    )
    parser.add_argument(
        "--document", type=_tokens, default=0, metavar="TOKENS",
        help="length of documents (default: a sample is one document)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    config, arguments = _read_settings(parser, argv)
    cluster = parse_gpus(arguments.gpus, arguments.gpus_per_node, arguments.host_memory)
    from longspan.launcher.estimate_report import report  # imports torch, which mistakes need not wait for

    report(config, cluster, arguments.document, as_json=arguments.json)


def profile(argv: list[str]) -> None:
    """Prints the table of a run's newest profile. UserError if it has none."""
    parser = _Parser(
        "longspan profile",
        "Prints what steps of a run took by component, as `longspan train profile.start=N` measured it.",
    )
    parser.add_argument("run", metavar="RUN", help="run directory")
    run = parser.parse_args(argv).run
    from longspan.launcher.profile_report import show  # imports torch

    show(Path(run))


def verify(argv: list[str]) -> None:
    """Prints whether checkpoints are as they were written. UserError where one is not."""
    parser = _Parser(
        "longspan verify", "Reads every byte of checkpoints and compares with the digests that were written with them."
    )
    parser.add_argument("run", metavar="RUN", help="run directory, all checkpoints of which are read, or one of them")
    path = Path(parser.parse_args(argv).run)
    from longspan.launcher.checkpoint import verify as verify_checkpoints  # imports torch

    damaged = 0
    for line, right in verify_checkpoints(path):
        print(line, flush=True)
        damaged += not right
    if damaged:
        raise UserError(f"damaged checkpoints in {path}: {damaged}, see above")


def settings_help() -> str:
    """Every setting with its default, its type and its line of help, by section."""
    lines = ["settings (key=value, or by section in the file); K, M, G in token counts are 2^10, 2^20, 2^30:"]
    section = None
    for setting in settings_of(Config()):
        if setting.path.partition(".")[0] != section:
            section = setting.path.partition(".")[0]
            lines.append(f"\n {section}: {(getattr(Config(), section).__doc__ or '').splitlines()[0]}")
        lines.append(f"  {setting.path}={_shown(setting.default)}  ({describe(setting.kind)})")
        lines.append(f"      {setting.help}")
    return "\n".join(lines)


def prepare(argv: list[str]) -> None:
    """Writes a corpus. Raises UserError for arguments and files that do not fit."""
    parser = _Parser(
        "longspan prepare",
        "Turns files and folders of text into a corpus: PREFIX.bin and PREFIX.idx in Megatron's format.",
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, or folders of text files")
    parser.add_argument(
        "--tokenizer", default="bytes", metavar="bytes|FILE", help="bytes (default), or a Hugging Face tokenizer.json"
    )
    parser.add_argument("--output", required=True, metavar="PREFIX", help="path of the corpus without .bin/.idx")
    parser.add_argument("--eod", metavar="TOKEN", help="the tokenizer's token that ends a document")
    parser.add_argument(
        "--bos", metavar="TOKEN", help="its token that begins one, such as <|begin_of_text|> of Llama 3 (default: none)"
    )
    parser.add_argument("--suffix", nargs="+", metavar=".py", help="only files of folders with these endings")
    arguments = parser.parse_args(argv)
    from longspan.launcher.corpus import prepare as prepare_corpus  # imports torch

    prepare_corpus(
        arguments.input,
        arguments.output,
        arguments.tokenizer,
        eod=arguments.eod,
        bos=arguments.bos,
        suffixes=arguments.suffix,
    )


def sample(argv: list[str]) -> None:
    """Draws images. Raises UserError for arguments and runs that do not fit."""
    parser = _Parser(
        "longspan sample", "Draws images with a trained diffusion transformer (model.task=images), on one rank."
    )
    parser.add_argument("run", metavar="RUN", help="run directory, or one of its checkpoints")
    parser.add_argument("--output", required=True, metavar="FILE.png", help="all images side by side")
    parser.add_argument("--images", type=int, default=4, metavar="N", help="how many (default 4)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="steps of Euler's method (default 50)")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="on a side (default: data.image_size of the run)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the noise (default 0)")
    arguments = parser.parse_args(argv)
    from longspan.launcher.sampling import sample_run  # imports torch

    sample_run(**vars(arguments))


def evaluate(argv: list[str]) -> None:
    """Prints perplexities. Raises UserError for arguments and runs that do not fit."""
    parser = _Parser(
        "longspan evaluate",
        "Loss and perplexity of a trained model on held-out text: the same tokens predicted with several "
        "lengths of context, and by position. Over ranks: torchrun --nproc-per-node N --no-python longspan evaluate",
        epilog="More: docs/trained-models.md",
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="run directory, or one of its checkpoints")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="settings that differ from training: model.rope_scaling=4",
    )
    parser.add_argument(
        "--lengths", nargs="+", type=_tokens, default=[], metavar="TOKENS",
        help="such as 4K 16K 64K (default: that of training); shorter ones cut the samples of the longest",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="of the longest length (default 8)")
    parser.add_argument(
        "--corpora", nargs="+", default=[], metavar="PREFIX",
        help="corpora of `longspan prepare` (default: what the run kept for validation)",
    )  # fmt: skip
    parser.add_argument("--output", metavar="FILE.json", help="also write the figures to this file")
    arguments = parser.parse_intermixed_args(argv)
    from longspan.launcher.evaluation import evaluate_run  # imports torch

    evaluate_run(**vars(arguments))


def import_weights(argv: list[str]) -> None:
    """Writes a config for runs that start from weights. Raises UserError for arguments and files that do not fit."""
    parser = _Parser(
        "longspan import",
        "Writes a config for training that starts from the weights of a published Llama or Qwen3, or of "
        "`longspan export`: the model's settings, and checkpoint.weights=PATH. No weights are copied.",
        epilog="More: docs/trained-models.md",
    )
    parser.add_argument(
        "path", metavar="PATH",
        help="folder with config.json and model.safetensors, or model.safetensors.index.json and its files",
    )  # fmt: skip
    parser.add_argument("--output", required=True, metavar="FILE.yaml", help="for `longspan train --config`")
    arguments = parser.parse_args(argv)
    from longspan.launcher.weights import import_model  # imports torch

    import_model(**vars(arguments))


def export(argv: list[str]) -> None:
    """Writes the weights of a checkpoint. Raises UserError for arguments and runs that do not fit."""
    parser = _Parser(
        "longspan export",
        "Writes the weights of a checkpoint, of any number of ranks, as model.safetensors and config.json.",
        epilog="More: docs/trained-models.md",
    )
    parser.add_argument("run", metavar="RUN", help="run directory, or one of its checkpoints")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for both files")
    parser.add_argument(
        "--layout", choices=["longspan", "huggingface"], default="longspan",
        help="names of weights and settings: longspan's own (default), or those of transformers, for models of softmax "
        "layers alone",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default float32")
    arguments = parser.parse_args(argv)
    from longspan.launcher.export import export_run  # imports torch

    export_run(**vars(arguments))


def generate(argv: list[str]) -> None:
    """Prints text. Raises UserError for arguments and runs that do not fit."""
    parser = _Parser(
        "longspan generate", "Continues a text with a trained model, on one rank; to look at a model, not to serve it."
    )
    parser.add_argument("run", metavar="RUN", help="run directory, or one of its checkpoints")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="what to continue (default: a new document)")
    parser.add_argument("--prompt-file", metavar="FILE", help="a text file to continue, in the place of --prompt")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="how many at most (default 200)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="0: always the likeliest token (default 0.8)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P",
        help="choose among the likeliest tokens that have this share of the probability (default 1: all)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the choices (default 0)")
    parser.add_argument(
        "--tokenizer", metavar="bytes|FILE", help="as of `longspan prepare` (default: that of the run's first corpus)"
    )
    arguments = parser.parse_args(argv)
    from longspan.launcher.generation import generate_run  # imports torch

    generate_run(**vars(arguments))


def bench(argv: list[str]) -> None:
    """Runs a benchmark on one rank. UserError for an unknown one."""
    parser = _Parser(
        "longspan bench",
        "Measures. Over several ranks: torchrun --nproc-per-node N -m longspan.benchmarks.MODULE",
        **_listed({f"{name} ({module})": _summary(module) for name, module in BENCHMARKS.items()}),
    )
    arguments = parser.parse_choice("benchmark", BENCHMARKS, argv)
    sys.argv = [f"longspan bench {arguments.benchmark}", *arguments.arguments]
    sys.exit(import_module(f"longspan.benchmarks.{BENCHMARKS[arguments.benchmark]}").main())


def report(argv: list[str]) -> None:
    """Writes a report. Raises UserError for files that do not fit."""
    parser = _Parser(
        "longspan report",
        "Writes tables and plots of training runs and benchmarks: speed and MFU by sequence length and by "
        "number of GPUs, memory, times, losses, and in what the runs differ.",
        epilog="Plots need matplotlib: pip install 'longspan[plots]'. More: docs/report.md",
    )
    parser.add_argument(
        "results", nargs="+", metavar="RESULTS", help="run directories, metrics.jsonl files, JSON records of benchmarks"
    )
    parser.add_argument(
        "--output", default="report.md", metavar="FILE.md", help="plots go beside it (default report.md)"
    )
    parser.add_argument(
        "--warmup", type=int, default=2, metavar="N", help="first steps of a run that medians leave out (default 2)"
    )
    parser.add_argument("--plan", action="store_true", help="what `longspan plan` says of each run, beside its figures")
    parser.add_argument("--record", metavar="FILE.json", help="also keep the runs in one file, which RESULTS may name")
    parser.add_argument("--recipes", metavar="PAGE.md", help="also put the table of recipes into this page")
    arguments = parser.parse_args(argv)
    from longspan.launcher.report import write_report

    for path in write_report(**vars(arguments)):
        print(f"wrote {path}")


# name: module of longspan.benchmarks
BENCHMARKS = {
    "calibrate": "calibrate", "kernels": "linear_kernels", "attention": "ring_attention", "linear": "linear_ranks",
    "planner": "planner", "recall": "recall", "schemes": "attention_schemes",
}  # fmt: skip
COMMANDS = {
    "prepare": prepare, "plan": plan, "train": train, "verify": verify, "evaluate": evaluate, "import": import_weights,
    "export": export, "generate": generate, "profile": profile, "sample": sample, "bench": bench, "report": report,
}  # fmt: skip
COMMAND_HELP = {
    "prepare": "turns text into a corpus",
    "plan": "says what a step would take of memory and time, before any GPU is there",
    "train": "trains; over several ranks: torchrun launcher/train.py",
    "verify": "checks that checkpoints are as they were written",
    "evaluate": "perplexity of a trained model on held-out text, by length of context and by position",
    "import": "writes a config for training that starts from published weights",
    "export": "writes the weights of a checkpoint as safetensors",
    "generate": "continues a text with a trained model",
    "profile": "shows where the time of a run's steps went",
    "sample": "draws images with a trained diffusion transformer",
    "bench": "measures kernels, attention and communication on this machine",
    "report": "makes tables and plots of runs and benchmarks",
}


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are UserErrors: one line, printed by one rank."""

    def __init__(self, prog: str, description: str, **options: Any):
        super().__init__(prog=prog, description=description, allow_abbrev=False, **options)

    def error(self, message: str) -> None:
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        nearest = get_close_matches(wrong[1], re.findall(r"[\w-]+", wrong[2]), n=1) if wrong else ()
        message += "".join(f", did you mean {name}?" for name in nearest)
        command = self.prog.removeprefix("longspan").strip()  # the line starts with longspan as it is
        raise UserError(f"{command + ': ' if command else ''}{message}; see `{self.prog} --help`")

    def parse_choice(self, name: str, choices: dict, argv: list[str] | None) -> argparse.Namespace:
        """`name`, one of the choices, and the `arguments` behind it, which are left for it to read."""
        metavar, more = name.upper(), f"`{self.prog} {name.upper()} --help` says more"
        self.add_argument(name, metavar=metavar, choices=list(choices), help=more)
        self.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS).required = False
        return self.parse_args(argv)


def _listed(entries: dict[str, str]) -> dict[str, Any]:
    """Options of a parser whose help ends in a list of what there is to choose from."""
    width = max(map(len, entries)) + 2
    lines = (f"  {name:<{width}}{text}" for name, text in entries.items())
    return {"epilog": "\n".join(lines), "formatter_class": argparse.RawDescriptionHelpFormatter}


def _summary(module: str) -> str:
    """The first line of a benchmark's docstring, without importing it and with it torch."""
    source = Path(find_spec(f"longspan.benchmarks.{module}").origin).read_text()
    return ast.get_docstring(ast.parse(source)).splitlines()[0]


def _tokens(text: str) -> int:
    try:
        return parse_tokens(text)
    except UserError as error:
        hint = "; settings stand in front of options" if "=" in text else ""
        raise argparse.ArgumentTypeError(f"{error}{hint}") from None


def _gib(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of GiB; write it like 1024") from None


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(str(asdict(item)) if is_dataclass(item) else str(item) for item in value) + "]"
    return str(value)
