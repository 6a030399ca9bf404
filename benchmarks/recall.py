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
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch

from longspan.benchmarks.common import device_name, new_record, require_positive, save
from longspan.benchmarks.recall_report import join, load, write_report
from longspan.benchmarks.recall_task import Run, Task, train

FAMILIES = ("none", "fixed", "scalar", "gla", "hgrn2", "delta", "gated_delta")
HYBRIDS = tuple(f"{family}-{ratio}" for family in ("fixed", "hgrn2", "gated_delta") for ratio in ("7:1", "3:1"))
MODELS = (*FAMILIES, *HYBRIDS, "softmax")
QUICK = {
    "models": ["fixed", "gated_delta", "softmax"],
    "pairs": [4, 8, 16],
    "tokens": 1024,
    "num_keys": 64,
    "num_values": 64,
    "layers": 2,
    "hidden": 64,
    "heads": 2,
    "steps": 600,
    "learning_rates": [3e-3],
    "evaluation_batches": 2,
}
STATUS_S = 5.0  # between two lines of progress


def main() -> int:
    arguments = parse_arguments()
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


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--output", metavar="DIR", help="where results.json, recall.md and recall.svg go")
    parser.add_argument(
        "--plot",
        metavar="RESULTS",
        nargs="+",
        help="only draw table and plot of a results.json again, beside it; several are joined into --output",
    )
    parser.add_argument("--models", nargs="+", default=MODELS, help=f"families, FAMILY-7:1 and the like: {MODELS}")
    parser.add_argument("--pairs", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128], help="pairs per document")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per batch of each number of pairs")
    parser.add_argument("--num-keys", type=int, default=256)
    parser.add_argument("--num-values", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=128, help="width of the residual stream")
    parser.add_argument("--heads", type=int, default=4, help="of hidden / heads dimensions, in every layer")
    parser.add_argument(
        "--conv-width", type=int, default=4, help="short convolution of linear layers; 0: none, -1: the family's"
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument(
        "--learning-rates", type=float, nargs="+", default=[2e-3], help="of several, validation picks the model's"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights and training batches")
    parser.add_argument("--evaluation-batches", type=int, default=8)
    parser.add_argument("--device", type=device_name, choices=["cuda", "cpu"], default="cuda" if on_gpu else "cpu")
    parser.add_argument("--jobs", type=int, help="runs at a time; default: 1 on CPU, on a GPU one per CPU core")
    parser.add_argument("--no-graphs", action="store_true", help="on a GPU, do without CUDA graphs")
    parser.add_argument("--time-limit", type=float, help="seconds after which what still runs is stopped")
    parser.add_argument("--quick", action="store_true", help=f"minutes on a CPU; other defaults: {QUICK}")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**QUICK)
    arguments = parser.parse_args(argv)
    if not arguments.output and len(arguments.plot or ()) != 1:
        parser.error("give --output DIR, or --plot RESULTS of one file, or both for several")
    require_positive(
        parser, arguments, "layers", "hidden", "heads", "steps", "evaluation_batches", "jobs", "num_keys", "num_values"
    )
    if arguments.jobs is None:
        arguments.jobs = (os.cpu_count() or 1) if arguments.device == "cuda" else 1
    try:
        make_runs(arguments)
    except ValueError as error:
        parser.error(str(error))
    return arguments


if __name__ == "__main__":
    sys.exit(main())
