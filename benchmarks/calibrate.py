"""What softmax attention and moving its keys cost on this machine, for plans of mixed lengths (`parallel.costs`).

    longspan bench calibrate --output costs.json
    torchrun --nproc-per-node 4 -m longspan.benchmarks.calibrate --output costs.json

Times attention on one rank, on short and on long documents, and exchanges with a rank of the same node and of another.
Takes about a minute. What cannot be measured, such as links of a machine alone, is taken from the built-in table.
"""

import argparse
import sys
from dataclasses import asdict, replace

import torch
import torch.distributed as dist

from longspan.attention import softmax_attention
from longspan.benchmarks.arguments import parse_calibrate
from longspan.benchmarks.common import format_table, measure, new_record, save
from longspan.benchmarks.ranks import join
from longspan.parallel import Costs, SequenceParallel
from longspan.parallel.costs import key_bytes, token_bytes
from longspan.parallel.exchange import start_exchange

MODEL = ("heads", "kv_heads", "head_dim", "bytes_per_number")


def main(arguments: argparse.Namespace | None = None) -> int:
    arguments = arguments or parse_calibrate()
    mesh = join(arguments.device)
    device = mesh.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads = arguments.heads, arguments.kv_heads, arguments.head_dim
    record = new_record("calibrate", vars(arguments) | {"world_size": mesh.world_size})

    short, long = (time_attention(n, arguments, device, dtype) for n in (arguments.short, arguments.long))
    seconds_per_byte = {
        where: time_exchange(peer, mesh, arguments) for where, peer in peers(mesh.sp_rank, mesh.sp_topology).items()
    }
    costs = fit(short, long, seconds_per_byte, heads, dtype.itemsize)
    record |= {
        "costs": asdict(costs),
        "model": dict(zip(MODEL, (*heads, dtype.itemsize), strict=True)),
        "measured": {"attention": [short, long], "seconds_per_byte": seconds_per_byte},
    }
    if mesh.is_main:
        if arguments.output:
            save(record, arguments.output)
        print(summary(record), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return 0


def time_attention(length: int, arguments, device, dtype) -> dict:
    """Forward and backward of causal attention over documents of `length` tokens, on every rank by itself: the tokens,
    the seconds of the slowest rank, and query-key pairs."""
    count = max(1, arguments.long // length)
    seq = SequenceParallel(device=device).context((length,) * count)
    kv_shape = count * length, arguments.kv_heads, arguments.head_dim
    q = torch.randn(count * length, arguments.heads, arguments.head_dim, dtype=dtype, device=device)
    k, v = (torch.randn(kv_shape, dtype=dtype, device=device) for _ in range(2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    d_out = torch.randn_like(q)

    def step(mark):
        mark()
        torch.autograd.grad(softmax_attention(*leaves, seq=seq), leaves, d_out)
        mark()

    (seconds,) = measure(step, device, budget_s=arguments.seconds, group=dist.group.WORLD)
    return {"length": length, "documents": count, "pairs": count * length * (length + 1) // 2, "seconds": seconds}


def peers(rank: int, topology) -> dict[str, int]:
    """The rank that this one sends to: the next of its node, and the one in its place on the next node."""
    size, found = topology.ranks_per_node, {}
    if size > 1:
        found["near"] = rank // size * size + (rank + 1) % size
    if topology.nodes > 1:
        found["far"] = (rank + size) % topology.world_size
    return found


def time_exchange(to: int, mesh, arguments) -> float:
    """Seconds per byte that a rank receives, all ranks at once."""
    size, world_size = mesh.sp_topology.ranks_per_node, mesh.sp
    near = to // size == mesh.sp_rank // size
    back = mesh.sp_rank // size * size + (mesh.sp_rank - 1) % size if near else (mesh.sp_rank - size) % world_size
    sent = torch.zeros(arguments.megabytes << 18, device=mesh.device)
    received = torch.empty_like(sent)

    def step(mark):
        mark()
        start_exchange([(to, sent)], [(back, received)], mesh.sp_group).wait()
        mark()

    (seconds,) = measure(step, mesh.device, budget_s=arguments.seconds, group=mesh.sp_group)
    return seconds / (sent.numel() * sent.element_size())


def fit(short: dict, long: dict, seconds_per_byte: dict, heads, bytes_per_number: int) -> Costs:
    """Costs such that short and long documents take what was measured; links that were not are the built-in ones."""
    slow, fast = (x["seconds"] / x["pairs"] for x in (short, long))
    # slow = pair (1 + start / short), fast = pair (1 + start / long)
    ratio = max(slow / fast, 1.0)
    left = 1 / short["length"] - ratio / long["length"]
    start = min((ratio - 1) / left, short["length"] * 10.0) if left > 0 else short["length"] * 10.0
    costs = replace(
        Costs.h200(*heads, bytes_per_number), pair_s=fast / (1 + start / long["length"]), start_tokens=round(start)
    )
    keys, tokens = key_bytes(*heads[1:], bytes_per_number), token_bytes(*heads, bytes_per_number)
    for where, prefix in (("near", ""), ("far", "remote_")):
        if where in seconds_per_byte:
            per_byte = seconds_per_byte[where]
            costs = replace(costs, **{f"{prefix}key_s": keys * per_byte, f"{prefix}token_s": tokens * per_byte})
    return costs


def summary(record: dict) -> str:
    builtin = asdict(Costs.h200(*record["model"].values()))
    rows = [
        {"": name, "here": f"{value:.3g}", "H200": f"{builtin[name]:.3g}"} for name, value in record["costs"].items()
    ]
    missing = {"near": "key_s, token_s", "far": "remote_key_s, remote_token_s"}
    missing = [names for where, names in missing.items() if where not in record["measured"]["seconds_per_byte"]]
    note = f"\nnot measured, built in: {', '.join(missing)}" if missing else ""
    return format_table(rows, ["", "here", "H200"]) + note


if __name__ == "__main__":
    sys.exit(main())
