"""What a report computes: medians of steady steps, series of runs that differ in one thing, differences between runs.

Pure functions of what results.py read.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from longspan.launcher.report.results import FIELDS, Run, counted, is_number

# In these the runs of a series may differ. All else makes another series: model, kernels, dtype, memory, device.
SCALE = ("data.seq_len", "train.global_batch", "parallel.sp")
BESIDE = (
    "run.", "log.", "profile.", "checkpoint.", "optim.", "train.steps", "train.timeout_s", "data.prefetch",
    "data.corpora", "data.validation_fraction",
)  # fmt: skip
COUNTS = {"optim.offload"}  # within BESIDE, but it takes time
MEDIANS = [name for name in FIELDS if name not in ("loss", "peak_mem_gb")]
KNOWN_SECONDS = {"step_time_s", "tokens_per_s"}
LOSS_STEPS = 10  # the last loss is the mean over so many steps
LABEL_SETTINGS = 3  # series are called by the settings in which they differ, if these are not more


@dataclass
class Summary:
    """A run in numbers; None where they are not known. medians: by name in metrics.jsonl, over the steps `counted`.
    seconds: medians of other times in it (such as attention_s). notes: the run's, and what this lacks."""

    run: Run
    gpus: int | None
    dp: int | None
    sp: int | None
    seq_len: int | None
    samples: int | None
    counted: list[int]
    medians: dict[str, float]
    seconds: dict[str, float]
    peak_mem_gb: float | None
    first_loss: float | None
    last_loss: float | None
    val_loss: float | None
    notes: list[str]

    @property
    def steps(self) -> str:
        """The steps that were counted, such as `3..24 (22)`."""
        return f"{self.counted[0]}..{self.counted[-1]} ({len(self.counted)})" if self.counted else "none"

    @property
    def split(self) -> str:
        """Data-parallel x sequence-parallel ranks."""
        return f"{self.dp} x {self.sp}" if self.dp and self.sp else "-"


@dataclass
class Point:
    """A run within a group: `x` GPUs or tokens, and speed and MFU per GPU relative to the group's smallest x."""

    x: int
    summary: Summary
    efficiency: float | None = None
    mfu_efficiency: float | None = None


@dataclass
class Group:
    """Runs that differ in GPUs (kind strong, weak) or sequence length (kind length) alone. fixed: what they share."""

    kind: str
    fixed: str
    points: list[Point] = field(default_factory=list)


def summarize(run: Run, warmup: int) -> Summary:
    """Medians over all steps but the first `warmup` of the run, or the last step of one that has no others; of a
    continued run no other is left out, which is why they are medians. Memory is the largest of all steps."""
    start = run.rows[0]["step"] if run.rows else 0
    steady = [row for row in run.rows if row["step"] >= start + warmup]
    few = []
    if run.rows and not steady:  # steps of minutes, of which few are made
        steady = run.rows[1:][-1:]
        speeds = "speeds are those of the last" if steady else "no speeds"
        few = [f"{counted(len(run.rows), 'step')}, none after the warm-up: {speeds}"]
    losses, values = _numbers(run.rows, "loss"), _numbers(run.rows, "val_loss")
    gpus = run.environment.get("world_size") or _ranks(run.rows)
    sp = run.environment.get("sp") or run.settings.get("parallel.sp") or None
    names = dict.fromkeys(name for row in steady for name in row if name.endswith("_s") and name not in KNOWN_SECONDS)
    return Summary(
        run=run,
        gpus=gpus,
        dp=run.environment.get("dp") or (gpus // sp if gpus and sp else None),
        sp=sp,
        seq_len=run.settings.get("data.seq_len") or run.environment.get("sequence_tokens"),
        samples=run.settings.get("train.global_batch"),
        counted=[row["step"] for row in steady],
        medians={name: value for name in MEDIANS if (value := median(_numbers(steady, name))) is not None},
        seconds={name: value for name in names if (value := median(_numbers(steady, name))) is not None},
        peak_mem_gb=max(_numbers(run.rows, "peak_mem_gb"), default=None),
        first_loss=losses[0] if losses else None,
        last_loss=statistics.fmean(losses[-LOSS_STEPS:]) if losses else None,
        val_loss=values[-1] if values else None,
        notes=run.notes + few,
    )


def groups(summaries: Iterable[Summary]) -> list[Group]:
    """Every set of two or more different points in which one thing alone grows:

    strong: GPUs, with the tokens of a step fixed. weak: GPUs, with the tokens per GPU fixed, either because sequences
    get longer or because there are more of them. length: the sequence, on fixed GPUs. Ranks per sequence are fixed, or
    always all. Only runs whose settings are known take part.
    """
    usable = [s for s in summaries if s.counted and s.gpus and s.seq_len and s.run.settings]
    labels = _labels(usable)
    found = []
    for policy, belongs in _policies(usable):
        for kind, fixed in KINDS.items():
            sets: dict[tuple[str, str], list[Summary]] = {}
            for summary in filter(belongs, usable):
                sets.setdefault((labels[id(summary)], fixed(summary)), []).append(summary)
            for shared, members in sets.items():
                found.append(_group(kind, ", ".join(filter(None, (*shared, policy))), members))
    found = [group for group in found if len({point.x for point in group.points}) > 1]
    return [group for place, group in enumerate(found) if not _shown_by(group, found[:place], found[place + 1 :])]


def settings_that_differ(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """By setting, its value in every run whose settings are known; names and folders of runs are left out. A setting
    that a run does not say is None."""
    known = [run.settings for run in runs if run.settings]
    names = sorted({name for settings in known for name in settings} - {"run.name", "run.dir"})
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: row for name, row in values.items() if len({repr(s.get(name)) for s in known}) > 1}


def profiles(summaries: Iterable[Summary]) -> dict[str, dict[str, float]]:
    """Seconds of a step by component, by run and where they were found."""
    runs = [summary.run for summary in summaries]
    return {
        f"{run.name}, {where}": seconds
        for run in runs
        for where, seconds in run.breakdowns.items()
        if any(seconds.values())
    }


def plain(value: Any) -> str | None:
    """A fact or a setting as it is written in YAML and on command lines."""
    if value is None:
        return None
    if isinstance(value, dict):
        return ", ".join(f"{name}: {plain(item)}" for name, item in value.items())
    if isinstance(value, list):
        return f"[{', '.join(str(plain(item)) for item in value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def median(values: Sequence[float]) -> float | None:
    """The median, None of nothing."""
    return statistics.median(values) if values else None


def _length(summary: Summary) -> str:
    return counted(summary.gpus, "GPU")


def _strong(summary: Summary) -> str:
    return f"{summary.samples or 1} x {summary.seq_len:,} tokens a step"


def _weak_longer(summary: Summary) -> str:
    return f"{summary.samples or 1} x {summary.seq_len / summary.gpus:,.10g} tokens per GPU"


def _weak_more(summary: Summary) -> str:
    return f"{(summary.samples or 1) / summary.gpus:.10g} x {summary.seq_len:,} tokens per GPU"


# kind: what runs must share to be in a group of it.
KINDS: dict[str, Callable[[Summary], str]] = {
    "strong": _strong,
    "weak, longer sequences": _weak_longer,
    "weak, more sequences": _weak_more,
    "length": _length,
}


def _policies(summaries: list[Summary]):
    """Ways to choose the ranks of a sequence as GPUs grow: all of them, or so many; and the runs that fit each."""
    yield "all to a sequence", lambda summary: summary.dp in (None, 1)
    for sp in sorted({summary.sp for summary in summaries if summary.sp}):
        yield f"{sp} to a sequence", lambda summary, sp=sp: summary.sp == sp


def _group(kind: str, fixed: str, members: list[Summary]) -> Group:
    points = [Point(s.seq_len if kind == "length" else s.gpus, s) for s in members]
    points.sort(key=lambda point: point.x)
    smallest = [point.summary.medians for point in points if point.x == points[0].x]
    for point in points if kind != "length" else ():
        point.efficiency = _relative(point.summary, smallest, "tokens_per_s_per_gpu")
        point.mfu_efficiency = _relative(point.summary, smallest, "mfu")
    return Group(kind, fixed, points)


def _relative(summary: Summary, smallest: list[dict[str, float]], name: str) -> float | None:
    base = median([medians[name] for medians in smallest if name in medians])
    return summary.medians[name] / base if base and name in summary.medians else None


def _shown_by(group: Group, before: list[Group], after: list[Group]) -> bool:
    """Whether another group shows the same runs, and more or earlier."""

    def runs(some: Group) -> set[int]:
        return {id(point.summary) for point in some.points}

    def others(some: list[Group]) -> list[set[int]]:
        return [runs(other) for other in some if other.kind == group.kind]

    return any(runs(group) <= other for other in others(before)) or any(runs(group) < other for other in others(after))


def _labels(summaries: list[Summary]) -> dict[int, str]:
    """A name for the series of every summary: in what it differs from other series, or its first run if in much."""
    series: dict[str, list[Summary]] = {}
    for summary in summaries:
        series.setdefault(repr(sorted(_signature(summary).items())), []).append(summary)
    signatures = [_signature(members[0]) for members in series.values()]
    names = sorted({name for signature in signatures for name in signature})
    differing = [name for name in names if len({repr(signature.get(name)) for signature in signatures}) > 1]
    labels = {}
    for signature, members in zip(signatures, series.values(), strict=True):
        parts = [f"{name.removeprefix('--')}={plain(signature.get(name, 'default'))}" for name in differing]
        label = ", ".join(parts) if len(parts) <= LABEL_SETTINGS else f"series of {members[0].run.name}"
        labels |= {id(summary): label for summary in members}
    return labels


def _signature(summary: Summary) -> dict[str, Any]:
    settings = {
        name: value
        for name, value in summary.run.settings.items()
        if name in COUNTS or (name not in SCALE and not name.startswith(BESIDE))
    }
    chosen = dict.fromkeys(summary.run.environment.get("chosen", ()), "auto")  # what fits goes by the length
    return settings | chosen | {"device": summary.run.environment.get("device")}


def _numbers(rows: Iterable[dict[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows if is_number(row.get(name))]


def _ranks(rows: list[dict[str, Any]]) -> int | None:
    """How many ranks a run had, from its speeds, where nothing else says it."""
    for row in rows:
        whole, share = row.get("tokens_per_s"), row.get("tokens_per_s_per_gpu")
        if is_number(whole) and is_number(share) and share > 0:
            return round(whole / share)
    return None
