"""Softmax attention over documents of mixed lengths: ways to share it between ranks, on the same kernels in one run.

    torchrun --nproc-per-node 4 -m longspan.benchmarks.attention_schemes --output benchmarks/results/schemes_4xH200.json
    python -m longspan.benchmarks.attention_schemes --nodes 2 --ranks-per-node 2 --megabits 200 --output schemes.json

The second form emulates nodes with slow links on this machine (root; see emulated_nodes.py). See benchmarks/README.md
for what is measured and what the columns mean.
"""

import argparse
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from longspan.attention import softmax_attention, softmax_passes
from longspan.attention.moved import pairs_per_rank
from longspan.benchmarks.arguments import ONE, parse_attention_schemes
from longspan.benchmarks.calibrate import (
    fit,
    peers,
    time_attention,
    time_exchange,
)
from longspan.benchmarks.common import Traffic, format_table, new_record, save
from longspan.benchmarks.emulated_nodes import run_on_emulated_nodes
from longspan.benchmarks.length_mixes import draw
from longspan.benchmarks.ranks import Ranks, join, layer_step
from longspan.launcher.calibration import read_costs
from longspan.parallel import SequenceParallel, Topology, routes
from longspan.parallel.exchange import Pending

# name: (base layout, strategy)
SCHEMES = {
    "te_ring": ("zigzag", "ring"),
    "grouped_ring": ("zigzag", "grouped_ring"),
    "all_gather": ("zigzag", "all_gather"),
    "ulysses": ("zigzag", "ulysses"),
    "usp": ("zigzag", "usp"),
    "hybrid": ("auto", "hybrid"),
    "zeppelin_even": ("auto", "zeppelin_even"),
    "balanced": ("auto", "auto"),
    "zeppelin": ("auto", "zeppelin"),
}


def main(arguments: argparse.Namespace | None = None) -> int:
    arguments = arguments or parse_attention_schemes()
    if arguments.nodes and "RANK" not in os.environ:
        topology = Topology(arguments.nodes, arguments.ranks_per_node)
        return run_on_emulated_nodes("longspan.benchmarks.attention_schemes", topology, arguments.megabits)
    start = time.monotonic()
    mesh = join(arguments.device, timeout_s=300.0)
    device = mesh.device
    if device.type == "cpu":
        torch.set_num_threads(1)
    ranks = Ranks(mesh, device, arguments.repetitions)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    record = new_record("attention_schemes", vars(arguments) | {"world_size": mesh.world_size}) | {"rows": []}
    heads = arguments.heads, arguments.kv_heads, arguments.head_dim
    alone = [time_attention(n, arguments, device, dtype) for n in (arguments.short, arguments.long)]
    links = {at: time_exchange(to, mesh, arguments) for at, to in peers(mesh.sp_rank, mesh.sp_topology).items()}
    here = fit(*alone, links, heads, dtype.itemsize)
    costs = read_costs(arguments.costs) if arguments.costs else here
    record |= {"alone": alone, "seconds_per_byte": links, "costs": asdict(costs)}
    failed = False
    for mix in arguments.mixes:
        for tokens in arguments.tokens:
            lengths = batch(mix, tokens * mesh.sp, arguments.seed)
            ideal = ideal_seconds(lengths, mesh.sp, here)
            for scheme in arguments.schemes:
                given = scheme, lengths, arguments, costs, dtype
                found, error = ranks.within(start, arguments.budget, time_scheme, *given)
                row = {"mix": mix, "tokens": tokens, "documents": len(lengths), "scheme": scheme}
                if error:
                    row["error"] = error
                else:
                    row |= found | {"of_ideal": 1e3 * ideal / found["ms"]["forward+backward"]}
                failed |= error is not None
                record["rows"].append(row)
                if mesh.is_main:
                    print(progress(row), flush=True)
                    if arguments.output:
                        save(record | {"seconds": time.monotonic() - start}, arguments.output)
    if mesh.is_main:
        print(f"\n{table(record['rows'])}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return int(failed)


def time_scheme(ranks: Ranks, scheme: str, lengths, arguments, costs, dtype) -> dict:
    """Milliseconds of attention over all ranks, bytes that a rank receives at most, and how the pairs are shared."""
    layout, strategy = SCHEMES[scheme]
    mesh = ranks.mesh
    parallel = SequenceParallel(
        mesh.sp_group, topology=mesh.sp_topology, layout=layout, softmax=strategy, costs=costs, device=ranks.device
    )
    seq = parallel.context(lengths)
    q, k, v, d_out = (
        torch.randn(seq.num_tokens_local, heads, arguments.head_dim, dtype=dtype, device=ranks.device)
        for heads in (arguments.heads, arguments.kv_heads, arguments.kv_heads, arguments.heads)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def step(mark):
        mark()
        out = softmax_attention(*leaves, seq=seq)
        mark()
        torch.autograd.grad(out, leaves, d_out)
        mark()

    times = ranks.measure(step)
    with Traffic() as traffic:
        step(lambda: None)
    received = torch.tensor(traffic.received, dtype=torch.float64, device=ranks.device)
    dist.all_reduce(received, dist.ReduceOp.MAX, mesh.sp_group)
    pairs = pairs_per_rank(seq, arguments.heads)
    found = {"ms": times, "received_mib": received.item() / 2**20, "pairs": max(pairs) * len(pairs) / sum(pairs)}
    if arguments.exposed:
        with without_transfers():
            alone = ranks.measure(step)
        shape = arguments.heads, arguments.kv_heads, arguments.head_dim
        layer = ranks.measure(layer_step("softmax", *shape, seq, dtype, ranks.device))
        found |= {"without_transfers_ms": alone, "layer_ms": layer}
        exposed = times["forward+backward"] - alone["forward+backward"]
        found["exposed_of_layer"] = exposed / layer["forward+backward"]
    return found


@contextmanager
def without_transfers():
    """Every kernel runs, on what happens to be in memory, and nothing is sent: what is saved was exposed."""

    def exchange(sends, receives, group):
        return Pending((), [x for _, x in receives])

    def all_to_all(x, send_counts, receive_counts, group):
        return x.new_zeros(sum(receive_counts), *x.shape[1:])

    with (
        mock.patch.object(softmax_passes, "start_exchange", exchange),
        mock.patch.object(routes, "all_to_all_rows", all_to_all),
    ):
        yield


def batch(mix: str, tokens: int, seed: int) -> tuple[int, ...]:
    return (tokens,) if mix == ONE else draw(mix, np.random.default_rng(seed), tokens, tokens)


def ideal_seconds(lengths, world_size: int, costs) -> float:
    """The mean rank's attention, were every document whole and on its own at the rate of one rank."""
    pairs = (length * (length + 1) / 2 * (1 + costs.start_tokens / length) for length in lengths)
    return costs.pair_s * sum(pairs) / world_size


def progress(row: dict) -> str:
    where = f"{row['mix']} {row['tokens']} {row['scheme']}"
    if "error" in row:
        return f"{where}: {row['error']}"
    shown = f"{row['ms']['forward+backward']:.2f} ms, {row['received_mib']:.1f} MiB received"
    shown += f", pairs {row['pairs']:.2f}, {row['of_ideal']:.0%} of ideal"
    if "exposed_of_layer" in row:
        shown += f", transfers exposed for {row['exposed_of_layer']:.1%} of a layer"
    return f"{where}: {shown}"


def table(rows: list[dict]) -> str:
    """Forward and backward: one line per mix and size; ms, and in brackets the share of the ideal."""
    lines = {}
    for row in rows:
        line = lines.setdefault((row["mix"], row["tokens"]), {"mix": row["mix"], "tokens/rank": row["tokens"]})
        cell = "failed"
        if "ms" in row:
            cell = f"{row['ms']['forward+backward']:.2f} ({row['of_ideal']:.0%})"
        line[row["scheme"]] = cell
    columns = ["mix", "tokens/rank", *dict.fromkeys(row["scheme"] for row in rows)]
    return format_table(list(lines.values()), columns)


if __name__ == "__main__":
    sys.exit(main())
