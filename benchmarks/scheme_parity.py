"""Errors of softmax attention over ranks beside those of one rank, and whether runs repeat bit for bit.

    torchrun --nproc-per-node 4 -m longspan.benchmarks.scheme_parity --output benchmarks/results/scheme_parity.json

bf16 on GPUs, fp32 on CPUs; errors are relative, from fp64 on one rank. Over ranks they may be 1.5 times those of one.
Kernels are asked for deterministic forms; what those cost is measured on one document.
"""

import argparse
import sys

import torch
import torch.distributed as dist

from longspan.attention import softmax_attention
from longspan.benchmarks.arguments import device_name, require_positive, writable
from longspan.benchmarks.attention_schemes import SCHEMES
from longspan.benchmarks.common import format_table, new_record, save
from longspan.benchmarks.ranks import Ranks, join
from longspan.launcher.arguments import num_tokens
from longspan.launcher.environment import make_deterministic
from longspan.parallel import SequenceParallel

LIMIT = 1.5
NAMES = ("out", "dq", "dk", "dv")


def main() -> int:
    arguments = parse_arguments()
    if arguments.deterministic:
        make_deterministic()
    mesh = join(arguments.device)
    ranks = Ranks(mesh, mesh.device, 3)
    record = new_record("scheme_parity", vars(arguments) | {"world_size": mesh.world_size}) | {"rows": []}
    failed = False
    for case, (lengths, window) in batches(arguments.tokens).items():
        for scheme in arguments.schemes:
            found, error = ranks.guarded(compare, scheme, lengths, window, arguments)
            if found and arguments.deterministic and len(lengths) == 1:
                slower, error = ranks.guarded(price, scheme, lengths, arguments)
                found |= slower or {"broken": True}
            row = {"case": case, "scheme": scheme, "lengths": lengths, "window": window}
            row |= (found or {"broken": True}) | ({"error": error} if error else {})
            failed |= row["broken"]
            record["rows"].append(row)
            if mesh.is_main:
                print(f"{case} {scheme}: {error or row['ratio']}", flush=True)
                if arguments.output:
                    save(record, arguments.output)
    if mesh.is_main:
        lines = [row | {name: f"{value:.3f}" for name, value in row.get("ratio", {}).items()} for row in record["rows"]]
        print(f"\nerror over {mesh.world_size} ranks / error of one")
        print(format_table(lines, ["case", "scheme", *NAMES, "repeats", "time", "error"]))
    dist.barrier()
    dist.destroy_process_group()
    return int(failed)


def batches(tokens: int) -> dict[str, tuple[tuple[int, ...], int | None]]:
    """(document lengths, window) of every case; `tokens` in each."""
    mixed = [tokens // 2 + 7, 1, tokens // 4 - 13]
    mixed.append(tokens - sum(mixed) - 97)
    return {
        "one document": ((tokens,), None),
        "mixed": ((*mixed, 97), None),
        "one giant, many tiny": ((tokens - 31 * (tokens // 64), *[tokens // 64] * 31), None),
        "window": ((*mixed, 97), tokens // 8 + 5),
    }


def compare(ranks: Ranks, scheme: str, lengths, window, arguments) -> dict:
    """Relative errors of one rank (one) and of all (many), their ratio, whether a second run gives the same bits."""
    mesh, device = ranks.mesh, ranks.device
    whole = inputs(lengths, arguments, device)
    expected = run([x.double() for x in whole], window, ranks.alone(lengths))
    one = [error(x, exact, exact) for x, exact in zip(run(whole, window, ranks.alone(lengths)), expected, strict=True)]

    seq = context(mesh, scheme, lengths)
    mine = torch.from_numpy(seq.layout.global_indices(seq.rank)).to(device)
    found, again = (run([x[mine] for x in whole], window, seq) for _ in range(2))
    many = [error(x, exact[mine], exact, mesh.sp_group) for x, exact in zip(found, expected, strict=True)]
    same = torch.tensor([all(map(torch.equal, found, again))], dtype=torch.int32, device=device)
    dist.all_reduce(same, dist.ReduceOp.MIN, group=mesh.sp_group)
    ratio = {name: x / y for name, x, y in zip(NAMES, many, one, strict=True)}
    broken = any(not value <= LIMIT for value in ratio.values()) or (arguments.deterministic and not same.item())
    return {"one": one, "many": many, "ratio": ratio, "repeats": bool(same.item()), "broken": broken}


def price(ranks: Ranks, scheme: str, lengths, arguments) -> dict:
    """Time of a forward and backward pass with deterministic kernels, in units of that without."""
    seq, milliseconds = context(ranks.mesh, scheme, lengths), {}
    tensors = [x[: seq.num_tokens_local] for x in inputs(lengths, arguments, ranks.device)]

    def step(mark):
        mark()
        run(tensors, None, seq, mark)
        mark()

    try:
        for deterministic in (True, False):
            torch.use_deterministic_algorithms(deterministic)
            milliseconds[deterministic] = ranks.measure(step)["forward+backward"]
    finally:
        torch.use_deterministic_algorithms(True)
    return {"time": milliseconds[True] / milliseconds[False]}


def inputs(lengths, arguments, device) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, of all ranks."""
    generator = torch.Generator(device).manual_seed(arguments.seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [
        torch.randn(sum(lengths), heads, arguments.head_dim, generator=generator, device=device).to(dtype)
        for heads in (arguments.heads, arguments.kv_heads, arguments.kv_heads, arguments.heads)
    ]


def context(mesh, scheme: str, lengths):
    layout, strategy = SCHEMES[scheme]
    return SequenceParallel(
        mesh.sp_group, topology=mesh.sp_topology, layout=layout, softmax=strategy, device=mesh.device
    ).context(lengths)


def run(tensors, window, seq, mark=lambda: None) -> list[torch.Tensor]:
    """out, dq, dk, dv."""
    *leaves, d_out = (x.detach() for x in tensors)
    leaves = [x.requires_grad_() for x in leaves]
    out = softmax_attention(*leaves, window=window, seq=seq)
    mark()
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def error(x, exact, whole, group=None) -> float:
    """|x - exact| / |whole|; x and exact are this rank's rows where a group is given."""
    squares = (x.double() - exact).square().sum()
    if group is not None:
        dist.all_reduce(squares, group=group)
    return (squares.sqrt() / whole.norm()).item()


def parse_arguments(argv=None):
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--output", type=writable, help="JSON file, saved again after every case")
    add("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES), help="(default: all)")
    add("--tokens", type=num_tokens, default=1 << 13 if on_gpu else 1 << 9, help=f"in all {default}")
    add("--heads", type=int, default=8, help=default)
    add("--kv-heads", type=int, default=2, help=default)
    add("--head-dim", type=int, default=128 if on_gpu else 16, help=default)
    add("--deterministic", action=argparse.BooleanOptionalAction, default=True,
        help="ask kernels for forms that repeat bit for bit, and fail where they do not")  # fmt: skip
    add("--seed", type=int, default=0, help="of the inputs")
    add("--device", type=device_name, choices=["cuda", "cpu"], default="cuda" if on_gpu else "cpu", help=default)
    arguments = parser.parse_args(argv)
    require_positive(parser, arguments, "heads", "kv_heads", "head_dim")
    if arguments.tokens < 512:
        parser.error(f"--tokens {arguments.tokens} must be at least 512")
    if arguments.heads % arguments.kv_heads:
        parser.error(f"--kv-heads {arguments.kv_heads} must divide --heads {arguments.heads}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
