"""sparse_attention on 1 to 8 ranks against the selection's definition and the full masked matrix, in fp64."""

import zlib
from dataclasses import replace
from functools import cache

import parity
import pytest
import torch
import torch.distributed as dist
from cases import LENGTHS
from oracles import with_gradients
from parity import Case
from sparse_oracle import blocks_seen, hierarchy_seen
from sparse_oracle import sparse_attention as definition
from spawn import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from traffic import Traffic

from longspan.attention import Hierarchical, TopBlocks, sparse, sparse_attention
from longspan.kernels.sparse import forms
from longspan.parallel import SequenceParallel, contiguous

HEAD_SIZE = 8
SMALL = {"query_block": 16, "key_block": 8}
# name: (query heads, key heads, keyword arguments)
VARIANTS = {
    "causal": (2, 2, {"selection": TopBlocks(2, **SMALL)}),
    "causal_gqa": (4, 2, {"selection": TopBlocks(0.3, **SMALL)}),
    "causal_forced": (2, 1, {"selection": TopBlocks(4, **SMALL, first=1, recent=1)}),
    "causal_odd": (2, 2, {"selection": TopBlocks(3, query_block=12, key_block=7)}),
    "full": (2, 2, {"selection": TopBlocks(3, **SMALL), "causal": False}),
    "full_gqa": (4, 2, {"selection": TopBlocks(0.2, **SMALL), "causal": False}),
    "levels1": (2, 2, {"selection": Hierarchical(8, 2, 1)}),
    "levels2": (4, 2, {"selection": Hierarchical(4, 2, 2)}),
    "levels3": (2, 2, {"selection": Hierarchical(3, 2, 3)}),
    "levels1_full": (2, 2, {"selection": Hierarchical(8, 2, 1), "causal": False}),
    "levels2_full": (2, 1, {"selection": Hierarchical(4, 3, 2), "causal": False}),
    "levels3_full": (4, 2, {"selection": Hierarchical(3, 2, 3), "causal": False}),
}


def all_cases(world_size):
    """Every variant on one long document and on mixed lengths; layouts, strategies and small batches take turns."""
    turn = world_size
    for variant in VARIANTS:
        for lengths in ("one", "mixed", ["two", "ones", "few", "single_token"][turn % 4]):
            layout = ["contiguous", "zigzag", "random", "holes", "balanced"][turn % 5]
            yield Case(variant, lengths, layout, ["fetch", "ring", "auto"][turn % 3])
            turn += 1
        if turn % 4 == 0:
            yield Case(variant, "mixed", "zigzag", "auto", torch.float32)


def make_inputs(variant, lengths, dtype=torch.float64):
    heads, key_heads, kwargs = VARIANTS[variant]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{variant}{lengths}".encode()))

    def normal(heads):
        return torch.randn(sum(lengths), heads, HEAD_SIZE, generator=generator, dtype=torch.float64).to(dtype)

    return {"q": normal(heads), "k": normal(key_heads), "v": normal(key_heads)}, normal(heads), kwargs


@cache
def expected(variant, lengths, dtype):
    inputs, grad_out, kwargs = make_inputs(variant, LENGTHS[lengths], dtype)
    return with_gradients(definition, inputs, grad_out, LENGTHS[lengths], **kwargs)


def run_cases(rank, world_size, cases):
    return parity.run_cases(rank, world_size, cases, sparse_attention, make_inputs)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_equals_the_full_matrix(world_size):
    cases = list(all_cases(world_size))
    ranks = run_ranks(run_cases, world_size, cases, timeout=180)
    parity.check_cases(ranks, world_size, cases, lambda case: expected(case.variant, case.lengths, case.dtype))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "full" not in name])
def test_no_token_reaches_an_earlier_one(variant):
    """Changing a token changes no earlier output, nor any block chosen for one."""
    inputs, _, kwargs = make_inputs(variant, (200,))
    selection, layout = kwargs["selection"], contiguous((200,), 1)
    tables = selection.tables(SequenceParallel().context(layout), True)

    def run(inputs):
        coarse, _ = selection.coarse(inputs["k"], inputs["v"], tables, lambda x: x)
        chosen = selection.choose(inputs["q"], inputs["k"], coarse, tables, lambda x: x)
        return sparse_attention(**inputs, layout=layout, **kwargs), [x.sort(-1).values for x in chosen if x is not None]

    out, chosen = run(inputs)
    for token in (0, 15, 16, 50, 111, 199):
        changed = {name: x.clone() for name, x in inputs.items()}
        for x in changed.values():
            x[token] += 3.0
        new_out, new_chosen = run(changed)
        assert torch.equal(new_out[:token], out[:token]) and not torch.equal(new_out[token:], out[token:])
        block = token // tables.queries.size
        for new, old in zip(new_chosen, chosen, strict=True):
            assert torch.equal(new[:, : block + 1], old[:, : block + 1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_pairs_are_counted(variant):
    """Without a mask for whole blocks on every level only: how much of others is chosen depends on the tokens."""
    selection, causal = VARIANTS[variant][2]["selection"], VARIANTS[variant][2].get("causal", True)
    hierarchy = isinstance(selection, Hierarchical)
    whole = selection.block**selection.levels if hierarchy else selection.key_block
    for length in (1, 37, 200) if causal else (whole, 5 * whole, 12 * whole):
        inputs, _, _ = make_inputs(variant, (length,))
        q, k = inputs["q"], inputs["k"]
        if hierarchy:
            fine, _, coarse = hierarchy_seen(q, k, causal, selection)
            pairs = fine.sum() + coarse.sum()
        else:
            pairs = blocks_seen(q, k, causal, selection).sum()
        assert selection.pairs(length, causal) * q.shape[1] == pairs, length


def small_variant(variant):
    """Inputs of a variant in fp32 with blocks that the Triton kernels take."""
    inputs, grad_out, kwargs = make_inputs(variant, (100,), torch.float32)
    blocks = {"block": 16} if "levels" in variant else {"query_block": 32, "key_block": 16}
    return inputs, grad_out, kwargs | {"selection": replace(kwargs["selection"], **blocks)}


@pytest.fixture
def in_triton(monkeypatch):
    """Choosing, lists and attention by the Triton kernels, in the interpreter."""
    fused = pytest.importorskip("longspan.kernels.sparse.fused", reason="Triton is not installed")
    monkeypatch.setattr(sparse, "choose", lambda *arguments: (fused, None))
    monkeypatch.setattr(forms, "takes", lambda x: True)


@pytest.mark.parametrize("variant", ["causal_gqa", "levels2", "levels2_full"])
def test_triton_kernels_in_its_place(variant, in_triton):
    inputs, grad_out, kwargs = small_variant(variant)
    wanted = with_gradients(definition, inputs, grad_out, (100,), **kwargs)
    share = parity.run_share(sparse_attention, inputs, grad_out, contiguous((100,), 1), 0, **kwargs)
    assert all(parity.relative_error(share[name], x) < 1e-5 for name, x in wanted.items())


class Waits(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: values read, and results whose shape depends on values."""

    names = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero", "equal"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._opname not in self.names, f"{func} waits for the device"
        if func._opname == "index":
            assert all(x is None or x.dtype not in (torch.bool, torch.uint8) for x in args[1]), "mask as an index"
        if func._opname == "repeat_interleave":
            assert (kwargs or {}).get("output_size") is not None, "repeat_interleave without output_size"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["causal_gqa", "full", "levels2"])
def test_one_rank_never_waits_for_the_device(variant, in_triton):
    inputs, grad_out, kwargs = small_variant(variant)
    seq = SequenceParallel().context(contiguous((100,), 1))
    selection, causal = kwargs["selection"], kwargs.get("causal", True)
    selection.tables(seq, causal)  # made with the batch
    leaves = [x.requires_grad_() for x in inputs.values()]
    with Waits():
        out = sparse_attention(*leaves, selection=selection, causal=causal, seq=seq)
        torch.autograd.grad(out, leaves, grad_out)


@pytest.mark.parametrize("variant", VARIANTS)
def test_lists_ascend(variant):
    """What plans made from them rely on."""
    lengths = (200, 1, 45)
    inputs, _, kwargs = make_inputs(variant, lengths)
    selection, causal = kwargs["selection"], kwargs.get("causal", True)
    tables = selection.tables(SequenceParallel().context(contiguous(lengths, 1)), causal)
    coarse, _ = selection.coarse(inputs["k"], inputs["v"], tables, lambda x: x)
    for chosen in selection.choose(inputs["q"], inputs["k"], coarse, tables, lambda x: x):
        for row in [] if chosen is None else chosen.flatten(0, 1).tolist():
            listed = [n for n in row if n >= 0]
            assert listed == sorted(set(listed))


def run_traffic(rank, world_size, strategy):
    """Bytes of keys and values sent, and what the blocks of others that this rank's queries chose weigh."""
    inputs, grad_out, _ = make_inputs("causal_gqa", (1024,), torch.float32)
    layout = contiguous((1024,), world_size)
    selection = TopBlocks(2, query_block=64, key_block=16)
    rows = torch.from_numpy(layout.global_indices(rank))
    q, k, v = (inputs[name][rows] for name in "qkv")
    with Traffic() as traffic:
        sparse_attention(q, k, v, selection=selection, layout=layout, group=dist.group.WORLD, strategy=strategy)
    seen = blocks_seen(inputs["q"], inputs["k"], True, selection)[:, rows]  # [query heads, rows, T]
    wanted = sum(seen[2 * head].any(0).sum() - seen[2 * head][:, rows].any(0).sum() for head in range(2)).item()
    return traffic.bytes["isend"], wanted * 2 * HEAD_SIZE * 4


def test_only_blocks_that_are_chosen_travel():
    fetched, ring = (run_ranks(run_traffic, 4, strategy) for strategy in ("fetch", "ring"))
    sent, wanted = map(sum, zip(*fetched))
    assert sent == wanted > 0
    assert sum(sent for sent, _ in ring) > 2 * wanted


@pytest.mark.parametrize(
    "change, message",
    [
        ({"selection": 5}, "selection is a int; give TopBlocks(...) or Hierarchical(...)"),
        ({"v": torch.zeros(8, 2, 3)}, "k has shape (8, 2, 4) but v has (8, 2, 3); they must be equal"),
        ({"q": torch.zeros(8, 4, 5)}, "k has shape (8, 2, 4); its head_dim must be that of q, (8, 4, 5)"),
        ({"q": torch.zeros(8, 3, 4)}, "k has 2 heads, which does not divide the 3 heads of q"),
        ({"strategy": "rign"}, "sparse strategy 'rign' is unknown; use auto, fetch, ring; did you mean 'ring'?"),
    ],
)
def test_refusals(change, message):
    given = {"q": torch.zeros(8, 4, 4), "k": torch.zeros(8, 2, 4), "v": torch.zeros(8, 2, 4), "selection": TopBlocks()}
    with pytest.raises(ValueError) as error:
        sparse_attention(**given | change)
    assert str(error.value) == message


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TopBlocks(0), "TopBlocks.keep=0 must be a whole number of blocks or a share between 0 and 1"),
        (lambda: TopBlocks(2.5), "TopBlocks.keep=2.5 must be a whole number of blocks or a share between 0 and 1"),
        (lambda: TopBlocks(query_block=0), "TopBlocks.query_block=0 must be a whole number of at least 1"),
        (lambda: TopBlocks(2, first=2, recent=1), "TopBlocks.keep=2 must be at least first + recent, 3"),
        (lambda: Hierarchical(1), "Hierarchical.block=1 must be a whole number of at least 2"),
        (lambda: Hierarchical(levels=0), "Hierarchical.levels=0 must be a whole number of at least 1"),
    ],
)
def test_selections_refuse(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value) == message


class TestOnGpu:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("selection", [TopBlocks(0.1), Hierarchical(16, 8, 2), Hierarchical(16, 4, 3)], ids=str)
    def test_one_rank_never_waits_and_repeats_bit_for_bit(self, selection, causal):
        lengths = (5000, 100, 1, 3000)
        seq = SequenceParallel(device="cuda").context(contiguous(lengths, 1))
        generator = torch.Generator("cuda").manual_seed(0)
        q, k, v, d_out = (
            torch.randn(sum(lengths), heads, 64, device="cuda", dtype=torch.bfloat16, generator=generator)
            for heads in (4, 2, 2, 4)
        )
        leaves = [x.requires_grad_() for x in (q, k, v)]

        def run():
            out = sparse_attention(*leaves, selection=selection, causal=causal, seq=seq)
            return out, *torch.autograd.grad(out, leaves, d_out)

        first = run()  # compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))

    @pytest.mark.parametrize("variant", ["causal_gqa", "causal_forced", "full", "levels2", "levels3_full"])
    def test_equals_the_definition(self, variant):
        heads, key_heads, kwargs = VARIANTS[variant]
        blocks = {"block": 16} if "levels" in variant else {"query_block": 32, "key_block": 16}
        kwargs = kwargs | {"selection": replace(kwargs["selection"], **blocks)}
        inputs, grad_out, _ = make_inputs(variant, (300, 77), torch.float32)
        wanted = with_gradients(definition, inputs, grad_out, (300, 77), **kwargs)
        seq = SequenceParallel(device="cuda").context(contiguous((300, 77), 1))
        leaves = [x.cuda().requires_grad_() for x in inputs.values()]
        out = sparse_attention(*leaves, seq=seq, **kwargs)
        found = dict(zip(("out", "q", "k", "v"), (out, *torch.autograd.grad(out, leaves, grad_out.cuda()))))
        for (name, x), y in zip(found.items(), wanted.values(), strict=True):
            assert parity.relative_error(x.detach().cpu(), y) < 1e-4, name
