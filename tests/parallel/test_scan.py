"""The scan of states: every transport against a loop over spans, what each of them sends, and which one is chosen."""

from typing import get_args, get_type_hints

import pytest
import torch
import torch.distributed as dist
from cases import LENGTHS
from scan_cases import ARITHMETIC, TRANSITIONS, all_layouts, scan_and_check, scan_loop
from spawn import run_ranks

from longspan.launcher.config import ParallelConfig
from longspan.parallel import Topology, contiguous, zigzag
from longspan.parallel.scan import TRANSPORTS, choose_transport, resolve_transport, scan_plan, start_scan
from longspan.parallel.transports import LARGE, MIB, SMALL, chain

HEADS, KEYS, VALUES = 3, 2, 4
TOPOLOGIES = {
    1: [Topology(1, 1)],
    2: [Topology(1, 2), Topology(2, 1)],
    3: [Topology(3, 1)],
    4: [Topology(1, 4), Topology(2, 2)],
    8: [Topology(4, 2), Topology(2, 4)],
}


def scan_all(rank, world_size):
    chain.HOP_BYTES = 64  # several blocks in states of a few bytes
    sizes = (HEADS, KEYS, VALUES)
    for name, layout in all_layouts(world_size, tuple(LENGTHS) if world_size <= 4 else ("one", "mixed", "few")):
        plans = [scan_plan(layout, rank, topology).map(torch.clone) for topology in TOPOLOGIES[world_size]]
        assert len({(plan.linked, plan.num_slots, plan.links) for plan in plans}) == 1
        if not plans[0].connected:
            assert not any(getattr(plans[0], direction).which for direction in ("forward", "backward", "whole"))
            continue
        for kind in TRANSITIONS:
            expected = scan_loop(layout, kind, sizes)
            for plan, transport in [(plans[0], name) for name in TRANSPORTS] + [(p, "hierarchical") for p in plans[1:]]:
                where = f"{name} {layout.lengths}, {plan.topology}, {transport}, {kind}"
                traffic = scan_and_check(
                    plan, layout, kind, transport, sizes, dist.group.WORLD, expected, "cpu", torch.float64, 1e-12, where
                )
                for direction, sent in traffic.items():
                    formula = expected_traffic(plan, transport, kind, direction)
                    assert (sent.num_calls, sent.num_bytes) == formula, f"{where}, {direction}"


def expected_traffic(plan, transport, kind, direction):
    """(messages, bytes) that this rank sends, in closed form."""
    width = HEADS * KEYS * VALUES
    state_bytes, table = 8 * width, plan.flat if transport == "lasp2" else plan.nodes
    if transport in ("lasp", "all_scan"):
        blocks = chain.choose_blocks(state_bytes, HEADS, plan.num_hops) if transport == "all_scan" else 1
        ends = [(link.earlier[0], link.later[0])[:: -1 if direction == "backward" else 1] for link in plan.links]
        hops = sum(source == plan.rank != target for source, target in ends)
        return hops * blocks, hops * state_bytes
    if direction != "backward":
        width += {"none": 0, "scalar": HEADS, "vector": HEADS * KEYS, "matrix": HEADS * KEYS * KEYS}[kind]
    if plan.num_slots == 0 or plan.topology.world_size == 1:
        return 0, 0
    if transport == "lasp2" or plan.topology.nodes == 1:
        return 1, 8 * plan.num_slots * width
    peers, nodes = len(table.peers), len(table.counterparts)
    messages, num_bytes = peers - 1, 8 * (peers - 1) * plan.num_slots * width
    if table.num_totals:
        share = -(-table.num_totals * width // peers)
        gathers = {peers: 0 if peers == 1 else peers - 1, nodes: nodes - 1}
        if nodes == plan.topology.world_size:  # a gather among all ranks is a collective
            return messages + 1, num_bytes + 8 * share
        messages += gathers[nodes] + peers - 1
        num_bytes += 8 * share * (nodes - 1) + 8 * (peers - 1) * nodes * share
    return messages, num_bytes


@pytest.mark.parametrize("world_size", TOPOLOGIES)
def test_equals_a_loop_over_spans_and_sends_what_the_formula_says(world_size):
    run_ranks(scan_all, world_size, timeout=300)


# The plan


def test_a_rank_that_shares_no_document_is_not_connected():
    for rank in range(4):
        assert not scan_plan(contiguous((64,) * 4, 4), rank).connected


def test_what_is_published_does_not_depend_on_the_length():
    for make, num_slots in ((contiguous, 1), (zigzag, 2)):
        for length in (64, 4096):
            plans = [scan_plan(make((length,), 4), rank, Topology(2, 2)) for rank in range(4)]
            assert {plan.num_slots for plan in plans} == {num_slots}
            assert {plan.nodes.num_totals for plan in plans} == {1 if make is contiguous else 2}
            assert {plan.num_hops for plan in plans} == {3 if make is contiguous else 6}


def test_one_node_needs_no_totals():
    plan = scan_plan(zigzag((64, 40), 4), 1, Topology(1, 4))
    assert plan.nodes is plan.flat and plan.map(torch.clone).nodes.num_totals == 0


# The choice


@pytest.mark.parametrize(
    ("payload_bytes", "topology", "causal", "expected"),
    [
        (MIB, Topology(1, 8), True, "lasp2"),
        (2**10, Topology(16, 8), True, "lasp2"),
        (SMALL // 128 + 1, Topology(16, 8), True, "hierarchical"),
        (16 * MIB, Topology(2, 8), True, "hierarchical"),
        (16 * MIB, Topology(32, 8), True, "all_scan"),
        (16 * MIB, Topology(32, 8), False, "hierarchical"),
        (LARGE // 8 + 1, Topology(1, 8), True, "all_scan"),
        (LARGE // 8 + 1, Topology(1, 8), False, "lasp2"),
    ],
)
def test_the_choice(payload_bytes, topology, causal, expected):
    assert choose_transport(payload_bytes, topology, causal) == expected


def choices(rank, world_size):
    chosen = []
    for name, layout in all_layouts(world_size):
        plan = scan_plan(layout, rank, Topology(2, 2))
        for heads in (1, 64, 4096):
            state = torch.empty(len(plan.linked), heads, 64, 64, device="meta")
            for direction in ("forward", "backward", "whole"):
                chosen.append((name, heads, direction, resolve_transport("auto", plan, direction, state)))
                assert resolve_transport("lasp", plan, direction, state) == "lasp"
    return chosen


def test_all_ranks_choose_alike():
    chosen = [choices(rank, 4) for rank in range(4)]
    assert all(other == chosen[0] for other in chosen)
    assert {name for *_, name in chosen[0]} == {"lasp2", "hierarchical", "all_scan"}
    forward = [name for _, _, direction, name in chosen[0] if direction == "forward"]
    assert forward == [name for _, _, direction, name in chosen[0] if direction == "backward"]


def test_blocks_follow_the_size_and_the_number_of_hops():
    assert chain.choose_blocks(2**20, 16, 0) == chain.choose_blocks(2**20, 16, 1) == 1
    assert chain.choose_blocks(2**10, 16, 63) == 1
    assert 1 < chain.choose_blocks(2**24, 64, 15) < chain.choose_blocks(2**24, 64, 63) <= 64
    assert chain.choose_blocks(2**30, 4, 63) == 4


def test_the_config_offers_them():
    assert get_args(get_type_hints(ParallelConfig)["linear"]) == ("auto", *TRANSPORTS)


# NCCL


def scan_on_gpus(rank, world_size):
    device, topology = use_gpu(rank, world_size)
    group, sizes = dist.new_group(backend="nccl"), (4, 32, 48)
    for name, layout in all_layouts(world_size, ("one", "mixed", "few")):
        plan = scan_plan(layout, rank, topology).map(lambda x: x.to(device))
        if not plan.connected:
            continue
        for kind in TRANSITIONS:
            expected = scan_loop(layout, kind, sizes)
            for transport in TRANSPORTS:
                where = f"{name}, {transport}, {kind}"
                scan_and_check(
                    plan, layout, kind, transport, sizes, group, expected, device, torch.float32, 1e-5, where
                )


def scans_in_a_row(rank, world_size):
    """Scans that nothing waits for on the host, while their inputs' memory is used again as soon as it is free."""
    device, topology = use_gpu(rank, world_size)
    group = dist.new_group(backend="nccl")
    plan = scan_plan(zigzag((64, 40), world_size), rank, topology).map(lambda x: x.to(device))
    base = torch.randn(len(plan.linked), 16, 128, 128, device=device)
    work = torch.randn(2048, 2048, device=device)
    for transport in TRANSPORTS:
        entries = []
        for n in range(30):
            pending = start_scan(transport, plan, "forward", base * n, None, group, **ARITHMETIC)
            work = (work @ work).tanh()
            torch.full_like(base, float("nan"))
            entries.append(pending.wait()[0])
            torch.full_like(base, float("nan"))
        for n, entry in enumerate(entries):
            torch.testing.assert_close(entry, n * entries[1], rtol=1e-4, atol=1e-3, msg=f"{transport}, scan {n}")


def use_gpu(rank, world_size):
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    per_node = 2 if world_size % 2 == 0 and world_size > 2 else 1
    return device, Topology(world_size // per_node, per_node)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("scans", [scan_on_gpus, scans_in_a_row])
def test_over_nccl(scans):
    run_ranks(scans, torch.cuda.device_count(), timeout=300)
