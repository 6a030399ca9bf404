"""What a report is made of, as it was found: training runs with their steps, and records of benchmarks.

A run that was killed, continued or written by another release is read as far as it goes; what was odd or missing is
kept as notes, which the report shows.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from longspan.launcher.errors import UserError
from longspan.launcher.parsing import MALFORMED, parse_tokens

# What a report shows of a step; a note says which of these a run lacks.
FIELDS = ("loss", "tokens", "step_time_s", "tokens_per_s", "tokens_per_s_per_gpu", "mfu", "peak_mem_gb")
OF_THEN = ", planned"  # ends the name of a breakdown that is what `longspan plan` said when the run was profiled
FLAGS = {"--seq-len": "data.seq_len", "--steps": "train.steps", "--config": "--config"}  # of recorded commands


@dataclass
class Run:
    """A training run. rows: the objects of metrics.jsonl, one per step, in order. settings: by dotted path, as far as
    they are known. breakdowns: by where they were found, seconds of a step by component. document: tokens of equal
    documents with as many query-key pairs as those of profiled steps, 0 if not known."""

    name: str
    path: Path
    rows: list[dict[str, Any]]
    environment: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    breakdowns: dict[str, dict[str, float]] = field(default_factory=dict)
    document: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass
class Record:
    """What a benchmark wrote: `content` has the keys of benchmarks/common.py, and rows of its own."""

    name: str
    path: Path
    content: dict[str, Any]


def read(paths: Sequence[Path]) -> tuple[list[Run], list[Record]]:
    """The runs and records in `paths`, each once, with names that differ. UserError for what is neither."""
    runs, records = [], []
    for path in dict.fromkeys(file.resolve() for path in paths for file in _files(path)):
        if path.name.endswith(".jsonl"):
            runs.append(_read_run(path))
        else:
            for found in _read_record(path):
                (records if isinstance(found, Record) else runs).append(found)
    if not records and not any(run.rows for run in runs):
        raise UserError(f"report: {', '.join(map(str, paths))}: no training step and no benchmark's record in it")
    for run in runs:
        run.notes += _missing(run)
    _tell_apart(runs)
    _tell_apart(records)
    return runs, records


def steps_of(lines: Iterable[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """The steps that the lines of a metrics.jsonl hold, one row per step in order, and notes on what they lack."""
    rows, broken, repeated, last = {}, [], 0, 0
    for number, line in enumerate(lines, 1):
        last = number
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            step = row["step"]
            if not isinstance(step, int):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            broken.append((number, line.endswith("\n")))
            continue
        repeated += step in rows
        rows[step] = row  # a run that went on from an earlier step: the later row is of the weights that stayed
    notes = []
    if broken and broken[-1] == (last, False):
        broken.pop()
        notes.append(f"line {last} is cut off (the run was killed while writing it) and left out")
    if broken:
        numbers = ", ".join(str(number) for number, _ in broken[:5]) + (", ..." if len(broken) > 5 else "")
        notes.append(f"{counted(len(broken), 'line')} without a step's object left out: {numbers}")
    if repeated:
        notes.append(f"{counted(repeated, 'step')} written more than once: the last one counts")
    steps = sorted(rows)
    if steps and (absent := steps[-1] - len(steps)):
        notes.append(f"{counted(absent, 'step')} before step {steps[-1]} missing")
    return [rows[step] for step in steps], notes


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted names."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def breakdowns_of(tree: Any, where: str) -> Iterator[tuple[str, dict[str, float]]]:
    """Seconds of a step by component, with the names that lead there, of every object with `components` in a tree of
    JSON. Those that stand in a list together are of several ranks: the mean. `planned_s` beside them is one, too."""
    if isinstance(tree, dict) and isinstance(tree.get("components"), dict):
        yield where, _totals(tree["components"])
    elif isinstance(tree, list) and tree and all(isinstance(i, dict) and "components" in i for i in tree):
        ranks = [_totals(item["components"]) for item in tree]
        names = dict.fromkeys(name for totals in ranks for name in totals)
        yield where, {name: sum(totals.get(name, 0.0) for totals in ranks) / len(ranks) for name in names}
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from breakdowns_of(value, where)
            if name == "planned_s" and isinstance(value, dict):
                yield where + OF_THEN, _totals(value)


def _totals(components: dict[str, Any]) -> dict[str, float]:
    totals = {name: value.get("total") if isinstance(value, dict) else value for name, value in components.items()}
    return {name: total for name, total in totals.items() if is_number(total)}


def _files(path: Path) -> list[Path]:
    """The files that an argument stands for: itself, or what a folder holds, or the folders in it."""
    if path.is_file():
        if path.suffix not in (".jsonl", ".json"):
            raise UserError(f"report: {path}: name run directories, metrics.jsonl files or JSON records of benchmarks")
        return [path]
    if not path.is_dir():
        raise UserError(f"report: {path}: there is no such file or folder")
    if (path / "metrics.jsonl").is_file():
        return [path / "metrics.jsonl"]
    found = sorted(path.glob("*/metrics.jsonl")) + [file for file in sorted(path.glob("*.json")) if _is_record(file)]
    if not found:
        raise UserError(
            f"report: {path}: neither it nor a folder in it has a metrics.jsonl, and no record of a benchmark"
        )
    return found


def _is_record(path: Path) -> bool:
    try:
        return bool(dict(_records_in(json.loads(path.read_text()), path.stem)))
    except (OSError, ValueError):
        return False


def _records_in(content: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, content) of the record that this JSON is, or of those that stand in it."""
    if isinstance(content, dict) and "benchmark" in content:
        yield name, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _records_in(value, f"{name}/{key}")


def _read_run(path: Path) -> Run:
    folder = path.parent
    with open(path, encoding="utf-8", errors="replace") as file:
        rows, notes = steps_of(file)
    if not rows:
        notes.append("no step in it")
    environment, settings = (_beside(folder / name, notes) for name in ("environment.json", "config.yaml"))
    run = Run(_name(path), path, rows, environment, flatten(settings), notes=notes)
    if not settings and (command := environment.get("command")):
        run.settings = settings_of_command(command)
    for file in sorted(folder.glob("profile/**/profile.json")):
        where = str(file.parent.relative_to(folder))
        try:
            profile = json.loads(file.read_text())
            run.breakdowns |= breakdowns_of(profile, where)
            run.document = next((rank["document"] for rank in profile["ranks"] if "document" in rank), 0)
        except (OSError, ValueError):
            notes.append(f"{where}/profile.json cannot be read")
    for row in rows:
        run.breakdowns |= breakdowns_of(row, f"step {row['step']}")
    return run


def settings_of_command(command: list[str]) -> dict[str, Any]:
    """The settings that a recorded command names; `--config` is kept as a setting of its own."""
    settings = {}
    for word, following in zip(command, [*command[1:], ""], strict=False):
        flag, equals, value = word.partition("=")
        if flag in FLAGS:
            settings[FLAGS[flag]] = value if equals else following
        elif equals and not word.startswith("-"):
            settings[flag] = value
    for name, value in settings.items():
        try:
            settings[name] = yaml.safe_load(value)
        except MALFORMED:
            pass
    if "data.seq_len" in settings:
        settings["data.seq_len"] = parse_tokens(settings["data.seq_len"])
    return settings


def _beside(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text())  # of JSON, too
        if isinstance(found, dict):
            return found
        notes.append(f"{path.name} holds no settings")
    except FileNotFoundError:
        notes.append(f"no {path.name}")
    except (OSError, ValueError, yaml.YAMLError):
        notes.append(f"{path.name} cannot be read")
    return {}


def _read_record(path: Path) -> list[Record] | list[Run]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"report: {path}: no JSON ({error})") from None
    found = dict(_records_in(content, path.stem))
    if not found:
        raise UserError(f'report: {path}: no record of a benchmark: it has no "benchmark"')
    if path.stem not in found:
        return [Record(name, path, record) for name, record in found.items()]
    if isinstance(content.get("steps"), list):
        return [_recorded_run(path.stem, path, content, {"environment": {}, "settings": {}})]
    runs = content.get("runs")
    if isinstance(runs, dict) and any(
        isinstance(run, dict) and isinstance(run.get("steps"), list) for run in runs.values()
    ):
        shared = {part: content.get(part) or {} for part in ("environment", "settings")}
        return [_recorded_run(f"{path.stem}/{name}", path, run, shared) for name, run in runs.items() if run["steps"]]
    return [Record(path.stem, path, content)]


def _recorded_run(name: str, path: Path, content: dict[str, Any], shared: dict[str, dict]) -> Run:
    """A training run that a record holds: `steps`, `environment`, `settings` or those of a command, `breakdowns` or
    objects with `components`, and a `summary` for what these do not say. shared: of all runs of the record."""
    rows, notes = steps_of(json.dumps(row) + "\n" for row in content["steps"])
    environment, summary = shared["environment"] | (content.get("environment") or {}), content.get("summary") or {}
    settings = shared["settings"] | (content.get("settings") or {})
    settings = settings or settings_of_command(environment.get("command") or [])
    for key, value in (
        ("sequence_tokens", summary.get("sequence_tokens")),
        ("world_size", summary.get("gpus") or summary.get("ranks")),
        ("commit", content.get("commit")),
    ):
        if value is not None:
            environment.setdefault(key, value)
    if not settings:
        notes.append("no environment with a command: its settings are not known")
    run = Run(name, path, rows, environment, settings, document=content.get("document", 0), notes=notes)
    run.breakdowns = content.get("breakdowns") or dict(
        breakdowns_of({key: content[key] for key in content if key != "steps"}, path.stem)
    )
    return run


def _missing(run: Run) -> list[str]:
    notes = []
    for name in FIELDS:
        values = [row.get(name, _ABSENT) for row in run.rows]
        counts = Counter(
            "absent" if v is _ABSENT else "null" if v is None else "odd" for v in values if not is_number(v)
        )
        for kind, count in counts.items():
            said = {"absent": "missing", "null": "null", "odd": "no finite number"}[kind]
            where = "all steps" if count == len(values) else f"{count} of {len(values)} steps"
            notes.append(f"`{name}` is {said} in {where}")
    return notes


_ABSENT = object()


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _name(path: Path) -> str:
    return path.parent.name if path.name == "metrics.jsonl" else path.stem


def _tell_apart(items: list) -> None:
    """Puts folders in front of names that several have."""
    for depth in range(1, 20):
        counts = Counter(item.name for item in items)
        for item in items:
            if counts[item.name] > 1:
                folder = item.path.parent if item.path.name == "metrics.jsonl" else item.path
                parts = folder.with_suffix("").parts[-1 - depth :]
                item.name = "/".join(parts)
        if max(counts.values(), default=1) == 1:
            return


def counted(number: int, noun: str) -> str:
    """Such as `1 step` or `2 steps`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
