"""Runs as one JSON record: what a report needs of them, small enough to be kept. results.py reads it again."""

from collections.abc import Sequence
from typing import Any

from longspan.launcher.report.results import Run

PARTS = ("environment", "settings")


def record_of(runs: Sequence[Run]) -> dict[str, Any]:
    """What all runs share stands once; by run what is its own, its steps, and seconds of profiled ones by component."""
    shared = {part: _shared([getattr(run, part) for run in runs]) for part in PARTS}
    return {"benchmark": "train", **shared, "runs": {run.name: _one(run, shared) for run in runs}}


def _one(run: Run, shared: dict[str, dict]) -> dict[str, Any]:
    own = {
        part: {name: value for name, value in getattr(run, part).items() if name not in shared[part]} for part in PARTS
    }
    profiled = {"breakdowns": run.breakdowns, "document": run.document} if run.breakdowns else {}
    return {**own, **profiled, "steps": run.rows}


def _shared(parts: list[dict[str, Any]]) -> dict[str, Any]:
    first, *others = parts
    return {name: value for name, value in first.items() if all(other.get(name, ...) == value for other in others)}
