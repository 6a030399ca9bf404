"""Causal softmax attention over several GPUs, forward and backward: longspan, torch's context_parallel, one GPU alone.

    torchrun --nproc-per-node 4 benchmarks/ring_attention.py --output benchmarks/results/ring_attention.json
    torchrun --nproc-per-node 2 benchmarks/ring_attention.py --device cpu --lengths 512 --heads 2 --head-dim 16

Gradients are checked against fp64 at a small size first. See benchmarks/README.md for what the columns mean.
"""

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from longspan.attention import softmax_attention
from longspan.benchmarks.arguments import parse_ring_attention
from longspan.benchmarks.common import Traffic, format_table, measure, new_record, save
from longspan.benchmarks.ranks import join
from longspan.kernels.softmax import BACKENDS, Pack, refusal
from longspan.kernels.softmax import math as math_backend
from longspan.parallel import zigzag
from longspan.parallel.context import SequenceParallel
from longspan.parallel.mesh import communicator_options

COLUMNS = [
    "name",
    "tokens",
    "gpus",
    "fwd ms",
    "fwd+bwd ms",
    "fwd TFLOP/s",
    "fwd+bwd TFLOP/s",
    "received GiB",
    "peak GB",
]
SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
# Slowest rate expected of anything here, TFLOP/s per GPU: says whether a case still fits in the time limit.
SLOWEST_RATE = 250e12


@dataclass(frozen=True)
class Problem:
    """One causal attention; q [T, heads, D], k and v [T, kv_heads, D] with T rows on this rank."""

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def forward_flops(self) -> float:
        return 4 * self.tokens**2 * self.heads * self.head_dim / 2

    def random(self, num_rows: int, seed: int) -> list[torch.Tensor]:
        """q, k, v, dout."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return [
            torch.randn(num_rows, heads, self.head_dim, generator=generator, dtype=self.dtype, device=self.device)
            for heads in (self.heads, self.kv_heads, self.kv_heads, self.heads)
        ]


@dataclass(frozen=True)
class Case:
    """`attend(problem, stack)` gives a differentiable function (q, k, v) -> out on this rank's zig-zag rows, or on all
    rows when `alone`; what must stay open while it runs is entered on `stack`."""

    name: str
    attend: Callable
    alone: bool = False
    heads_first: bool = False  # inputs lie in memory as [H, T, D], the layout of scaled_dot_product_attention
    longest: int | None = None  # tokens beyond which this case is not worth its time


def longspan_case(strategy: str, backend: str, key_blocks: int) -> Case:
    def attend(problem, stack):
        parallel = SequenceParallel(
            group_of(problem.device, key_blocks),
            layout="zigzag",
            softmax=strategy,
            backend=backend,
            device=problem.device,
        )
        seq = parallel.context((problem.tokens,))
        return lambda q, k, v: softmax_attention(q, k, v, seq=seq)

    name = f"longspan {strategy} {backend}" + (f" {key_blocks} blocks" if key_blocks else "")
    return Case(name, attend, longest=1 << 18 if backend == "flash" else None)


@cache
def group_of(device: torch.device, key_blocks: int):
    """All ranks, over a communicator of at most so many thread blocks, 0 for NCCL's own choice."""
    group = dist.new_group(**communicator_options(device, key_blocks))
    dist.all_reduce(torch.zeros(1, device=device), group=group)  # now, with all ranks
    return group


def longspan_alone_case(backend: str) -> Case:
    def attend(problem, stack):
        seq = SequenceParallel(backend=backend, device=problem.device).context((problem.tokens,))
        return lambda q, k, v: softmax_attention(q, k, v, seq=seq)

    return Case(f"longspan one rank {backend}", attend, alone=True, longest=1 << 17)


def library_alone_case(backend: str) -> Case:
    """The bare library on one GPU: what the sequence-parallel rates are measured by."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, pack, scale):
            out, lse = BACKENDS[backend].forward(q, k, v, pack, scale)
            ctx.save_for_backward(q, k, v, out, lse)
            ctx.pack, ctx.scale = pack, scale
            return out

        @staticmethod
        def backward(ctx, dout):
            gradients = BACKENDS[backend].backward(dout, *ctx.saved_tensors, ctx.pack, ctx.scale)
            return *gradients, None, None

    def attend(problem, stack):
        pack = Pack((0, problem.tokens), (0, problem.tokens), True)
        return lambda q, k, v: Attention.apply(q, k, v, pack, problem.head_dim**-0.5)

    return Case(f"library alone {backend}", attend, alone=True, longest=1 << 17)


def torch_case(backend: str, rotation: str) -> Case:
    """torch's context_parallel with its own head-tail load balance, which places tokens as zigzag does."""

    def attend(problem, stack):
        from torch.distributed.tensor.experimental import context_parallel
        from torch.distributed.tensor.experimental._attention import set_rotate_method

        set_rotate_method(rotation)
        mesh = init_device_mesh(problem.device.type, (dist.get_world_size(),))
        positions = torch.arange(problem.tokens, device=problem.device)
        stack.enter_context(sdpa_kernel(SDPA[backend]))
        # It shards the buffers it is given and patches scaled_dot_product_attention for tensors sharded alike.
        stack.enter_context(
            context_parallel(mesh, buffers=[positions], buffer_seq_dims=[0], no_restore_buffers={positions})
        )

        def attention(q, k, v):
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            gqa = problem.heads != problem.kv_heads
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)[0].transpose(0, 1)

        return attention

    name = f"torch context_parallel {rotation} {backend}"
    longest = 1 << 18 if backend == "flash" or rotation == "alltoall" else None
    return Case(name, attend, heads_first=True, longest=longest)


def local_rows(problem: Problem) -> torch.Tensor:
    layout = zigzag((problem.tokens,), dist.get_world_size())
    return torch.from_numpy(layout.global_indices(dist.get_rank())).to(problem.device)


def check(case: Case, problem: Problem) -> dict[str, float]:
    """Relative error of out, dq, dk and dv against fp64, over the rows of all ranks."""
    whole = problem.random(problem.tokens, seed=0)
    pack, scale = Pack((0, problem.tokens), (0, problem.tokens), True), problem.head_dim**-0.5
    q, k, v, dout = (x.double() for x in whole)
    out, lse = math_backend.forward(q, k, v, pack, scale)
    expected = out, *math_backend.backward(dout, q, k, v, out, lse, pack, scale)

    rows = slice(None) if case.alone else local_rows(problem)
    q, k, v, dout = (x[rows].detach() for x in whole)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    with ExitStack() as stack:
        out = case.attend(problem, stack)(*inputs)
        out.backward(dout)
    errors = {}
    for name, actual, exact in zip(
        ("out", "dq", "dk", "dv"), (out.detach(), *(x.grad for x in inputs)), expected, strict=True
    ):
        squares = torch.stack([(actual.double() - exact[rows]).square().sum(), exact[rows].square().sum()])
        if not case.alone:
            dist.all_reduce(squares)
        errors[name] = (squares[0] / squares[1]).sqrt().item()
    return errors


def time_case(case: Case, problem: Problem, budget_s: float) -> dict:
    """Medians, rates, bytes received and peak memory of one case, maxima over the ranks that take part."""
    group, num_gpus = (None, 1) if case.alone else (dist.group.WORLD, dist.get_world_size())
    num_rows = problem.tokens if case.alone else len(local_rows(problem))
    tensors = problem.random(num_rows, seed=1 + dist.get_rank())
    if case.heads_first:
        tensors = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors]
    q, k, v, dout = tensors
    inputs = [x.requires_grad_() for x in (q, k, v)]
    on_gpu = problem.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()

    with ExitStack() as stack:
        attention = case.attend(problem, stack)

        def step(mark):
            for x in inputs:
                x.grad = None
            mark()
            out = attention(*inputs)
            mark()
            out.backward(dout)
            mark()

        forward_s, backward_s = measure(step, problem.device, budget_s=budget_s, group=group)
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        with Traffic() as traffic:
            step(lambda: None)
    assert all(x.grad.isfinite().all() for x in inputs), f"{case.name}: gradients that are not finite"
    received, peak = traffic.received, float(peak)
    if not case.alone:
        most = torch.tensor([received, peak], dtype=torch.float64, device=problem.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        received, peak = most.tolist()
    flops = problem.forward_flops() / num_gpus
    return {
        "gpus": num_gpus,
        "fwd ms": 1e3 * forward_s,
        "fwd+bwd ms": 1e3 * (forward_s + backward_s),
        "fwd TFLOP/s": flops / forward_s / 1e12,
        "fwd+bwd TFLOP/s": 3.5 * flops / (forward_s + backward_s) / 1e12,
        "received GiB": received / 2**30,
        "peak GB": peak / 1e9 if on_gpu else None,
    }


def guarded(function, *arguments):
    """(result, None), or (None, error text) after printing the traceback: one failure must not lose the other cases."""
    try:
        return function(*arguments), None
    except Exception as error:
        traceback.print_exc()
        return None, f"{type(error).__name__}: {error}"[:1000]


def run_case(case: Case, function, *arguments) -> tuple[dict | None, str | None]:
    """Runs `function` on the ranks that take part. The same result or error text on every rank."""
    result, error = None, None
    if not case.alone or dist.get_rank() == 0:
        result, error = guarded(function, case, *arguments)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    outcomes = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, error))
    errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error is not None]
    return outcomes[0][0], errors[0] if errors else None


def make_cases(arguments, device: torch.device, dtype: torch.dtype) -> tuple[list[Case], dict[str, str]]:
    """The cases that can run here, and why the others cannot."""
    refusals = {
        name: refusal(BACKENDS[name], device.type, dtype, arguments.head_dim) for name in arguments.backends.split(",")
    }
    names = [name for name, reason in refusals.items() if reason is None]
    strategies = arguments.strategies.split(",")
    cases = [longspan_case(*case) for case in product(strategies, names, arguments.key_blocks)]
    if dist.get_world_size() > 1 and device.type == "cuda":
        cases += [torch_case("cudnn", "allgather"), torch_case("cudnn", "alltoall"), torch_case("flash", "allgather")]
    cases += [library_alone_case(name) for name in names] + [longspan_alone_case(name) for name in names[:1]]
    return cases, {name: reason for name, reason in refusals.items() if reason is not None}


def main(arguments: argparse.Namespace | None = None) -> int:
    start = time.monotonic()
    arguments = arguments or parse_ring_attention()
    mesh = join(arguments.device)
    device, is_main = mesh.device, mesh.is_main
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bound = 1e-2 if device.type == "cuda" else 1e-5
    cases, refusals = make_cases(arguments, device, dtype)
    record = new_record("ring_attention", vars(arguments)) | {"refusals": refusals, "checks": [], "results": []}
    failed = False

    def note(kind, row, line):
        record[kind].append(row)
        if is_main:
            print(line, flush=True)
            if arguments.output:
                save(record | {"seconds": time.monotonic() - start}, arguments.output)

    def problem(tokens):
        kv_heads = arguments.kv_heads or arguments.heads
        return Problem(tokens, arguments.heads, kv_heads, arguments.head_dim, dtype, device)

    working = []
    for case in cases:
        errors, error = run_case(case, check, problem(arguments.check_length))
        if error is None and not max(errors.values()) <= bound:
            error = f"relative error above {bound}"
        failed |= error is not None and not case.name.startswith("torch")
        if error is None:
            working.append(case)
        shown = error or " ".join(f"{name} {value:.1e}" for name, value in errors.items())
        note("checks", {"name": case.name, "errors": errors, "error": error}, f"check  {case.name}: {shown}")

    for tokens in arguments.lengths:
        for case in working:
            if case.longest is not None and tokens > case.longest:
                continue
            num_gpus = 1 if case.alone else dist.get_world_size()
            expected_s = 6 * 3.5 * problem(tokens).forward_flops() / num_gpus / SLOWEST_RATE
            late = [time.monotonic() - start + expected_s > arguments.time_limit]
            dist.broadcast_object_list(late)
            if late[0]:
                result, error = None, f"skipped: would not end within --time-limit {arguments.time_limit:.0f}"
            else:
                result, error = run_case(case, time_case, problem(tokens), arguments.case_seconds)
                failed |= error is not None and not case.name.startswith("torch")
            row = {"name": case.name, "tokens": tokens} | (result or {"error": error})
            rate = f"{result['fwd+bwd TFLOP/s']:.1f} TFLOP/s per GPU" if result else error
            note("results", row, f"time   {case.name} {tokens:,}: {rate}")

    if is_main:
        for name, reason in refusals.items():
            print(f"back end {name} not measured: {reason}")
        print(format_table(record["results"], COLUMNS))
    dist.destroy_process_group()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
