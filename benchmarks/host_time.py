"""What a decoder layer takes the host, forward and backward: where sequences are short, that is what it takes at all.

    python -m longspan.benchmarks.host_time --output benchmarks/results/host_time_H200.json
    python -m longspan.benchmarks.host_time --layers llsa --forms longspan --functions 25

On a GPU layers of the size of configs/hybrid-1b.yaml. Without one a small layer of which no kernel is compiled and no
launch does anything: the host's part of the same code. See benchmarks/README.md.
"""

import argparse
import cProfile
import pstats
import sys
import time
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import torch

from longspan.benchmarks.arguments import writable
from longspan.benchmarks.common import format_table, new_record, save
from longspan.benchmarks.pointwise import layer_step, profile
from longspan.benchmarks.pointwise_cases import Sizes, eager_layers
from longspan.benchmarks.worker import describe
from longspan.kernels import operators, softmax
from longspan.launcher.arguments import num_tokens
from longspan.models.config import LAYER_KINDS

REPEATS = 5  # steps in a row: a host that is ahead waits once about a thousand launches are queued
AHEAD = 160_000_000  # cycles that a GPU waits meanwhile


def main() -> int:
    arguments, start = parse_arguments(), time.monotonic()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    small = () if gpu else (128, 2, 64, 192, 100)
    record, steps = new_record("host_time", vars(arguments)) | {"rows": []}, []
    for kind in arguments.layers:
        for tokens in arguments.tokens:
            sizes = Sizes(tokens, *(small or (2048, 16, 128, 5632, 32_000)))
            for form in arguments.forms:
                made_as = "compiled" if form == "compiled" else "longspan"
                row = {"layer": kind, "tokens": tokens, "form": form}
                steps.append((row, layer_step(kind, made_as, tokens, sizes, torch.bfloat16, device)))
    with nullcontext() if gpu else absent_gpu() as launches:
        for row, step in steps:
            with FORMS[row["form"]]():
                try:
                    if time.monotonic() - start > arguments.budget:
                        raise TimeoutError(f"skipped: --budget of {arguments.budget:.0f} s is spent")
                    row |= gpu_times(step, row["form"]) if gpu else host_times(step, launches)
                except Exception as error:  # compilers fail in many ways
                    row["error"] = describe(error)
                if arguments.functions:
                    slowest(step, arguments.functions)
            record["rows"].append(row)
            print(row, flush=True)
            if arguments.output:
                save(record, arguments.output)
    columns = ["layer", "tokens", "form", "launches", "host_ms", "gpu_ms", "ms"]
    shown = [{key: f"{x:.2f}" if isinstance(x, float) else x for key, x in row.items()} for row in record["rows"]]
    print(format_table(shown, columns))
    return int(any("error" in row for row in record["rows"]))


def gpu_times(step, form) -> dict:
    """ms: of a step among many. host_ms: until its last launch is queued, while the GPU is busy. gpu_ms: of kernels."""
    for _ in range(3):
        step()
    if form == "graph":
        step = captured(step)
    torch.cuda.synchronize()
    host, whole = [], []
    for _ in range(3):
        torch.cuda._sleep(AHEAD)
        begin = time.perf_counter()
        for _ in range(REPEATS):
            step()
        host.append((time.perf_counter() - begin) / REPEATS * 1e3)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(REPEATS):
            step()
        torch.cuda.synchronize()
        whole.append((time.perf_counter() - begin) / REPEATS * 1e3)
    found = profile(step)
    gpu_ms = sum(found["parts_ms"].values())
    return {"ms": min(whole), "host_ms": min(host), "gpu_ms": gpu_ms, "launches": found["launches"]}


def captured(step):
    """The step as a CUDA graph: its launches in one."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def host_times(step, launches) -> dict:
    """host_ms: the shortest of many steps, with products of a small layer. launches: those of Triton alone."""
    for _ in range(5):
        step()
    launches.clear()
    step()
    count, times = len(launches), []
    for _ in range(60):
        launches.clear()
        begin = time.thread_time()  # whoever else runs does not count
        step()
        times.append((time.thread_time() - begin) * 1e3)
    return {"host_ms": min(times), "launches": count}


def slowest(step, count):
    """Prints the functions that the host spends most time in."""
    with cProfile.Profile() as found:
        for _ in range(20):
            step()
    pstats.Stats(found).sort_stats("tottime").print_stats(count)


@contextmanager
def as_triton_launches():
    """Operators through torch's registry, and every launch through Triton."""
    from longspan.kernels.launch import Launcher

    with mock.patch.object(operators, "PLAIN", ()), mock.patch.object(Launcher, "__getitem__", _of_triton):
        yield


def _of_triton(launcher, grid):
    return launcher.kernel[grid]


FORMS = {
    "eager": eager_layers,
    "registered": as_triton_launches,
    "longspan": nullcontext,
    "compiled": nullcontext,
    "graph": nullcontext,
}


@contextmanager
def absent_gpu():
    """Tensors on the CPU are taken for those of a Hopper GPU, whose kernels are not compiled and do nothing. Yields a
    list that launches go to, with the arguments of the driver, which is left out."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launches, device = [], torch.device("cuda", 0)

    class Absent(CompiledKernel):
        function, packed_metadata, module = 0, (), None

        def __init__(self, name):
            self.name = name

        @property
        def run(self):
            return lambda *args: launches.append((self.name, args))

        def launch_metadata(self, *_):
            return None

    def compile_nothing(self, key, signature, device, *_):
        kernel = self.device_caches[device][0][key] = Absent(self._fn_name)
        return kernel

    def here(make):
        return lambda *args, device=None, **options: make(*args, **options)

    class Attention:
        name, device_types = "absent", ("cuda",)

        def limits(*_):
            return None

        def missing():
            return None

        def forward(q, k, v, pack, scale):
            return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)

        def backward(d_out, q, k, v, out, lse, pack, scale):
            return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    absent = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32), map_python_to_cpp_type=lambda kind: "int",
    )  # fmt: skip
    with ExitStack() as stack:
        for holder, name, value in [
            (driver, "_active", absent),
            (JITFunction, "_do_compile", compile_nothing),
            (torch.Tensor, "is_cuda", True),
            (torch.Tensor, "device", device),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            (torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(multi_processor_count=132)),
            (softmax, "BACKENDS", {"absent": Attention}),
            *((torch, name, here(getattr(torch, name))) for name in ("zeros", "full", "arange", "eye")),
            (torch, "empty", here(torch.zeros)),  # what no kernel fills may be an index
            (torch, "empty_like", torch.zeros_like),
            (torch.Tensor, "new_empty", torch.Tensor.new_zeros),
        ]:
            stack.enter_context(mock.patch.object(holder, name, value, create=True))
        torch.set_num_threads(1)
        yield launches


def parse_arguments(argv=None):
    on_gpu, default = torch.cuda.is_available(), "(default: %(default)s)"
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    add = parser.add_argument
    kinds = ["softmax", "linear:scalar", "linear:gated_delta", "sla", "llsa"]
    forms = list(FORMS) if on_gpu else ["eager", "registered", "longspan"]
    add("--output", type=writable, help="JSON file, saved again after every measurement")
    add("--layers", nargs="+", choices=LAYER_KINDS, default=kinds, metavar="KIND", help=default)
    add("--forms", nargs="+", choices=forms, default=forms, help=default)
    tokens = [2048, 8192, 32768] if on_gpu else [64]
    add("--tokens", nargs="+", type=num_tokens, default=tokens, help=default)
    add("--functions", type=int, default=0, help="print so many functions that take the host longest")
    add("--budget", type=float, default=120.0, help=f"seconds after which nothing more is started {default}")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
