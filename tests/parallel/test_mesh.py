"""Which ranks form a group, which shard parameters together, and which splits are refused."""

import logging
import os

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks

from longspan.parallel.mesh import build_mesh, ranks_here

CPU = torch.device("cpu")


def test_groups_of_four_ranks():
    for rank, seen in enumerate(run_ranks(_groups, 4, timeout=60)):
        assert seen["sp 0"] == (1, 4, 0, rank, [0, 1, 2, 3], (4,))
        assert seen["sp 1"] == (4, 1, rank, 0, [rank], (4,))
        first = rank // 2 * 2
        assert seen["sp 2"] == (2, 2, rank // 2, rank % 2, [first, first + 1], (4,))
        assert seen["hsdp"][-1] == (2, 2) and seen["hsdp shards"] == [first, first + 1]
        assert seen["shards"] == [4, 2, 1]
        assert (
            "parallel.sp=3 does not divide the 4 ranks of this run; use one of 1, 2, 4, or 0 for all" in seen["refused"]
        )
        assert "needs equally many ranks on every machine" in seen["uneven"]
        assert seen["topologies"] == [(1, 4), (2, 2), (1, 2), (4, 1)]
        assert seen["warnings"] == ["parallel.sp=2 makes some groups span machines of 3 ranks; one of 1, 3 would keep "
                                    "each inside a machine"]  # fmt: skip


def _groups(rank, world_size):
    seen = {}
    for sp in (0, 1, 2):
        seen[f"sp {sp}"] = _describe(_build(sp))
    with pytest.raises(ValueError) as error:
        _build(3)
    seen["refused"] = str(error.value)
    assert "LOCAL_WORLD_SIZE" not in os.environ and ranks_here() == world_size
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    assert ranks_here() == 2
    mesh = _build(4, "hsdp")
    seen["hsdp"] = _describe(mesh)
    seen["hsdp shards"] = dist.get_process_group_ranks(mesh.fsdp_mesh.get_group("shard"))
    seen["shards"] = [_build(4, sharding).shards for sharding in ("fsdp", "hsdp", "none")]
    os.environ["LOCAL_WORLD_SIZE"] = "3"
    with pytest.raises(ValueError) as error:
        _build(2, "hsdp")
    seen["uneven"] = str(error.value)
    seen["topologies"] = []
    for sp, machines in ((4, "4444"), (4, "2222"), (2, "2222"), (4, "3331")):
        os.environ["LOCAL_WORLD_SIZE"] = machines[rank]
        topology = _build(sp).sp_topology
        seen["topologies"].append((topology.nodes, topology.ranks_per_node))
    os.environ["LOCAL_WORLD_SIZE"] = "3"
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("longspan.parallel.mesh").addHandler(handler)
    _build(2)
    seen["warnings"] = messages
    return seen


def _build(sp, sharding="fsdp"):
    return build_mesh(sp=sp, sharding=sharding, device=CPU, timeout_s=60)


def _describe(mesh):
    ranks = dist.get_process_group_ranks(mesh.sp_group)
    assert ranks == dist.get_process_group_ranks(mesh.sp_state_group) and mesh.sp_group is not mesh.sp_state_group
    assert mesh.is_main == (dist.get_rank() == 0) and mesh.world_size == 4
    return mesh.dp, mesh.sp, mesh.dp_rank, mesh.sp_rank, ranks, tuple(mesh.fsdp_mesh.mesh.shape)
