"""What is measured of one implementation of linear attention, as steps for a process of its own (worker.py)."""

import math
import traceback
from dataclasses import dataclass

import torch

from longspan.benchmarks import linear_cases
from longspan.benchmarks.linear_cases import Problem
from longspan.benchmarks.linear_peers import IMPLEMENTATIONS
from longspan.benchmarks.parallel_tuning import compile_in_parallel
from longspan.benchmarks.worker import captured, describe, launched_kernels, time_calls

ROTATED_BYTES = 256 << 20  # input sets are rotated until they weigh this, several times an L2 cache


@dataclass(frozen=True)
class Step:
    """kind: prepare (compile and tune), check, eager, graph, copy or matmul. direction: forward or forward+backward."""

    by: str
    kind: str
    problem: Problem
    direction: str = "forward+backward"
    seconds: float = 1.0  # of timed repetitions
    seed: int = 0

    def run(self) -> dict:
        if self.by != "longspan" and self.problem.device.type == "cuda":
            compile_in_parallel()
        return KINDS[self.kind](self)


def _prepare(step: Step) -> dict:
    for direction in ("forward", "forward+backward"):
        calls_of(step, direction, 1)[0]()
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
    calls = calls_of(step, step.direction, _num_sets(step.problem))
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
    calls = captured(calls_of(step, step.direction, min(4, _num_sets(step.problem))))
    return time_calls(calls, step.problem.device, step.seconds)


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


def calls_of(step: Step, direction: str, num_sets: int):
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
