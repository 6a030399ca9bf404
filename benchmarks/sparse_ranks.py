"""Block-sparse attention over several GPUs: blocks by request, a ring, and the choice between them, in one run.

    torchrun --nproc-per-node 4 benchmarks/sparse_ranks.py --output benchmarks/results/sparse_ranks.json
    torchrun --nproc-per-node 4 benchmarks/sparse_ranks.py --layer --output benchmarks/results/sparse_layer.json

One document lies over all ranks. See benchmarks/README.md for what is measured and what the columns mean.
"""

import argparse
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
import torch.distributed as dist

from longspan.attention import Hierarchical, LinearBranch, TopBlocks, sparse, sparse_attention
from longspan.attention.block_parts import STRATEGIES, pieces_of
from longspan.attention.gather_rows import Ranks as Others
from longspan.benchmarks.common import Traffic, format_table, new_record, save
from longspan.benchmarks.linear_ranks import with_efficiency
from longspan.benchmarks.ranks import DIRECTIONS, Ranks, join, layer_step
from longspan.launcher.parsing import parse_tokens
from longspan.parallel import SequenceParallel

SELECTIONS = {
    "sla_ratio": TopBlocks(0.05),
    "sla_top16": TopBlocks(16),
    "llsa2": Hierarchical(16, 8, 2),
    "llsa3": Hierarchical(16, 8, 3),
}
FORCED = ("auto", *STRATEGIES)
FP32 = 4


def scaled(selection, ranks: int):
    """The selection with which one rank's tokens alone are as much work as they are over ranks: a share of the blocks
    of a shorter document is so much larger."""
    if isinstance(selection, TopBlocks) and selection.keep < 1:
        return replace(selection, keep=min(0.999, selection.keep * ranks))
    return selection


def operator_step(selection, seq, arguments, dtype, device):
    """A step that runs sparse_attention, with SLA's linear branch, on this rank's tokens, forward and backward."""
    generator = torch.Generator(device).manual_seed(1 + seq.rank)
    q, k, v, d_out = (
        torch.randn(seq.num_tokens_local, heads, arguments.head_dim, generator=generator, dtype=dtype, device=device)
        for heads in (arguments.heads, arguments.kv_heads, arguments.kv_heads, arguments.heads)
    )
    leaves, branch, width = [x.requires_grad_() for x in (q, k, v)], None, arguments.head_dim
    if isinstance(selection, TopBlocks):
        weight = torch.zeros(width, width, dtype=dtype, device=device, requires_grad=True)
        branch = LinearBranch(weight, torch.zeros(width, dtype=dtype, device=device, requires_grad=True))
        leaves += [branch.weight, branch.bias]

    def step(mark):
        mark()
        out = sparse_attention(q, k, v, selection=selection, linear=branch, causal=arguments.causal, seq=seq)
        mark()
        torch.autograd.grad(out, leaves, d_out)
        mark()

    return step


def decoder_layer(selection, seq, arguments, dtype, device):
    """A step that runs a whole causal decoder layer."""
    if isinstance(selection, TopBlocks):
        kind, settings = "sla", {"sla_keep": selection.keep}
    else:
        kind, settings = "llsa", {"llsa_block": selection.block, "llsa_keep": selection.keep}
        settings["llsa_levels"] = selection.levels
    sizes = arguments.heads, arguments.kv_heads, arguments.head_dim
    return layer_step(kind, *sizes, seq, dtype, device, **settings)


@contextmanager
def watched(seen):
    """Notes which parts ran, and how many rows of others their lists name, counted apart from what is exchanged."""
    attend, parts_of, rows = sparse.attend, sparse.parts_of, Others.rows
    seen |= {"rows": 0}

    def unique(lists, keys, rank):
        for head in pieces_of(lists, keys):
            found = head.unique()
            found = found[(found >= 0) & (found // keys.width != rank)]
            seen["rows"] += int(keys.lengths[found].sum())

    def count_tokens(chosen, tables, causal, strategy, group):
        if not tables.keys.whole:
            unique(chosen[0], tables.keys, dist.get_rank(group))
            seen["sums"] = summed(tables)
        return parts_of(chosen, tables, causal, strategy, group)

    def count_rows(self, blocks, own, tables):
        unique(blocks, tables.means.keys, dist.get_rank(self.group))
        return rows(self, blocks, own, tables)

    def note(*given):
        result = attend(*given)
        remote = [part for part in result[2] if part.remote and not part.coarse]
        seen["took"] = "ring" if len(remote) > 1 or any(part.picked is None for part in remote) else "fetch"
        return result

    with (
        mock.patch.object(sparse, "attend", note),
        mock.patch.object(sparse, "parts_of", count_tokens),
        mock.patch.object(Others, "rows", count_rows),
    ):
        yield


def summed(tables) -> int:
    """Rows and key heads of pooled sums that a rank gets: of keys, and in LLSA of queries, and of keys and values and
    their gradients."""
    if hasattr(tables, "everywhere"):
        return 5 * tables.everywhere.width + (5 if tables.means is not None else 1) * len(tables.routers.shown)
    return tables.keys.width + len(tables.routers.shown)


def time_case(ranks: Ranks, name: str, tokens: int, strategy: str | None, arguments, dtype) -> dict:
    """Times of one strategy; without one, of the rank alone on as many tokens and pairs, all ranks at once."""
    selection, mesh = SELECTIONS[name], ranks.mesh
    if strategy is None:
        selection, seq = scaled(selection, mesh.sp), ranks.alone((tokens // mesh.sp,))
    else:
        groups = mesh.sp_group, mesh.sp_state_group
        parallel = SequenceParallel(*groups, layout=arguments.layout, sparse=strategy, device=ranks.device)
        seq = parallel.context((tokens,))
    causal = arguments.layer or arguments.causal
    pairs = selection.pairs(seq.num_tokens) if causal else selection.pairs(seq.num_tokens, causal=False)
    step = (decoder_layer if arguments.layer else operator_step)(selection, seq, arguments, dtype, ranks.device)
    found = {"ms": ranks.measure(step), "pairs_per_rank": pairs / seq.world_size}
    if strategy is None:
        return found
    seen = {}
    with Traffic() as traffic, watched(seen):
        step(lambda: None)
    row = 2 * arguments.head_dim * dtype.itemsize  # a key and a value
    pooled = seen["sums"] * arguments.kv_heads * arguments.head_dim * FP32 * (seq.world_size - 1)
    totals = torch.tensor([traffic.received, 2 * seen["rows"] * row, pooled], dtype=torch.float64, device=ranks.device)
    dist.all_reduce(totals, group=mesh.sp_group)
    received, blocks, pooled = (totals / 2**20 / seq.world_size).tolist()
    found |= {"took": seen["took"], "received_mib": received, "blocks_mib": blocks, "pooled_mib": pooled}
    return found | {"received_over_needed": received / (blocks + pooled)}


def main() -> int:
    start, arguments = time.monotonic(), parse_arguments()
    mesh = join(arguments.device, timeout_s=300.0)
    if mesh.device.type == "cpu":
        torch.set_num_threads(1)
    ranks = Ranks(mesh, mesh.device, arguments.repetitions)
    dtype = torch.bfloat16 if mesh.device.type == "cuda" else torch.float32
    record = new_record("sparse_ranks", vars(arguments) | {"world_size": mesh.world_size}) | {"rows": []}
    failed = False
    for tokens in arguments.tokens:
        for name in arguments.cases:
            alone = None
            for strategy in (None, *arguments.strategies):
                late = [time.monotonic() - start > arguments.budget]
                dist.broadcast_object_list(late)
                found, error = None, f"skipped: --budget of {arguments.budget:.0f} s is spent"
                if not late[0]:
                    found, error = ranks.guarded(time_case, name, tokens, strategy, arguments, dtype)
                row = {"case": name, "tokens": tokens, "strategy": strategy or "alone"} | (found or {})
                if error:
                    row["error"] = error
                elif strategy is None:
                    alone = row
                elif alone:
                    row["pairs_over_alone"] = row["pairs_per_rank"] / alone["pairs_per_rank"]
                    with_efficiency(row, alone)
                failed |= error is not None
                record["rows"].append(row)
                if mesh.is_main:
                    print(f"{name} {tokens} {row['strategy']}: {error or row['ms']}", flush=True)
                    if arguments.output:
                        save(record | {"seconds": time.monotonic() - start}, arguments.output)
    if mesh.is_main:
        print("\n" + table(record["rows"]), flush=True)
    dist.barrier()  # torchrun ends the other ranks as soon as one reports failure
    dist.destroy_process_group()
    return int(failed)


def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        line = {name: row.get(name) for name in ("case", "strategy", "took")} | {"tokens": f"{row['tokens'] / 1024:g}K"}
        for short, direction in zip(("f", "fb"), DIRECTIONS):
            if "ms" in row:
                line[f"{short} ms"] = f"{row['ms'][direction]:.3f}"
            if "efficiency" in row:
                line[f"{short} share"] = f"{row['efficiency'][direction]:.1%}"
        for name in ("pairs_over_alone", "received_over_needed"):
            line[name] = f"{row[name]:.3f}" if name in row else None
        lines.append(line | {name: row.get(name) for name in ("received_mib", "blocks_mib", "pooled_mib")})
    columns = ["case", "tokens", "strategy", "took", "f ms", "f share", "fb ms", "fb share", "pairs_over_alone"]
    return format_table(lines, [*columns, "received_mib", "blocks_mib", "pooled_mib", "received_over_needed"])


def parse_arguments(argv=None):
    on_gpu = torch.cuda.is_available()
    parser, default = argparse.ArgumentParser(description=__doc__.split("\n")[0]), "(default: %(default)s)"
    add, sizes = parser.add_argument, [1 << 18, 1 << 20] if on_gpu else [1 << 12]
    add("--output", help="JSON file, saved again after every measurement")
    add("--cases", nargs="+", choices=list(SELECTIONS), default=list(SELECTIONS))
    add("--strategies", nargs="+", choices=FORCED, default=list(FORCED))
    add("--tokens", type=parse_tokens, nargs="+", default=sizes, help=f"of all ranks {default}")
    add("--layout", choices=["contiguous", "zigzag"], default=None, help="default: zigzag under a causal mask")
    add("--heads", type=int, default=16 if on_gpu else 2, help=default)
    add("--kv-heads", type=int, default=4 if on_gpu else 1, help=default)
    add("--head-dim", type=int, default=128 if on_gpu else 16, help=default)
    add("--layer", action="store_true", help="time a whole decoder layer, which is causal, instead of the operator")
    add("--causal", action="store_true", help="a causal mask for the operator")
    add("--repetitions", type=int, default=5, help=default)
    add("--device", choices=["cuda", "cpu"], default="cuda" if on_gpu else "cpu")
    add("--budget", type=float, default=540.0, help=f"seconds after which no case is started {default}")
    arguments = parser.parse_args(argv)
    for name in ("heads", "kv_heads", "head_dim", "repetitions"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be at least 1")
    if arguments.heads % arguments.kv_heads:
        parser.error(f"--kv-heads {arguments.kv_heads} does not divide --heads {arguments.heads}")
    causal = arguments.layer or arguments.causal
    arguments.layout = arguments.layout or ("zigzag" if causal else "contiguous")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
