"""The `longspan` command: COMMANDS says what each of its commands takes and what runs it.

What runs is imported once the arguments are right: it imports torch, for which neither help nor a mistake waits.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import longspan
from longspan.launcher.allocator import set_allocator
from longspan.launcher.arguments import (
    SETTINGS,
    Command,
    Parser,
    choice,
    flag,
    gib,
    listed,
    num_tokens,
    option,
    settings_help,
    writable,
    writable_folder,
)
from longspan.launcher.config import Config
from longspan.launcher.errors import UserError, main_guard
from longspan.launcher.gpus import parse_gpus


def main(argv: list[str] | None = None) -> None:
    """The `longspan` console command."""
    with main_guard():
        entries = {name: command.summary for name, command in COMMANDS.items()}
        parser = Parser("longspan", longspan.__doc__, listed(entries))
        parser.add_argument("--version", action="version", version=f"longspan {longspan.__version__}")
        for name, options in choice("command", COMMANDS, "longspan"):
            parser.add_argument(name, **options)
        arguments = parser.read(argv)
        COMMANDS[arguments["command"]](arguments["argv"])


def train_config(argv: list[str]) -> Config:
    """The settings that the arguments of `longspan train` ask for: file, then key=value words, then flags."""
    return COMMANDS["train"].read(argv)["config"]


def train(config: Config) -> None:
    """Trains. Raises UserError for settings that do not fit."""
    set_allocator()
    from longspan.launcher.trainer import run

    run(config)


def plan(config: Config, gpus: str, gpus_per_node: int, host_memory: float, document: int, json: bool) -> None:
    """Prints what a training step would hold and take. Raises UserError where it does not fit."""
    cluster = parse_gpus(gpus, gpus_per_node, host_memory)
    from longspan.launcher.estimate_report import report

    report(config, cluster, document, as_json=json)


def verify(run: str) -> None:
    """Prints whether checkpoints are as they were written. UserError where one is not."""
    from longspan.launcher.checkpoint import verify as verify_checkpoints

    wrong = 0
    for line, right in verify_checkpoints(Path(run)):
        print(line, flush=True)
        wrong += not right
    if wrong:
        raise UserError(f"checkpoints in {run} that are damaged or cannot be read: {wrong}, see above")


def bench(benchmark: str, argv: list[str]) -> None:
    """Runs a benchmark on one rank."""
    module, sys.argv = BENCHMARKS[benchmark], [f"longspan bench {benchmark}", *argv]
    arguments = _benchmark("arguments").PARSERS[module]()
    sys.exit(_benchmark(module).main(arguments))


def report(**arguments) -> None:
    """Writes a report. Raises UserError for files that do not fit."""
    from longspan.launcher.report import write_report

    for path in write_report(**arguments):
        print(f"wrote {path}")


def _later(module: str, name: str) -> Callable[..., None]:
    """The function `name` of launcher/`module`.py, imported when it is called."""
    return lambda **arguments: getattr(import_module(f"longspan.launcher.{module}"), name)(**arguments)


def _benchmark(module: str) -> ModuleType:
    return import_module(f"longspan.benchmarks.{module}")


def _summaries() -> str:
    """What each benchmark measures."""
    summary = _benchmark("arguments").summary
    return listed({f"{name} ({module})": summary(module) for name, module in BENCHMARKS.items()})


# name: module of longspan.benchmarks
BENCHMARKS = {
    "calibrate": "calibrate", "kernels": "linear_kernels", "attention": "ring_attention", "linear": "linear_ranks",
    "planner": "planner", "recall": "recall", "schemes": "attention_schemes",
}  # fmt: skip

RUN = option("run", "RUN", "run directory, or one of its checkpoints")
MODEL = option("run", "MODEL", "run directory, one of its checkpoints, or a folder of config.json and safetensors")
OVERRIDES = option(
    "overrides",
    SETTINGS,
    "settings unlike in training: model.rope_scaling=4",
    nargs="*",
    default=[],
)
TRAINED = "More: docs/trained-models.md"

COMMANDS = (
    Command(
        "prepare",
        "turns text into a corpus",
        "Turns files and folders of text into a corpus: PREFIX.bin and PREFIX.idx in Megatron's format.",
        (
            option("--input", "PATH", "files, or folders of text files", nargs="+", required=True, dest="inputs"),
            option("--tokenizer", "bytes|FILE", "bytes, or a Hugging Face tokenizer.json", "bytes"),
            option("--output", "PREFIX", "path of the corpus without .bin/.idx", required=True, dest="output_prefix"),
            option("--eod", "TOKEN", "the tokenizer's token that ends a document (default: found by its usual names)"),
            option("--bos", "TOKEN", "its token that begins one, such as <|begin_of_text|> of Llama 3 (default: none)"),
            option("--suffix", ".py", "only files of folders with these endings", nargs="+", dest="suffixes"),
        ),
        _later("corpus", "prepare"),
    ),
    Command(
        "plan",
        "says what a step would take of memory and time, before any GPU is there",
        "Estimates memory per rank and time per step of a config on given GPUs, without having them.",
        (
            option("--gpus", "NxTYPE", "such as 64xH200", "1xH200"),
            option("--gpus-per-node", "N", "GPUs of a machine", 8),
            option("--host-memory", "GIB", "of a machine (default: 128 for each GPU)", type=gib, default=0),
            option(
                "--document", "TOKENS", "a document's (default: a sample is one document)", type=num_tokens, default=0
            ),
            flag("--json", "print JSON instead of a table"),
        ),
        plan,
        "key=value settings are those of `longspan train --help`. The method: docs/planning.md",
        settings=True,
    ),
    Command(
        "train",
        "trains; over several ranks: torchrun launcher/train.py",
        "Trains a model, alone or as one of the ranks that torchrun starts.",
        (),
        train,
        settings_help,
        settings=True,
        ranks=True,
    ),
    Command(
        "verify",
        "checks that checkpoints are as they were written",
        "Reads every byte of checkpoints and compares with the digests that were written with them.",
        (option("run", "RUN", "run directory, all checkpoints of which are read, or one of them"),),
        verify,
    ),
    Command(
        "evaluate",
        "perplexity of a trained model on held-out text, by length of context and by position",
        "Loss and perplexity of a trained model on held-out text: the same tokens predicted with several lengths of "
        "context, and by position. Over ranks: torchrun --nproc-per-node N --no-python longspan evaluate",
        (
            MODEL,
            OVERRIDES,
            option(
                "--lengths",
                "TOKENS",
                "such as 4K 16K 64K (default: that of training, for weights 4K); shorter cut samples of the longest",
                nargs="+",
                type=num_tokens,
                default=[],
            ),
            option("--samples", "N", "of the longest length", 8),
            option(
                "--corpora",
                "PREFIX",
                "corpora of `longspan prepare` (default: what the run kept for validation; weights need some)",
                nargs="+",
                default=[],
            ),
            option("--output", "FILE.json", "also write the figures to this file", type=writable),
        ),
        _later("evaluation", "evaluate_run"),
        TRAINED,
        ranks=True,
    ),
    Command(
        "import",
        "writes a config for training that starts from published weights",
        "Writes a config for training that starts from the weights of a published Llama or Qwen3, or of "
        "`longspan export`: the model's settings, and checkpoint.weights=PATH. No weights are copied.",
        (
            option(
                "path",
                "PATH",
                "folder with config.json and model.safetensors, or model.safetensors.index.json and its files",
            ),
            option("--output", "FILE.yaml", "for `longspan train --config`", required=True, type=writable),
        ),
        _later("weights", "import_model"),
        TRAINED,
    ),
    Command(
        "export",
        "writes the weights of a checkpoint as safetensors",
        "Writes the weights of a checkpoint, of any number of ranks, as model.safetensors and config.json.",
        (
            RUN,
            option("--output", "DIR", "folder for both files", required=True, type=writable_folder),
            option(
                "--layout",
                None,
                "names of weights and settings: longspan's own, or those of transformers, for models of softmax layers "
                "alone",
                "longspan",
                choices=["longspan", "huggingface"],
            ),
            option("--dtype", None, "of the weights in the file", "float32", choices=["float32", "bfloat16"]),
        ),
        _later("export", "export_run"),
        TRAINED,
    ),
    Command(
        "generate",
        "continues a text with a trained model",
        "Continues a text with a trained model, on one rank; to look at a model, not to serve it.",
        (
            MODEL,
            OVERRIDES,
            option("--prompt", "TEXT", "what to continue (default: a new document)", default=""),
            option("--prompt-file", "FILE", "a text file to continue, in the place of --prompt"),
            option("--tokens", "N", "how many at most", 200),
            option("--temperature", "X", "0: always the likeliest token", 0.8),
            option("--top-p", "P", "choose among the likeliest tokens of this share of the probability, 1: all", 1.0),
            option("--seed", "N", "of the choices", 0),
            option(
                "--tokenizer",
                "bytes|FILE",
                "as of `longspan prepare` (default: that of the run's first corpus, of weights their tokenizer.json)",
            ),
        ),
        _later("generation", "generate_run"),
    ),
    Command(
        "profile",
        "shows where the time of a run's steps went",
        "Prints what steps of a run took by component, as `longspan train profile.start=N` measured it.",
        (option("run_dir", "RUN", "run directory", type=Path),),
        _later("profile_report", "show"),
    ),
    Command(
        "sample",
        "draws images with a trained diffusion transformer",
        "Draws images with a trained diffusion transformer (model.task=images), on one rank.",
        (
            RUN,
            option("--output", "FILE.png", "all images side by side", required=True, type=writable),
            option("--images", "N", "how many", 4),
            option("--steps", "N", "steps of Euler's method", 50),
            option("--size", "PIXELS", "on a side, a power of two (default: data.image_size of the run)", type=int),
            option("--seed", "N", "of the noise", 0),
        ),
        _later("sampling", "sample_run"),
    ),
    Command(
        "bench",
        "measures kernels, attention and communication on this machine",
        "Measures. Over several ranks: torchrun --nproc-per-node N -m longspan.benchmarks.MODULE",
        choice("benchmark", BENCHMARKS, "longspan bench"),
        bench,
        _summaries,
        ranks=True,
    ),
    Command(
        "report",
        "makes tables and plots of runs and benchmarks",
        "Writes tables and plots of training runs and benchmarks: speed and MFU by sequence length and by number of "
        "GPUs, memory, times, losses, and in what the runs differ.",
        (
            option("results", "RESULTS", "run directories, metrics.jsonl files, JSON records of benchmarks", nargs="+"),
            option("--output", "FILE.md", "plots go beside it", "report.md", type=writable),
            option("--warmup", "N", "first steps of a run that medians leave out", 2),
            flag("--plan", "what `longspan plan` says of each run, beside its figures"),
            option("--record", "FILE.json", "also keep the runs in one file, which RESULTS may name", type=writable),
            option("--recipes", "PAGE.md", "also put the table of recipes into this page", type=writable),
        ),
        report,
        "Plots need matplotlib: pip install 'longspan[plots]'. More: docs/report.md",
    ),
)
COMMANDS = {command.name: command for command in COMMANDS}
