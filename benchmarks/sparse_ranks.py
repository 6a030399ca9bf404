"""Block-sparse attention over several GPUs: blocks by request, a ring, and the choice between them, in one run.

    torchrun --nproc-per-node 4 benchmarks/sparse_ranks.py --output benchmarks/results/sparse_ranks.json
    torchrun --nproc-per-node 4 benchmarks/sparse_ranks.py --layer --output benchmarks/results/sparse_layer.json

One document lies over all ranks. See benchmarks/README.md for what is measured and what the columns mean.
"""

import argparse
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

from longspan.attention import Hierarchical, LinearBranch, TopBlocks, requests, sparse, sparse_attention
from longspan.attention.block_parts import STRATEGIES, pieces_of
from longspan.attention.requests import Asked
from longspan.benchmarks.arguments import BUDGET, device_name, require_positive, writable, writable_folder
from longspan.benchmarks.common import Traffic, format_table, new_record, save
from longspan.benchmarks.linear_ranks import with_efficiency
from longspan.benchmarks.ranks import DIRECTIONS, NCCL, Ranks, join, layer_step
from longspan.launcher.arguments import num_tokens
from longspan.launcher.breakdown import EXPOSED, Work, break_down
from longspan.parallel import SequenceParallel

SELECTIONS = {
    "sla_ratio": TopBlocks(0.05),
    "sla_top16": TopBlocks(16),
    "llsa2": Hierarchical(16, 8, 2),
    "llsa3": Hierarchical(16, 8, 3),
}
FORCED = ("auto", *STRATEGIES)
WAYS = (*FORCED, "auto" + NCCL, "fetch" + NCCL)  # through shared memory, where GPUs have it, or without
FP32 = 4
# What kernels of the operator are for, by how their names begin.
PARTS = {
    "forward": ("forward_kernel",),
    "dq": ("queries_kernel", "rows_kernel"),
    "dk, dv": ("keys_kernel", "add_kernel"),
    "choosing": ("pool_", "levels_", "split_", "top_", "descend_", "blocks_below_"),
    "lists": ("list_rows", "list_columns", "mark_", "sum_cells_", "scan_", "place_", "order_"),
    "packing": ("ask_kernel", "count_kernel", "locate_kernel", "rename_kernel", "pack_kernel", "add_packed_kernel"),
    "branch": ("whole_", "sums_kernel", "output_kernel", "query_grad", "key_grad", "inside_key", "listed_kernel"),
}

COMMUNICATION = "nccl", "peer_"


class Kernel(NamedTuple):
    """ms since ranks met."""

    begin: float
    end: float
    stream: int
    name: str


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
    attend, parts_of = sparse.attend, sparse.parts_of

    def count_tokens(chosen, tables, causal, strategy, group, *rest):
        if not tables.keys.whole:
            seen.update(rows=0, sums=summed(tables))
            for head in pieces_of(chosen[0], tables.keys):
                found = head.unique()
                found = found[(found >= 0) & (found // tables.keys.width != dist.get_rank(group))]
                seen["rows"] += int(tables.keys.lengths[found].sum())
        return parts_of(chosen, tables, causal, strategy, group, *rest)

    def note(*given):
        result = attend(*given)
        remote = [part for part in result[2] if part.remote]
        seen["took"] = "fetch" if len(remote) == 1 and isinstance(remote[0].way, Asked) else "ring"
        return result

    with mock.patch.object(sparse, "attend", note), mock.patch.object(sparse, "parts_of", count_tokens):
        yield


def summed(tables) -> tuple[int, int]:
    """Rows and key heads of pooled sums in fp32, of keys and, in LLSA, of values and queries, that a rank gets of each
    other, and those of gradients of means, which are as wide as keys."""
    shown = len(tables.routers.shown)
    if not hasattr(tables, "owned"):
        return tables.keys.width + shown, 0
    second = 0 if tables.second is None else tables.second.width
    return 2 * tables.keys.width + second + shown, 2 * len(tables.owned.tree.size)


def time_case(ranks: Ranks, name: str, tokens: int, strategy: str | None, arguments, dtype) -> dict:
    """Times of one strategy; without one a rank's share of the time that it takes for the whole document by itself, all
    ranks at once."""
    selection, mesh = SELECTIONS[name], ranks.mesh
    if strategy is None:
        seq = ranks.alone((tokens,))
    else:
        groups, peers = (mesh.sp_group, mesh.sp_state_group), None if strategy.endswith(NCCL) else ranks.peers
        options = {"layout": arguments.layout, "sparse": strategy.removesuffix(NCCL), "device": ranks.device}
        parallel = SequenceParallel(*groups, peers=peers, **options)
        seq = parallel.context((tokens,))
    step = (decoder_layer if arguments.layer else operator_step)(selection, seq, arguments, dtype, ranks.device)
    found = {"ms": ranks.measure(step)}
    if ranks.device.type == "cuda":
        kernels = kernels_of(step, mesh.sp_group)
        found["parts_ms"] = ranks.mean(by_part(kernels))
        if arguments.kernels and mesh.is_main:
            path = Path(arguments.kernels, f"{name}-{tokens}-{strategy or 'alone'}.txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(listing(kernels), encoding="utf-8")
    if strategy is None:
        return {of: {part: ms / mesh.sp for part, ms in times.items()} for of, times in found.items()}
    seen, before = {}, ranks.received()
    with Traffic() as traffic, watched(seen):
        step(lambda: None)
    wide, narrow = seen["sums"]
    row = 2 * arguments.head_dim * dtype.itemsize  # a key and a value
    pooled = (wide * FP32 + narrow * dtype.itemsize) * arguments.kv_heads * arguments.head_dim * (seq.world_size - 1)
    received = traffic.received + ranks.received() - before
    totals = torch.tensor([received, 2 * seen["rows"] * row, pooled], dtype=torch.float64, device=ranks.device)
    dist.all_reduce(totals, group=mesh.sp_group)
    received, blocks, pooled = (totals / 2**20 / seq.world_size).tolist()
    found |= {"took": seen["took"], "received_mib": received, "blocks_mib": blocks, "pooled_mib": pooled}
    return found | {"received_over_needed": received / (blocks + pooled)}


def kernels_of(step, group) -> list[Kernel]:
    """What a GPU does in a step, by its begin. As in `Ranks.measure` ranks meet first, with the host ahead."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.cuda._sleep(20_000_000)
        dist.all_reduce(torch.ones(1, device="cuda"), group=group)
        step(lambda: None)
        torch.cuda.synchronize()
    found = [
        Kernel(event.time_range.start / 1e3, event.time_range.end / 1e3, event.device_resource_id, event.name)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    found.sort()
    met = next(x.end for x in found if "nccl" in x.name)
    return [Kernel(x.begin - met, x.end - met, *x[2:]) for x in found if x.begin >= met]


def by_part(kernels: list[Kernel]) -> dict[str, float]:
    """ms of a step by what it does, see PARTS: every instant belongs to what is computed then, else to communication,
    which is exposed, else to the host, for which the GPU waits. In "nccl" all communication, through shared memory as
    well."""
    work = []
    for begin, end, _, name in kernels:
        kind = next((kind for kind in COMMUNICATION if kind in name), "")
        work.append(Work(begin, end, part_of(name), communication=kind))
    found = break_down(work, (min(x.start for x in work), max(x.end for x in work)))
    times = {part: 0.0 for part in (*PARTS, "other", "exposed", "idle")}
    for (component, _), ms in found.seconds.items():
        times["exposed" if component == EXPOSED else component] += ms
    return times | {"nccl": found.communication, "launches": float(len(work))}


def listing(kernels: list[Kernel]) -> str:
    """A line for each: when it begins and how long it takes in microseconds, its stream and name."""
    lines = [f"{1e3 * x.begin:10.1f} {1e3 * (x.end - x.begin):9.1f} {x.stream:4} {x.name}\n" for x in kernels]
    return f"{'begins us':>10} {'takes us':>9} {'on':>4} kernel\n" + "".join(lines)


def part_of(kernel: str) -> str:
    """The part that a kernel of this name belongs to."""
    return next((part for part, names in PARTS.items() if any(kernel.startswith(name) for name in names)), "other")


def main() -> int:
    start, arguments = time.monotonic(), parse_arguments()
    requests.GROUPS = arguments.groups
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
                given = name, tokens, strategy, arguments, dtype
                found, error = ranks.within(start, arguments.budget, time_case, *given)
                row = {"case": name, "tokens": tokens, "strategy": strategy or "alone"} | (found or {})
                if error:
                    row["error"] = error
                elif strategy is None:
                    alone = row
                elif alone:
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
        needed = row.get("received_over_needed")
        line |= {"MiB": row.get("received_mib"), "over needed": None if needed is None else f"{needed:.3f}"}
        lines.append(line | {part: f"{ms:.2f}" for part, ms in row.get("parts_ms", {}).items()})
    columns = ["case", "tokens", "strategy", "took", "f ms", "f share", "fb ms", "fb share", "MiB", "over needed"]
    parts = list(next((row["parts_ms"] for row in rows if "parts_ms" in row), ()))
    return format_table(lines, columns) + ("\n\n" + format_table(lines, columns[:3] + parts) if parts else "")


def parse_arguments(argv=None):
    on_gpu = torch.cuda.is_available()
    parser, default = argparse.ArgumentParser(description=__doc__.split("\n")[0]), "(default: %(default)s)"
    add, sizes = parser.add_argument, [1 << 18] if on_gpu else [1 << 12]
    add("--output", type=writable, help="JSON file, saved again after every measurement")
    add("--kernels", type=writable_folder, metavar="DIR", help="on GPUs: where lists of what rank 0 launches go")
    add("--cases", nargs="+", choices=list(SELECTIONS), default=list(SELECTIONS))
    add("--strategies", nargs="+", choices=WAYS, default=list(FORCED), help=f"{NCCL}: not through shared memory")
    add("--groups", type=int, default=requests.GROUPS, help=f"of lists, whose keys come one after the other {default}")
    add("--tokens", type=num_tokens, nargs="+", default=sizes, help=f"of all ranks {default}")
    add("--layout", choices=["contiguous", "zigzag"], default=None, help="default: zigzag under a causal mask")
    add("--heads", type=int, default=16 if on_gpu else 2, help=default)
    add("--kv-heads", type=int, default=4 if on_gpu else 1, help=default)
    add("--head-dim", type=int, default=128 if on_gpu else 16, help=default)
    add("--layer", action="store_true", help="time a whole decoder layer, which is causal, instead of the operator")
    add("--causal", action="store_true", help="a causal mask for the operator")
    add("--repetitions", type=int, default=5, help=default)
    add("--device", type=device_name, choices=["cuda", "cpu"], default="cuda" if on_gpu else "cpu")
    add("--budget", type=float, default=540.0, help=f"{BUDGET} {default}")
    arguments = parser.parse_args(argv)
    require_positive(parser, arguments, "tokens", "heads", "kv_heads", "head_dim", "repetitions", "groups")
    if arguments.heads % arguments.kv_heads:
        parser.error(f"--kv-heads {arguments.kv_heads} does not divide --heads {arguments.heads}")
    if arguments.kernels and arguments.device == "cpu":
        parser.error("--kernels lists what GPUs do, and --device is cpu: leave it out")
    causal = arguments.layer or arguments.causal
    arguments.layout = arguments.layout or ("zigzag" if causal else "contiguous")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
