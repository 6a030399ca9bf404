"""Sparse attention whose ranks share memory: the same results, to the bit, and less left to the group."""

import pytest
import torch
import torch.distributed as dist
from cases import LENGTHS, layouts
from shared_windows import shared_windows
from sparse_variants import VARIANTS, make_inputs
from spawn import run_ranks
from torch.utils.checkpoint import checkpoint
from traffic import Traffic

from longspan.attention import LinearBranch, TopBlocks, requests, shared_requests, sparse_attention
from longspan.attention.recompute import checkpoint_contexts
from longspan.kernels.sparse import READ_PAST
from longspan.parallel import SequenceParallel, contiguous, peer_memory

pytest.importorskip("triton", reason="memory is shared by Triton kernels")
from longspan.kernels.sparse import peers_triton  # noqa: E402

CHOSEN = ["causal_gqa", "causal_odd", "full_gqa", "levels2", "levels3_full", "lists_of_heads", "tokens", "window"]


def run(variant, layout, rank, peers, checkpointed, dtype, branch):
    """(output and gradients, calls of the group) of a rank."""
    inputs, grad_out, kwargs = make_inputs(variant, layout.lengths, dtype)
    rows = torch.from_numpy(layout.global_indices(rank))
    leaves = [inputs[name][rows].requires_grad_() for name in "qkv"]
    parameters = []
    if branch and isinstance(kwargs["selection"], TopBlocks):
        width = leaves[0].shape[2]
        weight = torch.eye(width, dtype=dtype).requires_grad_()
        kwargs = kwargs | {"linear": LinearBranch(weight, weight.new_zeros(width).requires_grad_(), over=branch)}
        parameters = [kwargs["linear"].weight, kwargs["linear"].bias]
    seq = SequenceParallel(dist.group.WORLD, peers=peers, sparse="fetch").context(layout)

    def layer(q, k, v):  # two of them: what one leaves in a window is not the other's
        x = sparse_attention(q, k, v, seq=seq, **kwargs)
        return x + sparse_attention(q.flip(2), k.sin(), v.cos(), seq=seq, **kwargs)

    with Traffic() as traffic:
        if checkpointed:
            out = checkpoint(layer, *leaves, use_reentrant=False, context_fn=checkpoint_contexts)
        else:
            out = layer(*leaves)
        found = out.detach(), *torch.autograd.grad(out, leaves + parameters, grad_out[rows])
    return found, traffic


def compare(rank, world_size, variants):
    peers, problems, returned = shared_windows(rank, world_size), [], 0
    for number, variant in enumerate(variants):
        given = layouts(LENGTHS["mixed"], world_size)
        for name, layout in [*given.items()][number % 2 :: 2]:
            dtype = [torch.float64, torch.float32, torch.bfloat16][(number + len(name)) % 3]
            branch = [None, "all", "rest"][(number + world_size) % 3] if dtype != torch.bfloat16 else None
            given = variant, layout, rank
            more = number % 2 == 0, dtype, branch
            (wanted, by_group), (found, by_peers) = (run(*given, memory, *more) for memory in (None, peers))
            where = f"rank {rank}: {variant}, {name}, {more}"
            if not all(map(torch.equal, wanted, found)):
                worst = [(x - y).abs().max().item() for x, y in zip(wanted, found) if x.numel()]
                problems.append(f"{where}: results differ by {worst}")
            there, back = ([x.calls[name] for x in (by_group, by_peers)] for name in ("all_to_all_single", "isend"))
            if there[0] - there[1] < 2:  # of two layers
                problems.append(f"{where}: {there[1]} transfers of the group, without shared memory {there[0]}")
            if back[1]:
                problems.append(f"{where}: {back[1]} transfers back, without shared memory {back[0]}")
            returned += back[0]
    assert peers.received and returned
    return problems


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_same_through_shared_memory(world_size):
    variants = CHOSEN[world_size % 2 :: 2]
    assert all(variant in VARIANTS for variant in variants)
    problems = sum(run_ranks(compare, world_size, variants, timeout=300), [])
    assert not problems, "\n".join(problems)


def one_is_late(rank, world_size):
    """Rank 0 takes its time before it lays keys into its window, before it reads and before it adds: each by itself."""
    layout = contiguous((256,), world_size)
    given = "full_gqa", layout, rank
    wanted, _ = run(*given, None, False, torch.float32, None)

    def late(function, when=lambda *given: True):
        def run_late(*given, **options):
            if rank == 0 and when(*given):
                for _ in range(8):
                    torch.randn(1000, 1000) @ torch.randn(1000, 1000)
            return function(*given, **options)

        return run_late

    signal = peer_memory.PeerMemory.signal
    places = [
        (shared_requests, "aside", late(shared_requests.aside, lambda *x: len(x) == 2)),  # of keys and values
        (peers_triton, "pull_blocks", late(peers_triton.pull_blocks)),
        (requests, "add_packed", late(requests.add_packed)),
        (peer_memory.PeerMemory, "signal", late(signal)),
    ]
    peers = shared_windows(rank, world_size)
    for place in places:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*place)
            found, _ = run(*given, peers, False, torch.float32, None)
        assert all(map(torch.equal, wanted, found)), place[1]


def test_nobody_reads_or_writes_too_early():
    run_ranks(one_is_late, 2)


def second_turns(rank, world_size):
    """How many turns of the group there were: where the second ones come to there are numbers before."""
    exchange, seen = requests.start_all_to_all, 0

    def exchanged(x, sent, received, group, out):
        nonlocal seen
        seen += 1
        if seen % 2 == 0:
            assert out[:READ_PAST].isfinite().all() and len(out)
        return exchange(x, sent, received, group, out)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(requests, "start_all_to_all", exchanged)
        run("full_gqa", contiguous((256,), world_size), rank, None, False, torch.float32, None)
    return seen


def test_rows_that_have_not_come_are_numbers():
    """Of two groups of lists, in two layers. Through shared memory: kernels/test_peer_blocks."""
    assert run_ranks(second_turns, 2) == [4] * 2


def by_the_group(rank, world_size):
    peer_memory.MOST_ROOM = 1000
    peers = shared_windows(rank, world_size)
    layout = contiguous(LENGTHS["one"], world_size)
    given = "full_gqa", layout, rank
    (wanted, _), (found, traffic) = (run(*given, memory, False, torch.float32, None) for memory in (None, peers))
    assert all(map(torch.equal, wanted, found))
    return traffic.calls["all_to_all_single"]


def test_blocks_go_by_the_group_where_there_is_no_room():
    """Where a rank's keys and gradients of them are more than windows take."""
    assert all(calls > 0 for calls in run_ranks(by_the_group, 2))
