"""Seconds of a training step by component: what the device computes, what shows of transfers, and where it waits.

Computation is counted (models.activations) and divided by rates (launcher.gpus). What shows of communication and of the
host follows from when things may start, stage by stage (`timeline`): FSDP2 (arXiv 2304.11277, section 3.3, for the
principle) gathers a block while the last one computes and reduces its gradients while the next one does, so that the
first gather and the last reduction have nothing to hide behind; in the backward pass blocks are gathered again.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from longspan.attention.hierarchy import Hierarchical
from longspan.attention.moved import head_parallel_ranks
from longspan.attention.outline import Call
from longspan.attention.outline.linear import PROCESSORS
from longspan.attention.schedules import STRATEGIES as KEYS_TRAVEL
from longspan.attention.schedules import ranks_at_once
from longspan.attention.shared_requests import PROGRAMS
from longspan.launcher.gpus import (
    BACKEND_SHARE,
    BLOCK_S,
    HOST_LINK,
    HOST_RATE,
    LAST_LEVEL_SHARE,
    LATENCY_S,
    LAUNCH_S,
    LINEAR_IN_STEP,
    LINEAR_NS,
    POINTWISE_SHARE,
    SHARDING_SHARE,
    SMALL_BLOCK_SHARE,
    SPARSE_SHARE,
    THREAD_RATE,
    UPDATE_SHARE,
)
from longspan.launcher.state_sizes import MASTER
from longspan.models.activations import LOSS, Measured, Stage
from longspan.parallel.layout import Layout

EXPOSED, WAITING, COPIES = "communication, exposed", "waiting for the host", "copies of sharding"
OPTIMIZER_TRAFFIC = 40  # bytes per parameter: norm, clipping, and an update that reads four numbers and writes three
CALL_LAUNCHES = 8  # kernels of one call of attention, about
SUMS = 2  # small collectives of a step that nothing runs beside: of losses, and of the norm of gradients
STEPS = 3  # of a timeline until it repeats: the host is at most one step ahead of the device


def step_seconds(job, measured: Measured) -> dict[str, float]:
    """Seconds of a step of the job (an estimate.Job) by component; they add up."""
    gpu, times, parts = job.cluster.gpu, Counter(), []
    forward = backward = 0.0
    for number, stage in enumerate(measured.stages):
        computing = compute_seconds(job, stage)
        computing[COPIES] += _copied(job, measured, number) / (SHARDING_SHARE * gpu.memory_rate)
        seconds = sum(computing.values())
        times.update(computing)
        parts.append(_part(job, measured, number, seconds))
        forward, backward = (forward, backward + seconds) if stage.backward else (forward + seconds, backward)
    update = min(THREAD_RATE, HOST_RATE / job.cluster.per_node) if job.offload else UPDATE_SHARE * gpu.memory_rate
    optimizer = OPTIMIZER_TRAFFIC * measured.num_trained / job.shards / update
    shown, idle = timeline(parts, job.micro_batches, optimizer)
    times = Counter({name: seconds * job.micro_batches for name, seconds in times.items()})
    times[EXPOSED] = shown + job.micro_batches * activations_exposed(measured, forward, backward)
    times[EXPOSED] += SUMS * LATENCY_S * (job.cluster.count > 1)
    times[WAITING], times["optimizer"] = idle, optimizer
    return {name: seconds for name, seconds in times.items() if seconds > 0}


def compute_seconds(job, stage: Stage) -> Counter:
    """Of what the device computes in a stage, by component."""
    gpu, times = job.cluster.gpu, Counter()
    products = (gpu.products if job.dtype == torch.bfloat16 else gpu.products_fp32) * 1e12
    for name, count in stage.flops.items():
        times["loss" if name == LOSS else "projections and MLP"] += count / products
    for name, size in stage.traffic.items():
        share = 1 if name == LOSS else POINTWISE_SHARE
        times["loss" if name == LOSS else "norms, gates, rotations"] += size / (share * gpu.memory_rate)
    for call, count in stage.calls.items():
        times[NAMES[call.kind]] += count * call_seconds(job, call)
    return times


@dataclass(frozen=True)
class Part:
    """A stage as the timeline sees it, in seconds: of the device's computation; of transfers beside which nothing runs;
    of the host, until all is queued; of gathering its parameters before it and reducing its gradients after it, and of
    summing them over copies in the last micro-batch. waits: whether the host waits for the device first."""

    computing: float
    shown: float = 0.0
    host: float = 0.0
    gather: float = 0.0
    reduce: float = 0.0
    copies: float = 0.0
    waits: bool = False
    backward: bool = False


def timeline(parts: Sequence[Part], micro_batches: int = 1, update: float = 0.0) -> tuple[float, float]:
    """(seconds of a step in which communication alone runs, those in which the device waits for the host), of a step
    like all others.

    The host queues stage after stage, one step ahead at most. Gathers and reductions take turns on the link. A gather
    starts when its buffers are free: backward when the stage before has its parameters, where it is queued, forward
    when the one before that has, and the host is there. Gradients are reduced after a stage, and the next stage is not
    done before they are.
    """
    host = gpu = link = 0.0
    ends = [0.0, 0.0]  # of steps
    for _ in range(STEPS):
        shown = idle = 0.0
        host = max(host, ends[-2])
        for batch in range(micro_batches):
            reduced, begun = 0.0, gpu
            arrives = link = max(link, host, gpu) + parts[0].gather
            for part, following in zip(parts, [*parts[1:], Part(0.0)]):
                if part.waits:
                    host = max(host, gpu)
                ready = max(gpu, host)
                start = max(ready, arrives)
                done = start + part.computing + part.shown
                idle += ready - gpu
                shown += start - ready + part.shown + max(0.0, reduced - done)
                done = max(done, reduced)
                queued, host = host, host + part.host
                if following.gather:
                    free, queued = (start, queued) if following.backward else (begun, host)
                    arrives = link = max(link, queued, free) + following.gather
                idle += max(0.0, host - done)
                gpu, begun = max(done, host), start
                if part.reduce or part.copies:
                    link = max(link, gpu) + part.reduce + part.copies * (batch == micro_batches - 1)
                    reduced = link
            shown += max(0.0, reduced - gpu)
            gpu = max(gpu, reduced)
        gpu += update
        ends.append(gpu)
    return shown, idle


def _part(job, measured: Measured, number: int, computing: float) -> Part:
    """Of stage `number` of a micro-batch, which computes for so long."""
    stage, gpu, shown = measured.stages[number], job.cluster.gpu, 0.0
    for call, count in stage.calls.items():
        if call.backward == stage.backward or call.kind == "convolution":  # what came from others is kept
            shown += count * TRANSFERS[call.kind](job, call, call_seconds(job, call))
    # Of layers that are shared, and of tokens that move for attention.
    shown += stage.exchanged / gpu.intra + stage.crossed / gpu.inter + stage.exchanges * LATENCY_S
    (size, trained), (gathers, reduces) = _parameters(measured, stage), _moves(measured, number)
    host = LAUNCH_S * (stage.launches + CALL_LAUNCHES * sum(stage.calls.values()))
    host += BLOCK_S * (gathers and stage.block is not None)
    gathered, reduced, summed = per_parameter(job)
    gather, reduce, copies = map(_transfer, (size * gathered, trained * reduced, trained * summed))
    return Part(
        computing, shown, host, gathers * gather, reduces * reduce, reduces * copies, stage.waits, stage.backward
    )


def _parameters(measured: Measured, stage: Stage) -> tuple[int, int]:
    """Whole ones of what FSDP2 gathers together, a block, or all outside blocks; and how many of them are trained."""
    if stage.block is None:
        return measured.root_parameters, measured.root_trained
    return measured.block_parameters[stage.block], measured.block_trained[stage.block]


def _moves(measured: Measured, number: int) -> tuple[bool, bool]:
    """Whether parameters are gathered before a stage, and gradients reduced after it. Those outside blocks are gathered
    once and stay."""
    stages = measured.stages
    stage, last = stages[number], number + 1 == len(stages)
    in_block = stage.block is not None
    return (in_block and not stage.waits) or number == 0, stage.backward and (in_block or last)


def per_parameter(job) -> tuple[float, float, float]:
    """Seconds of one parameter on its way: gathered, its gradient reduced, and summed over copies of a shard, which is
    twice its size. In host memory they are moved to the GPU and back besides."""
    share, away = 1 - 1 / job.shards, MASTER / job.shards / HOST_LINK * job.offload
    copies = job.cluster.count // job.tp // job.shards
    across = job.cluster.gpu.inter if job.shards > 1 else _link(job, copies)
    return (
        job.itemsize * share / _link(job, job.shards) + away,
        job.reduce_size * share / _link(job, job.shards) + away,
        2 * job.reduce_size * (1 - 1 / copies) / job.shards / across,
    )


def _transfer(seconds: float) -> float:
    return seconds + LATENCY_S if seconds else 0.0


def _copied(job, measured: Measured, number: int) -> float:
    """Bytes that FSDP2 reads and writes on the device around its transfers: shards are cast and packed, what arrives is
    unpacked, and gradients are packed in the dtype that they are reduced in."""
    gathers, reduces = _moves(measured, number)
    packed = (MASTER + 3 * job.itemsize) / job.shards + 2 * job.itemsize * (job.shards > 1)
    size, trained = _parameters(measured, measured.stages[number])
    return gathers * packed * size + reduces * (job.itemsize + job.reduce_size) * trained


def call_seconds(job, call: Call) -> float:
    """Of one attention kernel on one rank."""
    gpu, tokens = job.cluster.gpu, sum(job.lengths) / job.sp
    if call.kind == "linear":
        width = max((call.key_size + call.value_size) / 256, _padded(call.key_size) * _columns(call.value_size) / 2**14)
        rate = LINEAR_NS[call.detail][call.backward] * 1e-9 * LINEAR_IN_STEP * gpu.linear
        return rate * tokens * call.heads * width
    if call.kind == "convolution":
        return (3 if call.backward else 2) * tokens * call.key_size * job.itemsize / gpu.memory_rate
    if call.kind == "softmax":
        share = BACKEND_SHARE.get(job.backend, (1.0, 1.0))[call.backward] if gpu.hopper else 1.0
        work, packing = job.pairs(call.detail) / share, 0.0
    else:
        work = _sparse_work(job, call) / job.sp
        packing = _packed(job, call) / gpu.memory_rate
    rates = gpu.attention[min(gpu.attention, key=lambda width: abs(width - call.key_size))]
    rate = rates[call.backward] if job.dtype == torch.bfloat16 else gpu.products_fp32
    flops = 4.0 * work * call.heads * call.key_size * (2.5 if call.backward else 1)
    return flops / (rate * 1e12) + packing


def _sparse_work(job, call: Call) -> float:
    """Pairs of all documents that dense attention would take as long for."""
    direction = {} if job.config.model.causal else {"causal": False}
    pairs = sum(call.detail.pairs(length, **direction) for length in job.lengths)
    share = SPARSE_SHARE[call.backward]
    if not isinstance(call.detail, Hierarchical):
        return pairs / share
    above = sum(call.detail.pairs_above(length, **direction) for length in job.lengths)
    share = min(share, SMALL_BLOCK_SHARE[call.backward] * call.detail.block / 16)
    return above / LAST_LEVEL_SHARE[call.backward] + (pairs - above) / share


def _packed(job, call: Call) -> float:
    """Bytes read and written on the device where keys come by request: forward this rank's are packed for others, or
    laid into its window, and laid beside those that arrive, about all each time; backward their gradients and those
    that return are added."""
    if call.asked is None or job.sp == 1:
        return 0.0
    return (3 if call.backward else 4) * _key_bytes(job, call) * sum(job.lengths) / job.sp


def ring_transfer(job, call: Call, seconds: float) -> float:
    """What shows of keys that travel to queries. Those of the next step travel beside the kernels of this one; backward
    the gradients of the last step's keys go home too, and those of the last step beside nothing, except where local
    queries were kept for then. Where ranks exchange heads, fewer steps bring all their keys of as many times fewer
    heads."""
    layout, strategy = job.attention_layout(call.detail), job.config.parallel.softmax
    ranks = _ranks_of_a_document(layout) // head_parallel_ranks(job.parallel, job.heads)
    if ranks <= 1:
        return 0.0
    tokens = max(layout.tokens_per_rank)
    if call.detail.window is not None:  # before each of two parts, of one neighbour
        tokens, ranks = min(tokens, 2 * (call.detail.window - 1)), 2
    together = 1 if strategy in (*KEYS_TRAVEL, "usp") else job.per_node
    strategy = strategy if strategy in KEYS_TRAVEL else "ring"
    # Some rank sees all of what travels in a step, and the others wait for it.
    of_rank, local = _key_seconds(job, call, tokens, together), seconds / ranks
    beside, last = (local, 0.0) if strategy == "ring" or not call.backward else (local / 2, local / 2)
    shown = returning = 0.0
    for count in ranks_at_once(strategy, ranks, call.heads // call.kv_heads):
        arriving, home = count * of_rank, returning
        shown += max(0.0, arriving + home - beside)
        beside, returning = count * local, count * of_rank * call.backward
    return shown + max(0.0, returning - last) + LATENCY_S


def request_transfer(job, call: Call, seconds: float) -> float:
    """What shows of keys of sparse layers: flags of who asks for what, and means of keys where there are levels, which
    choices wait for; what is asked for travels beside attention to local keys, backward its gradients do. Through
    memory that ranks share some processors move it, and attention has the others. In a ring as softmax attention's."""
    if job.sp == 1:
        return 0.0
    beside = seconds / job.sp
    if call.asked is None:
        shown, waits = max(0.0, _key_seconds(job, call, sum(job.lengths) * (1 - 1 / job.sp)) - seconds + beside), 0
    else:
        away = _key_seconds(job, call, call.asked)
        shown, waits = max(0.0, away - beside) + (call.window > 0) * away * PROGRAMS / PROCESSORS, LATENCY_S
    if isinstance(call.detail, Hierarchical):
        block, levels = call.detail.block, range(1, call.detail.levels + 1)
        means = sum(job.lengths) * (1 - 1 / job.sp) * sum(block**-level for level in levels)
        waits += LATENCY_S + _key_seconds(job, call, means)
    return shown + waits * (not call.backward) + LATENCY_S


def _key_seconds(job, call: Call, tokens: float, together: int = 0) -> float:
    """Of keys and values of so many tokens on their way to one rank, to a machine over the links of so many of its
    ranks, 0 for all."""
    size, gpu = _key_bytes(job, call) * tokens, job.cluster.gpu
    return size / gpu.intra + (job.sp > job.per_node) * size / gpu.inter / (together or job.per_node)


def _key_bytes(job, call: Call) -> int:
    """Of the key and the value of one token."""
    return 2 * call.kv_heads * call.key_size * job.itemsize


def _ranks_of_a_document(layout: Layout) -> int:
    """Ranks that one is on, at most."""
    return max(Counter(document for spans in layout.spans for document in {span.document for span in spans}).values())


def state_transfer(job, call: Call, seconds: float) -> float:
    """Summaries from every other rank, of each span whose document goes on elsewhere. Backward they travel while dq is
    computed."""
    lengths = job.layout.lengths
    summaries = max(sum(len(span) < lengths[span.document] for span in spans) for spans in job.layout.spans)
    if not summaries:
        return 0.0
    size = call.heads * call.key_size * (call.value_size + (call.key_size if "delta" in call.detail else 0)) * 4
    transfer = LATENCY_S + summaries * (job.sp - 1) * size / _near_or_cross(job)
    return max(0.0, transfer - seconds / 3) if call.backward else transfer


def halo_transfer(job, call: Call, seconds: float) -> float:
    """A few rows, which travel while the rest is convolved."""
    return 0.0 if job.sp == 1 else max(0.0, LATENCY_S - seconds)


NAMES = {
    "softmax": "softmax attention", "linear": "linear attention", "sparse": "sparse attention",
    "convolution": "short convolutions",
}  # fmt: skip
TRANSFERS = {
    "softmax": ring_transfer, "linear": state_transfer, "sparse": request_transfer, "convolution": halo_transfer,
}  # fmt: skip


def activations_exposed(measured: Measured, forward: float, backward: float) -> float:
    """Of what layers keep on its way to host memory beside the forward pass of so many seconds, and back beside the
    other."""
    one_way = sum(measured.put_away) / HOST_LINK
    return max(0.0, one_way - forward) + max(0.0, one_way - backward)


def _near_or_cross(job) -> float:
    """Bytes per second of one rank to others of its sequence."""
    return job.cluster.gpu.intra if job.sp <= job.per_node else job.cluster.gpu.inter


def _link(job, ranks: int) -> float:
    """Rings cross between machines once for all GPUs of one, over the links of all."""
    gpu = job.cluster.gpu
    return gpu.intra if ranks <= job.per_node else min(gpu.intra, gpu.inter * job.per_node)


def _padded(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _columns(width: int) -> int:
    return -(-width // 64) * 64
