"""Softmax attention over nodes with slow links between them: found, still exact, and what crosses goes over them."""

import pytest
import torch
import torch.distributed as dist
from oracles import softmax_attention as full_matrix
from oracles import with_gradients
from parity import disagreements, run_share
from spawn import run_ranks

from longspan.attention import softmax_attention
from longspan.benchmarks.emulated_nodes import emulated_nodes, unavailable
from longspan.parallel import SequenceParallel, Topology
from longspan.parallel.mesh import build_mesh

LENGTHS = (900, 37, 120, 1, 300)
HEADS, HEAD_SIZE = (4, 2, 2), 8


@pytest.fixture(scope="module")
def nodes():
    reason = unavailable()
    if reason:
        pytest.skip(f"no emulated nodes here: {reason}")
    with emulated_nodes(2, megabits=200) as found:
        yield found


def run(rank, world_size, inputs, grad_out):
    """(topology as found, {strategy: (share, layout)}), after a transfer of 4 MiB from every rank to the other node."""
    mesh = build_mesh(sp=0, sharding="fsdp", device=torch.device("cpu"), timeout_s=60)
    sent, received = torch.zeros(2, 1 << 20)
    other = (rank + world_size // 2) % world_size
    work = [dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, received, other)]
    for pending in dist.batch_isend_irecv(work):
        pending.wait()
    shares = {}
    for strategy in ("auto", "zeppelin", "usp"):
        parallel = SequenceParallel(mesh.sp_group, topology=mesh.sp_topology, softmax=strategy)
        seq = parallel.context(LENGTHS)

        def on_nodes(*tensors, layout, group, seq=seq, **options):
            return softmax_attention(*tensors, seq=seq, **options)

        shares[strategy] = run_share(on_nodes, inputs, grad_out, seq.layout, rank, group=mesh.sp_group), seq.layout
    return mesh.sp_topology, shares


def test_exact_over_two_nodes_and_a_slow_link(nodes):
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad_out = (
        torch.randn(sum(LENGTHS), heads, HEAD_SIZE, generator=generator, dtype=torch.float64)
        for heads in (*HEADS, HEADS[0])
    )
    inputs = {"q": q, "k": k, "v": v}
    before = [node.sent_bytes() for node in nodes]
    ranks = run_ranks(run, 4, inputs, grad_out, timeout=100, nodes=nodes)
    exact, problems = with_gradients(full_matrix, inputs, grad_out, LENGTHS), []
    for strategy, (_, layout) in ranks[0][1].items():
        shares = [shares[strategy][0] for _, shares in ranks]
        problems += disagreements(strategy, shares, layout, exact, torch.float64, dict.fromkeys(exact, 1e-9))
    assert not problems, "\n".join(problems)
    assert {topology for topology, _ in ranks} == {Topology(2, 2)}
    assert all(node.sent_bytes() - sent > 2 * 4 * 2**20 for node, sent in zip(nodes, before, strict=True))
