"""What `longspan plan` prints: the estimate as a table or as JSON, and the refusal of what cannot fit."""

from longspan.launcher.config import Config
from longspan.launcher.estimate import WINDOWS, Estimate, Job, estimate
from longspan.launcher.files import strict_json
from longspan.launcher.fitting import largest_of, refuse
from longspan.launcher.gpus import GIB, Cluster
from longspan.launcher.memory_choice import NAMES, described, settle, smallest

STATE = ("parameters", "optimizer state", "gradients", "gathered parameters, reduced gradients", WINDOWS)


def report(config: Config, cluster: Cluster, document: int = 0, *, as_json: bool = False) -> None:
    """Prints the estimate of the config on these GPUs. UserError for what cannot work, or does not fit."""
    asked = Job(config, cluster, document)
    job = settle(asked)
    found = estimate(job)
    tokens, power = largest_of(smallest(asked)) if found.fits else (0, 0)
    if as_json:
        limits = {"largest_seq_len": tokens, "largest_power_of_two": power} if found.fits else {}
        settings = {name: getattr(job.config.train, name) for name in NAMES}
        start = {"gpus": str(job.cluster), "rates": job.cluster.gpu.source, "settings": settings}
        print(strict_json({**start, **found.as_dict(), **limits}))
    else:
        print("\n".join(lines(job, found)))
        if job is not asked:
            print(f"note: train.checkpointing=auto is {described(job.config)} here")
    if not found.fits:
        refuse(job, found)
    if not as_json:
        print(f"largest data.seq_len that fits: {tokens:,} ({shown(power)} as a power of two)")


def lines(job: Job, found: Estimate) -> list[str]:
    """The table."""
    config, shared = job.config, f" x {job.tp} tensor-parallel" * (job.tp > 1)
    trained = f", {found.num_trained:,} of them trained" * (found.num_trained < found.num_parameters)
    apart = f", {job.head_groups} groups of heads" * (job.head_groups > 1)
    peak, limit = found.peak / GIB, found.limit / GIB
    activations = {name: size for name, size in found.memory.items() if name not in STATE}
    rows = [
        f"{config.run.name} on {job.cluster}: {found.num_parameters:,} parameters{trained},"
        f" {found.tokens:,} tokens a step",
        f"{job.dp} data-parallel x {job.sp} sequence-parallel{shared}, {config.train.dtype}, checkpointing"
        f" {config.train.checkpointing}, {config.parallel.engine}{apart}",
        "",
        *_table("memory of a rank at the peak, GiB", {name: found.memory[name] / GIB for name in STATE}),
        *_table("activations then", {name: size / GIB for name, size in activations.items()}),
        f"  {'peak':<42}{peak:>10.2f}   {100 * peak / limit:.0f} % of {limit:.1f} that can be allocated",
        "",
        *_table("kept for the backward pass, GiB", {name: size / GIB for name, size in found.kept.items()}),
        "",
        *_host(found),
        *_table("step, seconds", found.seconds, total=found.step_s),
        f"  {'step':<42}{found.step_s:>10.3f}   bound by {found.binds}",
        f"  {found.tokens_per_s_per_gpu:,.0f} tokens/s/GPU, MFU {100 * found.mfu:.1f} %",
        "",
        f"rates: {job.cluster.gpu.source}",
    ]
    return rows + [f"note: {note}" for note in found.notes]


def _host(found: Estimate) -> list[str]:
    total, limit = sum(found.host.values()) / GIB, found.host_limit / GIB
    return [
        *_table("host memory of a machine, GiB", {name: size / GIB for name, size in found.host.items()}),
        f"  {'all':<42}{total:>10.2f}   {100 * total / limit:.0f} % of {limit:.0f}",
        "",
    ]


def shown(tokens: int) -> str:
    """131072 as 128K."""
    for size, unit in ((2**30, "G"), (2**20, "M"), (2**10, "K")):
        if tokens and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)


def _table(title: str, values: dict[str, float], total: float = 0.0) -> list[str]:
    """Named numbers, the largest first; those that would show as zero are left out."""
    rows = sorted((item for item in values.items() if item[1] >= 0.0005), key=lambda item: -item[1])
    share = (lambda value: f"   {100 * value / total:.0f} %") if total else lambda value: ""
    digits = 3 if total else 2
    return [title, *(f"  {name:<42}{value:>10.{digits}f}{share(value)}" for name, value in rows)]
