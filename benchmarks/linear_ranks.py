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
from longspan.benchmarks.arguments import LAYOUTS, parse_linear_ranks
from longspan.benchmarks.common import Traffic, format_table, new_record, save
from longspan.benchmarks.head_parallel import HEAD_PARALLEL, HeadParallel
from longspan.benchmarks.linear_cases import FAMILIES, Problem
from longspan.benchmarks.linear_parity import drift, parity
from longspan.benchmarks.ranks import DIRECTIONS, Ranks, join, layer_step
from longspan.models import mixers

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


def main(arguments: argparse.Namespace | None = None) -> int:
    start = time.monotonic()
    arguments = arguments or parse_linear_ranks()
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


if __name__ == "__main__":
    sys.exit(main())
