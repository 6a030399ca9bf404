"""Whether a step can be done on CPUs, before the first one: machines are small beside what a setting may ask for."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from longspan.launcher.config import Config
from longspan.launcher.errors import UserError
from longspan.launcher.estimate import COUNTED, prepare
from longspan.launcher.gpus import GIB
from longspan.launcher.state_sizes import MASTER, state_sizes
from longspan.models.activations import measure
from longspan.models.flops import model_flops, num_parameters
from longspan.parallel.context import SequenceParallel
from longspan.parallel.costs import Costs
from longspan.parallel.mesh import Mesh, ranks_here

log = logging.getLogger("longspan")

CORE_FLOPS = 3e10  # of a model a second that a core takes, about: configs/quickstart.yaml on two took 2 to 4e10 each
SHORT_S, LONG_S = 10, 600  # a step that takes less fits; one that takes more is worth a line


def check_model(config: Config) -> None:
    """UserError if the machine has not even memory for the weights of each rank, which are whole before they are
    sharded."""
    needed, had, ranks = MASTER * num_parameters(config.model), *memory_here()
    if needed > had:
        raise UserError(
            f"a model of {needed // MASTER:,} parameters takes {needed / GIB:.1f} GiB a rank, and this machine has"
            f" {had / GIB:.1f} for it (ranks here: {ranks}): use GPUs, or a smaller model.hidden_size or"
            " model.num_layers"
        )


def check_step(config: Config, mesh: Mesh, batches: Sequence, costs: Costs) -> None:
    """Of the micro-batches of a rank's step: a warning if it takes long. UserError if a rank needs more memory than
    the machine has for each of its ranks. costs: those that the run plans with."""
    model, train, (had, ranks) = config.model, config.train, memory_here()
    lengths = {batch.seq.layout.lengths for batch in batches}
    work = {found: model_flops(model, found, config.optim.trainable) for found in lengths}
    flops = sum(work[batch.seq.layout.lengths] for batch in batches) / mesh.sp / mesh.tp
    seconds = flops / (CORE_FLOPS * min(torch.get_num_threads(), (os.cpu_count() or 1) / ranks))
    if seconds < SHORT_S:
        return
    if model.sparse_selection.get("name") in (None, *COUNTED):
        needed = memory(config, mesh, max(work, key=work.get), costs)
        if needed > had:
            settings = " or train.checkpointing=full" * (train.checkpointing == "none")
            settings += " or train.mlp_tile=4K" * (train.mlp_tile == 0)
            raise UserError(
                f"data.seq_len={config.data.seq_len} takes at least {needed / GIB:.1f} GiB a rank, and this machine has"
                f" {had / GIB:.1f} for it (ranks here: {ranks}): use a smaller data.seq_len{settings}, more machines or"
                " GPUs"
            )
    if seconds > LONG_S:
        log.warning(
            "data.seq_len=%d: a step will take about %s on this CPU; GPUs or a smaller data.seq_len take less",
            config.data.seq_len,
            timedelta(seconds=round(seconds / 60) * 60),
        )


def memory(config: Config, mesh: Mesh, lengths: Sequence[int], costs: Costs) -> float:
    """Bytes that a rank holds at least in a step over documents of these lengths."""
    measured = measure(
        config.model, lengths, dtype=getattr(torch, config.train.dtype), gpu=False, tp=mesh.tp,
        prepare=partial(prepare, config),
        parallel=SequenceParallel(rank=0, topology=mesh.sp_topology, costs=costs, **config.parallel.of_sequences),
    )  # fmt: skip
    states = state_sizes(measured.num_parameters, measured.num_trained, mesh.shards)
    return measured.peak + sum(measured.put_away) + sum(states.values())


def memory_here() -> tuple[float, int]:
    """(bytes of this machine's memory for each of its ranks, how many there are)."""
    ranks = ranks_here()
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([whole, *allowed(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]) / ranks, ranks


def allowed(groups: Path, root: Path) -> Iterator[int]:
    """Bytes that a container or a job may have: the limits of this process's control groups and of those above."""
    if not groups.is_file():
        return
    for line in groups.read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers in ("", "memory"):  # version 2, 1
            folder, name = root / controllers, "memory.limit_in_bytes" if controllers else "memory.max"
            below = folder / group.lstrip("/")  # in a container it may not be there, but its limit is at the root
            for path in (below, *below.parents):
                if path.is_relative_to(folder) and (path / name).is_file():
                    with suppress(ValueError, OSError):  # "max"
                        yield int((path / name).read_text())
