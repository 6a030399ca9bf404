"""Block lists: the plan's two orders, and both forms of the arithmetic against full masked scores in fp64."""

from dataclasses import replace

import pytest
import torch
from devices import telling
from hypothesis import example, given, settings
from hypothesis import strategies as st
from plan_cases import BESIDE, CASES, LIMITS, SCALE, check, make, make_beside, make_hot, of_one_list
from sparse_oracle import make_shares

from longspan.kernels.sparse import BlockPlan, Blocks, Boxes, Picks, choose, forms, gathered, naive
from longspan.kernels.sparse import plan as plan_module

fused = pytest.importorskip("longspan.kernels.sparse.fused", reason="Triton is not installed")
backward = pytest.importorskip("longspan.kernels.sparse.backward", reason="Triton is not installed")
lists_triton = pytest.importorskip("longspan.kernels.sparse.lists_triton", reason="Triton is not installed")
cells_triton = pytest.importorskip("longspan.kernels.sparse.cells_triton", reason="Triton is not installed")

# rule: (query block, key block, list heads, query heads, key heads, heads of the rule, causal)
RULES = {
    "picks": (32, 64, 1, 4, 2, 4, True),
    "picks of key heads": (16, 16, 2, 8, 2, 2, True),
    "picks, small keys": (32, 16, 2, 4, 2, 4, False),
    "boxes": (32, 32, 1, 4, 2, 1, False),
    "boxes, small keys": (64, 16, 2, 4, 2, 1, True),
}


def make_rule(name, device="cpu", dtype=torch.float32, dim=16, offsets=(0, 70, 71, 200), blocks=None):
    """A case of random lists with a random rule: three picks a row, some for blocks that no list names; boxes in rows
    of seven tokens."""
    query_block, key_block, lists, heads, key_heads, rule_heads, causal = RULES[name]
    blocks = blocks or (query_block, key_block)
    case = (offsets, *blocks, lists, heads, key_heads, dim, causal, False, 4)
    plan, *rest = make(name, device=device, dtype=dtype, case=case)
    generator, tokens = torch.Generator().manual_seed(3), offsets[-1]
    if "picks" in name:
        picks = torch.rand(tokens, rule_heads, 2 + tokens // blocks[1], generator=generator).argsort(-1)[..., :3] - 1
        rule = Picks(picks.int().to(device))
    else:
        low, high = torch.rand(2, 2, tokens, generator=generator).mul(torch.tensor([12.0, 7.0])[:, None]).int()
        position = torch.arange(tokens)
        at = [x.int() for x in (position // 7, position % 7)]
        packed = [(x[0] << 4) + x[1] for x in (at, torch.minimum(low, high), torch.maximum(low, high))]
        rule = Boxes(packed[0].to(device), torch.stack(packed[1:], 1).to(device), (1 << 3) + (1 << 12))
    return replace(plan, rule=rule), *rest


@pytest.mark.parametrize("form", [fused, gathered], ids=["fused", "gathered"])
@pytest.mark.parametrize("name", RULES)
def test_rules(form, name):
    check(form, *make_rule(name))


def test_rules_see_what_they_say():
    plan = make_rule("picks")[0]
    seen = plan.rule.seen(torch.tensor([5, 6]), torch.arange(100), 8)
    for row, head, key in [(i, h, k) for i in range(2) for h in range(4) for k in range(100)]:
        assert seen[head, row, key] == (key // 8 in plan.rule.blocks[5 + row, head].tolist())
    rule = make_rule("boxes")[0].rule
    seen = rule.seen(torch.arange(30), torch.arange(60), 8)[0]
    for row, key in [(i, k) for i in range(30) for k in range(60)]:
        low, high = rule.bounds[row].tolist()
        at = key // 7, key % 7
        assert seen[row, key] == all(
            a <= c <= b for a, c, b in zip((low >> 4, low & 7), at, (high >> 4, high & 7), strict=True)
        )
    assert 0.02 < seen.double().mean() < 0.5


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_definition(name):
    check(fused, *make(name))


@pytest.mark.parametrize("name", ["ragged", "packed heads", "list per key head"])
def test_kernels_in_bfloat16(name):
    check(fused, *make(name, dtype=torch.bfloat16))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_plain_pytorch_equals_the_definition(name, dtype, monkeypatch):
    monkeypatch.setattr(gathered, "BATCH_ELEMENTS", 5000)  # several batches
    check(gathered, *make(name, dtype=dtype))


def test_plain_pytorch_takes_any_block_size():
    check(gathered, *make("odd", dtype=torch.float64, case=((0, 40, 97), 24, 7, 2, 4, 2, 5, True, True, 6)))


def nothing(queries, keys, heads):
    return torch.full((heads, len(queries), 2), -1)


def the_first(queries, keys, heads):
    return torch.zeros(heads, len(queries), 1, dtype=torch.int64)


def everything(queries, keys, heads):
    return torch.arange(len(keys)).flip(0).expand(heads, len(queries), -1)


@pytest.mark.parametrize("form", [fused, gathered], ids=["fused", "gathered"])
@pytest.mark.parametrize("chosen", [nothing, the_first, everything])
def test_extreme_lists(form, chosen, monkeypatch):
    for name in ("CHUNK", "LONG_CHUNK"):
        monkeypatch.setattr(plan_module, name, 2)  # a column that all rows choose is split
    plan, *rest = make("extreme", chosen, case=((0, 150), 32, 32, 2, 4, 2, 16, False, True, 0))
    assert chosen is nothing or (plan.item_ptr.diff() > 1).any()
    check(form, plan, *rest)


def test_blocks_that_one_list_names_need_no_sums(monkeypatch):
    monkeypatch.setattr(fused, "add_parts", lambda *_: None)
    check(fused, *make("apart", of_one_list, case=((0, 150), 32, 16, 2, 4, 1, 16, False, True, 0)))


@pytest.mark.parametrize("lists, key_heads", [(1, 1), (2, 2), (2, 1)])
def test_only_blocks_of_long_lists_have_parts(lists, key_heads):
    """With the same bits where memory has room for a part of every block."""
    (plan, apart), *given = make_hot(lists, key_heads, 16, 16)
    assert apart.compact(key_heads) and plan.compact(key_heads) == (lists == key_heads)
    assert apart.most_parts(key_heads) < len(apart.keys) and (apart.item_ptr.diff() > 1).sum() == 3 * lists
    wide = replace(plan, row_idx=torch.nn.functional.pad(plan.row_idx, (0, 10_000)))
    assert not wide.compact(key_heads)
    found = check(fused, apart, *given)
    assert all(map(torch.equal, found, check(fused, wide, *given)))


@pytest.mark.parametrize("name", BESIDE)
def test_gradients_of_keys_by_several_plans(name):
    """Lists of one plan, and of two by key, of which one or the other may be empty."""
    plan, *given = make_beside(name)
    assert [x.keys.size for x in plan.by_key] == [64, 16]
    assert [x.most_items > 0 for x in plan.by_key] == [name != "all chosen", name != "none chosen"]
    found = check(fused, plan, *given)
    assert all(map(torch.equal, found, check(fused, plan, *given)))


def test_all_blocks_make_it_dense():
    plan, q, k, v, *_ = make(
        "dense", everything, dtype=torch.float64, case=((0, 90),) + (32, 16, 1, 2, 1, 8) + (True, False, 0)
    )
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k.expand(-1, 2, -1), v.expand(-1, 2, -1))), is_causal=True, scale=SCALE
    )
    torch.testing.assert_close(gathered.forward(q, k, v, plan, SCALE)[0], dense.transpose(0, 1))


def test_coarse_keys_stand_for_their_last_token():
    """Every fourth token as a key: a query sees the keys of groups that end at or before it."""
    queries, keys = Blocks.of((0, 32), 16), Blocks.of((0, 8), 16)
    keys = Blocks(16, keys.start, keys.length, keys.position + 3, keys.step * 4, keys.document)
    plan = BlockPlan.of(queries, keys, torch.zeros(1, 2, 1, dtype=torch.int64), causal=True)
    seen = naive.log_weights(plan, 32, 8, 1)[0] == 0
    assert seen.sum(1).tolist() == [(t + 1) // 4 for t in range(32)]
    generator = torch.Generator().manual_seed(0)
    q, d_out = (torch.randn(32, 1, 16, generator=generator) for _ in range(2))
    k, v = (torch.randn(8, 1, 16, generator=generator) for _ in range(2))
    for form in (fused, gathered):
        check(form, plan, q, k, v, d_out, torch.zeros(32, 1))


def test_parts_of_a_plan_merge():
    """Two plans over disjoint keys, with the lse and out of both together, give the gradients of one plan."""
    plan, q, k, v, d_out, _ = make(
        "merge", everything, dtype=torch.float64, case=((0, 64), 16, 16, 1, 2, 1, 8, False, False, 0)
    )
    halves = [
        BlockPlan.of(plan.queries, plan.keys, torch.tensor(columns).expand(1, 4, 2), causal=False)
        for columns in ([0, 1], [2, 3])
    ]
    parts = [gathered.forward(q, k, v, half, SCALE) for half in halves]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(part * (part_lse - lse).exp()[..., None] for part, part_lse in parts)
    whole = gathered.forward(q, k, v, plan, SCALE)
    torch.testing.assert_close((out, lse), whole)
    given = d_out, None, q, k, v, out, lse
    sums = [sum(x) for x in zip(*(gathered.backward(*given, half, SCALE) for half in halves))]
    torch.testing.assert_close(tuple(sums), gathered.backward(*given, plan, SCALE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", [fused, gathered], ids=["fused", "gathered"])
def test_parts_continue_one_another(form, dtype):
    """Blocks of 16 queries see some keys, blocks of 32 others: the second part goes on from the results of the first.
    Queries 16 to 31 see nothing in the first part, 64 to 79 in the second, those from 80 on in neither."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, d_out = (torch.randn(100, n, 16, generator=generator).to(dtype) for n in (4, 2, 2, 4))
    fine, tiles, keys = (Blocks.of((0, 100), size) for size in (16, 32, 16))
    few = torch.tensor([[0, 3], [-1, -1], [1, -1], [0, 2], [2, 3], [-1, -1], [-1, -1]]).expand(2, -1, -1)
    more = torch.tensor([[4], [5], [-1], [-1]]).expand(2, -1, -1)
    plans = [
        BlockPlan.of(fine, keys, few, causal=False, chunk=1),
        BlockPlan.of(tiles, keys, more, causal=False, log_weight=torch.arange(7) / 7),
    ]
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    parts = [naive.attend(*leaves, plan, SCALE) for plan in plans]
    wanted_lse = torch.logaddexp(*(part[1] for part in parts))
    shift = wanted_lse.detach().nan_to_num(neginf=0.0)
    weights = [(lse - shift).exp()[..., None] for _, lse in parts]
    wanted = sum(out * weight for (out, _), weight in zip(parts, weights)) / sum(weights).clamp(min=1e-300)
    gradients = torch.autograd.grad((wanted * d_out.double()).sum(), leaves)

    first = form.forward(q, k, v, plans[0], SCALE, dtype=torch.float32)
    out, lse = form.forward(q, k, v, plans[1], SCALE, onto=first)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-4, atol=1e-4)
    given, rows = (d_out, None, q, k, v, out, lse), form.row_sums(d_out, None, out, lse)
    dq, *d_few = form.backward(*given, plans[0], SCALE, rows, dtype=torch.float32)
    dq, *d_more = form.backward(*given, plans[1], SCALE, rows, onto=dq)
    assert out.dtype == dq.dtype == dtype
    later, rows = [], form.row_sums(d_out, None, out, lse, plans[1].queries)
    again, *d_first = form.backward(*given, plans[0], SCALE, rows, dtype=torch.float32, later=later)
    again, *d_second = form.backward(*given, plans[1], SCALE, rows, onto=again, later=later)
    for make_queries in later:
        make_queries()
    assert all(map(torch.equal, (again, *d_first, *d_second), (dq, *d_few, *d_more)))
    found = out, dq, *(x.double() + y for x, y in zip(d_few, d_more))
    for name, x, y in zip(("out", "dq", "dk", "dv"), found, (wanted, *gradients)):
        assert ((x.double() - y).norm() / y.norm()).item() <= LIMITS[dtype], name
    assert not out[80:].any() and not dq[80:].any()


def several_programs(patch):
    """Lists of a few rows and columns take several programs, tiles and turns."""
    few = {"TILE": 1024, "ITEM_COLUMNS": 4, "PROGRAMS": 8, "COLUMNS": 2, "GROUPS": 4, "SCANNED": 4, "PLACING": 3}
    for name, value in few.items():
        patch.setattr(lists_triton, name, value)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 2**32), st.integers(1, 150), st.integers(1, 12), st.integers(1, 12), st.integers(1, 3),
    st.sampled_from(["sorted", "triton", "plain", "cells"]),
)  # fmt: skip
@example(5, 1, 2, 2, 1, "triton")
@example(5, 1, 12, 12, 2, "triton")
def test_both_orders_list_the_same_pairs(seed, rows, columns, most, heads, form):
    generator = torch.Generator().manual_seed(seed)
    most = min(most, columns)
    chosen = torch.rand(heads, rows, columns, generator=generator).argsort(-1)[..., :most]
    chosen = torch.where(torch.rand(chosen.shape, generator=generator) < 0.3, -1, chosen)
    queries, keys = Blocks.of((0, rows * 4), 4), Blocks.of((0, columns * 4), 4)
    if form == "sorted":
        chosen = chosen.sort(-1).values.int()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forms, "takes", lambda x: form != "plain")
        several_programs(patch)
        patch.setattr(plan_module, "CHUNK", 4)
        patch.setattr(plan_module, "LONG_CHUNK", 4)
        if form == "cells":
            patch.setattr(lists_triton, "WORDS", 0)
            patch.setattr(cells_triton, "_cell_shift", lambda *_: 6)
        plan = BlockPlan.of(queries, keys, chosen, causal=False, ascending=form == "sorted")
        assert plan.columns is plan.columns  # made once
        few = columns // 2
        named = ((chosen >= 0) & (chosen < few)).sum((1, 2)).max().item()
        _, first = plan.beside(plan, Blocks.of((0, few * 4), 4), named, 4).by_key
        assert first.columns is first.columns  # of some of the blocks, with room for no more than lists name
    assert plan.col_idx.dtype == plan.row_idx.dtype == plan.item_col.dtype == torch.int32
    for head in range(heads):
        wanted = {(i, j) for i in range(rows) for j in chosen[head, i].tolist() if j >= 0}
        by_row = [plan.row_idx[head, a:b].tolist() for a, b in zip(plan.row_ptr[head], plan.row_ptr[head, 1:])]
        by_column = [plan.col_idx[head, a:b].tolist() for a, b in zip(plan.col_ptr[head], plan.col_ptr[head, 1:])]
        assert all(x == sorted(x) for x in by_row + by_column)
        assert {(i, j) for i, row in enumerate(by_row) for j in row} == wanted
        assert {(i, j) for j, column in enumerate(by_column) for i in column} == wanted
        of_first = [first.col_idx[head, a:b].tolist() for a, b in zip(first.col_ptr[head], first.col_ptr[head, 1:])]
        assert of_first == by_column[:few]
        for part, count in ((plan, columns), (first, few)):
            items = [j for j, column in enumerate(by_column[:count]) for _ in range(-(-len(column) // 4))]
            rest = part.item_col[head].tolist()
            assert rest[: len(items)] == items and set(rest[len(items) :]) <= {count}


@pytest.mark.parametrize("form", ["triton", "plain"])
def test_full_lists_are_what_was_chosen(form, monkeypatch):
    """Nothing is copied or counted, nor are ends of lists made twice."""
    monkeypatch.setattr(forms, "takes", lambda x: form == "triton")
    queries, keys = Blocks.of((0, 50, 90), 4), Blocks.of((0, 50, 90), 8)
    chosen = torch.rand(2, len(queries), len(keys)).argsort(-1)[..., :3].int()
    plan, other = (
        BlockPlan.of(queries, keys, chosen, causal=False, full=full, ascending=True) for full in (True, False)
    )
    assert plan.row_idx.data_ptr() == chosen.data_ptr()
    for name in ("row_ptr", "row_idx", "col_ptr", "item_ptr", "item_col", "col_idx"):
        assert torch.equal(getattr(plan, name), getattr(other, name)), name
    again = BlockPlan.of(queries, keys, chosen.flip(2), causal=False, full=True)
    assert again.row_ptr is plan.row_ptr and again.row_ptr.is_contiguous()
    assert queries.ends(2, 4)[1].tolist() == [4 * n for n in range(len(queries) + 1)]


@pytest.mark.parametrize("form", ["triton", "plain"])
def test_lists_are_split_by_buffer(form, monkeypatch):
    """Plans over several buffers, made at once, list in both orders what each would list alone; one buffer is empty."""
    monkeypatch.setattr(forms, "takes", lambda x: form == "triton")
    several_programs(monkeypatch)
    generator, width, counts = torch.Generator().manual_seed(0), 7, (7, 4, 0, 6)
    queries, keys = Blocks.of((0, 40), 4), [Blocks.of((0, 4 * n), 4) for n in counts]
    numbers = torch.cat([torch.arange(n) + part * width for part, n in enumerate(counts)])
    chosen = numbers[torch.rand(2, 10, len(numbers), generator=generator).argsort(-1)[..., :9]]
    chosen = torch.where(torch.rand(chosen.shape, generator=generator) < 0.3, -1, chosen).int()
    for part, plan in enumerate(BlockPlan.split(queries, keys, chosen, width, causal=True)):
        inside = chosen // width == part
        alone = BlockPlan.of(queries, keys[part], torch.where(inside, chosen % width, -1), causal=True, ascending=True)
        for head in range(2):
            lists = [
                [idx[head, a:b].tolist() for a, b in zip(ptr[head], ptr[head, 1:])]
                for x in (plan, alone)
                for ptr, idx in ((x.row_ptr, x.row_idx), (x.col_ptr, x.col_idx))
            ]
            assert lists[:2] == lists[2:] and (part == 2 or any(lists[0]))


def test_what_the_kernels_refuse():
    plan = make("one list")[0]
    assert choose("cpu", torch.float32, 64, plan)[0] is gathered
    assert fused.refusal(torch.bfloat16, 128, 16, 64) is None
    assert "not torch.float64" in fused.refusal(torch.float64, 64, 16, 64)
    assert "up to 64 wide, not 128" in fused.refusal(torch.float32, 128, 16, 64)
    assert "the query blocks have 48" in fused.refusal(torch.bfloat16, 64, 48, 64)


def test_long_lists_are_cut_less_often():
    """Where key blocks have more than 64 query blocks each on average, most of them need no parts of gradients."""
    queries, keys = Blocks.of((0, 400), 1), Blocks.of((0, 8), 1)
    for most, items in ((1, 8 + 400 // 64), (8, 8 + 3200 // 512)):
        chosen = torch.arange(most).expand(1, 400, -1)
        assert BlockPlan.of(queries, keys, chosen, causal=False).most_items == items


def check_long_lists(rows, columns, device):
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(columns - 1, (2, rows, 1), generator=generator)
    chosen = torch.cat([(first + 7 * torch.arange(4)) % (columns - 1), torch.full_like(first, columns - 1)], 2)
    queries, keys = (Blocks.of((0, n), 1).map(lambda x: x.to(device)) for n in (rows, columns))
    plan = BlockPlan.of(queries, keys, chosen.to(device), causal=False)
    wanted = plan_module._columns(plan.row_ptr, plan.row_idx, columns, plan.chunk, plan.most_items)
    for columns in (plan.columns, BlockPlan.columns.func(plan)):
        assert all(torch.equal(x, y) for x, y in zip(vars(columns).values(), wanted, strict=True))


@pytest.mark.parametrize("form", [fused, gathered], ids=["fused", "gathered"])
@pytest.mark.parametrize("name", ["ragged", "packed heads", "list per query head", "keys for one head", "nothing"])
def test_gradients_of_means_come_to_keys(form, name, monkeypatch):
    """With every form of list: of one part, of several that are added, none."""
    nothing = (lambda queries, keys, heads: torch.full((heads, len(queries), 1), -1)) if name == "nothing" else None
    plan, q, k, v, d_out, _ = make("ragged" if nothing else name, nothing)
    plan = replace(plan, chunk=2, most_items=plan.most_items * 32)
    out, lse = form.forward(q, k, v, plan, SCALE)
    given = d_out, None, q, k, v, out, lse, plan, SCALE
    plain = form.backward(*given)
    shares, *wanted = make_shares(plan.keys, *k.shape[1:])
    actual = form.backward(*given, shares=shares)
    for x, y, more in zip(actual, plain, (0, *wanted), strict=True):
        torch.testing.assert_close(x.double(), y.double() + more, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(backward, "ADDING", 2)  # several key blocks to a program that adds parts
    assert all(map(torch.equal, form.backward(*given, shares=shares), actual))
    monkeypatch.setattr(backward, "FEW_ADDING", 0)  # and whole ones
    assert all(map(torch.equal, form.backward(*given, shares=shares), actual))
    alone = torch.zeros_like(k), torch.zeros_like(v)
    fused.add_shares_triton(alone, plan.keys, shares)  # as after kernels that know no shares
    for x, more in zip(alone, wanted, strict=True):
        torch.testing.assert_close(x.double(), more, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [fused, gathered], ids=["fused", "gathered"])
def test_lists_in_turn_and_keys_before_queries(form):
    """Bit for bit as all at once, on top of other keys as well; what is waited for is, group after group."""
    offsets = (0, 100)
    plan, q, k, v, d_out, _ = make("in turn", case=(offsets, 16, 16, 4, 8, 1, 16, False, False, 3))
    other = make("in turn", case=(offsets, 16, 16, 4, 8, 1, 16, False, False, 2))[0]
    for onto in (None, form.forward(q, k, v, other, SCALE)):
        given, waited = [None if onto is None else tuple(x.clone() for x in onto) for _ in range(2)], []
        wanted = form.forward(q, k, v, plan, SCALE, given[0])
        turns = 2, (waited.append(n) for n in range(2))
        found = form.forward(q, k, v, plan, SCALE, given[1], None, turns)
        assert waited == [0, 1] and all(map(torch.equal, found, wanted))
    sent = []
    given = d_out, None, q, k, v, *wanted, plan, SCALE
    found = form.backward(*given, send=lambda *gradients: sent.extend(x.clone() for x in gradients))
    assert all(map(torch.equal, found, form.backward(*given))) and all(map(torch.equal, found[1:], sent))


@pytest.mark.parametrize("rows, words", [(2100, 64), (200, 0)])
def test_long_lists_by_key_block(rows, words, monkeypatch):
    monkeypatch.setattr(forms, "takes", lambda x: True)
    few = {"WORDS": words, "PROGRAMS": 8, "ITEM_COLUMNS": 16, "COLUMNS": 8, "SCANNED": 256, "PLACING": 5}
    for name, value in few.items():
        monkeypatch.setattr(lists_triton, name, value)
    monkeypatch.setattr(cells_triton, "_cell_shift", lambda *_: 6)
    check_long_lists(rows, 50, "cpu")


class TestOnGpu:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("dtype", telling(torch.bfloat16, rest=[torch.float16, torch.float32]), ids=str)
    @pytest.mark.parametrize("dim", telling(128, rest=[64]))
    @pytest.mark.parametrize("blocks", telling((128, 64), (16, 16), rest=[(128, 128), (64, 64), (64, 16)]), ids=str)
    @pytest.mark.parametrize("heads", [(1, 4, 4), (2, 8, 2), (8, 8, 2)], ids=str)
    def test_equals_the_definition(self, heads, blocks, dim, dtype):
        if dtype == torch.float32 and dim > 64:
            pytest.skip("fp32 heads wider than 64 run in plain PyTorch")
        for causal in (False, True):
            case = ((0, 1, 700, 1500), *blocks, *heads, dim, causal, causal, 6)
            given = make("gpu", device="cuda", dtype=dtype, case=case)
            assert choose("cuda", dtype, dim, given[0]) == (fused, None)
            first, again = check(fused, *given), check(fused, *given)
            assert all(torch.equal(x, y) for x, y in zip(first, again)), "differs from run to run"

    @pytest.mark.parametrize("dtype", telling(torch.bfloat16, rest=[torch.float32]), ids=str)
    @pytest.mark.parametrize("blocks", telling((128, 64), rest=[(64, 128), (32, 16)]), ids=str)
    @pytest.mark.parametrize("name", RULES)
    def test_rules(self, name, blocks, dtype):
        check(fused, *make_rule(name, "cuda", dtype, 64, (0, 1, 700, 1500), blocks))

    @pytest.mark.parametrize("chosen", [nothing, the_first, everything])
    def test_extreme_lists(self, chosen):
        case = ((0, 12000), 16, 64, 1, 2, 1, 64, False, False, 0)
        check(fused, *make("gpu", chosen, device="cuda", dtype=torch.bfloat16, case=case))

    @pytest.mark.parametrize("rows, columns, most", [(3000, 20, 7), (500, 4000, 300), (70, 70, 70)])
    def test_lists_are_those_of_plain_pytorch(self, rows, columns, most):
        generator = torch.Generator().manual_seed(0)
        chosen = torch.rand(2, rows, columns, generator=generator).argsort(-1)[..., :most]
        chosen = torch.where(torch.rand(chosen.shape, generator=generator) < 0.3, -1, chosen)
        queries, keys = Blocks.of((0, rows * 16), 16), Blocks.of((0, columns * 16), 16)
        plain = BlockPlan.of(queries, keys, chosen, causal=False)
        queries, keys = (x.map(lambda x: x.cuda()) for x in (queries, keys))
        plan = BlockPlan.of(queries, keys, chosen.cuda(), causal=False)
        for name in ("row_ptr", "col_ptr", "item_ptr", "item_col"):
            assert torch.equal(getattr(plan, name).cpu(), getattr(plain, name)), name
        for head, count in enumerate(plain.row_ptr[:, -1].tolist()):
            for name in ("row_idx", "col_idx"):
                assert torch.equal(getattr(plan, name)[head, :count].cpu(), getattr(plain, name)[head, :count]), name

    @pytest.mark.parametrize("columns", [2000, 60000])
    def test_long_lists_by_key_block(self, columns):
        """All rows name the last column; few enough columns for bits of rows, and too many."""
        check_long_lists(20000, columns, "cuda")

    def test_building_a_plan_does_not_wait(self):
        queries, keys = (Blocks.of((0, 5000), size).map(lambda x: x.cuda()) for size in (128, 64))
        chosen = torch.zeros(2, len(queries), 3, dtype=torch.int64, device="cuda")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            BlockPlan.of(queries, keys, chosen, causal=False).columns
        finally:
            torch.cuda.set_sync_debug_mode("default")
