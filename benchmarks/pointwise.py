"""Norms, rotations, SwiGLU and the loss: eager PyTorch, torch.compile and longspan beside the bytes they move; then
whole layers, forward and backward, with what their time goes to.

    python -m longspan.benchmarks.pointwise --output benchmarks/results/pointwise_H200.json
    python -m longspan.benchmarks.pointwise --cases norm --layers --try norm_triton.PROGRAMS 264 1056

See benchmarks/README.md for what is measured.
"""

import argparse
import sys
import time
from collections import Counter
from contextlib import nullcontext
from functools import partial

import torch

from longspan.benchmarks.arguments import device_name, require_positive, writable
from longspan.benchmarks.common import format_table, measure, new_record, save
from longspan.benchmarks.linear_options import Option, literal
from longspan.benchmarks.linear_worker import describe
from longspan.benchmarks.pointwise_cases import CASES, Sizes, eager_layers, ready
from longspan.launcher.arguments import num_tokens
from longspan.models.build import build_model
from longspan.models.config import LAYER_KINDS, ModelConfig
from longspan.models.decay import Gate
from longspan.models.parallelize import compile_blocks
from longspan.models.rope import rotary_angles
from longspan.parallel import SequenceParallel

FORMS = ("eager", "longspan", "compiled")
AHEAD = 4_000_000  # cycles that a GPU waits while its work is queued, so that times are not those of the host
OWN = (
    "norm_kernel",
    "norm_backward_kernel",
    "rotate_",
    "swiglu_",
    "scores_kernel",
    "gradient_kernel",
    "channel_gate",
    "scalar_gate",
)  # in names of kernels
PRODUCTS = ("gemm", "nvjet", "cutlass", "xmma", "splitk")
ATTENTION = ("flash", "fmha", "sdpa")
PARTS = ("pointwise", "products", "attention", "other")


def main() -> int:
    arguments, start = parse_arguments(), time.monotonic()
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = Sizes(*(getattr(arguments, name) for name in Sizes.__dataclass_fields__))
    record = new_record("pointwise", vars(arguments) | {"tried": None}) | {"rows": []}
    record["copy_tb_per_s"] = copy_rate(device)

    def note(row, function, *parameters):
        if time.monotonic() - start > arguments.budget:
            row["error"] = f"skipped: --budget of {arguments.budget:.0f} s is spent"
        else:
            try:
                row |= function(*parameters)
            except Exception as error:  # compilers fail in many ways
                row["error"] = describe(error)
        record["rows"].append(row)
        print(row, flush=True)
        if arguments.output:
            save(record | {"seconds": time.monotonic() - start}, arguments.output)

    def run_case(name, form, **more):
        row = {"case": name, "form": form, **more}
        note(row, case_times, name, form, sizes, dtype, device, record["copy_tb_per_s"], arguments.seconds)

    for form in ("eager", "longspan"):
        for name in arguments.cases:
            run_case(name, form)
    for option, values in arguments.tried:
        for value in values:
            with option.set_to(value):
                for name in arguments.cases:
                    run_case(name, "longspan", option=option.name, value=repr(value))
    for kind in arguments.layers:
        for tokens in (sizes.tokens, arguments.few_tokens):
            for form in ("eager", "longspan"):
                row = {"layer": kind, "form": form, "tokens": tokens}
                note(row, layer_times, kind, form, tokens, sizes, dtype, device, arguments.seconds)
    if arguments.compile:
        for name in arguments.cases:
            run_case(name, "compiled")
        for kind in arguments.layers:
            row = {"layer": kind, "form": "compiled", "tokens": sizes.tokens}
            note(row, layer_times, kind, "compiled", sizes.tokens, sizes, dtype, device, arguments.seconds)
    print(summary(record["rows"]))
    return int(any("error" in row for row in record["rows"]))


def copy_rate(device: torch.device) -> float:
    """TB/s, read and written, of a copy that no cache holds."""
    source = torch.empty((1 << 28) if device.type == "cuda" else (1 << 20), device=device)
    target = torch.empty_like(source)
    (seconds,) = timed(lambda: target.copy_(source), device, 0.2)
    return 2 * source.nbytes / seconds / 1e12


def timed(*calls_and_options):
    """Seconds of each of the calls before the device and the budget in seconds, several times in a row."""
    *calls, device, budget_s = calls_and_options
    repeats = 5 if device.type == "cuda" else 1

    def step(mark):
        if device.type == "cuda":
            torch.cuda._sleep(AHEAD)
        mark()
        for call in calls:
            for _ in range(repeats):
                call()
            mark()

    return [seconds / repeats for seconds in measure(step, device, budget_s=budget_s)]


def case_times(name, form, sizes, dtype, device, rate, seconds) -> dict:
    """ms forward and forward+backward, those of the bytes at the rate of a copy, and relative errors against fp64."""
    case, inputs = CASES[name], ready(name, sizes, dtype, device)
    function = case.longspan if form == "longspan" else case.eager
    if form == "compiled":
        torch._dynamo.reset()
        torch._functorch.config.donated_buffer = False  # else a backward cannot be timed by itself, many times
        function = torch.compile(function, dynamic=True)
    row = {"errors": errors(name, function, sizes, dtype, device)}
    floor = [count * dtype.itemsize / rate / 1e9 for count in case.moved(sizes)]
    if not case.differentiable:
        (forward,) = timed(lambda: function(*inputs), device, seconds)
        return row | {"ms": {"forward": forward * 1e3}, "floor_ms": {"forward": floor[0]}}
    leaves = [x for x in inputs if x.requires_grad]
    outs = as_tuple(function(*inputs))
    d_outs = [torch.randn_like(out) for out in outs]

    def backward():
        torch.autograd.grad(outs, leaves, d_outs, retain_graph=True)

    forward, back = (1e3 * s for s in timed(lambda: function(*inputs), backward, device, seconds))
    row["ms"] = {"forward": forward, "forward+backward": forward + back}
    row["floor_ms"] = {"forward": floor[0], "forward+backward": sum(floor)}
    return row


def errors(name, function, sizes, dtype, device) -> list[float]:
    """Of every output and gradient, on few tokens, against the eager form in fp64."""
    few = Sizes(min(sizes.tokens, 300), *list(vars(sizes).values())[1:])
    inputs = ready(name, few, dtype, device)
    exact = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
    found, expected = as_tuple(function(*inputs)), as_tuple(CASES[name].eager(*exact))
    if CASES[name].differentiable:
        d_outs = [torch.randn_like(out) for out in found]
        found += torch.autograd.grad(found, [x for x in inputs if x.requires_grad], d_outs)
        d_outs = [d_out.double() for d_out in d_outs]
        expected += torch.autograd.grad(expected, [x for x in exact if x.requires_grad], d_outs)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]


def as_tuple(outs):
    return tuple(outs) if isinstance(outs, (tuple, list)) else (outs,)


def layer_times(kind, form, tokens, sizes, dtype, device, seconds) -> dict:
    """ms of a block forward and backward; on a GPU, of what its kernels are and how many there are. `host_ms` is the
    time by the host's clock when the GPU does not wait: where it is more than `ms`, the host is what limits."""
    step = layer_step(kind, form, tokens, sizes, dtype, device)
    with eager_layers() if form == "eager" else nullcontext():
        (found,) = timed(step, device, seconds)
        row = {"ms": {"forward+backward": found * 1e3}}
        return row | (profile(step) if device.type == "cuda" else {})


def layer_step(kind, form, tokens, sizes, dtype, device):
    """A function that runs a block of this kind forward and backward."""
    config = ModelConfig(
        vocab_size=257, num_layers=1, hidden_size=sizes.hidden, num_heads=sizes.heads, head_dim=sizes.head_dim,
        mlp_size=sizes.mlp, qk_norm=True, pattern=[kind],
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        model = build_model(config)
    block = model.blocks[0]
    if form == "compiled":  # as train.compile does: longspan's kernels, and the rest fused
        torch._dynamo.reset()
        compile_blocks(model, device.type)
    for module in block.modules():
        if not isinstance(module, Gate):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    seq = SequenceParallel(device=device).context([tokens])
    rotary = rotary_angles(seq.positions, sizes.head_dim, base=1e4, scaling=1.0, dtype=torch.float32)
    x = torch.randn(tokens, sizes.hidden, dtype=dtype, device=device, requires_grad=True)
    d_out, leaves = torch.randn_like(x), [x, *block.parameters()]

    def step():
        torch.autograd.grad(block(x, rotary, seq), leaves, d_out)

    return step


def profile(step) -> dict:
    """ms of GPU time by part, launches of kernels, the slowest kernels of no part, and the host's ms."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    host_ms = (time.perf_counter() - begin) / 5 * 1e3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    parts, others, launches = Counter(), Counter(), 0
    for event in found.key_averages():
        ms = event.self_device_time_total / 1e3
        if not ms:
            continue
        launches += event.count
        part = part_of(event.key)
        parts[part] += ms
        if part == "other":
            others[event.key[:90]] += ms
    return {"host_ms": host_ms, "parts_ms": dict(parts), "launches": launches, "other": dict(others.most_common(12))}


def part_of(kernel: str) -> str:
    """Which of PARTS a kernel of this name belongs to. Triton's are longspan's: what is no template of C++."""
    for part, words in zip(PARTS, (OWN, PRODUCTS, ATTENTION)):
        if any(word in kernel for word in words):
            return part
    return "other" if "::" in kernel or kernel.startswith("Mem") else "attention"


def summary(rows: list[dict]) -> str:
    """ms of every form, and in brackets the share of the floor that it reaches."""
    lines, layers = {}, []
    for row in rows:
        name = row.get("case", "") + (f", {row['option']} = {row['value']}" if "option" in row else "")
        for direction, ms in row.get("ms", {}).items():
            if "layer" in row:
                parts = {part: f"{t:.2f}" for part, t in row.get("parts_ms", {}).items()}
                shown = {"launches": row.get("launches"), "host ms": f"{row.get('host_ms', 0):.2f}", "ms": f"{ms:.2f}"}
                layers.append({key: row[key] for key in ("layer", "tokens", "form")} | shown | parts)
                continue
            floor = row["floor_ms"][direction]
            line = lines.setdefault((name, direction), {"case": name, "direction": direction, "floor": f"{floor:.3f}"})
            line[row["form"]] = f"{ms:.3f} ({floor / ms:.0%})"
    columns = ["layer", "tokens", "form", "ms", "host ms", "launches", *PARTS]
    tables = [format_table(list(lines.values()), ["case", "direction", "floor", *FORMS])] if lines else []
    return "\n\n".join(["", *tables, *([format_table(layers, columns)] if layers else [])])


def parse_arguments(argv=None):
    on_gpu, default = torch.cuda.is_available(), "(default: %(default)s)"
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    add = parser.add_argument
    add("--output", type=writable, help="JSON file, saved again after every measurement")
    add("--cases", nargs="*", choices=CASES, default=list(CASES), metavar="CASE", help=default)
    kinds = ["softmax", "linear:fixed", "linear:gated_delta"]
    add("--layers", nargs="*", choices=LAYER_KINDS, default=kinds, metavar="KIND", help=default)
    for name, gpu, cpu in [
        ("tokens", 1 << 15, 64), ("few-tokens", 2048, 16), ("hidden", 2048, 32), ("heads", 16, 2),
        ("head-dim", 128, 16), ("mlp", 6144, 96), ("vocabulary", 32_000, 100),
    ]:  # fmt: skip
        add(f"--{name}", type=num_tokens, default=gpu if on_gpu else cpu, help=default)
    add("--compile", action=argparse.BooleanOptionalAction, default=on_gpu, help="measure torch.compile as well")
    add("--try", dest="tried", nargs="+", action="append", default=[], metavar="NAME VALUE", help="launch options, in"
        " longspan.kernels, such as norm_triton.PROGRAMS 264; may be repeated")  # fmt: skip
    add("--seconds", type=float, default=0.1, help=f"timed repetitions of one measurement, about {default}")
    add("--budget", type=float, default=120.0, help=f"seconds after which nothing more is started {default}")
    add("--device", type=device_name, choices=["cuda", "cpu"], default="cuda" if on_gpu else "cpu")
    arguments = parser.parse_args(argv)
    require_positive(parser, arguments, *Sizes.__dataclass_fields__, "few_tokens", "seconds", "budget")
    option = partial(Option, package="longspan.kernels")
    try:
        arguments.tried = [(option(name), [literal(value) for value in values]) for name, *values in arguments.tried]
    except ValueError as error:
        parser.error(f"--try: {error}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
