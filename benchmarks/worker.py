"""Measurements in a process of their own: what one breaks, or hangs in, is lost for nobody else.

`run_steps` starts the process, hands it steps and gives back one result or error text for each. A step is anything that
can be pickled with `run() -> dict`.
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

import torch

from longspan.launcher.clock import Clock

LOST = None  # instead of a result: this process can take no more steps
REPETITION_S = 1e-3  # shorter calls are repeated within one timed repetition


def run_steps(steps: list, *, limit_s: float, deadline: float, go_on: bool = False) -> Iterator[tuple[object, dict]]:
    """Each step with its result, {"error": text} if it failed. One process after another: a step that kills its process
    costs only itself; one that exceeds limit_s ends the rest unless they `go_on`, as time.monotonic() = deadline does.
    """
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
                    if go_on and seconds == limit_s:
                        break
                    yield from ((step, {"error": "skipped: an earlier step ran out of time"}) for step in left)
                    return
                result = receiver.recv()
                if result is LOST:
                    break
                yield left.pop(0), result
        except EOFError:
            process.join()
            yield left.pop(0), {"error": f"its process died with exit code {process.exitcode}"}
        finally:
            process.kill()
            process.join()
            receiver.close()


def prepare_all(batches: list[list], *, limit_s: float) -> None:
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


def captured(calls) -> list:
    """The same calls as replays of CUDA graphs, one for each: no host in the way."""
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
    return [graph.replay for graph in graphs]


def _serve(connection, steps):
    for step in steps:
        try:
            result = step.run()
        except Exception as error:
            traceback.print_exc()
            result = {"error": describe(error)}
        connection.send(result)
        gc.collect()
        if torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception:
                connection.send(LOST)  # the error outlives the step that caused it; a new process takes the rest
                os._exit(1)


def describe(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {' '.join(lines)}"[:600]


def time_calls(calls, device: torch.device, seconds: float, slow_s: float = math.inf) -> dict:
    """Milliseconds of one call: median and quartiles of 20 to 200 repetitions, `calls` taken in turn. A call that takes
    longer than slow_s is repeated 5 times."""
    for call in (*calls, *calls):
        call()
    estimate = _repeat(calls, device, 1, 1)[0]
    if estimate <= slow_s:
        estimate = statistics.median(_repeat(calls, device, len(calls), 3)) / len(calls)
    inner = max(1, min(200, round(REPETITION_S / max(estimate, 1e-7))))
    repetitions = min(200, max(20, int(seconds / max(estimate * inner, 1e-7)))) if estimate <= slow_s else 5
    times = [1e3 * second / inner for second in _repeat(calls, device, inner, repetitions)]
    quartiles = statistics.quantiles(times, n=4)
    return {"ms": quartiles[1], "quartiles_ms": [quartiles[0], quartiles[2]], "repetitions": repetitions}


def _repeat(calls, device, inner: int, repetitions: int) -> list[float]:
    """Seconds of each repetition, `inner` calls long."""
    clock, turn, begins, ends = Clock(device), 0, [], []
    for _ in range(repetitions):
        begins.append(clock.mark())
        for _ in range(inner):
            calls[turn % len(calls)]()
            turn += 1
        ends.append(clock.mark())
    return list(map(clock.seconds, begins, ends))


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
