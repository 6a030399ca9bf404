"""The table of recipes: what was run with which settings, and what it took. A page has it between two lines."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from longspan.launcher.config import Config
from longspan.launcher.errors import UserError
from longspan.launcher.estimate_report import shown as tokens
from longspan.launcher.report.document import percent, table
from longspan.launcher.report.planned import config_of
from longspan.launcher.report.results import flatten
from longspan.launcher.report.series import Summary, plain
from longspan.models.flops import num_parameters

BEGIN, END = "<!-- recipes: begin -->", "<!-- recipes: end -->"
# Settings that a recipe names where they are not the default.
SETTINGS = (
    "train.checkpointing", "train.checkpoint_layers", "train.offload_activations", "train.mlp_tile", "optim.offload",
    "train.reduce_dtype", "train.compile", "parallel.sp", "parallel.tp", "parallel.engine", "parallel.sharding",
    "parallel.softmax", "train.global_batch",
)  # fmt: skip
HEAD = ("model", "length", "GPUs", "settings", "peak GiB", "tokens/s/GPU", "tokens/s", "MFU", "step, s")


def recipes(summaries: Sequence[Summary]) -> str:
    """Markdown, ordered by model, GPUs and length; and where the figures are from. Runs without steady steps or known
    settings are left out; UserError if none is left."""
    rows, sources = [], {}
    for summary in summaries:
        try:
            config = config_of(summary.run)
        except UserError:
            continue
        if summary.counted:
            count = num_parameters(config.model)
            sources[summary.run.path.name] = None
            rows.append(((count, summary.gpus, summary.seq_len), _row(summary, config, count)))
    if not rows:
        raise UserError("report: --recipes: no run with steady steps and known settings")
    rows.sort(key=lambda row: row[0])
    return f"{table(HEAD, [row for _, row in rows])}\n\nMeasured: {', '.join(f'`{name}`' for name in sources)}."


def insert(page: Path, text: str) -> str:
    """The page with `text` between its two lines. UserError where it has none."""
    try:
        before, rest = page.read_text(encoding="utf-8").split(BEGIN)
        after = rest.split(END)[1]
    except (OSError, ValueError, IndexError):
        raise UserError(f"report: --recipes {page}: name a page that has the lines {BEGIN} and {END}") from None
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def _row(summary: Summary, config: Config, count: int) -> list:
    speed = summary.medians.get("tokens_per_s_per_gpu")
    device = str(summary.run.environment.get("device")).removeprefix("NVIDIA ")
    default, own = flatten(asdict(Config())), flatten(asdict(config))
    changed = [f"`{path}={plain(own[path])}`" for path in SETTINGS if own[path] != default[path]]
    return [
        f"{config.run.name}, {count / 1e9:.2f}B, {_layers(config.model.pattern)}",
        tokens(summary.seq_len),
        f"{summary.gpus} x {device}",
        " ".join(changed) or "defaults",
        summary.peak_mem_gb,
        speed,
        speed and speed * summary.gpus,
        percent(summary.medians.get("mfu")),
        summary.medians.get("step_time_s"),
    ]


def _layers(pattern: list[str]) -> str:
    """[linear, linear, linear, softmax] as `3 linear : 1 softmax`."""
    runs = [(kind, len(list(group))) for kind, group in groupby(pattern)]
    return runs[0][0] if len(runs) == 1 else " : ".join(f"{count} {kind}" for kind, count in runs)
