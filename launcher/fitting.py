"""Whether a job fits: the longest sequence that does, and the settings that make one fit that does not."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from longspan.launcher.errors import UserError
from longspan.launcher.estimate import Estimate, Job, estimate, share_of_memory
from longspan.launcher.gpus import GIB, Cluster
from longspan.launcher.validation import LARGEST_SEQ_LEN
from longspan.models.config import SOFTMAX_KINDS


def largest(job: Job) -> tuple[int, int]:
    """(the largest data.seq_len that fits, within a hundredth; the largest power of two): 0 if none does."""
    unit = job.config.data.image_size**2 if job.config.model.task == "images" else 1024
    beyond = LARGEST_SEQ_LEN // unit + 1  # what plans take

    def spare(units: int) -> float:
        """The share of memory that is left."""
        return 1 - share_of_memory(job.with_settings(data={"seq_len": units * unit}))

    # Memory grows nearly linearly: a line finds the limit; a little below and a little above are tried. Host memory
    # grows in jumps, where the line creeps: then halves do.
    start = max(2, job.config.data.seq_len // unit)
    known, widths = {units: spare(units) for units in (start // 2, start)}, []
    while True:
        fitting = max((units for units, left in known.items() if left >= 0), default=0)
        failing = min((units for units, left in known.items() if left < 0), default=beyond)
        if failing - fitting <= max(1, fitting >> 7):
            break
        widths.append(failing - fitting)
        if failing < beyond and len(widths) > 2 and 4 * widths[-1] > widths[-3]:
            guess = (fitting + failing) // 2
        else:
            near = sorted(known, key=lambda units: abs(known[units]))
            a, b = (fitting, failing) if {fitting, failing} <= known.keys() else near[:2]
            falls = (known[a] - known[b]) / (b - a)  # short sequences may show none, beside what length does not change
            line, aside = math.floor(a + known[a] / falls) if falls > 0 else math.inf, max(1, fitting >> 9)
            guess = min(line - aside if line - aside > fitting else line + aside, 8 * max(known))
        guess = min(max(guess, fitting + 1), failing - 1)
        known[guess] = spare(guess)
    power = 1 << ((fitting * unit).bit_length() - 1) if fitting else 0
    doubled = 2 * power // unit
    if power and 2 * power % unit == 0 and doubled < failing and spare(doubled) >= 0:
        return 2 * power, 2 * power
    return fitting * unit, power


def largest_of(jobs: Iterable[Job]) -> tuple[int, int]:
    """Of that job which has the largest."""
    found = 0, 0
    for job in jobs:
        if not found[0] or share_of_memory(job.with_settings(data={"seq_len": found[0]})) < 1:
            found = max(found, largest(job))
    return found


def refuse(job: Job, found: Estimate) -> None:
    """Raises UserError for a job that does not fit, in a line that names settings that, each alone, make it fit."""
    remedies = [text for text, changed in _alternatives(job) if estimate(changed).fits][:2]
    tokens, _ = largest(job)
    if tokens:
        remedies.append(f"data.seq_len={tokens} or less")
    config, host = job.config, sum(found.host.values()) / GIB
    short = []
    if found.peak > found.limit:
        short.append(
            f"a rank needs {found.peak / GIB:.1f} GiB, and of {job.cluster.gpu.memory / GIB:.1f} GiB"
            f" {found.limit / GIB:.1f} can be allocated"
        )
    if host * GIB > found.host_limit:
        largest_part = max(found.host, key=found.host.get)
        short.append(
            f"a machine needs {host:.0f} GiB of host memory, {found.host[largest_part] / GIB:.0f} of it for"
            f" {largest_part}, and has {found.host_limit / GIB:.0f} (--host-memory)"
        )
    raise UserError(
        f"data.seq_len={config.data.seq_len} does not fit on {job.cluster} with train.checkpointing="
        f"{config.train.checkpointing}: {', and '.join(short)}; what does: {', or '.join(remedies) or NOTHING_FITS}"
    )


NOTHING_FITS = "a smaller model, or more GPUs by more than 64 times"


def _alternatives(job: Job) -> Iterator[tuple[str, Job]]:
    """Settings that take less memory, the cheapest first."""
    config = job.config
    if config.model.loss_chunk > 1024:
        yield "model.loss_chunk=1024", job.with_settings(model={"loss_chunk": 1024})
    if config.parallel.sharding == "hsdp" and job.cluster.count > job.cluster.per_node:
        yield "parallel.sharding=fsdp", job.with_settings(parallel={"sharding": "fsdp"})
    if config.train.checkpointing == "none":
        yield "train.checkpointing=full", job.with_settings(train={"checkpointing": "full"})
    if not config.train.mlp_tile:
        yield "train.mlp_tile=8192", job.with_settings(train={"mlp_tile": 8192})
    heads = config.model.kv_heads // job.tp
    if config.parallel.head_groups != heads and not set(SOFTMAX_KINDS).isdisjoint(config.model.layer_kinds):
        yield f"parallel.head_groups={heads}", job.with_settings(parallel={"head_groups": heads})
    if config.train.checkpointing != "none" and not config.train.offload_activations:
        yield "train.offload_activations=true", job.with_settings(train={"offload_activations": True})
    if not job.offload:
        yield "optim.offload=cpu", job.with_settings(optim={"offload": "cpu"})
    if config.train.dtype == "float32":
        yield "train.dtype=bfloat16", job.with_settings(train={"dtype": "bfloat16"})
    if config.parallel.engine == "ddp":
        yield "parallel.engine=fsdp2", job.with_settings(parallel={"engine": "fsdp2"})
    count = job.cluster.count
    for _ in range(6):
        count *= 2
        per_node = count if count <= 8 else max(job.cluster.per_node, 8)
        more = replace(job.cluster, count=count, per_node=per_node, host_memory=_host(job.cluster, per_node))
        try:
            bigger = replace(job, cluster=more)
        except UserError:
            continue  # a batch that so many groups cannot share
        if estimate(bigger).fits:
            yield f"--gpus {more}", bigger
            return


def _host(cluster: Cluster, per_node: int) -> float:
    """Of a machine with so many GPUs and as much for each."""
    return cluster.host_memory / cluster.per_node * per_node
