"""The ranks of a run: which of them share one sequence, over which communicators, and how parameters are sharded."""

import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from math import gcd
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from longspan.parallel.topology import Topology

log = logging.getLogger(__name__)
# gloo stays beside NCCL: checkpoints and decisions of the host travel without touching the GPU's streams.
BACKENDS = "cpu:gloo,cuda:nccl"
STATE_BLOCKS = 6  # of a collective over states; of 132 multiprocessors on Hopper linear attention takes about 128


@dataclass(frozen=True)
class Mesh:
    """dp x sp x tp ranks: global rank = (dp_rank * sp + sp_rank) * tp + tp_rank, so the ranks that share layers are
    consecutive, and so are the SP groups of one copy of the layers."""

    dp: int
    sp: int
    tp: int
    dp_rank: int
    sp_rank: int
    tp_rank: int
    sp_group: dist.ProcessGroup
    sp_state_group: dist.ProcessGroup  # same ranks, own communicator: summaries never queue behind keys and values
    sp_topology: Topology  # which ranks of an SP group share a machine
    fsdp_mesh: DeviceMesh  # of ranks with the same part of layers; 1-D, or 2-D: copies, then the shards of one copy
    tp_mesh: DeviceMesh | None  # 1-D over the ranks that share layers, where there are several
    device: torch.device

    @property
    def world_size(self) -> int:
        return self.dp * self.sp * self.tp

    @property
    def shards(self) -> int:
        """Ranks that share one copy of the parameters, or of a tensor-parallel rank's part of them."""
        return self.fsdp_mesh.size(self.fsdp_mesh.ndim - 1)

    def __str__(self) -> str:
        shared = f" x {self.tp} tensor-parallel" if self.tp > 1 else ""
        return f"{self.dp} data-parallel x {self.sp} sequence-parallel{shared}"

    @property
    def is_main(self) -> bool:
        return self.dp_rank == self.sp_rank == self.tp_rank == 0


def build_mesh(
    *,
    sp: int,
    sharding: Literal["fsdp", "hsdp", "none"],
    device: torch.device,
    timeout_s: float = 600.0,
    tp: int = 1,
    key_blocks: int = 0,
) -> Mesh:
    """Joins the run (torchrun's environment; without it this process is the only rank) and forms its groups.

    tp: ranks of one machine that share layers. sp: of those that have the same part, ranks that share one sequence, 0
    for all. sharding: parameters sharded over all ranks (fsdp), inside machines (hsdp), or whole on every rank (none).
    device: this rank's device. timeout_s: limit of one collective. key_blocks: most thread blocks of NCCL for tokens,
    keys and values on their way, 0 for its own choice.
    Collective: every rank calls it with the same arguments. Raises ValueError when `tp` or `sp` does not divide the
    ranks, `tp` those of a machine, or `sharding="hsdp"` meets machines with unequal numbers of ranks.
    """
    join(device, timeout_s)
    timeout = timedelta(seconds=timeout_s)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ranks_per_machine = ranks_here()
    _check_tp(tp, world_size)
    sp = sp or world_size // tp
    _check(sp, tp, sharding, world_size, ranks_per_machine)

    sp_group = sp_state_group = None
    for first in (start + part for start in range(0, world_size, sp * tp) for part in range(tp)):
        ranks = list(range(first, first + sp * tp, tp))
        group = dist.new_group(ranks, timeout=timeout, **communicator_options(device, key_blocks))
        state_group = dist.new_group(ranks, timeout=timeout, **communicator_options(device, STATE_BLOCKS))
        if rank in ranks:
            sp_group, sp_state_group = group, state_group
    if sharding == "hsdp":
        shape, names = (world_size // ranks_per_machine, ranks_per_machine // tp), ("replicate", "shard")
    elif sharding == "none":
        shape, names = (world_size // tp, 1), ("replicate", "shard")
    else:
        shape, names = (world_size // tp,), ("shard",)
    if tp > 1:
        mesh = init_device_mesh(device.type, (*shape, tp), mesh_dim_names=(*names, "tp"))
        fsdp_mesh, tp_mesh = mesh[names], mesh["tp"]
        mesh["shard", "tp"]._flatten()  # so that DTensor sums over both axes (norms of gradients) at once
    else:
        mesh = fsdp_mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
        tp_mesh = None
    _connect([dist.group.WORLD, sp_group, sp_state_group, *mesh.get_all_groups()], device)
    return Mesh(
        dp=world_size // (sp * tp),
        sp=sp,
        tp=tp,
        dp_rank=rank // (sp * tp),
        sp_rank=rank // tp % sp,
        tp_rank=rank % tp,
        sp_group=sp_group,
        sp_state_group=sp_state_group,
        sp_topology=group_topology(sp, tp, ranks_per_machine),
        fsdp_mesh=fsdp_mesh,
        tp_mesh=tp_mesh,
        device=device,
    )


def join(device: torch.device, timeout_s: float) -> None:
    """Makes this process a rank of the run, if it is none yet; the first that `build_mesh` does. Collective."""
    if dist.is_initialized():
        return
    on_gpu, timeout = device.type == "cuda", timedelta(seconds=timeout_s)
    options = {"backend": BACKENDS, "device_id": device} if on_gpu else {"backend": "gloo"}
    if os.environ.get("WORLD_SIZE", "1") != "1":
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        # torchrun's store outlives ranks that it starts again (--max-restarts), with the addresses of those before.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    else:
        store, rank, world_size = dist.HashStore(), 0, 1
    dist.init_process_group(store=store, rank=rank, world_size=world_size, timeout=timeout, **options)


def ranks_here() -> int:
    """Ranks of the run on this machine: all, unless torchrun says otherwise."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or (dist.get_world_size() if dist.is_initialized() else 1))


def _check_tp(tp: int, world_size: int) -> None:
    if tp < 1 or world_size % tp:
        raise ValueError(
            f"parallel.tp={tp} does not divide the {world_size} ranks of this run; use one of {_divisors(world_size)}"
        )


def _check(sp: int, tp: int, sharding: str, world_size: int, ranks_per_machine: int) -> None:
    copies = world_size // tp
    if sp < 1 or copies % sp:
        what = "ranks of this run" if tp == 1 else f"times that parallel.tp={tp} fits into the {world_size} ranks"
        raise ValueError(
            f"parallel.sp={sp} does not divide the {copies} {what}; use one of {_divisors(copies)}, or 0 for all"
        )
    if ranks_per_machine % tp:
        raise ValueError(
            f"parallel.tp={tp} makes ranks of different machines share layers, with {ranks_per_machine} ranks on this"
            f" one; use one of {_divisors(ranks_per_machine)}"
        )
    if sharding == "hsdp" and world_size % ranks_per_machine:
        raise ValueError(
            f"parallel.sharding=hsdp needs equally many ranks on every machine, found {world_size} ranks in all and "
            f"{ranks_per_machine} on this machine; start as many on each, or use parallel.sharding=fsdp"
        )
    if sp * tp <= ranks_per_machine and ranks_per_machine % (sp * tp):
        log.warning(
            "parallel.sp=%d makes some groups span machines of %d ranks; one of %s would keep each inside a machine",
            sp,
            ranks_per_machine,
            _divisors(ranks_per_machine // tp),
        )


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def group_topology(sp: int, tp: int, ranks_per_machine: int) -> Topology:
    """The ranks of an SP group in the largest equal parts that no machine boundary cuts, whatever group it is: every
    tp-th of sp * tp ranks in a row. ranks_per_machine: on this one. Collective over all ranks."""
    sizes = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, ranks_per_machine)
    ranks_per_node = gcd(sp, *(size // tp for size in sizes))
    return Topology(sp // ranks_per_node, ranks_per_node)


def communicator_options(device: torch.device, blocks: int) -> dict:
    """Options of a communicator of at most so many thread blocks, 0 for any number. Each holds a multiprocessor while
    it runs or waits for the other end; kernels beside have the others.

    Its kernels are started ahead of thread blocks that are queued on other streams: a transfer beside attention would
    else wait until the last of them has begun. With few blocks, as for states, they run beside kernels that leave a few
    multiprocessors free. With more, one rank's could hold what its kernel wants while another rank's, for which they
    wait, cannot start before a thread block there ends."""
    if device.type != "cuda":
        return {}
    options = dist.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = True
    if blocks:
        options.config.max_ctas = blocks
    return {"backend": BACKENDS, "pg_options": options}


def _connect(groups: list[dist.ProcessGroup], device: torch.device) -> None:
    """Sets up every communicator now, with all its ranks: later a point-to-point call may involve only some of them."""
    for group in groups:
        dist.all_reduce(torch.zeros(1, device=device), group=group)
