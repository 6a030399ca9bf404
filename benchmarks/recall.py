"""Multi-query associative recall by linear models, hybrids and softmax attention, trained small, side by side.

    python -m longspan.benchmarks.recall --output benchmarks/results/recall
    python -m longspan.benchmarks.recall --quick --output /tmp/recall
    python -m longspan.benchmarks.recall --plot benchmarks/results/recall/results.json

See benchmarks/README.md for the task and for what is written.
"""

import argparse
import itertools
import multiprocessing
import multiprocessing.connection
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch

from longspan.benchmarks.arguments import parse_recall
from longspan.benchmarks.common import new_record, save
from longspan.benchmarks.recall_report import join, load, write_report
from longspan.benchmarks.recall_task import Run, Task, train

STATUS_S = 5.0  # between two lines of progress


def main(arguments: argparse.Namespace | None = None) -> int:
    arguments = arguments or parse_recall()
    if arguments.plot:
        return report(arguments.plot, arguments.output)
    runs = make_runs(arguments)
    folder = Path(arguments.output)
    record = new_record("recall", vars(arguments)) | {"runs": []}

    def note(run: Run, result: dict):
        labels = {"model": run.model, "learning_rate": run.learning_rate, "seed": run.seed}
        record["runs"].append(labels | {"layers": list(run.config.layer_kinds)} | result)
        save(record, folder / "results.json")

    train_all(runs, note, jobs=arguments.jobs, limit_s=arguments.time_limit, batches=arguments.evaluation_batches)
    print(write_report(record, folder))
    return int(any("error" in row for row in record["runs"]))


def report(paths: list[str], output: str | None) -> int:
    """Table and plot of one results.json, beside it, or of several that are joined into the folder `output`."""
    folder = Path(output or Path(paths[0]).parent)
    try:
        record = join([load(path) for path in paths])
    except (OSError, ValueError) as error:
        print(f"--plot: {error}", file=sys.stderr)
        return 2
    if output:
        save(record, folder / "results.json")
    print(write_report(record, folder))
    return 0


def make_runs(arguments) -> list[Run]:
    """Every model with every seed and learning rate; first seed and rate of all models first. ValueError if one cannot
    be run."""
    task = Task(tuple(arguments.pairs), arguments.tokens, arguments.num_keys, arguments.num_values)
    runs = [
        Run(
            model=model,
            learning_rate=rate,
            seed=seed,
            task=task,
            steps=arguments.steps,
            num_layers=arguments.layers,
            hidden_size=arguments.hidden,
            num_heads=arguments.heads,
            conv_width=arguments.conv_width,
            device=arguments.device,
            graphs=not arguments.no_graphs,
        )
        for seed, rate, model in itertools.product(arguments.seeds, arguments.learning_rates, arguments.models)
    ]
    for run in runs:
        run.validate()
    return list(dict.fromkeys(runs))


def train_all(runs: list[Run], note, *, jobs: int, limit_s: float | None, batches: int) -> None:
    """Trains each run in a process of its own, `jobs` at a time; note(run, result) as they finish, {"error": text} for
    those that fail or are not done after limit_s seconds."""
    context, began = multiprocessing.get_context("spawn"), time.monotonic()
    waiting, running, progress = list(runs), {}, Progress(runs)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_serve, args=(sender, run, batches), daemon=True)
                process.start()
                sender.close()
                running[receiver] = run, process
            for receiver in multiprocessing.connection.wait(list(running), timeout=1.0):
                run, process = running[receiver]
                try:
                    message = receiver.recv()
                except EOFError:
                    process.join()
                    message = {"error": f"its process died with exit code {process.exitcode}"}
                if isinstance(message, int):
                    progress.steps[run] = message
                    continue
                del running[receiver]
                process.join()
                note(run, message)
                progress.done(run, message)
            progress.show(running.values())
            if limit_s is not None and time.monotonic() - began > limit_s:
                for run in [*(run for run, _ in running.values()), *waiting]:
                    step = progress.steps[run]
                    message = {"error": f"stopped after {step} of {run.steps} steps: --time-limit {limit_s:.0f} s"}
                    note(run, message)
                    progress.done(run, message)
                return
    finally:
        for _, process in running.values():
            process.kill()
            process.join()


def _serve(connection, run: Run, batches: int):
    """In the process of one run: sends steps done, then the result."""
    if run.device == "cpu":
        torch.set_num_threads(1)  # tensors are small: more models at a time, not more threads
    try:
        result = train(run, evaluation_batches=batches, report=connection.send)
    except Exception as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]}
    connection.send(result)


class Progress:
    """Prints a line for every run that ends, and every few seconds how far all are."""

    def __init__(self, runs: list[Run]):
        self.steps, self.total = dict.fromkeys(runs, 0), sum(run.steps for run in runs)
        self.finished, self.shown, self.first = 0, time.monotonic(), None

    def done(self, run: Run, result: dict):
        self.finished += 1
        self.steps[run] = run.steps
        shares = ", ".join(f"{pairs}: {share:.1%}" for pairs, share in result.get("accuracy", {}).items())
        shown = result.get("error") or f"{shares} ({result['seconds']:.0f} s)"
        print(f"[{self.finished}/{len(self.steps)}] {_name(run)}: {shown}", flush=True)

    def show(self, running):
        now, done = time.monotonic(), sum(self.steps.values())
        if now - self.shown < STATUS_S or not running:
            return
        self.shown = now
        if done and self.first is None:
            self.first = now, done  # before that processes start and kernels compile
        eta = "?"
        if self.first and done > self.first[1]:
            rate = (done - self.first[1]) / (now - self.first[0])
            eta = timedelta(seconds=round((self.total - done) / rate))
        steps = [self.steps[run] for run, _ in running]
        names = ", ".join(dict.fromkeys(run.model for run, _ in running))
        print(f"{done / self.total:4.0%} | eta {eta} | step {min(steps)} to {max(steps)} | {names}", flush=True)


def _name(run: Run) -> str:
    return f"{run.model} lr {run.learning_rate:g} seed {run.seed}"


if __name__ == "__main__":
    sys.exit(main())
