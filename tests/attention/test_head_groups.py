"""Softmax attention by groups of heads: the full matrix, the bits of all heads at once. test_softmax_memory: memory."""

import pytest
import torch
import torch.distributed as dist
from cases import LENGTHS, layouts
from one_gpu import through_host
from oracles import softmax_attention as full_matrix
from oracles import with_gradients
from parity import disagreements, run_share
from spawn import run_ranks

from longspan.attention import softmax_attention, softmax_passes
from longspan.attention.head_groups import FAR, GROUP, head_groups
from longspan.kernels.merge import merge
from longspan.parallel import SequenceParallel, Topology, zigzag
from longspan.parallel.geometry import Mask

HEADS = {"mha": (4, 4), "gqa": (8, 4)}
MASKS = {"causal": {}, "full": {"causal": False}, "window": {"window": 13}}
GROUPS = (1, 2, 4)
DOUBLE, BF16 = torch.float64, torch.bfloat16
CASES = [  # heads, mask, lengths, layout, strategy, dtype
    ("mha", "causal", "one", "zigzag", "ring", DOUBLE),
    ("gqa", "causal", "mixed", "holes", "ring", DOUBLE),
    ("gqa", "window", "one", "zigzag", "ring", DOUBLE),
    ("mha", "full", "mixed", "balanced", "double_ring", DOUBLE),
    ("gqa", "causal", "one", "zigzag", "double_ring", BF16),
    ("gqa", "full", "few", "contiguous", "grouped_ring", DOUBLE),
    ("mha", "causal", "one", "zigzag", "all_gather", DOUBLE),
    ("gqa", "causal", "mixed", "balanced", "zeppelin", DOUBLE),
    ("mha", "window", "mixed", "contiguous", "zeppelin", BF16),
    ("gqa", "causal", "one", "zigzag", "usp", DOUBLE),
]


def inputs_of(heads, lengths, dtype):
    """(inputs, gradient of the output), the same on every rank."""
    generator, (num_heads, kv_heads) = torch.Generator().manual_seed(len(lengths)), HEADS[heads]

    def normal(count):
        return torch.randn(sum(lengths), count, 8, generator=generator, dtype=torch.float64).to(dtype)

    return {"q": normal(num_heads), "k": normal(kv_heads), "v": normal(kv_heads)}, normal(num_heads)


def merge_head_by_head(out_acc, lse_acc, out, lse, rows=None):
    """merge, where exp and log of an element do not depend on its place in a vector register."""
    rows = slice(None) if rows is None else rows
    for head in range(out.shape[1]):
        parts = [x[rows, head : head + 1].clone() for x in (out_acc, lse_acc)]
        merge(*parts, *(x[:, head : head + 1].contiguous() for x in (out, lse)))
        out_acc[rows, head : head + 1], lse_acc[rows, head : head + 1] = parts


def run_cases(rank, world_size, device="cpu"):
    """Shares of every case by the number of groups."""
    results = []
    if device == "cpu":
        softmax_passes.merge = merge_head_by_head
    topology = Topology(2, world_size // 2) if world_size % 2 == 0 else Topology(1, world_size)
    for heads, mask, name, layout_name, strategy, dtype in CASES:
        inputs, grad_out = inputs_of(heads, LENGTHS[name], dtype)
        inputs, grad_out, shares = {name: x.to(device) for name, x in inputs.items()}, grad_out.to(device), {}
        for groups in GROUPS:
            parallel = SequenceParallel(
                dist.group.WORLD, softmax=strategy, head_groups=groups, topology=topology, token_cap=3.0, device=device
            )
            seq = parallel.context(layouts(LENGTHS[name], world_size)[layout_name])

            def grouped(*, layout, seq=seq, **kwargs):
                return softmax_attention(seq=seq, **kwargs)

            with through_host():
                share = run_share(grouped, inputs, grad_out, seq.layout, rank, **MASKS[mask])
            shares[groups] = {name: x.cpu() for name, x in share.items()}
        results.append(shares)
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_groups_are_exact_and_equal_to_the_bit(world_size):
    check(run_ranks(run_cases, world_size, timeout=240), world_size, bits=True)


@pytest.mark.gpu
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_groups_are_exact_on_one_gpu(world_size):
    """Bits are those of other sums there: libraries choose by the number of heads how they divide their work."""
    check(run_ranks(run_cases, world_size, "cuda:0", timeout=240), world_size, bits=False)


def check(ranks, world_size, bits):
    """bits: whether every number of groups gives the same."""
    problems = []
    for n, (heads, mask, name, layout_name, strategy, dtype) in enumerate(CASES):
        case, layout = f"{heads}-{mask}-{name}-{layout_name}-{strategy}-{dtype}", layouts(LENGTHS[name], world_size)
        inputs, grad_out = inputs_of(heads, LENGTHS[name], dtype)
        exact = with_gradients(full_matrix, inputs, grad_out, LENGTHS[name], **MASKS[mask])
        limits = dict.fromkeys(exact, 1e-9 if dtype == torch.float64 else 2e-2)
        for groups in GROUPS:
            shares = [results[n][groups] for results in ranks]
            problems += disagreements(f"{case} {groups}", shares, layout[layout_name], exact, dtype, limits)
            if not bits:
                continue
            for share, once in zip(shares, (results[n][1] for results in ranks)):
                different = [key for key in once if not torch.equal(share[key], once[key])]
                problems += [f"{case}: {groups} groups change {different}"] * bool(different)
    assert not problems, f"{len(problems)} problems\n" + "\n".join(problems)


# Memory on a GPU; what is held on CPUs: test_softmax_memory.py.

LARGE = 6001  # tokens of a rank, with 16 heads of 128 for each of which backward passes hold fp32 numbers


def held_on_gpu(rank, world_size):
    """The most bytes that the backward pass allocates beside what is there, by the number of groups."""
    torch.cuda.set_device(0)
    layout, peaks = zigzag((world_size * LARGE,), world_size), {}
    for groups in GROUPS:
        seq = SequenceParallel(dist.group.WORLD, softmax="ring", head_groups=groups, device="cuda").context(layout)
        for _ in range(2):  # in the first libraries make what they keep
            q, k, v = (torch.randn(LARGE, 16, 128, device="cuda", dtype=BF16).requires_grad_() for _ in range(3))
            with through_host():
                out = softmax_attention(q, k, v, seq=seq)
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
            peaks[groups] = torch.cuda.max_memory_allocated() - before
    return peaks


@pytest.mark.gpu
def test_groups_hold_less_on_one_gpu():
    for peaks in run_ranks(held_on_gpu, 2, timeout=120):
        assert peaks[4] < 0.7 * peaks[1] and peaks[4] < peaks[2] < 0.92 * peaks[1], peaks


# How many groups, and what is refused.


def test_groups_are_as_many_as_leave_large_calls():
    for tokens, heads, kv_heads, groups, near in (
        (2**17 - 1, 16, 16, 1, 1),
        (2**17, 16, 16, 4, 1),
        (2**18, 16, 16, 8, 4),
        (2**19, 16, 16, 16, 8),
        (2**22, 16, 4, 4, 4),
        (2**18, 12, 6, 6, 1),
        (2**17, 24, 3, 3, 1),
        (2**18, 24, 3, 3, 3),
        (2**22, 8, 1, 1, 1),
        (2**10, 16, 16, 1, 1),
    ):
        far = head_groups(0, tokens, heads, kv_heads, Mask(), [5, FAR])
        assert far == groups and (groups == 1 or tokens * heads / groups >= GROUP), (tokens, heads, kv_heads)
        for mask, longest in ((Mask(), FAR - 1), (Mask(True, FAR - 1), 2**20), (Mask(False), 10)):
            assert head_groups(0, tokens, heads, kv_heads, mask, [longest, 1]) == near, (tokens, heads, mask)
        assert head_groups(0, tokens, heads, kv_heads, Mask(True, FAR), [2**20]) == groups
    assert head_groups(2, 2**10, 16, 4, Mask(), [8]) == 2


def refused(rank, world_size):
    layout = zigzag((8,), world_size)
    seq = SequenceParallel(dist.group.WORLD, head_groups=4).context(layout)
    tensors = [torch.zeros(layout.tokens_per_rank[rank], heads, 8) for heads in (12, 6, 6)]
    with pytest.raises(ValueError) as found:
        softmax_attention(*tensors, seq=seq)
    return str(found.value)


def test_groups_that_do_not_divide_key_heads_are_refused_on_every_rank():
    line = "head_groups=4 does not divide the 6 key heads: use one of 1, 2, 3, 6, or 0"
    assert run_ranks(refused, 2) == [line] * 2
