"""The Markdown of a report."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from longspan.launcher.breakdown import OUTSIDE
from longspan.launcher.report.results import OF_THEN, Record, Run, flatten, is_number
from longspan.launcher.report.series import LOSS_STEPS, Group, Summary, groups, plain, profiles, settings_that_differ

MAX_ROWS, MAX_COLUMNS = 40, 14  # of a benchmark's table
PARTS = ("projections", "MLP")  # of "projections and MLP", which profiles have apart
UNLIKE = 1.03  # times the median: a profiled step that takes longer is not like the others
ENVIRONMENT = (
    "device", "world_size", "dp", "sp", "machines", "threads_per_rank", "commit", "longspan", "torch", "cuda", "nccl",
    "python", "platform", "started",
)  # fmt: skip


def document(
    summaries: Sequence[Summary],
    records: Sequence[Record],
    warmup: int,
    images: dict[str, str] | None,
    plans: dict[str, Any] | None = None,
) -> str:
    """The report. images: file names of plots by name; None where they cannot be drawn. plans: by name of a run its
    planned.Planned, or in words why there is none; None to leave them out."""
    parts = ["# Training and benchmark results"]
    if images is None:
        parts.append("No plots: they need matplotlib (`pip install 'longspan[plots]'`).")
    images = images or {}
    if summaries:
        parts += [_runs(summaries, warmup), _notes(summaries), _image(images, "loss", "Loss by step")]
        found = groups(summaries)
        parts += _scaling(found, images)
        parts += _times(summaries, images)
        parts += _plans(summaries, plans) if plans else []
        parts += _origins([summary.run for summary in summaries])
    parts += [_record(record, images) for record in records]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Markdown; what is not a number stands on the left."""
    rows = [[shown(cell) for cell in row] for row in rows]
    numeric = [all(_looks_numeric(row[i]) for row in rows) for i in range(len(head))]
    lines = [list(head), ["---:" if right else "---" for right in numeric], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: Any) -> str:
    """A cell: at most four digits of a fraction, commas in counts, `-` for nothing."""
    if value is None:
        return "-"
    if isinstance(value, float) and is_number(value):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _runs(summaries: Sequence[Summary], warmup: int) -> str:
    head = ["run", *SIZES, "steps counted", *SPEEDS, "first loss", "last loss", "validation"]
    rows = [[s.run.name, *_sizes(s), s.steps, *_speeds(s), s.first_loss, s.last_loss, s.val_loss] for s in summaries]
    return (
        f"## Runs\n\nMedians over the steps after the first {warmup} of each run; on CPUs, GPUs stand for ranks. Peak"
        " memory is that of the fullest rank in any step: allocated by torch on a GPU, resident on a CPU. Last loss:"
        f" mean of the last {LOSS_STEPS} steps.\n\n{table(head, rows)}"
    )


SIZES = ("GPUs", "dp x sp", "sequence", "samples")
SPEEDS = ("tokens/s/GPU", "MFU", "step, s", "peak GiB")


def _sizes(s: Summary) -> list[Any]:
    return [s.gpus, s.split, s.seq_len, s.samples]


def _speeds(s: Summary) -> list[Any]:
    mfu = percent(s.medians.get("mfu"))
    return [s.medians.get("tokens_per_s_per_gpu"), mfu, s.medians.get("step_time_s"), s.peak_mem_gb]


def _notes(summaries: Sequence[Summary]) -> str:
    runs: dict[str, list[str]] = {}
    for s in summaries:
        for note in s.notes:
            runs.setdefault(note, []).append(s.run.name)
    lines = [f"- {note}: {', '.join(names)}" for note, names in runs.items()]
    return "Missing or odd:\n\n" + "\n".join(lines) if lines else ""


def _scaling(found: list[Group], images: dict[str, str]) -> list[str]:
    lengths = [group for group in found if group.kind == "length"]
    others = [group for group in found if group.kind != "length"]
    parts = ["## Sequence length", _image(images, "length", "Speed and memory by sequence length")]
    parts += map(_length_table, lengths) if lengths else ["No two runs differ in it alone."]
    parts += ["## Number of GPUs"]
    if not others:
        return [*parts, "No two runs differ in it alone, with the tokens of a step or those of a GPU fixed."]
    parts += [
        "Efficiency is tokens/s/GPU relative to the fewest GPUs of the table. Where sequences get longer, attention"
        " grows with them, and relative MFU is the fairer figure.",
        _image(images, "gpus", "Speed and efficiency by number of GPUs"),
    ]
    return parts + list(map(_gpu_table, others))


def _length_table(group: Group) -> str:
    rows = [[point.summary.run.name, *_sizes(point.summary), *_speeds(point.summary)] for point in group.points]
    return f"{group.fixed}\n\n{table(['run', *SIZES, *SPEEDS], rows)}{_mixed(group)}"


def _gpu_table(group: Group) -> str:
    head = ["run", *SIZES, "efficiency", "MFU, relative", *SPEEDS]
    rows = []
    for point in group.points:
        relative = [percent(point.efficiency), percent(point.mfu_efficiency)]
        rows.append([point.summary.run.name, *_sizes(point.summary), *relative, *_speeds(point.summary)])
    return f"**{group.kind}** ({group.fixed})\n\n{table(head, rows)}{_mixed(group)}"


def _mixed(group: Group) -> str:
    """Says when the runs of a group are not of one state of the code or of torch."""
    mixed = [
        name
        for name in ("commit", "torch", "nccl")
        if len({str(point.summary.run.environment.get(name)) for point in group.points}) > 1
    ]
    return f"\n\nThese runs differ in {', '.join(mixed)}." if mixed else ""


def _times(summaries: Sequence[Summary], images: dict[str, str]) -> list[str]:
    parts = []
    timed = [s for s in summaries if s.seconds]
    if timed:
        names = list(dict.fromkeys(name for s in timed for name in s.seconds))
        head = ["run", "step, s", *(f"{name} (share)" for name in names)]
        rows = []
        for s in timed:
            step = s.medians.get("step_time_s")
            cells = [(s.seconds.get(name), name) for name in names]
            shares = [f"{shown(v)} ({percent(v / step)})" if v is not None and step else shown(v) for v, _ in cells]
            rows.append([s.run.name, step, *shares])
        parts.append(f"Medians of times in metrics.jsonl:\n\n{table(head, rows)}")
    profiled = profiles(summaries)
    if profiled:
        rows = [
            [label, *(_part_of_step(seconds, names) for seconds in profiled.values())]
            for label, names in _components(profiled.values()).items()
        ]
        total = ["sum", *(shown(1000 * sum(seconds.values())) for seconds in profiled.values())]
        image = _image(images, "breakdown", "Time of a step by component")
        parts.append("Profiled steps, milliseconds:\n\n" + table(["component", *profiled], [*rows, total]))
        parts += [image, *(line for s in summaries for line in _unlike_others(s))]
    return ["## Time of a step", *parts] if parts else []


def _components(profiled: Iterable[dict[str, float]]) -> dict[str, list[str]]:
    """Rows of a profile: components that each is the sum of; parts come after what they are parts of."""
    names = list(dict.fromkeys(name for seconds in profiled for name in seconds))
    found = {name: [name] for name in names if name not in PARTS}
    if not set(PARTS).isdisjoint(names):
        whole = ["projections and MLP", *PARTS]
        found = {whole[0]: whole, **{f"of which {name}": [name] for name in PARTS}} | found | {whole[0]: whole}
    return found


def _part_of_step(seconds: dict[str, float], names: Sequence[str]) -> str | None:
    """Milliseconds and share of these components, None where there are none."""
    values = [seconds[name] for name in names if name in seconds]
    share = sum(values) / (sum(seconds.values()) or 1)
    return f"{shown(1000 * sum(values))} ({percent(share)})" if values else None


def _unlike_others(s: Summary) -> Iterable[str]:
    """Says which profiled steps took longer than the others: what happens once is in them."""
    median = s.medians.get("step_time_s")
    for where, seconds in s.run.breakdowns.items():
        step = sum(value for name, value in seconds.items() if name != OUTSIDE)
        if median and not where.endswith(OF_THEN) and step > UNLIKE * median:
            more = percent(step / median - 1)
            yield (
                f"{s.run.name}, {where}: {shown(step)} s, {more} more than the median of the steps counted: what is"
                " done in few steps, such as compiling, is in its idle time and its communication."
            )


def _plans(summaries: Sequence[Summary], plans: dict[str, Any]) -> list[str]:
    head = ["run", "GPUs", "sequence", "peak GiB", "planned", "off by", "step, s", "planned", "off by"]
    rows, notes, profiled = [], [], []
    for s in summaries:
        name, found = s.run.name, plans[s.run.name]
        if isinstance(found, str):
            notes.append(f"- {name}: {found}")
            continue
        pairs = (s.peak_mem_gb, found.peak_gib), (s.medians.get("step_time_s"), found.step_s)
        rows.append([name, s.gpus, s.seq_len, *(cell for pair in pairs for cell in (*pair, deviation(*pair)))])
        for where, compared in found.components.items():
            cells = [[row, 1000 * one, 1000 * other, deviation(one, other)] for row, one, other in compared]
            profiled.append(f"{name}, {where}:\n\n{table(['component', 'ms', 'planned', 'off by'], cells)}")
    parts = [
        "## Plan against measurement",
        "What `longspan plan` says today of the same config on the same GPUs; off by: planned / measured - 1.",
    ]
    parts += [table(head, rows)] if rows else []
    return [*parts, "No plan:\n\n" + "\n".join(notes) if notes else "", *profiled]


def deviation(measured: float | None, planned: float) -> str | None:
    """Planned / measured - 1 in percent, None for what is not in both."""
    return f"{100 * (planned / measured - 1):+.1f} %" if measured and planned else None


def _origins(runs: Sequence[Run]) -> list[str]:
    """Where the figures come from: what all runs share, what differs, commands, settings that differ."""
    facts = {name: [run.environment.get(name) for run in runs] for name in ENVIRONMENT}
    facts["commit"] = [commit and re.sub(r"^(\w{10})\w+", r"\1", str(commit)) for commit in facts["commit"]]
    packages = {name: None for run in runs for name in run.environment.get("packages") or {}}
    facts |= {name: [(run.environment.get("packages") or {}).get(name) for run in runs] for name in packages}
    facts = {name: values for name, values in facts.items() if any(value is not None for value in values)}
    same = {name: values[0] for name, values in facts.items() if all(value == values[0] for value in values)}
    parts = ["## Machines and versions"]
    if same:
        parts.append("In all runs: " + ", ".join(f"{name} {plain(value)}" for name, value in same.items()) + ".")
    names = [run.name for run in runs]
    differing = [[name, *map(plain, values)] for name, values in facts.items() if name not in same]
    if differing:
        parts.append(table(["", *names], differing))
    commands = [f"- {run.name}: `{' '.join(command)}`" for run in runs if (command := run.environment.get("command"))]
    if commands:
        parts.append("Commands:\n\n" + "\n".join(commands))
    settings = settings_that_differ(runs)
    parts.append("## Settings that differ")
    if len(runs) < 2 or not settings:
        return [*parts, "None." if len(runs) > 1 else "One run."]
    return [*parts, table(["setting", *names], [[name, *map(plain, values)] for name, values in settings.items()])]


def _record(record: Record, images: dict[str, str]) -> str:
    content = record.content
    machine, versions = content.get("machine") or {}, content.get("versions") or {}
    devices = machine.get("gpus") or [f"{machine.get('architecture', 'unknown')} CPU"]
    facts = [f"{len(devices)} x {devices[0]}", f"torch {versions.get('torch')}", f"commit {content.get('commit')}"]
    parts = [
        f"## {record.name}",
        f"Benchmark {content['benchmark']}: {', '.join(facts)}, {content.get('date')}.",
        f"`{content['command']}`" if content.get("command") else "",
        str(content.get("note") or ""),
        _image(images, plot_of(record), record.name),
    ]
    for name, rows in rows_of(record).items():
        columns = columns_of(rows)
        body = [[row.get(column) for column in columns[:MAX_COLUMNS]] for row in rows[:MAX_ROWS]]
        parts.append(f"{name}:\n\n{table(columns[:MAX_COLUMNS], body)}")
        left_out = [
            f"{count - most} of {count} {what}"
            for count, most, what in ((len(rows), MAX_ROWS, "rows"), (len(columns), MAX_COLUMNS, "columns"))
            if count > most
        ]
        if left_out:
            parts.append(f"Left out: {', '.join(left_out)}; all are in {record.path.name}.")
    return "\n\n".join(part for part in parts if part)


def plot_of(record: Record) -> str:
    """The name of its plot, which is part of a file name."""
    return "bench-" + re.sub(r"[^-.\w]+", "-", record.name)


def rows_of(record: Record) -> dict[str, list[dict[str, Any]]]:
    """The tables that a record holds, by name: its lists of objects, flat."""
    lists = {name: value for name, value in record.content.items() if isinstance(value, list) and value}
    return {
        name: [flatten(row) for row in rows]
        for name, rows in lists.items()
        if all(isinstance(row, dict) for row in rows)
    }


def columns_of(rows: list[dict[str, Any]]) -> list[str]:
    """The columns that hold numbers, words or nothing."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [name for name in columns if not any(isinstance(row.get(name), list) for row in rows)]


def percent(share: float | None) -> str | None:
    """0.123 as 12.3 %."""
    return None if share is None else f"{100 * share:.1f} %"


def _looks_numeric(text: str) -> bool:
    return (
        text == "-" or text.split(" ")[0].replace(",", "").lstrip("+-").replace(".", "", 1).replace("e-", "").isdigit()
    )


def _image(images: dict[str, str], name: str, title: str) -> str:
    return f"![{title}]({images[name]})" if name in images else ""
