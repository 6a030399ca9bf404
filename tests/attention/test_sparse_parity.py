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
from sparse_oracle import blocks_seen, hierarchy_seen, seen_by
from sparse_oracle import sparse_attention as definition
from spawn import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from traffic import Traffic

from longspan.attention import (
    Antidiagonal,
    BlockLists,
    CompressedTop,
    Hierarchical,
    Radial,
    TokenTop,
    TopBlocks,
    Window,
    sparse,
    sparse_attention,
)
from longspan.attention.gather_rows import Ranks
from longspan.kernels.sparse import Picks, forms
from longspan.parallel import SequenceParallel, contiguous
from longspan.parallel.exchange import ToHost

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


def every_second(length):
    """Key blocks 0, 2, 4, ... of the first half of those there are, for every block of queries."""
    blocks = torch.arange(0, -(-length // 8) // 2 + 1, 2)
    return blocks.expand(-(-length // 16), -1)


def random_lists(lengths, heads=2):
    """Up to three key blocks a list, later ones and none among them."""
    generator, lists = torch.Generator().manual_seed(0), []
    for length in lengths:
        columns, rows = -(-length // 8), -(-length // 16)
        chosen = torch.rand(heads, rows, columns, generator=generator).argsort(-1)[..., :3]
        lists.append(chosen.masked_fill(torch.rand(chosen.shape, generator=generator) < 0.3, -1))
    return BlockLists(tuple(lists), **SMALL)


# The same for selections with lists from lengths, of different lengths, and token by token. A selection that is a
# function is one of lengths.
MORE_VARIANTS = {
    "window": (4, 2, {"selection": Window(37, **SMALL)}),
    "window2": (2, 1, {"selection": Window((3, 5), (0, 7), query_block=12, key_block=7)}),
    "window3": (2, 2, {"selection": Window((2, 3, 3), (0, 3, 5), causal_axes=(True, False, True), **SMALL)}),
    "window_morton": (2, 2, {"selection": Window((4, 7), (19, 16), "morton", **SMALL)}),
    "window_full": (2, 2, {"selection": Window(8, **SMALL), "causal": False}),
    "window2_full": (4, 2, {"selection": Window((4, 3), (20, 15), **SMALL), "causal": False}),
    "window3_morton_full": (2, 1, {"selection": Window((3, 3, 2), (0, 4, 6), "morton", **SMALL), "causal": False}),
    "radial": (2, 2, {"selection": Radial(21, query_block=8, key_block=4)}),
    "radial_full": (4, 2, {"selection": Radial(20, query_block=8, key_block=4), "causal": False}),
    "radial_far_full": (2, 2, {"selection": Radial(3, query_block=2, key_block=3), "causal": False}),
    "antidiagonal": (4, 2, {"selection": Antidiagonal(0.4, 4, **SMALL)}),
    "antidiagonal_full": (2, 2, {"selection": Antidiagonal(0.3, 8, **SMALL, first=0), "causal": False}),
    "tokens": (4, 2, {"selection": TokenTop(3, **SMALL)}),
    "tokens_own": (2, 2, {"selection": TokenTop(1, query_block=12, key_block=7)}),
    "tokens_full": (2, 1, {"selection": TokenTop(2, **SMALL), "causal": False}),
    "compressed": (4, 2, {"selection": CompressedTop(4, 8, 8, 4, 2)}),
    "compressed_odd": (4, 1, {"selection": CompressedTop(3, 4, 6, 6, 3, first=0, recent=1)}),
    "compressed_full": (2, 2, {"selection": CompressedTop(3, 4, 8, 4, 2, recent=1), "causal": False}),
    "lists": (4, 2, {"selection": BlockLists(every_second, **SMALL)}),
    "lists_of_heads": (4, 2, {"selection": random_lists}),
    "lists_full": (2, 2, {"selection": random_lists, "causal": False}),
}
VARIANTS |= MORE_VARIANTS
CAUSAL = [name for name in VARIANTS if "full" not in name]


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


def make_inputs(variant, lengths, dtype=torch.float64):
    heads, key_heads, kwargs = VARIANTS[variant]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{variant}{lengths}".encode()))

    def normal(heads):
        return torch.randn(sum(lengths), heads, HEAD_SIZE, generator=generator, dtype=torch.float64).to(dtype)

    if callable(kwargs["selection"]):
        kwargs = kwargs | {"selection": kwargs["selection"](lengths)}
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
        sizes = tables.queries.size, tables.tiles.size if len(lists) > 1 else None  # of fine and of coarse lists
        for new, old, size in zip(new_lists, lists, sizes):
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


@pytest.mark.parametrize(
    "variant", ["causal_gqa", "levels2", "levels2_full", "window2_full", "tokens", "compressed", "antidiagonal"]
)
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
    for chosen in selection.choose(inputs["q"], inputs["k"], coarse, tables, Ranks())[:2]:
        for row in [] if chosen is None else chosen.flatten(0, 1).tolist():
            listed = [n for n in row if n >= 0]
            assert listed == sorted(set(listed))


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("form", ["plain", "triton"])
def test_lists_without_gaps_are_taken_as_they_are(levels, form, monkeypatch):
    """Where there is enough to choose from, and documents are of whole rows."""
    monkeypatch.setattr(forms, "takes", lambda x: form == "triton")
    selection = Hierarchical(4, 2, levels)
    few = 4**levels
    cases = (256, False, True), (250, False, levels == 1), (256, True, False), (few, False, False)
    for length, causal, full in cases:
        lengths = length, length
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


def run_waiting(rank, world_size, cases):
    """Of every case what was done in its forward pass, in order: kernels, and waits of the host; backward waits for
    nothing. Results are those of the definition."""
    import interpreter_bf16

    from longspan.kernels.sparse import fused

    interpreter_bf16.install()
    done = []
    wait, forward = ToHost.wait, fused.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "choose", lambda *arguments: (fused, None))
        patch.setattr(forms, "takes", lambda x: True)
        patch.setattr(fused, "forward", lambda *x: done.append("kernel") or forward(*x))
        patch.setattr(ToHost, "wait", lambda self: done.append("wait") or wait(self))
        found = []
        for variant, strategy in cases:
            inputs, grad_out, kwargs = small_variant(variant)
            wanted = with_gradients(definition, inputs, grad_out, (100,), **kwargs)
            layout = contiguous((100,), world_size)
            rows = torch.from_numpy(layout.global_indices(rank))
            leaves = [inputs[name][rows].requires_grad_() for name in "qkv"]
            seq = SequenceParallel(dist.group.WORLD, sparse=strategy).context(layout)
            kwargs["selection"].tables(seq, kwargs.get("causal", True))  # made with the batch
            with Waits(), pytest.MonkeyPatch.context() as strict:
                for name in ("tolist", "item"):
                    strict.setattr(torch.Tensor, name, lambda x: pytest.fail("values are read without ToHost"))
                out = sparse_attention(*leaves, seq=seq, **kwargs)
                found.append(done[:])
                results = out, *torch.autograd.grad(out, leaves, grad_out[rows])
                assert done == found[-1]
            assert all(parity.relative_error(x, y[rows]) < 1e-5 for x, y in zip(results, wanted.values(), strict=True))
            done.clear()
        return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs kernels in the interpreter")
def test_ranks_wait_once_after_local_work():
    """A ring waits for nothing; by request the host waits once, with local work queued, and once more for the means of
    level 1, which have to be there before blocks are chosen."""
    pytest.importorskip("triton")
    cases = [("full", "ring"), ("full", "fetch"), ("full", "auto"), ("levels2_full", "fetch"), ("levels2_full", "ring")]
    for found in run_ranks(run_waiting, 2, cases):
        ring, fetch, auto, levels_fetch, levels_ring = (" ".join(x) for x in found)
        assert ring == "kernel kernel"
        assert fetch == auto == "kernel wait kernel"
        assert levels_fetch == "wait kernel kernel kernel kernel wait kernel"
        assert levels_ring == "wait kernel kernel kernel kernel kernel"


def rows_wanted(seen, rows):
    """Rows of others that any of the queries `rows` sees, summed over lists: seen [lists, T, rows of keys]."""
    return sum((head[rows].any(0)).sum() for head in seen).item()


def run_traffic(rank, world_size, cases):
    """For every (selection, strategy): bytes of keys and values sent, forward and backward, and what the rows of others
    weigh that this rank's queries chose."""
    found = []
    for selection, strategy, causal in cases:
        inputs, grad_out, _ = make_inputs("causal_gqa", (1024,), torch.float32)
        layout = contiguous((1024,), world_size)
        rows = torch.from_numpy(layout.global_indices(rank))
        leaves = [inputs[name][rows].requires_grad_() for name in "qkv"]
        given = {"selection": selection, "causal": causal, "layout": layout, "group": dist.group.WORLD}
        with Traffic() as forward:
            out = sparse_attention(*leaves, **given, strategy=strategy)
        with Traffic() as backward:
            torch.autograd.grad(out, leaves, grad_out[rows])
        if isinstance(selection, Hierarchical):
            fine, spans, coarse = hierarchy_seen(inputs["q"], inputs["k"], causal, selection)
            level1 = [n for n, (level, _) in enumerate(spans) if level == 1]
            owned = torch.tensor([[start in rows for start, _ in spans.values()]])[:, level1]
            coarse = coarse[::2, :, level1]
            wanted = rows_wanted(coarse & ~owned, rows)
        else:
            fine, wanted = blocks_seen(inputs["q"], inputs["k"], causal, selection), 0
        fine = fine[::2].clone()  # [key heads, T, T]
        fine[:, :, rows] = False
        wanted += rows_wanted(fine, rows)
        found.append((forward.bytes["isend"], backward.bytes["isend"], wanted * 2 * HEAD_SIZE * 4))
    return found


def test_only_blocks_that_are_chosen_travel():
    """Gradients as well, and in LLSA means of level 1."""
    top = TopBlocks(2, query_block=64, key_block=16)
    cases = [(top, "fetch", True), (top, "ring", True), (Hierarchical(8, 2, 2), "fetch", False)]
    for number, ((forward, backward, wanted), (_, strategy, _)) in enumerate(
        zip((map(sum, zip(*ranks)) for ranks in zip(*run_ranks(run_traffic, 4, cases))), cases, strict=True)
    ):
        if strategy == "fetch":
            assert forward == backward == wanted > 0, number
        else:  # a causal mask hides half of what others hold
            assert forward == backward == 6 * 256 * 2 * 2 * HEAD_SIZE * 4 > 2 * wanted


def run_choices(rank, world_size, cases):
    """For every (selection, strategy, RING_SHARE or None) the number of parts whose keys come from other ranks."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        attend = sparse.attend

        def counted(*given):
            result = attend(*given)
            found.append(sum(part.remote for part in result[2]))
            return result

        patch.setattr(sparse, "attend", counted)
        for selection, strategy, share in cases:
            patch.setattr(block_parts, "RING_SHARE", share or RING_SHARE)
            inputs, _, _ = make_inputs("causal_gqa", (1024,), torch.float32)
            layout = contiguous((1024,), world_size)
            rows = torch.from_numpy(layout.global_indices(rank))
            given = {"selection": selection, "causal": False, "layout": layout, "group": dist.group.WORLD}
            sparse_attention(*(inputs[name][rows] for name in "qkv"), **given, strategy=strategy)
    return found


def share_of_a_ring(selection):
    """What ranks ask for over what a ring brings, from the definition."""
    inputs, _, _ = make_inputs("causal_gqa", (1024,), torch.float32)
    seen = (
        blocks_seen(inputs["q"], inputs["k"], False, selection)[::2].unflatten(1, (4, 256)).any(2)
    )  # [heads, rank, T]
    theirs = seen.unflatten(2, (4, 256)) & ~torch.eye(4, dtype=torch.bool)[None, :, :, None]
    return theirs.sum().item() / (2 * 12 * 256)


def test_auto_goes_by_what_is_asked_for():
    few, many = (TopBlocks(keep, query_block=64, key_block=16) for keep in (2, 0.3))
    share = share_of_a_ring(few)
    assert share < RING_SHARE < share_of_a_ring(many)
    cases = [(few, "auto", None), (many, "auto", None), (few, "auto", share - 1e-9), (few, "auto", share + 1e-9)]
    for found in run_ranks(run_choices, 4, cases):
        assert found == [1, 3, 3, 1]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"selection": 5}, "selection is a int; give one such as TopBlocks(...) or Window(...)"),
        ({"v": torch.zeros(8, 2, 3)}, "k has shape (8, 2, 4) but v has (8, 2, 3); they must be equal"),
        ({"q": torch.zeros(8, 4, 5)}, "k has shape (8, 2, 4); its head_dim must be that of q, (8, 4, 5)"),
        ({"q": torch.zeros(8, 3, 4)}, "k has 2 heads, which does not divide the 3 heads of q"),
        (
            {"selection": Window((3, 3), (2, 3))},
            "a document of 8 tokens does not fit Window.shape=(2, 3), which has 6 places; use 0 for the first axis",
        ),
        (
            {"selection": BlockLists([[[0]]] * 2, 8, 4)},
            "BlockLists.lists has 2 documents, the batch has 1",
        ),
        (
            {"selection": BlockLists([[[0]]], 4, 4)},
            "BlockLists.lists gives int64 [1, 1] for document 0 of 8 tokens; give integers [2, n] or [key heads, 2, n]",
        ),
        (
            {"selection": BlockLists([[[2, 1]]], 8, 4)},
            "BlockLists.lists names block 2 in document 0 of 8 tokens; it has 2 blocks of 4",
        ),
        (
            {"selection": BlockLists([[[1, 0, 1]]], 8, 4)},
            "BlockLists.lists names block 1 twice in a list of document 0",
        ),
        (
            {"selection": BlockLists([[[[1]]] * 3], 8, 4)},
            "BlockLists.lists has lists of 3 heads for 2 key heads",
        ),
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
        (
            lambda: Window((3, 3)),
            "Window.window=(3, 3) and Window.shape=(0,) must have the same 1 to 3 axes",
        ),
        (
            lambda: Window((3, 0), (0, 4)),
            "Window.window=(3, 0) and Window.shape=(0, 4) must be at least 1 on every axis; only the first of shape may"
            " be 0, as long as a document needs",
        ),
        (lambda: Window(3, order="z"), "Window.order='z' is unknown; use row_major or morton"),
        (lambda: Window(3, causal_axes=(1, 0)), "Window.causal_axes=(1, 0) must have a flag for each axis of (3,)"),
        (lambda: Radial(0), "Radial.frame=0 must be a whole number of at least 1"),
        (lambda: Antidiagonal(0.0), "Antidiagonal.threshold=0.0 must be a share above 0, at most 1"),
        (
            lambda: Antidiagonal(stride=16, key_block=72),
            "Antidiagonal.key_block=72 must be a multiple of stride=16",
        ),
        (lambda: TokenTop(True), "TokenTop.keep=True must be a whole number of at least 1"),
        (
            lambda: CompressedTop(window=24),
            "CompressedTop.window=24 must be a multiple of stride=16 and at most key_block=64, another multiple",
        ),
        (lambda: CompressedTop(2), "CompressedTop.keep=2 must be at least first + recent, 3"),
        (lambda: Hierarchical(1), "Hierarchical.block=1 must be a whole number of at least 2"),
        (lambda: Hierarchical(levels=0), "Hierarchical.levels=0 must be a whole number of at least 1"),
    ],
)
def test_selections_refuse(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value) == message


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
