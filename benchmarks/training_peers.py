"""Training steps of one model by longspan and by other systems on the GPUs of this machine: tokens per second and MFU.

    python -m longspan.benchmarks.training_peers --output benchmarks/results/training_peers_4xH200.json

Every system runs in processes of its own, longspan through launcher/train.py. See benchmarks/README.md.
"""

import argparse
import importlib.util
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from longspan.benchmarks.arguments import device_name, require_positive, writable
from longspan.benchmarks.common import format_table, new_record, save
from longspan.launcher import train
from longspan.launcher.arguments import num_tokens
from longspan.launcher.corpus import prepare
from longspan.launcher.files import strict_json
from longspan.launcher.metrics import peak_tflops
from longspan.models.config import ModelConfig
from longspan.models.flops import model_flops, num_parameters

# A decoder of 0.95 B parameters.
MODEL = {"vocab_size": 32000, "num_layers": 16, "hidden_size": 2048, "num_heads": 16, "mlp_size": 5632}
COLUMNS = ["system", "gpus", "tokens", "step s", "tokens/s/GPU", "MFU %", "peak GiB", "note"]
SHARE = 1 << 20  # tokens that the steps of one length take together, about


SOFTMAX, LINEAR = ("softmax",), ("linear:fixed",)


@dataclass(frozen=True)
class System:
    """pattern: the layers of its model, in turn. worker: its name in training_systems.py, None: longspan itself.
    package: what must be importable. alone: it uses one GPU. settings: others of a longspan run."""

    pattern: tuple[str, ...]
    worker: str | None = None
    package: str = "longspan"
    alone: bool = False
    settings: dict = field(default_factory=dict)

    def missing(self) -> str | None:
        found = importlib.util.find_spec(self.package)
        return None if found else f"the package {self.package} is not installed"


SYSTEMS = {
    "longspan": System(SOFTMAX),
    "longspan_hybrid": System((*LINEAR * 3, *SOFTMAX)),
    "torch_cp": System(SOFTMAX, "torch_cp", "torch"),
    "deepspeed_ulysses": System(SOFTMAX, "deepspeed_ulysses", "deepspeed"),
    "longspan_linear": System(LINEAR, alone=True),
    "longspan_cudnn": System(SOFTMAX, settings={"parallel": {"backend": "cudnn"}}),
    "fla_linear": System(LINEAR, "fla", "fla", alone=True),
}

DEFAULT = [name for name in SYSTEMS if name != "longspan_cudnn"]


def main(argv=None) -> int:
    arguments = parse_arguments(argv)
    start, failed = time.monotonic(), False
    deadline = start + arguments.budget
    record = new_record("training_peers", vars(arguments)) | {"rows": [], "not_measured": {}}
    for name in arguments.systems:
        system = SYSTEMS[name]
        missing = system.missing()
        if missing:
            record["not_measured"][name] = missing
            print(f"{name} is not measured: {missing}", flush=True)
            continue
        model = arguments.model | {"pattern": list(system.pattern)}
        tokens = arguments.linear_tokens if system.alone else arguments.tokens
        runs = [(n, arguments.steps or max(2, min(5, SHARE // n))) for n in sorted(tokens)]
        gpus = 1 if system.alone else arguments.gpus
        for row in measure(system, model, runs, gpus, arguments, deadline):
            row = {"system": name, "gpus": gpus} | complete(row, model, gpus, arguments.device)
            failed |= "error" in row and system.worker is None
            record["rows"].append(row)
            print(strict_json(row), flush=True)
            if arguments.output:
                save(record | {"seconds": time.monotonic() - start}, arguments.output)
    if arguments.output:
        save(record | {"seconds": time.monotonic() - start}, arguments.output)
    print("\n" + table(record["rows"]))
    return int(failed)


def measure(system: System, model: dict, runs, gpus: int, arguments, deadline: float) -> Iterator[dict]:
    """A row for every run, with what was measured or an error."""
    left, error = list(runs), None
    with tempfile.TemporaryDirectory(prefix="longspan-training-") as folder:
        while left and error is None:
            together = left[:1] if system.worker is None else left[:]
            if system.worker is None:
                command, read = ours(system, model, *left[0], arguments.device, Path(folder))
            else:
                command, read = theirs(system.worker, model, left, arguments.device, Path(folder))
            limit = min(deadline - time.monotonic(), arguments.limit * len(together))
            ranks, found = Ranks(command, gpus, Path(folder)), 0
            for row in ranks.rows(read, len(together), after(limit)):
                yield row
                left.pop(0)
                found += 1
                if "error" in row:
                    error = "skipped: a shorter sequence failed"
            if found < len(together) and error is None:
                yield {"tokens": left.pop(0)[0], "error": ranks.reason}
                error = "skipped: a shorter sequence failed"
    yield from ({"tokens": tokens, "error": error} for tokens, _ in left)


def ours(system: System, model: dict, tokens: int, steps: int, device: str, folder: Path):
    """launcher/train.py on a corpus of one document that is a step longer than what is read."""
    text, run = folder / f"text-{tokens}.txt", folder / f"run-{tokens}"
    text.write_text("".join(random.Random(0).choices("abcdefgh ", k=tokens * (steps + 1))))
    prepare([text], folder / f"corpus-{tokens}", progress=lambda line: None)
    config = {
        "run": {"dir": str(run), "device": device},
        "model": model,
        "data": {"corpora": [{"path": str(folder / f"corpus-{tokens}")}], "seq_len": tokens},
        "train": {
            "steps": steps,
            "dtype": "bfloat16" if device == "cuda" else "float32",
            "checkpointing": "full",
        },
        "checkpoint": {"resume": "none"},
        "log": {"interval": 1, "tensorboard": False},
        **system.settings,
    }
    path = folder / f"config-{tokens}.yaml"
    path.write_text(yaml.safe_dump(config))

    def read():
        rows = read_lines(run / "metrics.jsonl")
        if len(rows) < steps:
            return []
        seconds = [row["step_time_s"] for row in rows]
        found = {"tokens": tokens, "step_s": statistics.median(seconds[1:] or seconds), "steps_s": seconds}
        found |= {"loss": rows[-1]["loss"], "peak_GiB": rows[-1]["peak_mem_gb"], "mfu_reported": rows[-1]["mfu"]}
        assert rows[-1]["tokens"] == tokens, rows[-1]
        return [found | {"settings": f"launcher/train.py, {config['train']}, {system.settings}"}]

    return [sys.executable, train.__file__, "--config", str(path)], read


def theirs(worker: str, model: dict, runs, device: str, folder: Path):
    output = folder / f"{worker}.jsonl"
    command = [sys.executable, "-m", "longspan.benchmarks.training_worker", "--system", worker]
    command += ["--model", json.dumps(model), "--runs", json.dumps(runs), "--device", device, "--output", str(output)]
    return command, lambda: read_lines(output)


class Ranks:
    """Processes with torchrun's environment, ended with the last row, the first failure or the time limit; `reason`:
    why there are no more rows."""

    def __init__(self, command: list[str], count: int, folder: Path, environment: dict[str, str] | None = None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log, self.processes, self.reason = folder / "log.txt", [], None
        with open(self.log, "w") as log:
            for rank in range(count):
                places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
                places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                own = (
                    {"OMP_NUM_THREADS": "1"} | os.environ | (environment or {}) | {k: str(v) for k, v in places.items()}
                )
                options = {"stdout": log, "stderr": subprocess.STDOUT, "env": own}
                self.processes.append(subprocess.Popen(command, **options))

    def rows(self, read, count: int, over: Callable[[], str | None]) -> Iterator[dict]:
        """What `read` returns, row by row as it grows, up to `count`, until `over` has a reason to end."""
        given = 0
        try:
            while given < count:
                ended = [process.poll() for process in self.processes]
                found = read()
                for row in found[given:]:
                    yield row
                given = max(given, len(found))
                if any(ended) or None not in ended:
                    self.reason = f"a rank ended: {self._last_words()}"
                    return
                if reason := over():
                    self.reason = reason
                    return
                time.sleep(0.2)
        finally:
            for process in self.processes:
                process.kill()
            for process in self.processes:
                process.wait()

    def _last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        named = [line for line in lines if "Error" in line]
        return (named or lines or ["nothing was said"])[-1][:300]


def after(limit_s: float) -> Callable[[], str | None]:
    """For `Ranks.rows`: over `limit_s` seconds from now."""
    deadline = time.monotonic() + limit_s
    return lambda: f"took longer than {limit_s:.0f} s" if time.monotonic() > deadline else None


def complete(row: dict, model: dict, gpus: int, device: str) -> dict:
    """Adds tokens per second and GPU, and MFU by longspan's count of FLOPs, the same for all systems."""
    if "step_s" not in row:
        return row
    config, rate = ModelConfig(**model), peak_tflops(torch.device(device))
    per_gpu = 1 / (row["step_s"] * gpus)
    flops = model_flops(config, (row["tokens"],))
    found = {"tokens_per_s_per_gpu": row["tokens"] * per_gpu, "tflops_per_gpu": flops * per_gpu / 1e12}
    found["mfu"] = found["tflops_per_gpu"] / rate if rate else None
    return row | found | {"parameters": num_parameters(config)}


def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        line = {
            "system": row["system"],
            "gpus": row["gpus"],
            "tokens": row["tokens"],
            "note": row.get("error", "")[:80],
        }
        if "step_s" in row:
            line |= {"step s": f"{row['step_s']:.3f}", "tokens/s/GPU": f"{row['tokens_per_s_per_gpu']:,.0f}"}
            line |= {"peak GiB": row["peak_GiB"], "MFU %": row["mfu"] and 100 * row["mfu"]}
        lines.append(line)
    return format_table(lines, COLUMNS)


def read_lines(path: Path) -> list[dict]:
    """Whole lines of a file that is being written."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def parse_arguments(argv=None):
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--output", type=writable, help="JSON file, saved again after every row")
    add("--systems", nargs="+", choices=list(SYSTEMS), default=DEFAULT, help=default)
    add("--tokens", nargs="+", type=num_tokens, default=[1 << 17, 1 << 18, 1 << 19], help=f"of a step {default}")
    add("--linear-tokens", nargs="+", type=num_tokens, default=[1 << 15, 1 << 17], help=f"on one GPU {default}")
    add("--gpus", type=int, default=torch.cuda.device_count() if on_gpu else 2, help=f"or ranks {default}")
    add("--model", type=json.loads, default=MODEL, help=f"settings of the model, JSON {default}")
    add("--steps", type=int, default=0, help="of a length, the first not timed; 0: 2 to 5, about 1M tokens in all")
    add("--device", type=device_name, choices=["cuda", "cpu"], default="cuda" if on_gpu else "cpu")
    add("--limit", type=float, default=240.0, help=f"seconds of a system for a length, compiling included {default}")
    add("--budget", type=float, default=560.0, help=f"seconds after which nothing is started {default}")
    arguments = parser.parse_args(argv)
    require_positive(parser, arguments, "gpus", "limit", "budget")
    if arguments.steps < 0:
        parser.error(f"--steps {arguments.steps} must be 0 or more")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
