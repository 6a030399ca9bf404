"""Block lists by the kernels for Hopper, emulated, against the definition in fp64."""

import gluon_emulator
import pytest
import torch
from plan_cases import check, make

from longspan.kernels.sparse import BlockPlan, Blocks, fused, hopper, naive

# offsets, query block, key block, list heads, query heads, key heads, head dim, causal, weighted, keys a row
CASES = {
    "long lists": ((0, 900, 1000), 128, 64, 1, 1, 1, 64, False, True, 15),
    "heads side by side": ((0, 70, 71, 300), 64, 64, 1, 4, 2, 64, True, False, 4),
    "small keys": ((0, 250, 283), 128, 16, 2, 2, 2, 64, True, True, 9),
    "parts of a block": ((0, 500), 128, 128, 2, 2, 1, 64, False, True, 4),
    "wide": ((0, 400, 650), 128, 64, 1, 1, 1, 128, True, True, 7),
}
FORMS = {"fed": (128, 2, 4, None), "feeds itself": (64, 3, 8, 128)}


@pytest.fixture
def launched(monkeypatch):
    """The names of kernels as they are launched; those for Hopper are emulated."""
    names = [f"longspan.kernels.sparse.hopper.{name}" for name in ("tiles", "attend", "queries", "keys", "run")]
    *_, attend, queries, keys, run = gluon_emulator.load(*names)
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
    given = make(name, dtype=torch.bfloat16, case=CASES[name])
    assert name != "long lists" or given[0].row_ptr.diff().max() > 2 * 3 * 2
    check(fused, *given)
    assert launched == ["forward_kernel", "queries_kernel", *["keys_kernel"] * (name != "small keys")]


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
