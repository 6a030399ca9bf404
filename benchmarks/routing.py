"""Routing between nodes: keys that cross dealt out over the ranks of a node, against crossing from where they lie.

    python -m longspan.benchmarks.routing --nodes 2 --ranks-per-node 2 --megabits 200 --output routing.json

Emulates the nodes on this machine (root; see emulated_nodes.py). See benchmarks/README.md for what is measured and what
the columns mean.
"""

import argparse
import os
import statistics
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import torch
import torch.distributed as dist

from longspan.attention.double_ring import double_ring_schedule
from longspan.attention.softmax import softmax_attention
from longspan.attention.softmax_passes import arriving
from longspan.benchmarks.arguments import add_model_arguments, check_model_arguments, read, require_positive, writable
from longspan.benchmarks.calibrate import fit, peers, time_attention, time_exchange
from longspan.benchmarks.common import format_table, new_record, save
from longspan.benchmarks.emulated_nodes import run_on_emulated_nodes, sent_bytes
from longspan.benchmarks.length_mixes import MIXES, draw
from longspan.benchmarks.ranks import DIRECTIONS, join
from longspan.launcher.arguments import num_tokens
from longspan.parallel import Layout, Mask, SequenceParallel, Span, Topology, plan_attention, zigzag
from longspan.parallel.costs import KEY_PASSES, predict
from longspan.parallel.layout import head_tail

MASK = Mask()
CASES = ("lopsided", "uneven", *(f"zeppelin {mix}" for mix in MIXES), "zigzag")
UNEVEN = 3  # tokens of a node's first rank to one of every other


def lopsided(lengths, topology: Topology) -> Layout:
    """Every document cut into one part per node: even nodes hold theirs on the last rank, odd ones on all."""
    spans = [[] for _ in range(topology.world_size)]
    for document, length in enumerate(lengths):
        for node in range(topology.nodes):
            first, stop = (length * n // topology.nodes for n in (node, node + 1))
            holders = topology.ranks_per_node if node % 2 else 1
            for part in range(holders):
                start, end = (first + (stop - first) * p // holders for p in (part, part + 1))
                if start < end:
                    rank = (node + 1) * topology.ranks_per_node - holders + part
                    spans[rank].append(Span(document, start, end))
    return Layout(tuple(lengths), tuple(map(tuple, spans)))


def uneven(lengths, topology: Topology) -> Layout:
    """Head-tail pairs of every document, those of a node's first rank UNEVEN times as long."""
    weights = [UNEVEN if rank % topology.ranks_per_node == 0 else 1 for rank in range(topology.world_size)]
    spans = [[] for _ in weights]
    for document, length in enumerate(lengths):
        ends = [length * sum(weights[:rank]) // sum(weights) for rank in range(len(weights) + 1)]
        for rank, pair in enumerate(head_tail(document, [stop - start for start, stop in zip(ends, ends[1:])])):
            spans[rank] += pair
    return Layout(tuple(lengths), tuple(map(tuple, spans)))


def place(case: str, arguments, topology: Topology, costs) -> Layout:
    tokens = arguments.tokens * topology.world_size
    if case == "zigzag":
        return zigzag((tokens,), topology.world_size)
    if case in ("lopsided", "uneven"):
        return {"lopsided": lopsided, "uneven": uneven}[case]((tokens,), topology)
    lengths = draw(case.removeprefix("zeppelin "), np.random.default_rng(arguments.seed), tokens, tokens)
    return plan_attention(lengths, topology, costs).layout


def main() -> int:
    arguments = parse_arguments()
    topology = Topology(arguments.nodes, arguments.ranks_per_node)
    if "RANK" not in os.environ:
        return run_on_emulated_nodes("longspan.benchmarks.routing", topology, arguments.megabits)
    start = time.monotonic()
    mesh = join("cpu", timeout_s=300.0)
    torch.set_num_threads(1)
    record = new_record("routing", vars(arguments))
    heads = arguments.heads, arguments.kv_heads, arguments.head_dim
    alone = [time_attention(n, arguments, mesh.device, torch.float32) for n in (arguments.short, arguments.long)]
    links = {where: time_exchange(to, mesh, arguments) for where, to in peers(mesh.sp_rank, mesh.sp_topology).items()}
    costs = fit(*alone, links, heads, torch.float32.itemsize)
    record |= {"alone": alone, "seconds_per_byte": links, "costs": asdict(costs), "rows": []}
    # Where nothing takes time nothing pays.
    routings = {"off": replace(costs, key_s=0.0, remote_key_s=0.0), "on": costs}
    for case in arguments.cases:
        for row in run_case(mesh, place(case, arguments, topology, costs), routings, costs, arguments):
            record["rows"].append({"case": case} | row)
            if mesh.is_main:
                print(progress(record["rows"][-1]), flush=True)
        if mesh.is_main and arguments.output:
            save(record | {"seconds": time.monotonic() - start}, arguments.output)
    if mesh.is_main:
        print(f"\n{table(record['rows'])}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return 0


def run_case(mesh, layout: Layout, routings: dict, costs, arguments) -> list[dict]:
    """Measured and predicted times of attention in a layout, one row for every entry of `routings`: name -> the costs
    that its schedule goes by."""
    topology, group, rank = mesh.sp_topology, mesh.sp_group, mesh.sp_rank
    q, k, v, d_out = (
        torch.randn(layout.tokens_per_rank[rank], heads, arguments.head_dim)
        for heads in (arguments.heads, arguments.kv_heads, arguments.kv_heads, arguments.heads)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    contexts = {
        name: SequenceParallel(group, topology=topology, softmax="double_ring", costs=by).context(layout)
        for name, by in routings.items()
    }
    schedules = {
        name: [double_ring_schedule(layout, r, MASK, topology, by) for r in range(layout.world_size)]
        for name, by in routings.items()
    }

    def attend(name):
        out = softmax_attention(*leaves, seq=contexts[name])
        yield
        torch.autograd.grad(out, leaves, d_out)
        yield

    def transfer(name):
        yield from arriving(k.detach(), v.detach(), schedules[name][rank].steps, group)

    times = alternate(attend, routings, arguments.repetitions, group)
    arrivals = alternate(transfer, routings, arguments.repetitions, group)
    rows = []
    for name in routings:
        dist.barrier(group)
        before = sent_bytes()
        list(attend(name))
        dist.barrier(group)
        over_link = gathered(sent_bytes() - before)
        predicted = step_seconds(schedules[name], topology, costs)
        rows.append({
            "routing": name,
            "tokens": layout.tokens_per_rank,
            "ms": dict(zip(DIRECTIONS, times[name], strict=True)),
            "link_mib": [count / 2**20 for count in over_link],
            "keys_over_link": [keys_over_link(one, r, topology) for r, one in enumerate(schedules[name])],
            "step_ms": np.diff(arrivals[name], prepend=0.0).tolist(),
            "transfer_ms": arrivals[name][-1],
            "predicted_step_ms": [1e3 * seconds / KEY_PASSES for seconds in predicted],
            "predicted_ms": 1e3 * sum(predicted) / KEY_PASSES,
            "planner_ms": 1e3 * max(predict(layout, topology, costs, MASK).keys_s) / KEY_PASSES,
        })  # fmt: skip
    return rows


def alternate(run, names, repetitions: int, group) -> dict[str, list[float]]:
    """Median milliseconds until each yield of run(name), of each repetition the last rank counted. The names take
    turns, so that what else the machine does meets all of them; the first turn warms up."""
    found = {name: [] for name in names}
    for _ in range(repetitions + 1):
        for name in names:
            dist.barrier(group)
            start = time.perf_counter()
            found[name].append([1e3 * (time.perf_counter() - start) for _ in run(name)])
    medians = {}
    for name in names:
        slowest = torch.tensor(found[name][1:], dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX, group)
        medians[name] = [statistics.median(column) for column in slowest.t().tolist()]
    return medians


def step_seconds(schedules, topology: Topology, costs) -> list[float]:
    """What the costs make of a schedule: of every step the seconds of its most loaded link, all passes."""
    found = []
    for number in range(len(schedules[0].steps)):
        near, far = 0, 0
        for rank, schedule in enumerate(schedules):
            for ends in (schedule.steps[number].sends, schedule.steps[number].receives):
                home, away = counts(ends, rank, topology)
                near, far = max(near, home), max(far, away)
        found.append(near * costs.key_s + far * costs.remote_key_s)
    return found


def keys_over_link(schedule, rank: int, topology: Topology) -> int:
    """Keys that a rank sends to other nodes in one pass."""
    return sum(counts(step.sends, rank, topology)[1] for step in schedule.steps)


def counts(ends, rank: int, topology: Topology) -> tuple[int, int]:
    """Rows sent to or received from ranks of the same node, and of others."""
    found = [0, 0]
    for peer, rows, *_ in ends:
        found[topology.node(peer) != topology.node(rank)] += (
            rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        )
    return tuple(found)


def gathered(value) -> list:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def progress(row: dict) -> str:
    shown = f"{row['ms']['forward+backward']:.1f} ms, transfer {row['transfer_ms']:.1f}, predicted"
    return f"{row['case']}, routing {row['routing']}: {shown} {row['predicted_ms']:.1f}, keys {row['keys_over_link']}"


def table(rows: list[dict]) -> str:
    columns = ["case", "routing", "forward", "forward+backward", "transfer", "predicted", "planner", "MiB", "mean MiB"]
    return format_table(
        [
            {
                **row, **row["ms"], "transfer": row["transfer_ms"], "predicted": row["predicted_ms"],
                "planner": row["planner_ms"], "MiB": max(row["link_mib"]), "mean MiB": statistics.mean(row["link_mib"]),
            }
            for row in rows
        ],
        columns,
    )  # fmt: skip


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--output", type=writable, help="JSON file, saved again after every measurement")
    add("--cases", nargs="+", choices=CASES, default=list(CASES), help="(default: all)")
    add("--nodes", type=int, default=2, help=f"emulated on this machine {default}")
    add("--ranks-per-node", type=int, default=2, help=default)
    add("--megabits", type=float, default=200.0, help=f"per second, of a rank's link {default}")
    add("--tokens", type=num_tokens, default=1 << 10, help=f"per rank, on average {default}")
    add("--seed", type=int, default=0, help="of the lengths")
    add("--repetitions", type=int, default=9, help=default)
    add_model_arguments(parser)
    parser.set_defaults(heads=8, kv_heads=8, head_dim=32, megabytes=2, short=64, long=1024, seconds=2.0, device="cpu")
    arguments = read(parser, argv)
    check_model_arguments(parser, arguments)
    require_positive(parser, arguments, "nodes", "ranks_per_node", "megabits", "tokens", "repetitions")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
