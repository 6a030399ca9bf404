"""What `longspan plan` says of runs that were measured: their config, on as many GPUs of the same kind."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.launcher.cli import train_config
from longspan.launcher.config import Config, shipped_configs
from longspan.launcher.errors import UserError
from longspan.launcher.estimate import WINDOWS, Job, estimate
from longspan.launcher.gpus import GIB, cluster_of, extras_of
from longspan.launcher.memory_choice import settle
from longspan.launcher.parsing import update
from longspan.launcher.profile_report import PLANNED, ROWS
from longspan.launcher.report.results import OF_THEN, Run
from longspan.launcher.report.series import Summary

# How runs were made that do not have these settings yet; and those of shipped configs that have `auto` since.
OF_OLD, OF_AUTO = {"parallel.head_groups": 1}, {"train.checkpointing": "full"}


def config_of(run: Run) -> Config:
    """The config that a run had; of one whose command alone is known, what this says with the shipped config as it is
    today, but for `auto`, which it had not then. UserError where it is not known."""
    if not run.settings:
        raise UserError("its settings are not known")
    if "--config" in run.settings:
        shipped = shipped_configs()
        words = [Path(word).stem if Path(word).stem in shipped else word for word in run.environment["command"][1:]]
        config = train_config([*_words(OF_OLD), *words])
        if config.train.checkpointing == "auto" and "train.checkpointing" not in run.settings:
            config = train_config([*_words(OF_OLD | OF_AUTO), *words])
        return config
    config = update(Config(), _tree(OF_OLD | run.settings), run.name)
    config.validate()
    return config


@dataclass(frozen=True)
class Planned:
    """Of a run. components: by where steps were profiled (row, measured, planned) of `longspan profile`, in seconds."""

    peak_gib: float
    step_s: float
    components: dict[str, list[tuple[str, float, float]]]


def plan(summary: Summary) -> Planned:
    """UserError where the plan does not know the device or the settings. Documents are as long as those of profiled
    steps; where none are, a sample is one."""
    run = summary.run
    if not summary.gpus:
        raise UserError("it does not say on how many GPUs it ran")
    device, machines = str(run.environment.get("device")), run.environment.get("machines") or {}
    cluster = cluster_of(device, summary.gpus, max(machines.values(), default=summary.gpus))
    packages = run.environment.get("packages")
    known = {"extras": extras_of(packages)} if packages else {}
    found = estimate(settle(Job(config_of(run), cluster, run.document, **known)))
    measured = {where: seconds for where, seconds in run.breakdowns.items() if not where.endswith(OF_THEN)}
    compared = {where: list(_components(seconds, found.seconds)) for where, seconds in measured.items()}
    allocated = found.peak - found.memory[WINDOWS]  # torch's allocator, which runs report of, does not make windows
    return Planned(allocated / GIB, found.step_s, compared)


def _components(measured: dict[str, float], planned: dict[str, float]) -> Iterator[tuple[str, float, float]]:
    """Of rows that are not parts of others."""
    for row, parts in ROWS.items():
        seconds, plan = sum(measured.get(part, 0.0) for part in parts), planned.get(PLANNED.get(row, row), 0.0)
        if not row.startswith(" ") and (seconds or plan):
            yield row, seconds, plan


def _words(settings: dict[str, Any]) -> list[str]:
    return [f"{path}={value}" for path, value in settings.items()]


def _tree(settings: dict[str, Any]) -> dict[str, Any]:
    """Dotted names as nested mappings."""
    tree: dict[str, Any] = {}
    for path, value in settings.items():
        *sections, name = path.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return tree
