"""One rank of a system of training_systems.py: a few steps at every length, a row of JSON after each.

training_peers.py starts the ranks.
"""

import argparse
import json
import os
import resource
import statistics
import time

import torch
import torch.distributed as dist

from longspan.benchmarks.parallel_tuning import compile_in_parallel
from longspan.benchmarks.ranks import join
from longspan.benchmarks.training_systems import SYSTEMS
from longspan.benchmarks.worker import describe
from longspan.launcher.files import strict_json
from longspan.models.config import ModelConfig


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--system", choices=list(SYSTEMS), required=True)
    parser.add_argument("--model", type=json.loads, required=True, help="settings of the model, JSON")
    parser.add_argument("--runs", type=json.loads, required=True, help="[[tokens, steps], ...], JSON")
    parser.add_argument("--device", required=True)
    parser.add_argument("--output", required=True, help="file to which rows are added")
    arguments = parser.parse_args()
    mesh = join(arguments.device, timeout_s=600.0)
    device = mesh.device
    if device.type == "cuda":
        compile_in_parallel()
    config = ModelConfig(**arguments.model)
    system, tokens = SYSTEMS[arguments.system](config, device), None
    for tokens, steps in arguments.runs:
        try:
            row = run(system, config, tokens, steps, device)
        except Exception as error:
            report({"tokens": tokens, "error": describe(error)}, arguments.output)
            os._exit(1)  # other ranks may wait for this one for ever
        if mesh.is_main:
            report(row, arguments.output)
    dist.destroy_process_group()


def run(system, config, tokens: int, steps: int, device) -> dict:
    """The median step but the first, which compiles; the last loss; the peak of the rank that needs most."""
    generator, seconds = torch.Generator().manual_seed(0), []
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(steps):
        stream = torch.randint(config.vocab_size, (1, tokens + 1), generator=generator).to(device)
        dist.barrier()
        begin = time.perf_counter()
        loss = system.step(stream[:, :-1].contiguous(), stream[:, 1:].contiguous())  # waits for the device
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    peak = torch.tensor(_peak_memory(device), dtype=torch.float64, device=device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    timed = seconds[1:] or seconds
    return {"tokens": tokens, "step_s": statistics.median(timed), "steps_s": seconds, "loss": loss,
            "peak_GiB": peak.item() / 2**30, "settings": system.settings}  # fmt: skip


def _peak_memory(device) -> float:
    """Bytes allocated by torch on a GPU, resident in the process otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(row: dict, path: str):
    with open(path, "a") as file:
        file.write(strict_json(row) + "\n")


if __name__ == "__main__":
    main()
