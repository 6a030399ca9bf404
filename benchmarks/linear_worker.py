"""Measurements of one implementation in a process of its own: what it breaks, or hangs in, is lost for nobody else.

`run_steps` starts the process, hands it steps and gives back one result or error text for each.
"""

import gc
import math
import multiprocessing
import os
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from longspan.benchmarks import linear_cases
from longspan.benchmarks.linear_cases import Problem
from longspan.benchmarks.linear_peers import IMPLEMENTATIONS
from longspan.benchmarks.parallel_tuning import compile_in_parallel

ROTATED_BYTES = 256 << 20  # input sets are rotated until they weigh this, several times an L2 cache
REPETITION_S = 1e-3  # shorter calls are repeated within one timed repetition


@dataclass(frozen=True)
class Step:
    """kind: prepare (compile and tune), check, eager, graph, copy or matmul. direction: forward or forward+backward."""

    by: str
    kind: str
    problem: Problem
    direction: str = "forward+backward"
    seconds: float = 1.0  # of timed repetitions
    seed: int = 0


def run_steps(steps: list[Step], *, limit_s: float, deadline: float) -> Iterator[tuple[Step, dict]]:
    """Each step with its result, {"error": text} if it failed. One process after another: a step that kills its process
    costs only itself; one that exceeds limit_s, or time.monotonic() = deadline, ends the rest."""
    context, left = multiprocessing.get_context("spawn"), list(steps)
    while left:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(sender, left), daemon=True)
        process.start()
        sender.close()
        try:
            while left:
                seconds = min(limit_s, deadline - time.monotonic())
                if not receiver.poll(max(0.0, seconds)):
                    late = "the limit of one step" if seconds == limit_s else "what is left of --budget"
                    yield left.pop(0), {"error": f"took longer than {seconds:.0f} s, {late}"}
                    yield from ((step, {"error": "skipped: an earlier step ran out of time"}) for step in left)
                    return
                yield left.pop(0), receiver.recv()
        except EOFError:
            process.join()
            yield left.pop(0), {"error": f"its process died with exit code {process.exitcode}"}
        finally:
            process.kill()
            process.join()
            receiver.close()


def prepare_all(batches: list[list[Step]], *, limit_s: float) -> None:
    """Runs batches of steps at the same time, each in its own process, and forgets the results: what is wanted is what
    compilers leave in their caches on disk. Processes that are not done in time are ended."""
    context, running = multiprocessing.get_context("spawn"), []
    for steps in batches:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(sender, steps), daemon=True)
        process.start()
        sender.close()
        running.append((process, receiver))
    deadline = time.monotonic() + limit_s
    for process, _ in running:
        process.join(max(0.0, deadline - time.monotonic()))
    for process, receiver in running:
        process.kill()
        process.join()
        receiver.close()


def _serve(connection, steps):
    if any(step.by != "longspan" and step.problem.device.type == "cuda" for step in steps):
        compile_in_parallel()
    for step in steps:
        try:
            result = KINDS[step.kind](step)
        except Exception as error:
            traceback.print_exc()
            result = {"error": describe(error)}
        connection.send(result)
        gc.collect()
        if step.problem.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception:
                os._exit(1)  # a CUDA error outlives the step that caused it; a new process takes the rest


def describe(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {' '.join(lines)}"[:600]


def _prepare(step: Step) -> dict:
    for direction in ("forward", "forward+backward"):
        _calls(step, direction, 1)[0]()
    return {}


def _check(step: Step) -> dict:
    """Relative errors against fp64; a backward that fails leaves those of the forward."""
    implementation, inputs = IMPLEMENTATIONS[step.by], step.problem.random(step.seed)
    expected = linear_cases.exact(inputs)
    prepared = implementation.prepare(inputs)
    prepared.leaves()
    out = implementation.make(step.problem)(prepared)
    errors = {"out": linear_cases.relative_error(out.detach(), expected["out"])}
    try:
        for name, gradient in linear_cases.gradients(out, prepared).items():
            errors[name] = linear_cases.relative_error(gradient, expected[name])
    except Exception as error:
        traceback.print_exc()
        return {"errors": errors, "error": describe(error)}
    return {"errors": errors}


def _eager(step: Step) -> dict:
    calls = _calls(step, step.direction, _num_sets(step.problem))
    result = time_calls(calls, step.problem.device, step.seconds)
    if step.problem.device.type == "cuda":
        try:
            result["kernels"] = launched_kernels(calls[0])
            result["launches"] = sum(kernel["count"] for kernel in result["kernels"])
        except RuntimeError as error:
            result["profile_error"] = describe(error)
    return result


def _graph(step: Step) -> dict:
    """The same calls inside CUDA graphs, one for each input set: no host in the way."""
    calls = _calls(step, step.direction, min(4, _num_sets(step.problem)))
    side, graphs = torch.cuda.Stream(), []
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    for call in calls:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], pool=graphs[0].pool() if len(graphs) > 1 else None):
            call()
    return time_calls([graph.replay for graph in graphs], step.problem.device, step.seconds)


def _copy(step: Step) -> dict:
    size = (1 << 30) if step.problem.device.type == "cuda" else (1 << 22)
    source = torch.randn(size, device=step.problem.device, dtype=torch.float32)
    target = torch.empty_like(source)
    seconds = time_calls([lambda: target.copy_(source)], step.problem.device, step.seconds)["ms"] / 1e3
    return {"TB/s": 8 * size / seconds / 1e12}


def _matmul(step: Step) -> dict:
    size = 8192 if step.problem.device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=step.problem.device, dtype=step.problem.dtype) for _ in range(2))
    seconds = time_calls([lambda: a @ b], step.problem.device, step.seconds)["ms"] / 1e3
    return {"TFLOP/s": 2 * size**3 / seconds / 1e12}


KINDS = {"prepare": _prepare, "check": _check, "eager": _eager, "graph": _graph, "copy": _copy, "matmul": _matmul}


def _num_sets(problem: Problem) -> int:
    size = 4 * problem.token_heads * problem.head_dim * problem.dtype.itemsize
    return min(16, max(2 if size < 8 * ROTATED_BYTES else 1, math.ceil(ROTATED_BYTES / size)))


def _calls(step: Step, direction: str, num_sets: int):
    """One call for each of several input sets."""
    implementation = IMPLEMENTATIONS[step.by]
    attend = implementation.make(step.problem)
    sets = [implementation.prepare(step.problem.random(step.seed + n)) for n in range(num_sets)]

    def forward(inputs):
        with torch.no_grad():
            attend(inputs)

    def forward_backward(inputs):
        linear_cases.gradients(attend(inputs), inputs)

    function = forward if direction == "forward" else forward_backward
    for inputs in sets:
        inputs.leaves()
    return [lambda inputs=inputs: function(inputs) for inputs in sets]


def time_calls(calls, device: torch.device, seconds: float) -> dict:
    """Milliseconds of one call: median and quartiles of 20 to 200 repetitions, `calls` taken in turn."""
    for call in (*calls, *calls):
        call()
    estimate = statistics.median(_repeat(calls, device, len(calls), 3)) / len(calls)
    inner = max(1, min(200, round(REPETITION_S / max(estimate, 1e-7))))
    repetitions = min(200, max(20, int(seconds / max(estimate * inner, 1e-7))))
    times = [1e3 * second / inner for second in _repeat(calls, device, inner, repetitions)]
    quartiles = statistics.quantiles(times, n=4)
    return {"ms": quartiles[1], "quartiles_ms": [quartiles[0], quartiles[2]], "repetitions": repetitions}


def _repeat(calls, device, inner: int, repetitions: int) -> list[float]:
    """Seconds of each repetition, `inner` calls long."""
    turn, marks = 0, []
    on_gpu = device.type == "cuda"

    def mark():
        if on_gpu:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())

    for _ in range(repetitions):
        mark()
        for _ in range(inner):
            calls[turn % len(calls)]()
            turn += 1
        mark()
    if not on_gpu:
        return [stop - start for start, stop in zip(marks[::2], marks[1::2], strict=True)]
    torch.cuda.synchronize(device)
    return [start.elapsed_time(stop) / 1e3 for start, stop in zip(marks[::2], marks[1::2], strict=True)]


def launched_kernels(call) -> list[dict]:
    """What one call runs on the GPU, copies and fills included: name, count and microseconds, longest first."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    count, total = Counter(), Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            count[event.name] += 1
            total[event.name] += event.time_range.elapsed_us()
    return [{"name": name[:100], "count": count[name], "us": round(us, 1)} for name, us in total.most_common()]
