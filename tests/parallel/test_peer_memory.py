"""States through shared memory: ranks that are processes, which wait for one another; and who gets such memory."""

from typing import get_type_hints

import pytest
import torch
import torch.distributed as dist
from scan_cases import ARITHMETIC, TRANSITIONS, all_layouts, scan_and_check, scan_loop
from shared_windows import shared_windows
from spawn import run_ranks
from traffic import Traffic

from longspan.kernels import peer_triton
from longspan.kernels.peer import peer_kernels
from longspan.launcher.config import ParallelConfig
from longspan.parallel import Topology, contiguous
from longspan.parallel.peer_memory import open_peer_memory
from longspan.parallel.scan import scan_plan, start_scan

SIZES = 3, 2, 4


def scan_all(rank, world_size):
    peers, sent = shared_windows(rank, world_size), 0
    for name, layout in all_layouts(world_size, ("mixed",)):
        plan = scan_plan(layout, rank)
        if not plan.connected:
            continue
        for kind in TRANSITIONS:
            expected = scan_loop(layout, kind, SIZES)
            where = f"{name} {layout.lengths}, {kind}"
            before = peers.received
            traffic = scan_and_check(
                plan,
                layout,
                kind,
                "lasp2",
                SIZES,
                dist.group.WORLD,
                expected,
                "cpu",
                torch.float64,
                1e-12,
                where,
                peers,
            )
            assert all(counted.num_calls == 0 for counted in traffic.values()), where
            sent += plan.num_slots > 0
            assert (peers.received > before) == (plan.num_slots > 0), where
    assert sent > 10


def test_equals_a_loop_over_spans_and_leaves_nothing_to_the_group():
    run_ranks(scan_all, 3, timeout=300)


def interleaved(rank, world_size):
    """Scans that start before others end, on ranks that are not equally fast; then one too many, and one too large."""
    peers = shared_windows(rank, world_size)
    plan, group = scan_plan(contiguous((64,), world_size), rank), dist.group.WORLD

    def start(number, sizes=SIZES):
        state = torch.full((1, *sizes), float(number + 1) * 10.0**rank)
        return start_scan("lasp2", plan, "forward", state, None, group, **ARITHMETIC, peers=peers)

    def check(pending, number):
        before = sum(10.0**r for r in range(rank))
        for entry in pending.wait()[0]:
            assert (entry == before * (number + 1)).all(), (rank, number)

    for number in range(0, 12, 2):
        dist.barrier()
        if number // 2 % world_size == rank:  # late: the others have to wait for it
            for _ in range(4):
                torch.randn(1000, 1000) @ torch.randn(1000, 1000)
        pending = start(number), start(number + 1)
        for n, one in enumerate(pending):
            check(one, number + n)
    assert rank > 0 or not plan.forward.which

    pending = [start(number) for number in range(3)]
    for number in (1, 0, 2):
        check(pending[number], number)

    pending = [start(number) for number in range(peer_triton.SLOTS)]
    with pytest.raises(RuntimeError, match="under way"):
        start(0)
    for number, one in enumerate(pending):
        check(one, number)
    with Traffic() as traffic:
        check(start(3, (16, 16, 17)), 3)  # more than a window takes
    assert traffic.num_calls == 1


def test_several_may_be_under_way_and_what_does_not_fit_goes_by_the_group():
    run_ranks(interleaved, 3)


def refused(rank, world_size):
    given = dist.group.WORLD, Topology(1, world_size), torch.device("cpu"), peer_kernels
    assert open_peer_memory(*given, "off") is None and open_peer_memory(*given, "auto") is None
    with pytest.raises(ValueError, match=r"parallel.peer_memory=on .* rank 0: device cpu .* use auto or off"):
        open_peer_memory(*given, "on")


def test_a_cpu_has_none_and_says_so_where_it_is_asked_for():
    run_ranks(refused, 2)


def test_the_config_offers_what_is_taken():
    offered = get_type_hints(ParallelConfig)["peer_memory"]
    assert offered == get_type_hints(open_peer_memory)["wanted"]


def on_gpus(rank, world_size):
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    group, sizes = dist.new_group(backend="nccl"), (4, 32, 48)
    peers = open_peer_memory(group, Topology(1, world_size), device, peer_kernels, "on")
    for name, layout in all_layouts(world_size, ("one", "mixed", "few")):
        plan = scan_plan(layout, rank).map(lambda x: x.to(device))
        if not plan.connected:
            continue
        for kind in TRANSITIONS:
            expected, where = scan_loop(layout, kind, sizes), f"{name}, {kind}"
            scan_and_check(
                plan, layout, kind, "lasp2", sizes, group, expected, device, torch.float32, 1e-5, where, peers
            )
    plan = scan_plan(contiguous((64,), world_size), rank).map(lambda x: x.to(device))
    base = torch.randn(1, 16, 128, 128, device=device)
    entries = []
    for n in range(200):  # nothing waits on the host, and memory is used again as soon as it is free
        pending = start_scan("lasp2", plan, "forward", base * n, None, group, **ARITHMETIC, peers=peers)
        torch.full_like(base, float("nan"))
        entries.append(pending.wait()[0])
    for n, entry in enumerate(entries):
        torch.testing.assert_close(entry, n * entries[1], rtol=1e-5, atol=1e-5, msg=f"scan {n}")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_over_gpus():
    run_ranks(on_gpus, torch.cuda.device_count(), timeout=300)
