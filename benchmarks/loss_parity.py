"""Losses of training runs that differ in one thing: sparse layers, engines, memory options, tensor parallelism.

    python -m longspan.benchmarks.loss_parity --sets sparse --output benchmarks/results/loss_parity_sparse_2xH200.json

Every variant is a run of launcher/train.py with the same seed, data and steps. See benchmarks/README.md.
"""

import argparse
import importlib.util
import json
import signal
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

from longspan.benchmarks.arguments import device_name, require_positive, writable
from longspan.benchmarks.common import format_table, new_record, save
from longspan.benchmarks.loss_sets import SETS
from longspan.benchmarks.training_peers import Ranks, read_lines
from longspan.launcher import train
from longspan.launcher.config import Config
from longspan.launcher.errors import UserError
from longspan.models.flops import num_parameters

FINAL = 10  # the final loss is the mean of one step in so many, the last ones
FALLEN = 0.2  # of its first loss a run must lose for its fall to be one
KEPT = ("step", "loss", "val_loss", "grad_norm", "tokens", "step_time_s", "peak_mem_gb")
COLUMNS = "set variant verdict steps final ratio validation val_ratio difference fall note".split()
FORMATS = {
    "final": ".4f", "ratio": ".4f", "validation": ".4f", "val_ratio": ".4f", "difference": ".1e", "fall": ".3f",
}  # fmt: skip
# What of a comparison must not exceed a set's tolerance.
MEASURES = {
    "excess": lambda c: max(c["ratio"], c["val_ratio"] or 0.0) - 1,
    "difference": lambda c: c["difference"],
    "missing fall": lambda c: 1 - c["fall"] if c["fallen"] > FALLEN else 1.0,
}


def main(argv=None) -> int:
    arguments = parse_arguments(argv)
    record, end = new_record("loss_parity", vars(arguments)), End(arguments.budget)
    devices, lock, found = Devices(arguments.device), threading.Lock(), {}
    pairs = [(name, variant) for name in arguments.sets for variant in SETS[name].variants]
    chosen = [pair for pair in pairs if not arguments.variants or pair[1] in arguments.variants]
    try:
        runs = [Planned(*pair, arguments) for pair in chosen]
    except UserError as error:
        sys.exit(f"loss_parity: error: {error}")

    def do(run: Planned):
        result = run.execute(devices, end)
        with lock:
            found[run.title] = result
            record["runs"] = {run.title: found[run.title] for run in runs if run.title in found}
            judge(record["runs"], arguments.device)
            save(record, arguments.output)
            print(f"{run.title}: {result.get('note') or result['steps'][-1]}", flush=True)

    with end, ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(do, runs))
    print("\n" + table(record["runs"]))
    return int(any(run["verdict"] in ("above", "incomplete") for run in record["runs"].values()))


class End:
    """When everything is over: after --budget, or when a signal asks for it, such as that of `timeout`."""

    def __init__(self, budget_s: float):
        self._budget, self._deadline, self._asked = budget_s, time.monotonic() + budget_s, False

    def reason(self) -> str | None:
        if self._asked:
            return "ended by a signal"
        return f"--budget {self._budget:.0f} s" if time.monotonic() > self._deadline else None

    def _ask(self, *_):
        self._asked = True

    def __enter__(self):
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)


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


class Planned:
    """A variant of a set as a training run. Raises UserError for settings that do not fit."""

    def __init__(self, name: str, variant: str, arguments):
        self.set, self.variant, self.arguments, self.title = name, variant, arguments, f"{name}: {variant}"
        self.runs, self.about = SETS[name], SETS[name].variants[variant]
        small = self.runs.small if arguments.device == "cpu" else ()
        quiet = ("log.tensorboard=false", "checkpoint.resume=none")
        self.settings = [*self.runs.settings, *small, *quiet, *self.about.settings, *arguments.settings]
        text = Config.load(self.runs.config).model.task == "text"  # images are generated
        self.data = [f"data.corpora=[{{path: {arguments.corpus}}}]"] if text else []
        self.config = Config.load(self.runs.config, [*self.settings, *self.data])
        self.ranks = self.about.ranks or arguments.ranks or self.runs.ranks

    def execute(self, devices: Devices, end: End) -> dict:
        """Its steps, as far as they went, with a note where that is not to the end."""
        head = {"set": self.set, "variant": self.variant, "parameters": num_parameters(self.config.model)}
        if reason := self._missing(devices):
            return head | {"steps": [], "note": f"skipped: {reason}"}
        if reason := end.reason():
            return head | {"steps": [], "note": f"not started: {reason}"}
        command = ["launcher/train.py", "--config", self.runs.config, *self.settings]
        with tempfile.TemporaryDirectory(prefix="longspan-loss-") as folder, devices.lend(self.ranks) as variables:
            run_dir = Path(folder) / "run"
            places = [*self.data, f"run.dir={run_dir}", f"run.device={self.arguments.device}"]
            ranks = Ranks([sys.executable, train.__file__, *command[1:], *places], self.ranks, Path(folder), variables)
            steps, note = self._follow(ranks, run_dir / "metrics.jsonl", end)
            described = run_dir / "environment.json"
            environment = json.loads(described.read_text()) if described.exists() else {}
        return head | {"environment": environment | {"command": command}, "steps": steps} | note

    def _missing(self, devices: Devices) -> str | None:
        if importlib.util.find_spec(self.about.package) is None:
            return f"the package {self.about.package} is not installed"
        if self.arguments.device == "cuda" and devices.count < self.ranks:
            return f"it needs {self.ranks} GPUs of {devices.count}"
        return None

    def _follow(self, ranks: Ranks, metrics: Path, end: End) -> tuple[list[dict], dict]:
        """The steps that a run writes, until its last or a limit ends it; compilers have no part in --limit."""
        count, steps, first, limit = self.config.train.steps, [], None, self.arguments.limit

        def over():
            late = first is not None and time.monotonic() - first > limit
            return f"stopped {limit:.0f} s after the first" if late else end.reason()

        for row in ranks.rows(lambda: read_lines(metrics), count, over):
            steps.append({key: row[key] for key in KEPT if key in row})
            first = first or time.monotonic()
        return steps, {} if len(steps) == count else {"note": f"{len(steps)} of {count} steps: {ranks.reason}"}


def judge(runs: dict[str, dict], device: str) -> None:
    """Puts `compared` and a `verdict` into every run.

    verdict: within or above the tolerance of its set (`measure` is what was compared with it); incomplete; skipped; or
    it is the reference, or a control.
    """
    for run in runs.values():
        about = SETS[run["set"]]
        first = next(iter(about.variants))
        reference = runs.get(f"{run['set']}: {first}", {"steps": []})
        complete = run["steps"] and "note" not in run
        if run["steps"] and reference["steps"]:
            run["compared"] = compare(run["steps"], reference["steps"])
        run["verdict"] = "reference" if run["variant"] == first else "control"
        if not complete:
            run["verdict"] = "skipped" if run["note"].startswith("skipped") else "incomplete"
        elif run["variant"] != first and not about.variants[run["variant"]].control:
            tolerance = about.small_tolerance if device == "cpu" else about.tolerance
            run |= {"verdict": "incomplete", "tolerance": tolerance}
            if "compared" in run and "note" not in reference:
                run["measure"] = MEASURES[about.measure](run["compared"])
                run["verdict"] = "within" if run["measure"] <= tolerance else "above"


def compare(steps: list[dict], reference: list[dict]) -> dict:
    """A run beside its reference over the steps that both took.

    final: mean of the last tenth. ratio, val_ratio: of it and of the last validation loss to the reference's; None
    without one. difference, norm_difference: the largest relative one of any step's loss and gradient norm. fallen:
    share of the first loss by which the final one is lower. fall: that difference over the reference's.
    """
    count = min(len(steps), len(reference))
    ours, theirs = ([row["loss"] for row in rows[:count]] for rows in (steps, reference))
    norms, expected_norms = ([row["grad_norm"] for row in rows[:count]] for rows in (steps, reference))
    last = -(-count // FINAL)
    final, expected = (statistics.fmean(losses[-last:]) for losses in (ours, theirs))
    both = [pair for pair in zip(steps, reference, strict=False) if all("val_loss" in row for row in pair)]
    validation, expected_validation = [row["val_loss"] for row in both[-1]] if both else (None, None)
    fell = theirs[0] - expected
    return {
        "steps": count,
        "final": final,
        "validation": validation,
        "ratio": final / expected,
        "val_ratio": validation / expected_validation if both else None,
        "difference": max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)),
        "norm_difference": max(abs(a / b - 1) for a, b in zip(norms, expected_norms, strict=True)),
        "fallen": 1 - final / ours[0],
        "fall": (ours[0] - final) / fell if fell else float("nan"),
    }  # fmt: skip


def table(runs: dict[str, dict]) -> str:
    rows = []
    for run in runs.values():
        compared = run.get("compared", {})
        shown = {key: f"{compared[key]:{form}}" for key, form in FORMATS.items() if compared.get(key) is not None}
        names = {key: run[key] for key in ("set", "variant", "verdict")}
        rows.append({**names, "steps": len(run["steps"]), **shown, "note": run.get("note", "")[:80]})
    return format_table(rows, COLUMNS)


def parse_arguments(argv=None):
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--output", type=writable, required=True, help="JSON file, saved again after every run")
    add("--sets", nargs="+", choices=list(SETS), default=list(SETS), help=default)
    add("--variants", nargs="+", help="only these of the sets; the reference is a set's first (default: all)")
    add("--corpus", default="data/stdlib", help=f"of `longspan prepare`, without .bin {default}")
    add("--device", type=device_name, choices=["cuda", "cpu"], default="cuda" if on_gpu else "cpu",
        help=f"cpu: small sizes {default}")  # fmt: skip
    add("--jobs", type=int, help="runs at a time; more than GPUs share them (default: one per 2 GPUs)")
    add("--ranks", type=int, help="of a run whose number is not what a variant is about (default: 2, of some sets 1)")
    add("--limit", type=float, default=600.0, help=f"seconds of a run, from its first step {default}")
    add("--budget", type=float, default=3600.0, help=f"seconds after which all that runs is stopped {default}")
    add("settings", nargs="*", metavar="key=value", help="settings of all runs, after a set's, such as train.steps=20")
    arguments = parser.parse_intermixed_args(argv)
    names = [name for chosen in arguments.sets for name in SETS[chosen].variants]
    for name in set(arguments.variants or ()) - set(names):
        parser.error(f"--variants {name}: these sets have {', '.join(dict.fromkeys(names))}")
    arguments.jobs = arguments.jobs or max(1, torch.cuda.device_count() // 2)
    require_positive(parser, arguments, "jobs", "ranks", "limit", "budget")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
