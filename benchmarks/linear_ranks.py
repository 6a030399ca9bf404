"""Linear attention over several GPUs: ways to pass states, and all-to-all to heads, on the same kernels in one run.

    torchrun --nproc-per-node 4 benchmarks/linear_ranks.py --output benchmarks/results/linear_ranks.json
    torchrun --nproc-per-node 4 benchmarks/linear_ranks.py --layer --output benchmarks/results/linear_layer.json
    torchrun --nproc-per-node 4 benchmarks/linear_ranks.py --parity --output benchmarks/results/linear_parity.json

One document lies over all ranks. See benchmarks/README.md for what is measured and what the columns mean.
"""

import argparse
import sys
import time
from contextlib import ExitStack
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist

from longspan.attention import linear_attention
from longspan.benchmarks.common import Traffic, device_name, format_table, new_record, require_positive, save, writable
from longspan.benchmarks.head_parallel import HEAD_PARALLEL, HeadParallel
from longspan.benchmarks.linear_cases import FAMILIES, Problem
from longspan.benchmarks.linear_parity import drift, parity
from longspan.benchmarks.ranks import DIRECTIONS, NCCL, Ranks, join, layer_step
from longspan.launcher.parsing import parse_tokens
from longspan.models import mixers
from longspan.parallel.scan import TRANSPORTS

LAYOUTS = ("contiguous", "zigzag")
LAYER_KINDS = {name: f"linear:{name}" for name in FAMILIES} | {"channel": "linear:gla"}


def operator_step(problem: Problem, attend):
    """A step that runs attend(q, k, v, log_decay=, beta=) on this rank's tokens, forward and backward."""
    inputs = problem.random(1 + dist.get_rank())
    leaves = list(inputs.leaves().values())

    def step(mark):
        mark()
        out = attend(inputs.q, inputs.k, inputs.v, log_decay=inputs.log_decay, beta=inputs.beta)
        mark()
        torch.autograd.grad(out, leaves, inputs.d_out)
        mark()

    return step


def time_case(ranks: Ranks, problem: Problem, layout: str, strategy: str | None, layer: bool) -> dict:
    """Times of one strategy; without one, of the rank alone on its local tokens, all ranks at once."""
    if strategy is None:
        seq = ranks.alone((problem.tokens,))
    else:
        linear = "auto" if strategy == HEAD_PARALLEL else strategy
        seq = ranks.context((problem.tokens * ranks.mesh.sp,), layout, linear)
    with ExitStack() as stack:
        attend = None
        if strategy == HEAD_PARALLEL:
            attend = HeadParallel(seq.layout, ranks.mesh.sp_group, ranks.device)
        if layer:
            if attend is not None:
                stack.enter_context(mock.patch.object(mixers, "linear_attention", attend))
            shape = problem.heads, problem.heads, problem.head_dim
            step = layer_step(LAYER_KINDS[problem.family], *shape, seq, problem.dtype, problem.device)
        else:

            def on_spans(q, k, v, **gates):
                return linear_attention(q, k, v, seq=seq, **gates)

            step = operator_step(problem, attend or on_spans)
        times = ranks.measure(step)
        before = ranks.peers.received if ranks.peers else 0
        with Traffic() as traffic:
            step(lambda: None)
        shared = ranks.peers.received - before if ranks.peers else 0
    received = torch.tensor(traffic.received + shared, dtype=torch.float64, device=ranks.device)
    dist.all_reduce(received, dist.ReduceOp.MAX, ranks.mesh.sp_group)
    return {"ms": times, "received_mib": received.item() / 2**20}


def with_efficiency(row: dict, alone: dict | None) -> dict:
    """Adds what the time alone says: its share of the time over ranks, and the difference."""
    for direction in DIRECTIONS if alone and "ms" in row else ():
        over_ranks, by_itself = row["ms"][direction], alone["ms"][direction]
        row.setdefault("alone_ms", {})[direction] = by_itself
        row.setdefault("efficiency", {})[direction] = by_itself / over_ranks
        row.setdefault("exposed_ms", {})[direction] = over_ranks - by_itself
    return row


def efficiency_table(rows: list[dict], direction: str) -> str:
    """ms, share of the time alone and exposed ms for every strategy; one line per family, size and layout."""
    lines = {}
    for row in rows:
        key = row["family"], f"{row['tokens_per_gpu'] / 1024:g}K", row["layout"]
        line = lines.setdefault(key, dict(zip(("family", "tokens/GPU", "layout"), key, strict=True)))
        line[row["strategy"]] = "failed"
        if "efficiency" in row:
            line["alone"] = f"{row['alone_ms'][direction]:.3f}"
            shown = row["ms"][direction], row["efficiency"][direction], row["exposed_ms"][direction]
            line[row["strategy"]] = "{:.3f} {:.1%} {:+.3f}".format(*shown)
    strategies = dict.fromkeys(row["strategy"] for row in rows)
    columns = ["family", "tokens/GPU", "layout", "alone", *strategies]
    return f"{direction}: ms, share, exposed ms\n" + format_table(list(lines.values()), columns)


def main() -> int:
    start = time.monotonic()
    arguments = parse_arguments()
    mesh = join(arguments.device)
    device = mesh.device
    ranks = Ranks(mesh, device, arguments.repetitions)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    record = new_record("linear_ranks", vars(arguments) | {"world_size": mesh.world_size}) | {"rows": []}
    failed = False

    run = partial(ranks.within, start, arguments.budget)

    def note(row, error):
        nonlocal failed
        failed |= error is not None or row.get("broken", False)
        record["rows"].append(row if error is None else row | {"error": error})
        if mesh.is_main:
            print(progress(record["rows"][-1]), flush=True)
            if arguments.output:
                save(record | {"seconds": time.monotonic() - start}, arguments.output)

    def problem(family, tokens, heads=arguments.heads):
        return Problem(family, tokens, heads, arguments.head_dim, dtype, device)

    if arguments.parity:
        for family in arguments.families:
            found, error = run(parity, problem(family, arguments.parity_tokens), arguments.strategies, arguments.seed)
            for row in found or [{"family": family}]:
                note(row, error)
        for family in arguments.families:
            heads = min(4, arguments.heads)
            found, error = run(drift, problem(family, arguments.drift_tokens, heads), arguments.seed)
            for row in found or [{"family": family}]:
                note(row, error)
    else:
        for tokens in arguments.tokens:
            for family in arguments.families:
                alone, error = run(time_case, problem(family, tokens), LAYOUTS[0], None, arguments.layer)
                note({"family": family, "tokens_per_gpu": tokens, "strategy": "alone"} | (alone or {}), error)
                for layout in arguments.layouts:
                    for strategy in arguments.strategies:
                        found, error = run(time_case, problem(family, tokens), layout, strategy, arguments.layer)
                        row = {"family": family, "tokens_per_gpu": tokens, "layout": layout, "strategy": strategy}
                        note(with_efficiency(row | (found or {}), alone), error)
    if mesh.is_main:
        print()
        print(summary(record["rows"], arguments.parity), flush=True)
    dist.barrier()  # torchrun ends the other ranks as soon as one reports failure
    dist.destroy_process_group()
    return int(failed)


def progress(row: dict) -> str:
    shown = row.get("error") or row.get("ms") or row.get("ratio") or {"first": row["first"], "last": row["last"]}
    parts = [str(value) for value in row.values() if isinstance(value, (str, int)) and value != row.get("error")]
    return f"{' '.join(parts)}: {shown}"


def summary(rows: list[dict], is_parity: bool) -> str:
    if not is_parity:
        rows = [row for row in rows if row["strategy"] != "alone"]
        return "\n\n".join(efficiency_table(rows, direction) for direction in DIRECTIONS)
    ratios = [row for row in rows if "ratio" in row]
    names = dict.fromkeys(name for row in ratios for name in row["ratio"])
    shown = [row | {name: f"{value:.3f}" for name, value in row["ratio"].items()} for row in ratios]
    worst = max((value for row in ratios for value in row["ratio"].values()), default=None)
    lines = ["error over ranks / error of one rank", format_table(shown, ["family", "layout", "strategy", *names])]
    drifts = [
        row | {f"{name} {place}": f"{row[place][name]:.2e}" for name in row["first"] for place in ("first", "last")}
        for row in rows
        if "first" in row
    ]
    names = dict.fromkeys(name for row in drifts for name in row["first"])
    columns = [f"{name} {place}" for name in names for place in ("first", "last")]
    lines += [f"worst {worst}", "", "error in the first and in the last chunks"]
    lines.append(format_table(drifts, ["family", "run", *columns]))
    return "\n".join(lines)


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    strategies = [*TRANSPORTS, f"lasp2{NCCL}", HEAD_PARALLEL]
    parser.add_argument("--output", type=writable, help="JSON file, saved again after every measurement")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES),
                        help="default: fixed scalar gated_delta; with --parity all")  # fmt: skip
    parser.add_argument("--strategies", nargs="+", choices=strategies, default=strategies)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--tokens", type=parse_tokens, nargs="+", help="per GPU; default 32K 128K 512K, layer 32K 128K")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--layer", action="store_true", help="time a whole decoder layer instead of the operator")
    parser.add_argument("--parity", action="store_true", help="compare errors instead of timing")
    parser.add_argument("--parity-tokens", type=parse_tokens, default=1 << 13, help="in several documents")
    parser.add_argument("--drift-tokens", type=parse_tokens, default=1 << 16, help="in one document")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs of --parity")
    parser.add_argument("--repetitions", type=int, default=20)
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", type=device_name, choices=["cuda", "cpu"], default="cuda" if on_gpu else "cpu")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which no case is started")
    arguments = parser.parse_args(argv)
    if arguments.layer and arguments.parity:
        parser.error("--layer and --parity exclude each other; give one of them")
    require_positive(parser, arguments, "heads", "head_dim", "repetitions", "parity_tokens", "drift_tokens")
    if arguments.families is None:
        arguments.families = [*FAMILIES] if arguments.parity else ["fixed", "scalar", "gated_delta"]
    arguments.tokens = arguments.tokens or [1 << 15, 1 << 17] + ([] if arguments.layer else [1 << 19])
    return arguments


if __name__ == "__main__":
    sys.exit(main())
