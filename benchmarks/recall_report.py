"""Table and plot of a recall benchmark, from its results alone."""

import json
import statistics
from pathlib import Path

COLORS = {
    "none": "tab:gray",
    "fixed": "tab:orange",
    "scalar": "tab:olive",
    "mamba2": "tab:pink",
    "gla": "tab:brown",
    "hgrn2": "tab:green",
    "delta": "tab:cyan",
    "gated_delta": "tab:blue",
    "softmax": "black",
}
ORIGIN = ("commit", "date", "command", "machine", "versions")
PARTS = ("models", "learning_rates", "seeds")
HARMLESS = ("output", "plot", "jobs", "time_limit", "no_graphs")
DASHES = {"": "-", "7:1": "--", "3:1": "-.", "1:1": ":"}


def load(path: str | Path) -> dict:
    """A results.json; ValueError for another file."""
    record = json.loads(Path(path).read_text())
    if not isinstance(record, dict) or record.get("benchmark") != "recall":
        raise ValueError(f"{path} is no results.json of longspan.benchmarks.recall")
    return record


def join(records: list[dict]) -> dict:
    """One record of several that differ in models, learning rates and seeds, to compare what was trained in parts; the
    first's with `parts`, where each came from. Of a run that several have, the first that finished counts. ValueError
    if another setting differs."""
    first, *others = records
    if not others:
        return first
    merged, runs = dict(first["arguments"]), {}
    for record in others:
        for name, value in record["arguments"].items():
            if name in PARTS:
                merged[name] = list(dict.fromkeys([*merged[name], *value]))
            elif name not in HARMLESS and value != first["arguments"][name]:
                raise ValueError(f"results with {name}={first['arguments'][name]} and {name}={value} cannot be joined")
    for run in (run for record in records for run in record["runs"]):
        key = run["model"], run["learning_rate"], run["seed"]
        if key not in runs or ("error" in runs[key] and "error" not in run):
            runs[key] = run
    merged["learning_rates"].sort()
    parts = [{name: record[name] for name in ORIGIN} for record in records]
    return first | {"arguments": merged, "parts": parts, "runs": list(runs.values())}


def write_report(record: dict, folder: Path) -> str:
    """Writes recall.md and, where matplotlib is installed, recall.svg; returns the table and what was written."""
    rows = models(record)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recall.md").write_text(markdown(record, rows))
    written = f"wrote {folder / 'recall.md'}"
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        hint = "pip install 'longspan[plots]', then --plot results.json"
        return f"{table(record, rows)}\n\n{written}; no plot without matplotlib: {hint}"
    if rows:
        plot(record, rows, folder / "recall.svg")
    return f"{table(record, rows)}\n\n{written} and recall.svg"


def models(record: dict) -> list[dict]:
    """One row per model that finished: at the learning rate with the best mean validation accuracy (over seeds and
    numbers of pairs), the mean test accuracy by number of pairs over the seeds, and its standard deviation."""
    groups = {}
    for run in record["runs"]:
        if "error" not in run:
            groups.setdefault(run["model"], {}).setdefault(run["learning_rate"], []).append(run)
    rows = []
    for model in [name for name in record["arguments"]["models"] if name in groups]:
        rates = {rate: _mean(_overall(run["validation"]) for run in runs) for rate, runs in groups[model].items()}
        rate = max(rates, key=rates.get)
        runs = groups[model][rate]
        layers = runs[0]["layers"]
        by_pairs = {pairs: [run["accuracy"][pairs] for run in runs] for pairs in runs[0]["accuracy"]}
        overall = [_overall(run["accuracy"]) for run in runs]
        rows.append(
            {
                "model": model,
                "softmax": layers.count("softmax") / len(layers),
                "learning_rate": rate,
                "validation": rates,
                "seeds": [run["seed"] for run in runs],
                "parameters": runs[0]["parameters"],
                "state": runs[0]["state"],
                "accuracy": {pairs: _mean(shares) for pairs, shares in by_pairs.items()},
                "mean": _mean(overall),
                "deviation": statistics.stdev(overall) if len(overall) > 1 else None,
                "seconds": _mean(run["seconds"] for run in runs),
            }
        )
    return rows


def table(record: dict, rows: list[dict]) -> str:
    """Markdown: one line per model, accuracy in percent."""
    pairs = [str(n) for n in record["arguments"]["pairs"]]
    head = ["model", "softmax layers", "parameters", "state", "learning rate", *(f"{n} pairs" for n in pairs), "mean"]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for row in rows:
        spread = "" if row["deviation"] is None else f" ± {100 * row['deviation']:.1f}"
        shares = [f"{100 * row['accuracy'][n]:.1f}" for n in pairs] + [f"{100 * row['mean']:.1f}{spread}"]
        sizes = [f"{row['softmax']:.1%}", f"{row['parameters']:,}", f"{row['state']:,}", f"{row['learning_rate']:g}"]
        lines.append([row["model"], *sizes, *shares])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _origin(part: dict) -> str:
    machine = ", ".join(part["machine"]["gpus"]) or f"{part['machine']['architecture']} CPU"
    return f"{machine}, torch {part['versions']['torch']}, commit {part['commit']}, {part['date']}: `{part['command']}`"


def markdown(record: dict, rows: list[dict]) -> str:
    """recall.md: where the figures come from, the table, every learning rate that was tried, runs that failed."""
    found = record["arguments"]
    parts = [
        "# Multi-query associative recall",
        f"Accuracy at queries, in percent. {found['layers']} layers, hidden size {found['hidden']}, {found['heads']}"
        f" heads; {found['steps']} steps of {found['tokens']} tokens for each number of pairs; {found['num_keys']} keys"
        f" and {found['num_values']} values; short convolution of linear layers: {found['conv_width']} (-1: the"
        f" family's); seeds {_list(found['seeds'])}. `state`: numbers in the states of all linear layers.",
        *(_origin(part) for part in record.get("parts", [record])),
        table(record, rows),
    ]
    if len(found["learning_rates"]) > 1:
        rates = [f"{rate:g}" for rate in found["learning_rates"]]
        lines = [["model", *rates], ["---"] + ["---:"] * len(rates)]
        for row in rows:
            tried = (row["validation"].get(rate) for rate in found["learning_rates"])
            lines.append([row["model"], *("-" if share is None else f"{100 * share:.1f}" for share in tried)])
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(
            f"Mean accuracy in validation for every learning rate; the best one is in the table above:\n\n{text}"
        )
    failed = [run for run in record["runs"] if "error" in run]
    if failed:
        text = "\n".join(
            f"- {run['model']}, {run['learning_rate']:g}, seed {run['seed']}: {run['error']}" for run in failed
        )
        parts.append(f"Without result:\n\n{text}")
    return "\n\n".join(parts) + "\n"


def plot(record: dict, rows: list[dict], path: Path) -> None:
    """Accuracy by number of pairs, and its mean by the share of softmax layers."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for row in rows:
        family, _, ratio = row["model"].partition("-")
        style = {"color": COLORS[family], "linestyle": DASHES[ratio], "marker": ".", "label": row["model"]}
        left.plot([int(n) for n in row["accuracy"]], list(row["accuracy"].values()), **style)
    left.set_xscale("log", base=2)
    left.set_xticks(record["arguments"]["pairs"], [str(n) for n in record["arguments"]["pairs"]])
    left.set(xlabel="pairs per document", ylabel="accuracy at queries", ylim=(-0.02, 1.02))
    left.yaxis.set_major_formatter(PercentFormatter(1))
    whole = [row for row in rows if row["model"] == "softmax"]
    for family in dict.fromkeys(row["model"].partition("-")[0] for row in rows):
        own = sorted((row for row in rows if row["model"].partition("-")[0] == family), key=lambda row: row["softmax"])
        line = own + whole if len(own) > 1 else own
        points = [row["softmax"] for row in line], [row["mean"] for row in line]
        right.plot(*points, color=COLORS[family], marker="o", label=family)
    right.xaxis.set_major_formatter(PercentFormatter(1))
    right.set(xlabel="share of softmax layers", title="mean over numbers of pairs")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize="small", frameon=False)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "recall"}):  # text as text, the same file every time
        figure.savefig(path, metadata={"Date": None})


def _overall(accuracy: dict[str, float]) -> float:
    return _mean(accuracy.values())


def _mean(values) -> float:
    return statistics.fmean(values)


def _list(values) -> str:
    return ", ".join(map(str, values))
