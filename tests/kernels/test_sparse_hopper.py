"""Block lists by the kernels for Hopper, emulated, against the definition in fp64."""

import sys

import gluon_emulator
import pytest
import sparse_oracle
import torch
from plan_cases import BESIDE, check, make, make_beside, make_hot, of_one_list

from longspan.attention import LinearBranch, TopBlocks, linear_branch
from longspan.attention import sparse as attention
from longspan.kernels.block_states import fused as block_states
from longspan.kernels.block_states import plain as block_states_plain
from longspan.kernels.sparse import BlockPlan, Blocks, fused, hopper, naive
from longspan.kernels.sparse.states import KeyStates
from longspan.parallel import SequenceParallel

# offsets, query block, key block, list heads, query heads, key heads, head dim, causal, weighted, keys a row
CASES = {
    "long lists": ((0, 900, 1000), 128, 64, 1, 1, 1, 64, False, True, 15),
    "heads side by side": ((0, 70, 71, 300), 64, 64, 1, 4, 2, 64, True, False, 4),
    "small keys": ((0, 250, 283), 128, 16, 2, 2, 2, 64, True, True, 9),
    "parts of a block": ((0, 500), 128, 128, 2, 2, 1, 64, False, True, 4),
    "wide": ((0, 400, 650), 128, 64, 1, 1, 1, 128, True, True, 7),
    "wide, small keys": ((0, 250, 283), 128, 16, 2, 2, 2, 128, True, True, 9),
}
STATES = {"lists of queries": ((0, 300, 390), 128, 64, 4, 4, 2, 64)}
FORMS = {"fed": (128, 2, 4, None), "fed, tile after tile": (128, 2, 4, None), "feeds itself": (64, 3, 8, 128)}


@pytest.fixture
def launched(monkeypatch):
    """The names of kernels as they are launched; those for Hopper are emulated."""
    names = [f"longspan.kernels.sparse.hopper.{name}" for name in ("tiles", "attend", "queries", "keys", "run")]
    branch = "longspan.kernels.block_states.hopper"
    *_, run, of_branch = gluon_emulator.load(*names, branch)
    monkeypatch.setitem(sys.modules, branch, of_branch)
    monkeypatch.setattr(hopper, "on_hopper", lambda x: True)
    monkeypatch.setattr(hopper, "processors", lambda device: 3)  # programs take several tiles
    monkeypatch.setattr(hopper, "run", run, raising=False)
    monkeypatch.setattr(gluon_emulator, "SECONDS", 2.0)
    found = []
    for name in ("forward_kernel", "queries_kernel", "keys_kernel"):
        launch = type("Noted", (), {"__getitem__": lambda self, grid, name=name, of=getattr(run, name): (
            found.append(name), of[grid])[1]})  # fmt: skip
        monkeypatch.setattr(run, name, launch())
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_definition(name, form, launched, monkeypatch):
    for table in ("FORWARD", "QUERIES"):
        monkeypatch.setitem(getattr(hopper.run, table), CASES[name][6], FORMS[form])
    monkeypatch.setattr(hopper.run, "PERSISTENT", form == "fed, tile after tile")
    given = make(name, dtype=torch.bfloat16, case=CASES[name])
    assert name != "long lists" or given[0].row_ptr.diff().max() > 2 * 3 * 2
    check(fused, *given)
    assert launched == ["forward_kernel", "queries_kernel", *["keys_kernel"] * (CASES[name][2] >= 64)]


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("name", BESIDE)
def test_gradients_of_keys_by_several_plans(name, dim, launched):
    check(fused, *make_beside(name, 128, dim, dtype=torch.bfloat16))
    assert launched == ["forward_kernel", "queries_kernel", *["keys_kernel"] * BESIDE[name][0]]


def test_lists_in_turn_and_keys_before_queries(launched):
    """Bit for bit as all at once, and in that order."""
    case = (0, 300), 64, 64, 2, 4, 1, 64, False, False, 3
    plan, q, k, v, d_out, _ = make("in turn", dtype=torch.bfloat16, case=case)
    wanted = fused.forward(q, k, v, plan, 0.3)
    found = fused.forward(q, k, v, plan, 0.3, turns=(2, iter(range(2))))
    assert all(map(torch.equal, found, wanted))
    given = d_out, None, q, k, v, *wanted, plan, 0.3
    expected, sent = fused.backward(*given, rows=fused.row_sums(d_out, None, *wanted)), []
    found = fused.backward(*given, send=lambda *gradients: sent.extend(x.clone() for x in gradients))
    assert all(map(torch.equal, (*found, *sent), (*expected, *expected[1:])))
    assert launched[1:3] == ["forward_kernel"] * 2
    assert launched[3:] == ["queries_kernel", "keys_kernel", "keys_kernel", "queries_kernel"]
    later, rows = [], fused.row_sums(d_out, None, *wanted, plan.queries)
    found = fused.backward(*given, rows=rows, later=later)
    assert launched[7:] == ["keys_kernel"]
    later[0]()
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("key_block", [64, 128])
def test_blocks_that_one_list_names_need_no_sums(key_block, launched, monkeypatch):
    monkeypatch.setattr(hopper.run, "add_parts", lambda *_: None)
    case = (0, 4 * key_block - 9), 64, key_block, 2, 4, 1, 64, True, False, 0
    plan, *given, d_lse = make("apart", of_one_list, dtype=torch.bfloat16, case=case)
    check(fused, plan, *given, d_lse)


def test_only_blocks_of_long_lists_have_parts(launched):
    (_, plan), *given = make_hot(2, 1, 64, 64, dim=64, dtype=torch.bfloat16)
    assert plan.compact(1) and (plan.item_ptr.diff() > 1).sum() == 6
    check(fused, plan, *given)
    assert launched[-1] == "keys_kernel"


@pytest.mark.parametrize("feature_map", ["softmax", "elu1"])
@pytest.mark.parametrize("name, chunk", [("parts of a block", 1), ("wide", 64), ("lists of queries", 2)])
def test_gradients_from_states(name, chunk, feature_map, launched):
    """Added to those of attention: for lists in one and in several parts, and for blocks that no query chose."""
    offsets, query_block, key_block, lists, heads, key_heads, dim, *_ = STATES.get(name) or CASES[name]
    q, k, v, d_out = torch.randn(4, offsets[-1], heads, dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    k, v = k[:, :key_heads], v[:, :key_heads].contiguous()
    queries, keys = Blocks.of(offsets, query_block), Blocks.of(offsets, key_block)
    chosen = torch.tensor([0, 2]).expand(lists, len(queries), 2)
    plan = BlockPlan.of(queries, keys, chosen, causal=False, chunk=chunk)
    assert plan.item_ptr[:, 1:].eq(plan.item_ptr[:, :-1]).any()
    states = torch.randn(3, key_heads, 1, dim * dim + dim, generator=torch.Generator().manual_seed(1))
    given = KeyStates(states, (torch.arange(len(keys)) % 3).int(), feature_map)
    assert fused.takes_states(q, k, plan, 0.3)
    out, lse = fused.forward(q, k, v, plan, 0.3)
    alone = fused.backward(d_out, None, q, k, v, out, lse, plan, 0.3)
    both = fused.backward(d_out, None, q, k, v, out, lse, plan, 0.3, states=given)
    block_states.lonely_key_gradients(k, v, given, plan, both[1:])
    wanted = block_states_plain.key_gradients(k.double(), v.double(), states.double(), given.rows, keys, feature_map)
    assert torch.equal(both[0], alone[0])
    for found, of_lists, more in zip(both[1:], alone[1:], wanted, strict=True):
        total = of_lists.double() + more
        assert ((found.double() - total).norm() / total.norm()).item() < 1e-2
        few = plan.keys.start[1], plan.keys.start[1] + plan.keys.length[1]  # of the block that no query chose
        found, total = (x[slice(*few)].double() for x in (found, total))
        assert ((found - total).norm() / total.norm()).item() < 1e-2


@pytest.mark.parametrize("form", ["fed", "feeds itself"])
def test_parts_continue_one_another(form, launched, monkeypatch):
    """Queries 128 to 255 see nothing in the first part, those from 256 on in neither."""
    for table in ("FORWARD", "QUERIES"):
        monkeypatch.setitem(getattr(hopper.run, table), 64, FORMS[form])
    q, k, v, d_out = torch.randn(4, 300, 2, 64).bfloat16()
    queries, keys = Blocks.of((0, 300), 128), Blocks.of((0, 300), 16)
    lists = [[[0, 3, 7, 9, 18], [-1] * 5, [-1] * 5], [[4, 5, -1, -1, -1], [6, 1, 2, 8, 10], [-1] * 5]]
    plans = [
        BlockPlan.of(queries, keys, torch.tensor([x]), causal=False, log_weight=torch.arange(len(keys)) / 7 - 1)
        for x in lists
    ]
    both = torch.tensor([[x + y for x, y in zip(*lists)]])
    whole = BlockPlan.of(queries, keys, both, causal=False, log_weight=plans[0].log_weight)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    wanted, wanted_lse = naive.attend(*leaves, whole, 0.3)
    wanted_dq = torch.autograd.grad((wanted * d_out.double()).sum(), leaves)[0]

    first = fused.forward(q, k, v, plans[0], 0.3, dtype=torch.float32)
    out, lse = fused.forward(q, k, v, plans[1], 0.3, onto=first)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-4, atol=1e-4)
    given, rows = (d_out, None, q, k, v, out, lse), fused.row_sums(d_out, None, out, lse)
    dq, *_ = fused.backward(*given, plans[0], 0.3, rows, dtype=torch.float32)
    dq, *_ = fused.backward(*given, plans[1], 0.3, rows, onto=dq)
    assert out.dtype == dq.dtype == torch.bfloat16 and set(launched) == {"forward_kernel", "queries_kernel"}
    for found, exact in ((out, wanted), (dq, wanted_dq)):
        assert (found.double() - exact).norm() <= 1e-2 * exact.norm()
    assert not out[256:].any() and not dq[256:].any()


def test_branch_beside_attention(launched, monkeypatch):
    """A whole call with SLA's branch, whose gradients of keys are made where attention's are; a block that no query
    chooses among them."""
    for module, form in ((attention, fused), (linear_branch, block_states)):
        monkeypatch.setattr(module, "choose", lambda *arguments, form=form: (form, None))
    lengths, generator = (200, 330), torch.Generator().manual_seed(2)
    shapes = ((530, 2, 64),) * 4 + ((64, 64), (64,))
    q, k, v, d_out, weight, bias = (torch.randn(x, generator=generator).bfloat16() for x in shapes)
    selection, given = TopBlocks(2, query_block=128, key_block=64), (q, k, v, weight / 8, bias)
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in given]
        if dtype == torch.float64:
            out = sparse_oracle.sparse_attention(*leaves[:3], lengths, selection=selection, causal=False)
            out = out + sparse_oracle.linear_branch(
                *leaves, lengths, over="all", feature_map="softmax", selection=selection, causal=False
            )
        else:
            seq = SequenceParallel(device=torch.device("cpu")).context(lengths)
            linear = LinearBranch(*leaves[3:])
            out = attention.sparse_attention(*leaves[:3], selection=selection, linear=linear, causal=False, seq=seq)
        found.append([out, *torch.autograd.grad(out, leaves, d_out.to(dtype))])
    for actual, wanted in zip(*found, strict=True):
        assert ((actual.double() - wanted).norm() / wanted.norm()).item() < 2e-2
    assert launched == ["forward_kernel", "queries_kernel", "keys_kernel"]
