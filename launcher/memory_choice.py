"""train.checkpointing=auto: of settings that trade time for memory the quickest that fit, as `longspan plan` counts.

They change no loss and no gradient but by rounding (of tiles), so a run may go on with others, on other GPUs.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch

from longspan.launcher.agreement import decide
from longspan.launcher.calibration import load_costs
from longspan.launcher.config import Config
from longspan.launcher.cpu_limits import memory, memory_here
from longspan.launcher.environment import packages
from longspan.launcher.estimate import Job, countable, lengths_of, share_of_memory
from longspan.launcher.gpus import GPUS, Cluster, extras_of, kind_of
from longspan.parallel.mesh import Mesh

log = logging.getLogger("longspan")

SPARE = 0.1  # of the memory that is left free: plans of measured runs are within it (docs/scaling.md)
TILE = 16 * 1024
RUNGS = (  # the quickest first; tiles, which cost a hundredth, before host memory
    {"checkpointing": "none"},
    {"checkpointing": "selective"},
    {"checkpointing": "full"},
    {"checkpointing": "full", "mlp_tile": TILE},
    {"checkpointing": "full", "offload_activations": True},
    {"checkpointing": "full", "mlp_tile": TILE, "offload_activations": True},
)
NAMES = tuple(RUNGS[-1])


def choices(config: Config) -> Iterator[Config]:
    """The config with the settings of a rung each; a tile, an offload and kinds of layers that it names itself stay."""
    train = config.train
    given = {name: getattr(train, name) for name in NAMES[1:] if getattr(train, name)}
    seen = []
    for rung in RUNGS:
        settings = rung | given
        wants_checkpointing = "offload_activations" in given or train.checkpoint_layers
        if settings not in seen and not (settings["checkpointing"] == "none" and wants_checkpointing):
            seen.append(settings)
            yield replace(config, train=replace(train, **settings))


def choose(configs: Iterable[Config], share: Callable[[Config], float]) -> tuple[Config, float]:
    """(the first for which share, of the memory that there is, leaves SPARE; its share). Where none does it is the one
    that leaves most: the plan may be too careful."""
    found = []
    for config in configs:
        found.append((config, share(config)))
        if found[-1][1] <= 1 - SPARE:
            return found[-1]
    return min(found, key=lambda one: one[1])


def settle(job: Job) -> Job:
    """The job with settings in place of auto."""
    if job.config.train.checkpointing != "auto":
        return job
    chosen, _ = choose(choices(job.config), lambda config: share_of_memory(replace(job, config=config)))
    return replace(job, config=chosen)


def smallest(job: Job) -> list[Job]:
    """The job with what takes the least memory in place of auto, that of a machine too where these differ."""
    if job.config.train.checkpointing != "auto":
        return [job]
    last = {config.train.offload_activations: config for config in choices(job.config)}
    return [replace(job, config=last[away]) for away in (True, False) if away in last]


def settle_run(config: Config, mesh: Mesh) -> Config:
    """The config of a run on the ranks of `mesh`, with settings in place of auto, which its log says. Collective."""
    if config.train.checkpointing != "auto":
        return config
    config, why = decide(lambda: _chosen(config, mesh))
    log.info("train.checkpointing=auto: %s (%s)", described(config), why)
    return config


def described(config: Config) -> str:
    """The settings that a rung has, such as `checkpointing=full, mlp_tile=16384`."""
    given = {name: getattr(config.train, name) for name in NAMES}
    return ", ".join(f"{name}={str(value).lower()}" for name, value in given.items() if value)


def _chosen(config: Config, mesh: Mesh) -> tuple[Config, str]:
    if not countable(config, gpu=mesh.device.type == "cuda"):
        return replace(config, train=replace(config.train, checkpointing="full")), "this config cannot be planned"
    if mesh.device.type == "cuda":
        here = {"cluster": cluster_here(mesh.world_size), "extras": extras_of(packages())}
        chosen, taken = choose(choices(config), lambda choice: share_of_memory(Job(choice, **here)))
    else:
        # What is offloaded is in the same memory here.
        here = (c for c in choices(config) if c.train.offload_activations == config.train.offload_activations)
        (had, _), costs = memory_here(), load_costs(config)
        chosen, taken = choose(here, lambda choice: memory(choice, mesh, lengths_of(choice), costs) / had)
    return chosen, f"{100 * taken:.0f} % of the memory, as planned"


def cluster_here(world_size: int) -> Cluster:
    """GPUs like that of this process, on machines like this one. Of kinds that are not in the tables memory is known,
    which is all that counts here."""
    found, (had, ranks) = torch.cuda.get_device_properties(), memory_here()
    name = kind_of(found.name)
    gpu = replace(GPUS.get(name, GPUS["A100"]), memory=found.total_memory, capability=(found.major, found.minor))
    return Cluster(name or found.name, world_size, min(world_size, ranks), had * ranks, gpu)
