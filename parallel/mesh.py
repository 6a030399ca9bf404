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

from longspan.parallel.topology import Topology

log = logging.getLogger(__name__)
STATE_BLOCKS = 6  # of a collective over states; of 132 multiprocessors on Hopper linear attention takes about 128


@dataclass(frozen=True)
class Mesh:
    """dp x sp ranks: global rank = dp_rank * sp + sp_rank, so the ranks of one SP group are consecutive."""

    dp: int
    sp: int
    dp_rank: int
    sp_rank: int
    sp_group: dist.ProcessGroup
    sp_state_group: dist.ProcessGroup  # same ranks, own communicator: summaries never queue behind keys and values
    sp_topology: Topology  # which ranks of an SP group share a machine
    fsdp_mesh: DeviceMesh  # 1-D over all ranks, or 2-D: copies, then the shards of one copy
    device: torch.device

    @property
    def world_size(self) -> int:
        return self.dp * self.sp

    @property
    def is_main(self) -> bool:
        return self.dp_rank == 0 and self.sp_rank == 0


def build_mesh(
    *, sp: int, sharding: Literal["fsdp", "hsdp", "none"], device: torch.device, timeout_s: float = 600.0
) -> Mesh:
    """Joins the run (torchrun's environment; without it this process is the only rank) and forms its groups.

    sp: ranks that share one sequence, 0 for all. sharding: parameters sharded over all ranks (fsdp), inside machines
    (hsdp), or whole on every rank (none). device: this rank's device. timeout_s: limit of one collective.
    Collective: every rank calls it with the same arguments. Raises ValueError when `sp` does not divide the ranks or
    `sharding="hsdp"` meets machines with unequal numbers of ranks.
    """
    timeout = timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        _join(device, timeout)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    ranks_per_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    sp = sp or world_size
    _check(sp, sharding, world_size, ranks_per_machine)

    sp_group = sp_state_group = None
    for first in range(0, world_size, sp):
        ranks = list(range(first, first + sp))
        group = dist.new_group(ranks, timeout=timeout)
        state_group = dist.new_group(ranks, timeout=timeout, **_urgent(device))
        if rank in ranks:
            sp_group, sp_state_group = group, state_group
    if sharding == "hsdp":
        shape, names = (world_size // ranks_per_machine, ranks_per_machine), ("replicate", "shard")
    elif sharding == "none":
        shape, names = (world_size, 1), ("replicate", "shard")
    else:
        shape, names = (world_size,), ("shard",)
    fsdp_mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    _connect([dist.group.WORLD, sp_group, sp_state_group, *fsdp_mesh.get_all_groups()], device)
    return Mesh(
        dp=world_size // sp,
        sp=sp,
        dp_rank=rank // sp,
        sp_rank=rank % sp,
        sp_group=sp_group,
        sp_state_group=sp_state_group,
        sp_topology=_topology(sp, ranks_per_machine),
        fsdp_mesh=fsdp_mesh,
        device=device,
    )


def _join(device: torch.device, timeout: timedelta) -> None:
    # gloo stays beside NCCL: checkpoints and decisions of the host travel without touching the GPU's streams.
    on_gpu = device.type == "cuda"
    options = {"backend": "cpu:gloo,cuda:nccl", "device_id": device} if on_gpu else {"backend": "gloo"}
    if "RANK" in os.environ:
        dist.init_process_group(timeout=timeout, **options)
    else:
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1, timeout=timeout, **options)


def _check(sp: int, sharding: str, world_size: int, ranks_per_machine: int) -> None:
    if sp < 1 or world_size % sp:
        allowed = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise ValueError(
            f"parallel.sp={sp} does not divide the {world_size} ranks of this run; use one of {allowed}, or 0 for all"
        )
    if sharding == "hsdp" and world_size % ranks_per_machine:
        raise ValueError(
            f"parallel.sharding=hsdp needs equally many ranks on every machine, found {world_size} ranks in all and "
            f"{ranks_per_machine} on this machine; start as many on each, or use parallel.sharding=fsdp"
        )
    if sp <= ranks_per_machine and ranks_per_machine % sp:
        allowed = ", ".join(str(n) for n in range(1, ranks_per_machine + 1) if ranks_per_machine % n == 0)
        log.warning(
            "parallel.sp=%d makes some groups span machines of %d ranks; one of %s would keep each inside a machine",
            sp,
            ranks_per_machine,
            allowed,
        )


def _topology(sp: int, ranks_per_machine: int) -> Topology:
    """The ranks of an SP group in the largest equal parts that no machine boundary cuts, whatever group it is."""
    sizes = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, ranks_per_machine)
    ranks_per_node = gcd(sp, *sizes)
    return Topology(sp // ranks_per_node, ranks_per_node)


def _urgent(device: torch.device) -> dict:
    """Options of the state communicator: its small messages go ahead of bulk transfers in flight, and its few thread
    blocks run beside kernels that leave a few multiprocessors free. With more blocks, one rank's could hold what its
    kernel wants while another rank's, for which they wait, cannot start before the kernel there ends."""
    if device.type != "cuda":
        return {}
    options = dist.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = True
    options.config.max_ctas = STATE_BLOCKS
    return {"backend": "nccl", "pg_options": options}


def _connect(groups: list[dist.ProcessGroup], device: torch.device) -> None:
    """Sets up every communicator now, with all its ranks: later a point-to-point call may involve only some of them."""
    for group in groups:
        dist.all_reduce(torch.zeros(1, device=device), group=group)
