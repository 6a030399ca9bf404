"""Losses of training runs that differ in one thing: sparse layers, engines, memory options, tensor parallelism.

    python -m longspan.benchmarks.loss_parity --sets sparse --output benchmarks/results/loss_parity_sparse_2xH200.json

Every variant is a run of launcher/train.py with the same seed, data and steps. See benchmarks/README.md.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from longspan.benchmarks.common import format_table, new_record, save
from longspan.benchmarks.loss_sets import SETS, RunSet, Variant
from longspan.benchmarks.training_peers import Ranks, read_lines
from longspan.launcher import train
from longspan.launcher.config import Config
from longspan.models.flops import num_parameters

FINAL = 10  # the final loss is the mean of one step in so many, the last ones
KEPT = ("step", "loss", "val_loss", "grad_norm", "tokens", "step_time_s", "peak_mem_gb")
COLUMNS = ["set", "variant", "steps", "final", "validation", "ratio", "val. ratio", "difference", "judged", "note"]
# What of a comparison must not exceed a set's tolerance.
MEASURES = {
    "excess": lambda c: max(c["ratio"], c["val_ratio"] or 0.0) - 1,
    "difference": lambda c: c["difference"],
    "missing fall": lambda c: 1 - c["fall"],
}


def main(argv=None) -> int:
    arguments = parse_arguments(argv)
    deadline = time.monotonic() + arguments.budget
    record = new_record("loss_parity", vars(arguments)) | {"sets": {}, "runs": {}}
    devices, lock = Devices(arguments.device), threading.Lock()

    def do(job):
        found = execute(*job[1:], arguments, devices, deadline)
        with lock:
            record["runs"][name_of(*job[:2])] = found
            compare_all(record, arguments)
            save(record, arguments.output)
            print(f"{name_of(*job[:2])}: {found.get('note') or found['steps'][-1]}", flush=True)

    jobs = [(name, variant, SETS[name]) for name in arguments.sets for variant in SETS[name].variants]
    if arguments.variants:
        jobs = [job for job in jobs if job[1] in arguments.variants]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(do, jobs))
    print("\n" + table(record))
    return int(any(run.get("failed") for run in record["runs"].values()))


def name_of(name: str, variant: str) -> str:
    return f"{name}: {variant}"


class Devices:
    """Lends GPUs to runs, those with the fewest runs first; runs share them where there are more jobs than GPUs."""

    def __init__(self, device: str):
        self.count = torch.cuda.device_count() if device == "cuda" else 0
        self._runs, self._lock = Counter(), threading.Lock()

    @contextmanager
    def lend(self, ranks: int):
        """The environment of a run of so many ranks."""
        if not self.count:
            yield {}
            return
        with self._lock:
            chosen = sorted(sorted(range(self.count), key=lambda gpu: self._runs[gpu])[:ranks])
            self._runs.update(chosen)
        try:
            yield {"CUDA_VISIBLE_DEVICES": ",".join(map(str, chosen))}
        finally:
            with self._lock:
                self._runs.subtract(chosen)


def execute(name: str, runs: RunSet, arguments, devices: Devices, deadline: float) -> dict:
    """One training run: its steps, as far as they went, with a note where that is not to the end."""
    variant = runs.variants[name]
    if importlib.util.find_spec(variant.package) is None:
        return {"steps": [], "note": f"skipped: the package {variant.package} is not installed"}
    if time.monotonic() > deadline:
        return {"steps": [], "note": f"skipped: --budget {arguments.budget:.0f} s"}
    settings = settings_of(runs, variant, arguments)
    config = Config.load(runs.config, [*settings, *data_of(runs, arguments)])
    command, ranks = ["launcher/train.py", "--config", runs.config, *settings], variant.ranks or runs.ranks
    steps, first, note = [], None, None
    with tempfile.TemporaryDirectory(prefix="longspan-loss-") as folder, devices.lend(ranks) as environment:
        run_dir = Path(folder) / "run"
        words = [*command[1:], *data_of(runs, arguments), f"run.dir={run_dir}", f"run.device={arguments.device}"]
        processes = Ranks([sys.executable, train.__file__, *words], ranks, Path(folder), environment)
        left = deadline - time.monotonic()
        for row in processes.rows(lambda: read_lines(run_dir / "metrics.jsonl"), config.train.steps, left):
            steps.append({key: row[key] for key in KEPT if key in row})
            first = first or time.monotonic()
            if time.monotonic() - first > arguments.limit:
                note = f"stopped {arguments.limit:.0f} s after its first step"
                break
        found = run_dir / "environment.json"
        environment = json.loads(found.read_text()) if found.exists() else {}
    if len(steps) < config.train.steps:
        note = f"{len(steps)} of {config.train.steps} steps: {note or processes.reason}"
    result = {"environment": environment | {"command": command}, "parameters": num_parameters(config.model)}
    return result | {"steps": steps} | ({"note": note} if note else {})


def settings_of(runs: RunSet, variant: Variant, arguments) -> list[str]:
    small = runs.small if arguments.device == "cpu" else ()
    quiet = ["log.tensorboard=false", "checkpoint.resume=none"]
    return [*runs.settings, *small, *quiet, *variant.settings, *arguments.settings]


def data_of(runs: RunSet, arguments) -> list[str]:
    """Where a set's text is; images are generated."""
    text = Config.load(runs.config).model.task == "text"
    return [f"data.corpora=[{{path: {arguments.corpus}}}]"] if text else []


def compare_all(record: dict, arguments) -> None:
    """Compares every run with its set's reference, and says which failed."""
    for name in arguments.sets:
        runs = SETS[name]
        small = arguments.device == "cpu" and runs.small_tolerance is not None
        tolerance = runs.small_tolerance if small else runs.tolerance
        reference = next(iter(runs.variants))
        record["sets"][name] = {"reference": reference, "measure": runs.measure, "tolerance": tolerance}
        base = record["runs"].get(name_of(name, reference), {"steps": []})
        for variant, about in runs.variants.items():
            run = record["runs"].get(name_of(name, variant))
            if run is None:
                continue
            run |= {"set": name, "variant": variant, "failed": not run["steps"] and "skipped" not in run["note"]}
            if run["steps"] and base["steps"]:
                run["compared"] = compared = compare(run["steps"], base["steps"])
                if not about.control:
                    run["measure"] = MEASURES[runs.measure](compared)
                    run["failed"] |= not run["measure"] <= tolerance


def compare(steps: list[dict], reference: list[dict]) -> dict:
    """A run beside its reference over the steps that both took.

    final: mean of the last tenth. ratio, val_ratio: of it and of the last validation loss to the reference's; None
    without one. difference, norm_difference: the largest relative one of any step's loss and gradient norm. fall: from
    the first loss to the final one, over the reference's.
    """
    count = min(len(steps), len(reference))
    ours, theirs = ([row["loss"] for row in rows[:count]] for rows in (steps, reference))
    norms, expected_norms = ([row["grad_norm"] for row in rows[:count]] for rows in (steps, reference))
    last = -(-count // FINAL)
    final, expected = (statistics.fmean(losses[-last:]) for losses in (ours, theirs))
    pairs = [
        (a["val_loss"], b["val_loss"]) for a, b in zip(steps, reference, strict=False) if "val_loss" in a.keys() & b
    ]
    fell = theirs[0] - expected
    return {
        "steps": count,
        "final": final,
        "validation": pairs[-1][0] if pairs else None,
        "ratio": final / expected,
        "val_ratio": pairs[-1][0] / pairs[-1][1] if pairs else None,
        "difference": max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)),
        "norm_difference": max(abs(a / b - 1) for a, b in zip(norms, expected_norms, strict=True)),
        "fall": (ours[0] - final) / fell if fell else float("nan"),
    }  # fmt: skip


def table(record: dict) -> str:
    rows = []
    for run in record["runs"].values():
        row, compared = (
            {"set": run["set"], "variant": run["variant"], "note": run.get("note", "")[:80]},
            run.get("compared"),
        )
        if compared:
            row |= {
                "steps": compared["steps"],
                "final": f"{compared['final']:.4f}",
                "ratio": f"{compared['ratio']:.4f}",
            }
            row |= {"difference": f"{compared['difference']:.1e}"}
        if compared and compared["val_ratio"]:
            row |= {"validation": f"{compared['validation']:.4f}", "val. ratio": f"{compared['val_ratio']:.4f}"}
        if "measure" in run:
            limit = record["sets"][run["set"]]
            verdict = "above" if run["failed"] else "within"
            row["judged"] = f"{limit['measure']} {run['measure']:.1e} {verdict} {limit['tolerance']:g}"
        rows.append(row)
    return format_table(rows, COLUMNS)


def parse_arguments(argv=None):
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--output", required=True, help="JSON file, saved again after every run")
    add("--sets", nargs="+", choices=list(SETS), default=list(SETS), help=default)
    add("--variants", nargs="+", help="only these of the sets; the reference is a set's first (default: all)")
    add("--corpus", default="data/stdlib", help=f"of `longspan prepare`, without .bin {default}")
    add("--device", choices=["cuda", "cpu"], default="cuda" if on_gpu else "cpu", help=f"cpu: small sizes {default}")
    add("--jobs", type=int, help="runs at a time; more than GPUs share them (default: one per 2 GPUs)")
    add("--limit", type=float, default=600.0, help=f"seconds of a run, from its first step {default}")
    add("--budget", type=float, default=3600.0, help=f"seconds after which all that runs is stopped {default}")
    add("settings", nargs="*", metavar="key=value", help="settings of all runs, after a set's, such as train.steps=20")
    arguments = parser.parse_intermixed_args(argv)
    names = [name for chosen in arguments.sets for name in SETS[chosen].variants]
    for name in set(arguments.variants or ()) - set(names):
        parser.error(f"--variants {name}: these sets have {', '.join(dict.fromkeys(names))}")
    arguments.jobs = arguments.jobs or max(1, torch.cuda.device_count() // 2)
    for name in ("jobs", "limit", "budget"):
        if getattr(arguments, name) <= 0:
            parser.error(f"--{name} {getattr(arguments, name)} must be greater than 0")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
