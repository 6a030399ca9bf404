"""`longspan report`: from run directories and benchmark records to one Markdown file with tables and plots.

results.py reads files, series.py aggregates (pure functions), document.py and plots.py show; record.py keeps runs as
one file, planned.py has what `longspan plan` says of them, recipes.py a table for a page of the guide.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from longspan.launcher.errors import UserError
from longspan.launcher.files import replace_text, strict_json
from longspan.launcher.report.document import document
from longspan.launcher.report.record import record_of
from longspan.launcher.report.results import read
from longspan.launcher.report.series import summarize


def write_report(
    results: Sequence[str],
    output: str,
    warmup: int,
    *,
    plan: bool = False,
    record: str | None = None,
    recipes: str | None = None,
) -> list[Path]:
    """Writes the report and, where matplotlib is installed, SVG plots beside it; returns the paths written.

    results: run directories, folders of them, metrics.jsonl files, JSON records of benchmarks. warmup: first steps of
    every run that medians leave out. plan: beside measured figures those of `longspan plan`. record: a JSON file that
    gets the runs. recipes: a page that gets their table. Raises UserError for what cannot be read or written.
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
    plans = _plans(summaries) if plan else None
    files[path] = document(summaries, records, warmup, images if find_spec("matplotlib") else None, plans)
    if record:
        if not runs:
            raise UserError(f"report: --record {record}: there is no run among the results")
        files[Path(record)] = strict_json(record_of(runs), indent=1) + "\n"
    if recipes:
        from longspan.launcher.report.recipes import insert
        from longspan.launcher.report.recipes import recipes as recipe_table

        files[Path(recipes)] = insert(Path(recipes), recipe_table(summaries))
    for file, text in files.items():
        try:
            replace_text(file, text)
        except OSError as error:
            raise UserError(f"report: {file} cannot be written ({error.strerror})") from None
    return [path, *(file for file in files if file != path)]


def _plans(summaries) -> dict:
    """By name of a run its Planned, or in words why there is none."""
    from longspan.launcher.report.planned import plan  # imports torch

    found = {}
    for summary in summaries:
        try:
            found[summary.run.name] = plan(summary)
        except UserError as error:
            found[summary.run.name] = str(error)
    return found
