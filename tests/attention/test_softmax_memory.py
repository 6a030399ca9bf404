"""What plans count of softmax attention is what ranks hold, followed on the real code, and what two H200 held."""

import json
from functools import partial
from itertools import product
from pathlib import Path
from weakref import finalize

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import longspan
from longspan.attention import softmax, softmax_attention, softmax_passes
from longspan.attention.outline import Outline
from longspan.attention.outline.softmax import TOKENS
from longspan.parallel import SequenceParallel, Topology
from longspan.parallel.exchange import Done
from longspan.parallel.geometry import Mask

RECORD = Path(longspan.__file__).parent / "benchmarks" / "results" / "head_groups_2xH200.json"
HEADS, SIZE, BF16 = 16, 16, torch.bfloat16


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
    """Allocates what FlashAttention-4 does."""

    @staticmethod
    def forward(q, k, v, pack, scale):
        return torch.zeros_like(q), q.new_zeros(q.shape[:2], dtype=torch.float32)

    @staticmethod
    def backward(dout, q, k, v, out, lse, pack, scale):
        shared = q.shape[1] > k.shape[1]
        _sums = [torch.empty_like(x, dtype=torch.float32) for x in ((q, k, v) if shared else (q,))]
        return tuple(torch.zeros_like(x) for x in (q, k, v))


def nothing(*_, **__):
    """In the place of kernels that add where sums are."""


def peaks_of(q, k, v, attend):
    """Of the forward pass and of the backward pass, results included; inputs, output and its gradient are not."""
    attend(q, k, v)  # what is derived once is no part of either pass
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    with Peak() as forward:
        out = attend(q, k, v)
    d_out = torch.zeros_like(out)
    with Peak() as backward:
        gradients = torch.autograd.grad(out, (q, k, v), d_out)
    del gradients
    return forward.most, backward.most


def inputs(tokens, kv_heads, device="cpu", size=SIZE):
    return [torch.zeros(tokens, heads, size, dtype=BF16, device=device) for heads in (HEADS, kv_heads, kv_heads)]


def counted(lengths, topology, tokens, kv_heads, strategy, groups, mask=Mask(), size=SIZE, **options):
    parallel = SequenceParallel(rank=0, topology=topology, softmax=strategy, head_groups=groups, **options)
    seq = Outline(lengths, tokens, parallel, True, True, torch.empty(tokens, device="meta"), lambda call: None)
    attend = partial(softmax_attention, seq=seq, causal=mask.causal, window=mask.window)
    return peaks_of(*inputs(tokens, kv_heads, "meta", size), attend)


def held(rank, world_size, cases, topology):
    softmax._backend = lambda *_: Flash
    softmax_passes.merge = softmax_passes.gather_add = softmax_passes.scatter_rows = nothing
    dist.all_to_all_single = lambda *_, **__: Done()  # threads of gloo hold what they sent for a while
    peaks = []
    for lengths, kv_heads, (strategy, layout), groups, mask in cases:
        settings = {"softmax": strategy, "layout": layout, "head_groups": groups, "topology": topology}
        parallel = SequenceParallel(dist.group.WORLD, **settings)
        seq = parallel.context(lengths)
        attend = partial(softmax_attention, seq=seq, causal=mask.causal, window=mask.window)
        peaks.append(peaks_of(*inputs(seq.num_tokens_local, kv_heads), attend))
    return peaks


AUTO, CUT = "auto", "contiguous"
RINGS = {
    1: [("ring", AUTO)],
    2: [("ring", AUTO), ("all_gather", AUTO), ("ring", CUT)],
    4: [*((name, AUTO) for name in ("ring", "grouped_ring", "all_gather", "double_ring")), ("ring", CUT)],
}
MOVED = {
    2: [("ulysses", AUTO), ("zeppelin", AUTO), ("zeppelin", CUT), ("hybrid", CUT)],
    4: [("ulysses", AUTO), ("ulysses", CUT), ("usp", AUTO), ("zeppelin", CUT), ("zeppelin_even", CUT), ("hybrid", CUT)],
}


def cases_of(world_size):
    """(lengths, key heads, (strategy, layout), groups, mask)"""
    for lengths, masks, groups in (
        ([512], [Mask()], [1, 2, 4]),
        ([512], [Mask(causal=False), Mask(window=96)], [1, 4]),
        ([300, 212], [Mask()], [1, 4]),
        ([1536], [Mask(), Mask(window=200)], [2]),
    ):
        lengths = tuple(world_size * length for length in lengths)
        yield from product([lengths], [16, 4], RINGS[world_size], groups, masks)


def moved_cases(world_size):
    short = [(512 * world_size,), (300 * world_size, 212 * world_size)]
    yield from product(short, [16, 4], MOVED[world_size], [1, 4], [Mask()])
    yield from product([(1536 * world_size,)], [4], MOVED[world_size], [2], [Mask(window=200)])


def compare(world_size, cases, near=0.01):
    """To the byte; of lengths that are made small as near as that."""
    topology = Topology(2, 2) if world_size == 4 else Topology(1, world_size)
    for case, *found in zip(cases, *run_ranks(held, world_size, cases, topology), strict=True):
        lengths, kv_heads, (strategy, layout), groups, mask = case
        tokens, most = sum(lengths) // world_size, tuple(map(max, zip(*found)))
        plan = counted(lengths, topology, tokens, kv_heads, strategy, groups, mask, layout=layout)
        assert plan == (most if tokens < TOKENS else pytest.approx(most, rel=near)), case


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_plan_counts_what_the_fullest_rank_holds(world_size):
    compare(world_size, list(cases_of(world_size)))


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_plan_counts_what_ranks_hold_where_tokens_or_heads_move(world_size):
    compare(world_size, list(moved_cases(world_size)))


def test_the_plan_counts_what_the_rank_with_most_tokens_holds():
    """Of mixed lengths, which plans share out unevenly, and which come and go by links that are loaded unevenly; in the
    default layout every rank holds other documents."""
    lengths, ways = (24_000, 3_500, *[500] * 20), [("zeppelin", AUTO), ("hybrid", CUT), ("ring", AUTO)]
    compare(4, [*product([lengths], [4], ways, [1], [Mask(), Mask(window=300)])], near=0.03)


def test_the_plan_counts_what_two_gpus_held():
    """Above q, k, v and the gradient of the output, in units of q; the record has the output besides."""
    rows = [row for row in json.loads(RECORD.read_text())["rows"] if "units" in row]
    assert len(rows) == 13
    for row in rows:
        tokens, (heads, kv_heads) = row["tokens per GPU"], row["heads"]
        mask = Mask(window=row["window"])
        _, backward = counted((2 * tokens,), Topology(1, 2), tokens, kv_heads, "ring", row["groups"], mask, size=128)
        units = backward / (tokens * heads * 128 * 2)
        assert units + 1 == pytest.approx(row["units"], rel=0.03), row


def test_a_ring_holds_keys_of_two_others_however_many_there_are():
    def unit(world_size):
        return counted((world_size * 256,), Topology(1, world_size), 256, 16, "ring", 1)[1] / (256 * HEADS * SIZE * 2)

    assert [unit(n) for n in (1, 2, 4, 8, 16)] == [5, 11, 16.5, 17.5, 17.5]


def test_cudnn_sums_keys_of_every_query_head_where_they_share_them():
    """In units of q on one GPU: dq, dk and dv, and sums of dq in fp32; with 4 of 16 key heads of dk and dv too."""

    def units(kv_heads, backend):
        held = counted((512,), Topology(1, 1), 512, kv_heads, "ring", 1, backend=backend)[1]
        return held / (512 * HEADS * SIZE * 2)

    for name in ("cudnn", "cudnn_ragged"):
        assert units(16, name) == units(16, "fa4") == 3 + 2
        assert (units(4, name), units(4, "fa4")) == (1.5 + 2 + 4, 1.5 + 2 + 1)
