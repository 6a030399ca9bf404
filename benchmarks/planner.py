"""Plans for softmax attention over mixes of document lengths: balance, tokens moved, planning time. Needs no GPU.

    python -m longspan.benchmarks.planner --output benchmarks/results/planner.json

Every strategy plans the same batches, with costs of query-key pairs alone (`pairs`) and with the default ones
(`default`). See benchmarks/README.md for what the columns mean.
"""

import argparse
import gc
import statistics
import sys
import time

import numpy as np

from longspan.benchmarks.arguments import parse_planner
from longspan.benchmarks.common import format_table, new_record, save
from longspan.benchmarks.length_mixes import MIXES, draw
from longspan.parallel import Layout, Mask, Topology, attention_pairs, rebalance
from longspan.parallel.costs import Costs
from longspan.parallel.planner import plan_attention
from longspan.parallel.water_fill import least_level

COSTS = {"pairs": Costs.pairs_only, "default": Costs}
COLUMNS = [
    "mix", "ranks", "strategy", "costs", "pairs", "time", "over least", "slowest ms", "tokens", "remap %", "crosses %",
    "node docs %", "shards", "max-min", "ms", "target met", "in time",
]  # fmt: skip


def measure_plan(plan, topology: Topology, token_cap: float) -> dict[str, float]:
    """Figures of one plan, its layout and the way from there to equal tokens on every rank."""
    layout = plan.layout
    base = rebalance(layout, topology)
    owner, target = owners(layout), owners(base)
    of_node = topology.ranks_per_node
    ranks, crossing = documents(layout, topology)
    return {
        "pairs": over_mean(attention_pairs(layout)),
        "time": plan.predicted.imbalance,
        "over_least": max(plan.predicted.attention_s) / least_attention_s(layout, plan.costs, token_cap),
        "slowest_s": plan.predicted.slowest_s,
        "tokens": over_mean(layout.tokens_per_rank),
        "moved_percent": 100 * float(np.mean(owner != target)),
        "moved_across_nodes_percent": 100 * float(np.mean(owner // of_node != target // of_node)),
        "tokens_of_documents_across_nodes_percent": 100 * crossing / layout.num_tokens,
        "shards_per_rank": sum(count for count in ranks if count > 1) / topology.world_size,
        "base_max_minus_min": max(base.tokens_per_rank) - min(base.tokens_per_rank),
    }


def least_attention_s(layout: Layout, costs: Costs, token_cap: float) -> float:
    """Which no plan's slowest rank falls below, as documents have a start on every rank that they are cut over."""
    lengths, ranks = layout.lengths, layout.world_size
    cap = max(1, token_cap * layout.num_tokens / ranks)
    return least_level(lengths, costs.weights(Mask(), lengths), costs.start_tokens, ranks, cap)


def owners(layout: Layout) -> np.ndarray:
    """int64 [tokens]: the rank that holds each token of the documents laid end to end."""
    owner = np.empty(layout.num_tokens, np.int64)
    for rank in range(layout.world_size):
        owner[layout.global_indices(rank)] = rank
    return owner


def documents(layout: Layout, topology: Topology) -> tuple[list[int], int]:
    """On how many ranks each document lies, and the tokens of those that lie on more than one node."""
    ranks = [set() for _ in layout.lengths]
    for rank, spans in enumerate(layout.spans):
        for span in spans:
            ranks[span.document].add(rank)
    crossing = (len({topology.node(rank) for rank in holders}) > 1 for holders in ranks)
    tokens = sum(length for length, crosses in zip(layout.lengths, crossing, strict=True) if crosses)
    return [len(holders) for holders in ranks], tokens


def over_mean(values) -> float:
    return max(values) / statistics.fmean(values)


def batches(mix: str, topology: Topology, count: int, arguments) -> list[tuple[int, ...]]:
    """The lengths of `count` batches: the same for every strategy, whichever other mixes and topologies are run."""
    most = topology.world_size * arguments.tokens_per_rank
    place = list(MIXES).index(mix)
    generator = np.random.default_rng([arguments.seed, place, topology.nodes, topology.ranks_per_node])
    return [draw(mix, generator, max(1, round(arguments.fill * most)), most) for _ in range(count)]


def run_row(mix: str, topology: Topology, strategy: str, costs: str, arguments) -> dict:
    """Plans all batches of one mix on one topology, after one more that is only warm-up."""
    prices, found, milliseconds = COSTS[costs](), [], []
    warm_up, *drawn = batches(mix, topology, arguments.batches + 1, arguments)
    plan_attention(warm_up, topology, prices, token_cap=arguments.token_cap, strategy=strategy)
    for lengths in drawn:
        gc.disable()  # as timeit does: what it would collect here is mostly the benchmark's
        try:
            start = time.process_time()  # one thread: what else the machine does is not counted
            plan = plan_attention(lengths, topology, prices, token_cap=arguments.token_cap, strategy=strategy)
            milliseconds.append(1000 * (time.process_time() - start))
        finally:
            gc.enable()
        found.append(measure_plan(plan, topology, arguments.token_cap))
    row = {
        "documents": statistics.fmean(map(len, drawn)),
        "planning_ms": {"median": statistics.median(milliseconds), "p95": p95(milliseconds)},
    }
    for name in found[0]:
        values = [figures[name] for figures in found]
        row[name] = {"mean": statistics.fmean(values), "p95": p95(values), "max": max(values)}
    for name in ("pairs", "time"):
        row[f"{name}_misses"] = misses(row[name], row["planning_ms"]["median"], topology.world_size)
    return row


def p95(values) -> float:
    return float(np.percentile(values, 95))


def misses(ratio: dict[str, float], planning_ms: float, world_size: int) -> list[str]:
    """Which targets a row misses: 1.05 on average up to 16 ranks, 1.10 above, 1.15 at p95, 10 ms (median)."""
    found = {
        "mean": ratio["mean"] > (1.05 if world_size <= 16 else 1.10),
        "p95": ratio["p95"] > 1.15,
        "ms": planning_ms > 10,
    }
    return [name for name, missed in found.items() if missed]


def shown(row: dict) -> dict:
    """A row as the table prints it."""
    if "error" in row:
        return row | {"pairs": "failed", "time": None, "tokens": None}

    def both(figures, decimals, first="mean"):
        return f"{figures[first]:.{decimals}f} ({figures['p95']:.{decimals}f})"

    return row | {
        "pairs": both(row["pairs"], 3),
        "time": both(row["time"], 3),
        "over least": both(row["over_least"], 2),
        # costs of pairs alone are no seconds
        "slowest ms": f"{1000 * row['slowest_s']['mean']:.3f}" if row["costs"] == "default" else None,
        "tokens": both(row["tokens"], 2),
        "remap %": row["moved_percent"]["mean"],
        "crosses %": row["moved_across_nodes_percent"]["mean"],
        "node docs %": row["tokens_of_documents_across_nodes_percent"]["mean"],
        "shards": f"{row['shards_per_rank']['mean']:.2f}",
        "max-min": row["base_max_minus_min"]["max"],
        "ms": both(row["planning_ms"], 1, "median"),
        "target met": verdict(row["pairs_misses"]),
        "in time": verdict(row["time_misses"]),
    }


def verdict(missed: list[str]) -> str:
    return f"no: {', '.join(missed)}" if missed else "yes"


def progress(row: dict, done: float, elapsed_s: float) -> str:
    """`done`: share of the work, by ranks planned for, since plans for more ranks take longer."""
    head = f"[{done:4.0%}, {elapsed_s * (1 - done) / done:4.0f} s left] "
    head += f"{row['mix']} {row['ranks']} {row['strategy']} {row['costs']}: "
    if "error" in row:
        return head + row["error"]
    cells = shown(row)
    return head + f"pairs {cells['pairs']}, moved {row['moved_percent']['mean']:.1f} %, {cells['ms']} ms"


def main(arguments: argparse.Namespace | None = None) -> int:
    arguments = arguments or parse_planner()
    start, failed = time.monotonic(), False
    topologies = [Topology(*sizes) for sizes in arguments.topologies]
    record = new_record("planner", vars(arguments) | {"topologies": list(map(name_of, topologies))})
    record["rows"] = rows = []
    cases = [
        (mix, topology, strategy, costs)
        for topology in topologies
        for mix in arguments.mixes
        for strategy in arguments.strategies
        for costs in arguments.costs
    ]
    total, done = sum(case[1].world_size for case in cases), 0
    for mix, topology, strategy, costs in cases:
        row = {"mix": mix, "ranks": name_of(topology), "strategy": strategy, "costs": costs}
        try:
            row |= run_row(mix, topology, strategy, costs, arguments)
        except Exception as error:  # the other rows are still worth having
            row["error"], failed = f"{type(error).__name__}: {error}", True
        rows.append(row)
        done += topology.world_size
        print(progress(row, done / total, time.monotonic() - start), flush=True)
        if arguments.output:
            save(record | {"seconds": time.monotonic() - start}, arguments.output)
    print("\nmean (p95) over batches; pairs, time and tokens: fullest rank over mean\n")
    print(format_table(list(map(shown, rows)), COLUMNS))
    return int(failed)


def name_of(topology: Topology) -> str:
    return f"{topology.nodes}x{topology.ranks_per_node}"


if __name__ == "__main__":
    sys.exit(main())
