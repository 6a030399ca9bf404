"""Softmax attention over nodes with slow links between them: found, still exact, and what crosses goes over them."""

import pytest
import torch
import torch.distributed as dist
from oracles import softmax_attention as full_matrix
from oracles import with_gradients
from parity import disagreements, run_share
from spawn import run_ranks

from longspan.attention import softmax_attention
from longspan.benchmarks.emulated_nodes import NEAR, emulated_nodes, sent_bytes, unavailable
from longspan.benchmarks.routing import lopsided
from longspan.parallel import Costs, SequenceParallel, Topology
from longspan.parallel.mesh import build_mesh

LENGTHS = (900, 37, 120, 1, 300)
HEADS, HEAD_SIZE = (4, 2, 2), 8
NODES, MEBIBYTE = Topology(2, 2), 2**20
EXACT = 1e-9


@pytest.fixture(scope="module")
def places():
    reason = unavailable()
    if reason:
        pytest.skip(f"no emulated nodes here: {reason}")
    with emulated_nodes(NODES, megabits=200) as found:
        yield found


def exchange(peer):
    """(bytes to other nodes, bytes to the own one) while this rank swaps 1 MiB with `peer`."""
    sent, received = torch.zeros(2, MEBIBYTE // 4)
    before = sent_bytes(), sent_bytes(NEAR)
    for pending in dist.batch_isend_irecv([dist.P2POp(dist.irecv, received, peer), dist.P2POp(dist.isend, sent, peer)]):
        pending.wait()
    dist.barrier()
    return sent_bytes() - before[0], sent_bytes(NEAR) - before[1]


def run(rank, world_size, inputs, grad_out):
    """(topology as found, bytes sent over both interfaces to peers at home and away, by strategy (share, layout), and
    by strategy bytes sent over the link)."""
    mesh = build_mesh(sp=0, sharding="fsdp", device=torch.device("cpu"), timeout_s=60)
    moved = exchange(rank ^ 1), exchange(rank ^ 2), exchange(rank ^ 3)
    shares, crossed = {}, {}
    for strategy, layout, costs in (
        ("auto", LENGTHS, None), ("zeppelin", LENGTHS, None), ("usp", LENGTHS, None),
        ("double_ring", lopsided(LENGTHS, NODES), Costs(remote_key_s=1e-4)),
        ("double_ring unrouted", lopsided(LENGTHS, NODES), Costs.pairs_only()),
    ):  # fmt: skip
        softmax = strategy.split()[0]
        parallel = SequenceParallel(mesh.sp_group, topology=mesh.sp_topology, softmax=softmax, costs=costs)
        seq = parallel.context(layout)

        def on_nodes(*tensors, layout, group, seq=seq, **options):
            return softmax_attention(*tensors, seq=seq, **options)

        dist.barrier()
        before = sent_bytes()
        shares[strategy] = run_share(on_nodes, inputs, grad_out, seq.layout, rank, group=mesh.sp_group), seq.layout
        dist.barrier()
        crossed[strategy] = sent_bytes() - before
    return mesh.sp_topology, moved, shares, crossed


def test_exact_over_two_nodes_and_slow_links(places):
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad_out = (
        torch.randn(sum(LENGTHS), heads, HEAD_SIZE, generator=generator, dtype=torch.float64)
        for heads in (*HEADS, HEADS[0])
    )
    inputs = {"q": q, "k": k, "v": v}
    ranks = run_ranks(run, 4, inputs, grad_out, timeout=100, places=places)
    exact, problems = with_gradients(full_matrix, inputs, grad_out, LENGTHS), []
    for strategy, (_, layout) in ranks[0][2].items():
        shares = [shares[strategy][0] for _, _, shares, _ in ranks]
        problems += disagreements(strategy, shares, layout, exact, torch.float64, dict.fromkeys(exact, EXACT))
    assert not problems, "\n".join(problems)
    assert {topology for topology, *_ in ranks} == {NODES}
    for _, (home, *away), _, _ in ranks:  # every rank has its own link, and what stays on a node does not take it
        assert home[1] > MEBIBYTE > 10 * home[0]
        assert all(far > MEBIBYTE > 10 * near for far, near in away), away
    routed, unrouted = ([rank[3][name] for rank in ranks] for name in ("double_ring", "double_ring unrouted"))
    # On node 0 all tokens are on one rank: what they and the gradients sent back there weigh is shared by two links.
    assert max(routed) < 0.6 * max(unrouted), (routed, unrouted)
