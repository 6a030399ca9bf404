"""The plots of a report as SVG, by name; matplotlib is needed."""

import io
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from longspan.launcher.report.document import plot_of, rows_of
from longspan.launcher.report.results import Record, is_number
from longspan.launcher.report.series import Group, Summary, groups, profiles

# Of a benchmark's columns: the first that its rows have is drawn against the first of the others.
X_COLUMNS = ("tokens", "tokens_per_gpu", "gpus")
Y_COLUMNS = ("tokens_per_s_per_gpu", "fwd+bwd TFLOP/s", "efficiency.forward+backward", "ms.forward+backward")
MAX_LINES = 10
# What is drawn of a point of a group: (label, value, whether it is a share).
SPEED = ("tokens/s/GPU", lambda point: point.summary.medians.get("tokens_per_s_per_gpu"), False)
MFU = ("MFU", lambda point: point.summary.medians.get("mfu"), True)
MEMORY = ("peak GiB", lambda point: point.summary.peak_mem_gb, False)
EFFICIENCY = ("efficiency", lambda point: point.efficiency, True)


def draw(summaries: Sequence[Summary], records: Sequence[Record]) -> dict[str, str]:
    """Every plot for which there is something to draw."""
    found = groups(summaries)
    lengths = {group.fixed: group for group in found if group.kind == "length"}
    gpus = {f"{group.kind}: {group.fixed}": group for group in found if group.kind != "length"}
    figures = {
        "loss": _losses(summaries),
        "length": _curves(lengths, "sequence, tokens", (SPEED, MFU, MEMORY)),
        "gpus": _curves(gpus, "GPUs", (SPEED, EFFICIENCY, MFU)),
        "breakdown": _breakdown(profiles(summaries)),
        **{plot_of(record): _benchmark(record) for record in records},
    }
    return {name: _svg(figure) for name, figure in figures.items() if figure is not None}


def _losses(summaries: Sequence[Summary]) -> Figure | None:
    figure, (axes,) = _panels(1)
    for number, summary in enumerate(summaries):
        color = f"C{number % 10}"
        for name, style in (
            ("loss", {"linewidth": 1}),
            ("val_loss", {"linestyle": "", "marker": "o", "markersize": 4}),
        ):
            points = [(row["step"], row[name]) for row in summary.run.rows if is_number(row.get(name))]
            if points:
                label = summary.run.name + (", validation" if name == "val_loss" else "")
                axes.plot(*zip(*points, strict=True), color=color, label=label, **style)
    axes.set(xlabel="step", ylabel="loss")
    return _finish(figure, [axes])


def _curves(found: dict[str, Group], xlabel: str, measures: Sequence[tuple]) -> Figure | None:
    """A panel for every measure of which there is a value, with a line for every group."""
    points = [point for group in found.values() for point in group.points]
    measures = [measure for measure in measures if any(measure[1](point) is not None for point in points)]
    if not measures:
        return None
    figure, panels = _panels(len(measures))
    for axes, (ylabel, value, share) in zip(panels, measures, strict=True):
        for label, group in found.items():
            _line(axes, [(point.x, value(point)) for point in group.points], label)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if share:
            axes.yaxis.set_major_formatter(PercentFormatter(1))
    return _finish(figure, panels, doubling=True)


def _breakdown(found: dict[str, dict[str, float]]) -> Figure | None:
    figure, (axes,) = _panels(1)
    left = [0.0] * len(found)
    for name in dict.fromkeys(name for seconds in found.values() for name in seconds):
        widths = [1000 * seconds.get(name, 0.0) for seconds in found.values()]
        axes.barh(list(found), widths, left=left, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set(xlabel="ms of a step")
    axes.invert_yaxis()
    return _finish(figure, [axes]) if found else None


def _benchmark(record: Record) -> Figure | None:
    """The first table that has columns to draw; a line for every combination of the words in its rows."""
    for rows in rows_of(record).values():
        x, y = _column(rows, X_COLUMNS), _column(rows, Y_COLUMNS)
        if x is None or y is None or len({row[x] for row in rows if is_number(row.get(x))}) < 2:
            continue
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            label = ", ".join(value for value in row.values() if isinstance(value, str))
            if is_number(row.get(x)) and is_number(row.get(y)):
                lines.setdefault(label, []).append((row[x], row[y]))
        figure, (axes,) = _panels(1)
        for label, points in list(lines.items())[:MAX_LINES]:
            _line(axes, sorted(points), label)
        axes.set(xlabel=x.replace("_", " "), ylabel=y)
        if len(lines) > MAX_LINES:
            axes.set_title(f"the first {MAX_LINES} of {len(lines)} lines", fontsize="small")
        return _finish(figure, [axes], doubling=True)
    return None


def _column(rows: Iterable[dict[str, Any]], names: Iterable[str]) -> str | None:
    return next((name for name in names if any(is_number(row.get(name)) for row in rows)), None)


def _panels(count: int) -> tuple[Figure, list]:
    figure = Figure(figsize=(4.6 * count if count > 1 else 9, 3.8), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _line(axes, points: list[tuple[float, float | None]], label: str) -> None:
    points = [point for point in points if is_number(point[1])]
    if points:
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)


def _finish(figure: Figure, panels: list, doubling: bool = False) -> Figure | None:
    """Axes and legend; None if nothing was drawn. doubling: x in powers of 2."""
    if not any(axes.has_data() for axes in panels):
        return None
    for axes in panels:
        axes.grid(alpha=0.3)
        if doubling:
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted({x for line in axes.lines for x in line.get_xdata()}))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _binary(value)))
            axes.set_ylim(bottom=0)
    handles, labels = panels[0].get_legend_handles_labels()
    if len(panels) > 1:
        figure.set_figheight(3.8 + 0.2 * len(labels))
    where = "lower center" if len(panels) > 1 else "right upper"
    figure.legend(handles, labels, loc=f"outside {where}", fontsize="small", frameon=False)
    return figure


def _binary(value: float) -> str:
    """131072 as 128K, as in settings."""
    for size, unit in ((2**30, "G"), (2**20, "M"), (2**10, "K")):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:g}"


def _svg(figure: Figure) -> str:
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):  # text as text, the same file every time
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
