"""Softmax attention by groups of heads: the full matrix, the bits of all heads at once, no more memory than said."""

from functools import partial
from weakref import finalize

import pytest
import torch
import torch.distributed as dist
from cases import LENGTHS, layouts
from one_gpu import through_host
from oracles import softmax_attention as full_matrix
from oracles import with_gradients
from parity import disagreements, run_share
from spawn import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longspan.attention import softmax, softmax_attention
from longspan.attention.head_groups import GROUP, head_groups
from longspan.attention.outline import Outline
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
        softmax.merge = merge_head_by_head
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


# Memory: what the plan counts of a backward pass is what one holds, or a little more.


class Peak(TorchDispatchMode):
    """The most bytes at any time of storages that operations made."""

    def __init__(self):
        super().__init__()
        self.known, self.bytes, self.most = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and not func.is_view]
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for storage in (x.untyped_storage() for x in made):
            if storage._cdata not in self.known | inputs:
                self.known.add(storage._cdata)
                self.bytes += storage.nbytes()
                finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.bytes)
        return result

    def _freed(self, key, size):
        self.known.discard(key)
        self.bytes -= size


class Flash:
    """Allocates what FlashAttention does."""

    @staticmethod
    def forward(q, k, v, pack, scale):
        return torch.zeros_like(q), q.new_zeros(q.shape[:2], dtype=torch.float32)

    @staticmethod
    def backward(dout, q, k, v, out, lse, pack, scale):
        _sums = torch.empty_like(q, dtype=torch.float32)
        return tuple(torch.zeros_like(x) for x in (q, k, v))


def peak_of(q, k, v, attend):
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out = attend(q, k, v)
    d_out = torch.zeros_like(out)
    with Peak() as peak:
        gradients = torch.autograd.grad(out, (q, k, v), d_out)
    del gradients
    return peak.most


PLANS = [(kv, strategy, groups) for kv in (16, 4) for strategy in ("ring", "all_gather") for groups in GROUPS]
TOKENS = 512  # of a rank


def inputs(kv_heads, device="cpu"):
    return [torch.zeros(TOKENS, heads, 16, dtype=BF16, device=device) for heads in (16, kv_heads, kv_heads)]


def held(rank, world_size):
    softmax._backend = lambda *_: Flash
    layout, peaks = zigzag((world_size * TOKENS,), world_size), []
    for kv_heads, strategy, groups in PLANS:
        seq = SequenceParallel(dist.group.WORLD, softmax=strategy, head_groups=groups).context(layout)
        peaks.append(peak_of(*inputs(kv_heads), partial(softmax_attention, seq=seq)))
    return peaks


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_plan_counts_what_is_held(world_size):
    """On one rank to the byte. On several it takes no step as the only one, and no call as one of half of the keys."""
    plan, ranks = {}, run_ranks(held, world_size)
    for (kv_heads, strategy, groups), *found in zip(PLANS, *ranks, strict=True):
        seq = Outline(
            (world_size * TOKENS,), TOKENS, world_size, True, True, torch.empty(TOKENS, device="meta"),
            lambda call: None, softmax_strategy=strategy, head_groups=groups,
        )  # fmt: skip
        counted = peak_of(*inputs(kv_heads, "meta"), partial(seq.softmax, mask=Mask()))
        assert max(found) <= counted <= (1 if world_size == 1 else 1.7) * max(found), (kv_heads, strategy, groups)
        plan[kv_heads, strategy, groups] = counted, max(found)
    if world_size > 1:
        for kv_heads, strategy, _ in PLANS:
            for whole, half, quarter in zip(*(plan[kv_heads, strategy, groups] for groups in GROUPS)):
                assert quarter < 0.8 * half < 0.7 * whole


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
        assert peaks[4] < 0.7 * peaks[1] and peaks[4] < peaks[2] < 0.9 * peaks[1], peaks


# How many groups, and what is refused.


def test_groups_are_as_many_as_leave_large_calls():
    for tokens, heads, kv_heads, groups in (
        (2**18 - 1, 16, 16, 1),
        (2**18, 16, 16, 4),
        (2**19, 16, 16, 8),
        (2**20, 16, 16, 16),
        (2**23, 16, 4, 4),
        (2**20, 12, 6, 6),
        (2**18, 24, 3, 3),
        (2**23, 8, 1, 1),
        (2**10, 16, 16, 1),
    ):
        assert head_groups(0, tokens, heads, kv_heads) == groups, (tokens, heads, kv_heads)
        assert groups == 1 or tokens * heads / groups >= GROUP
    assert head_groups(2, 2**10, 16, 4) == 2


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
