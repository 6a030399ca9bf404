"""`longspan report`: from run directories and benchmark records to one Markdown file with tables and plots.

results.py reads files, series.py aggregates (pure functions), document.py and plots.py show.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from longspan.launcher.errors import UserError
from longspan.launcher.report.document import document
from longspan.launcher.report.results import read
from longspan.launcher.report.series import summarize


def write_report(results: Sequence[str], output: str, warmup: int) -> list[Path]:
    """Writes the report and, where matplotlib is installed, SVG plots beside it; returns the paths written.

    results: run directories, folders of them, metrics.jsonl files, JSON records of benchmarks. warmup: first steps of
    every run that medians leave out. Raises UserError for what cannot be read or written.
    """
    if warmup < 0:
        raise UserError(f"report: --warmup {warmup}: use 0 or more")
    path = Path(output)
    if path.is_dir() or path.suffix != ".md":
        raise UserError(f"report: --output {output}: name a Markdown file, such as report.md")
    runs, records = read([Path(name) for name in results])
    summaries = [summarize(run, warmup) for run in runs]
    figures = {}
    if find_spec("matplotlib"):
        from longspan.launcher.report.plots import draw

        figures = draw(summaries, records)
    files = {path.with_name(f"{path.stem}-{name}.svg"): svg for name, svg in figures.items()}
    images = {name: file.name for name, file in zip(figures, files, strict=True)}
    files[path] = document(summaries, records, warmup, images if find_spec("matplotlib") else None)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"report: --output {output}: cannot be written ({error.strerror})") from None
    return [path, *(file for file in files if file != path)]
