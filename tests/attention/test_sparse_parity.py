"""sparse_attention on 1 to 8 ranks against the selection's definition and the full masked matrix, in fp64."""

from dataclasses import replace
from functools import cache

import parity
import pytest
import torch
from cases import LENGTHS
from oracles import with_gradients
from parity import Case
from sparse_oracle import hierarchy_seen, seen_by
from sparse_oracle import sparse_attention as definition
from sparse_variants import CAUSAL, MORE_VARIANTS, SMALL, VARIANTS, Waits, make_inputs, small_variant
from spawn import run_ranks

from longspan.attention import (
    Antidiagonal,
    BlockLists,
    Hierarchical,
    TopBlocks,
    sparse,
    sparse_attention,
)
from longspan.attention.gather_rows import Ranks
from longspan.kernels.sparse import Picks, forms
from longspan.parallel import SequenceParallel, contiguous


def all_cases(world_size):
    """Every variant on one long document and on mixed lengths, those of MORE_VARIANTS on up to 4 ranks and on one of
    them; layouts, strategies and small batches take turns."""
    turn = world_size
    for number, variant in enumerate(VARIANTS):
        batches = ["one", "mixed", ["two", "ones", "few", "single_token"][turn % 4]]
        if variant in MORE_VARIANTS:
            batches = batches[(number + world_size) % 2 :: 2] if world_size <= 4 else []
        for lengths in batches:
            layout = ["contiguous", "zigzag", "random", "holes", "balanced"][turn % 5]
            yield Case(variant, lengths, layout, ["fetch", "ring", "auto"][turn % 3])
            turn += 1
        if turn % 4 == 0:
            yield Case(variant, "mixed", "zigzag", "auto", torch.float32)


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


def lists_of(chosen):
    """What is listed for every query block, as sets, and what single queries picked, if they did."""
    fine, coarse, *rule = chosen
    lists = [[[{*row} - {-1} for row in head] for head in x.tolist()] for x in (fine, coarse) if x is not None]
    return lists, rule[0].blocks.sort(-1).values if rule and isinstance(rule[0], Picks) else None


@pytest.mark.parametrize("variant", CAUSAL)
def test_no_token_reaches_an_earlier_one(variant):
    """Changing a token changes no earlier output, nor any block chosen for one."""
    inputs, _, kwargs = make_inputs(variant, (200,))
    selection, layout = kwargs["selection"], contiguous((200,), 1)
    tables = selection.tables(SequenceParallel().context(layout), True)

    def run(inputs):
        coarse, _ = selection.coarse(inputs["k"], inputs["v"], tables, lambda x: x)
        chosen = selection.choose(inputs["q"], inputs["k"], coarse, tables, Ranks())
        return sparse_attention(**inputs, layout=layout, **kwargs), *lists_of(chosen)

    out, lists, picks = run(inputs)
    for token in (0, 15, 16, 50, 99, 111, 199):
        changed = {name: x.clone() for name, x in inputs.items()}
        for x in changed.values():
            x[token] += 30.0
        new_out, new_lists, new_picks = run(changed)
        assert not torch.equal(new_out[token:], out[token:])
        torch.testing.assert_close(new_out[:token], out[:token], rtol=1e-13, atol=1e-13)  # longer lists round anew
        if picks is not None:
            assert torch.equal(new_picks[:token], picks[:token])
        coarse_size = tables.dense.queries.size if len(lists) > 1 else None
        for new, old, size in zip(new_lists, lists, (tables.queries.size, coarse_size)):
            block = token // size + (picks is None)  # the token's whole block has one list
            assert [head[:block] for head in new] == [head[:block] for head in old]


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name in CAUSAL or name not in MORE_VARIANTS])
def test_pairs_are_counted(variant):
    """Without a mask for whole blocks on every level only: how much of others is chosen depends on the tokens."""
    selection, causal = VARIANTS[variant][2]["selection"], VARIANTS[variant][2].get("causal", True)
    hierarchy = isinstance(selection, Hierarchical)
    whole = 1 if causal else selection.block**selection.levels if hierarchy else selection.key_block
    for length in (1, 37, 200) if causal else (whole, 5 * whole, 12 * whole):
        inputs, _, kwargs = make_inputs(variant, (length,))
        selection, q, k = kwargs["selection"], inputs["q"], inputs["k"]
        if hierarchy:
            fine, _, coarse = hierarchy_seen(q, k, causal, selection)
            pairs = fine.sum() + coarse.sum()
        elif isinstance(selection, Antidiagonal):  # what is always kept
            always = TopBlocks(selection.first, selection.query_block, selection.key_block, selection.first)
            pairs = seen_by(q, k, True, always).sum()
        else:
            pairs = seen_by(q, k, causal, selection).sum()
        counted = selection.pairs(length) if causal else selection.pairs(length, causal=False)
        assert counted * q.shape[1] == pairs, length


@pytest.fixture
def in_triton(monkeypatch):
    """Choosing, lists and attention by the Triton kernels, in the interpreter."""
    fused = pytest.importorskip("longspan.kernels.sparse.fused", reason="Triton is not installed")
    monkeypatch.setattr(sparse, "choose", lambda *arguments: (fused, None))
    monkeypatch.setattr(forms, "takes", lambda x: True)


@pytest.mark.parametrize(
    "variant", ["causal_gqa", "levels2", "levels2_full", "window2_full", "tokens", "compressed", "antidiagonal"]
)
def test_triton_kernels_in_its_place(variant, in_triton):
    inputs, grad_out, kwargs = small_variant(variant)
    wanted = with_gradients(definition, inputs, grad_out, (100,), **kwargs)
    share = parity.run_share(sparse_attention, inputs, grad_out, contiguous((100,), 1), 0, **kwargs)
    assert all(parity.relative_error(share[name], x) < 1e-5 for name, x in wanted.items())


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
    for chosen in selection.choose(inputs["q"], inputs["k"], coarse, tables, Ranks())[:2]:
        for row in [] if chosen is None else chosen.flatten(0, 1).tolist():
            listed = [n for n in row if n >= 0]
            assert listed == sorted(set(listed))


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("form", ["plain", "triton"])
def test_lists_without_gaps_are_taken_as_they_are(levels, form, monkeypatch):
    """Where there is enough to choose from, and documents are of whole rows and as many blocks of the last level."""
    monkeypatch.setattr(forms, "takes", lambda x: form == "triton")
    selection = Hierarchical(4, 2, levels)
    few = 4**levels
    cases = [((256,) * 2, False, True), ((250,) * 2, False, levels == 1), ((256,) * 2, True, False)]
    for lengths, causal, full in [*cases, ((few,) * 2, False, False), ((256, 512), False, levels == 1)]:
        tables = selection.tables(SequenceParallel().context(contiguous(lengths, 1)), causal)
        assert tables.full == full
        if full:
            q, k = (torch.randn(sum(lengths), 2, 16) for _ in range(2))
            coarse, _ = selection.coarse(k, k, tables, lambda x: x)
            chosen = selection.choose(q, k, coarse, tables, Ranks())
            assert all(x.min() >= 0 for x in chosen if x is not None)
            made = [sparse.parts_of(chosen, x, causal, "auto", None)[0] for x in (tables, replace(tables, full=False))]
            for part, other in zip(*made, strict=True):
                assert torch.equal(part.plan.row_ptr, other.plan.row_ptr)
                assert torch.equal(part.plan.row_idx, other.plan.row_idx)


def test_lists_are_told_apart():
    """What follows from a layout is kept by selection: other lists are another selection."""
    first, same, other = (BlockLists([[[n]]], 8, 4) for n in (0, 0, 1))
    assert first == same and hash(first) == hash(same) and first != other
    functions = [lambda length, n=n: [[n]] for n in (0, 1)]
    seq = SequenceParallel().context(contiguous((8,), 1))
    q, k, v = make_inputs("full", (8,))[0].values()
    outs = [sparse_attention(q, k, v, selection=BlockLists(f, 8, 4), causal=False, seq=seq) for f in functions]
    assert not torch.equal(*outs)


def test_a_selection_of_ones_own():
    """Whatever has the methods of a Selection chooses."""

    class Latest:
        def tables(self, seq, causal):
            return TopBlocks(1, **SMALL).tables(seq, causal)

        def coarse(self, k, v, tables, gather):
            return None, None

        def choose(self, q, k, coarse_k, tables, ranks):
            return tables.diagonal[None], None

    inputs, _, _ = make_inputs("causal", (50,))
    out = sparse_attention(**inputs, selection=Latest())
    lists = [[[0, 1], [2, 3], [4, 5], [6, -1]]]
    wanted = definition(**inputs, lengths=(50,), selection=BlockLists(lists, **SMALL))
    torch.testing.assert_close(out, wanted)


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
