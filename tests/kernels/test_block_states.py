"""States of blocks: the Triton kernels against plain PyTorch in fp64, which the tests of the layer check."""

import gluon_emulator
import pytest
import torch
from devices import telling
from sparse_oracle import random_lists

from longspan.kernels.block_states import LOST, choose, plain
from longspan.kernels.sparse import BlockPlan, Blocks

fused = pytest.importorskip("longspan.kernels.block_states.fused", reason="Triton is not installed")
LIMITS = {torch.float32: 5e-6, torch.bfloat16: 1.2e-2}
OFFSETS = (0, 50, 51, 100)
# name: (query heads, key heads, key width, value width, feature map, causal)
CASES = {
    "softmax": (4, 2, 16, 16, "softmax", True),
    "odd widths": (2, 2, 20, 9, "softmax", False),
    "elu1": (2, 1, 9, 20, "elu1", True),
    "identity": (3, 3, 32, 16, "identity", False),
}


def make(name, dtype=torch.float32, device="cpu", case=None, offsets=OFFSETS, sizes=(32, 16)):
    heads, key_heads, K, V, feature_map, causal = case or CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    queries, keys = (Blocks.of(offsets, size) for size in sizes)
    lists = random_lists(queries, keys, key_heads, 3, causal, generator)
    plan = BlockPlan.of(*(x.map(lambda x: x.to(device)) for x in (queries, keys)), lists.to(device), causal=causal)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    count = offsets[-1]
    inputs = normal(count, heads, K), normal(count, key_heads, K), normal(count, key_heads, V)
    if feature_map == "identity":
        inputs = *(x.abs() for x in inputs[:2]), inputs[2]
    rows = (torch.arange(len(queries), device=device) % 4 - 1).int()  # no state, the lost one, others
    states = normal(3, key_heads, 1, K * V + K, dtype=torch.float32)
    states[..., -K:] = states[..., -K:].abs() + 0.1
    return plan, *inputs, rows, states, normal, feature_map


def check(given, others, dtype, names):
    for name, found, wanted in zip(names, given, others, strict=True):
        assert found.dtype in (dtype, torch.float32), name
        error = ((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-3)).item()
        assert error <= LIMITS[dtype], (name, error)


def both(function, *arguments, **options):
    """What the kernels give, and what plain PyTorch gives of the same in fp64."""

    def wide(x):
        if isinstance(x, tuple):
            return tuple(map(wide, x))
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    options64 = {name: torch.float64 if name == "dtype" else wide(x) for name, x in options.items()}
    found = getattr(fused, function)(*arguments, **options)
    wanted = getattr(plain, function)(*map(wide, arguments), **options64)
    return (found, wanted) if isinstance(found, tuple) else ((found,), (wanted,))


def check_all(name, dtype, inside, **where):
    plan, q, k, v, rows, states, normal, feature_map = make(name, dtype, **where)
    totals = states[:, :, 0, -q.shape[2] :] * 2
    totals[0] *= 1e7  # more than sums of fp32 resolve
    weight, bias, d_out = normal(v.shape[2], v.shape[2]), normal(v.shape[2]), normal(*q.shape[:2], v.shape[2])
    reading = states, totals, rows, plan.queries, weight
    lost = LOST[torch.float32]
    options = {"feature_map": feature_map, "inside": inside, "lost": lost}
    check(*both("output", d_out, q, k, v, *reading, bias, **options), dtype, ["out"])
    found, wanted = both("query_gradients", d_out, q, k, v, *reading, **options)
    check(found, wanted, dtype, ["dq", "d_num", "d_den", "o"])
    assert torch.equal(found[2] == 0, wanted[2] == 0)
    nothing = int(plan.queries.length[:2].sum())  # no state, and too little of one
    assert inside or not found[3][:nothing].any() and found[3][nothing:].any()
    d_num, d_den = found[1:3]
    for weights, x, y, blocks in ((None, k, v, plan.keys), (d_den, q, d_num, plan.queries)):
        summed = both("sums", x, y, weights, blocks, feature_map, k.shape[1], dtype=dtype)
        check(*summed, dtype, ["sums"])
    if inside:
        given = both("key_gradients", k, v, states, rows, plan.queries, feature_map, (q, d_num, d_den))
    else:
        rows = torch.arange(len(plan.keys), device=q.device).int() % 4 - 1
        given = both("key_gradients", k, v, states, rows, plan.keys, feature_map, None)
    check(*given, dtype, ["dk", "dv"])
    last = (None, plan.keys) if not inside else ((q, d_num, d_den), plan.queries)
    for count in (1, 2):  # added to dk, to dv
        onto = [None if n < count - 1 else normal(*x.shape) for n, x in enumerate((k, v))]
        wanted = [y if x is None else x.double() + y for x, y in zip(onto, given[1])]
        check(fused.key_gradients(k, v, states, rows, last[1], feature_map, last[0], onto), wanted, dtype, ["dk", "dv"])


def short_steps(monkeypatch):
    """Several steps and parts of a block."""
    monkeypatch.setattr(fused, "STEP", 16)
    monkeypatch.setattr(fused, "LOOPS", {name: (16, *options) for name, (_, *options) in fused.LOOPS.items()})


def check_whole(name, dtype, **where):
    _, q, k, v, _, states, normal, feature_map = make(name, dtype, **where)
    blocks = Blocks.of((0, len(q) // 2, len(q)), 64 if len(q) < 1000 else 1024).map(lambda x: x.to(q.device))
    rows = torch.arange(len(blocks), device=q.device).int() % 4 - 1
    bias, d_out = normal(v.shape[2]), normal(*q.shape[:2], v.shape[2])
    reading = q, states, rows, blocks
    check(*both("whole_output", d_out, *reading, bias, feature_map=feature_map), dtype, ["out"])
    found = both("whole_query_gradients", d_out, *reading, feature_map=feature_map, dtype=dtype)
    check(*found, dtype, ["dq", "sums", "d_bias"])
    check(*both("key_gradients", k, v, states, rows, blocks, feature_map=feature_map), dtype, ["dk", "dv"])


@pytest.mark.parametrize("name", CASES)
def test_whole_documents(name, monkeypatch):
    short_steps(monkeypatch)
    check_whole(name, torch.float32)


def test_whole_documents_in_bfloat16():
    check_whole("softmax", torch.bfloat16)


@pytest.mark.parametrize("feature_map, K, V", [("softmax", 128, 64), ("elu1", 64, 64), ("identity", 64, 128)])
def test_kernels_for_hopper(feature_map, K, V, monkeypatch):
    """Those in Gluon, emulated: blocks of some tiles, several heads, rows that weigh nothing and no state."""
    names = "longspan.kernels.sparse.hopper.tiles", "longspan.kernels.block_states.hopper"
    kernel = gluon_emulator.load(*names)[1]
    monkeypatch.setattr(gluon_emulator, "SECONDS", 5.0)
    case = 4, 2, K, V, feature_map, False
    _, q, _, _, _, states, normal, _ = make("hopper", torch.bfloat16, case=case, offsets=(0, 470))
    blocks, d_out = Blocks.of((0, 300, 301, 470), 250), normal(470, 4, V)
    rows = torch.arange(len(blocks)).int() % 4 - 1
    q[[260, 320], 1] = -1e4 if feature_map == "elu1" else 0.0
    dq, sums = torch.empty_like(q), states.new_empty(len(blocks), *states.shape[1:])
    d_bias = states.new_empty(len(blocks), 2, 2, V)
    kernel.whole_query_gradients(d_out, q, states, rows, dq, sums, d_bias, blocks, feature_map)
    wide = (x.double() for x in (d_out, q, states))
    wanted = plain.whole_query_gradients(*wide, rows, blocks, feature_map, torch.float64)
    check((dq, sums, d_bias.sum((0, 1, 2))), wanted, torch.bfloat16, ["dq", "sums", "d_bias"])
    check((sums[..., -K:],), (wanted[1][..., -K:],), torch.bfloat16, ["dz"])
    kernel.sums(q, d_out, sums, blocks, feature_map)
    wanted = plain.sums(q.double(), d_out.double(), None, blocks, feature_map, 2, torch.float64)
    check((sums, sums[..., -K:]), (wanted, wanted[..., -K:]), torch.bfloat16, ["sums", "z"])


@pytest.mark.parametrize("inside", [False, True], ids=["before", "inside"])
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_plain_pytorch(name, inside, monkeypatch):
    short_steps(monkeypatch)
    check_all(name, torch.float32, inside)


@pytest.mark.parametrize("inside", [False, True], ids=["before", "inside"])
def test_kernels_in_bfloat16(inside):
    check_all("softmax", torch.bfloat16, inside)


def check_listed(plan, base, states, alone, dtype):
    for transposed, of, count in ((False, plan.keys, plan.queries), (True, plan.queries, plan.keys)):
        given = states[: len(of)]
        rows = torch.arange(len(count), device=base.device).int() % 5 - 1
        for total in (None, base):
            found, wanted = both(
                "listed", total, None if total is None else rows, given, plan,
                transposed=transposed, heads=base.shape[1], dtype=torch.float32,
            )  # fmt: skip
            check(found, wanted, torch.float32, ["listed"])
        if alone:  # a buffer of rows of one head each: as many lists, one head of keys
            heads = 1 if transposed else plan.heads
            one = given if transposed else given[:, :1].contiguous()
            found = both("listed", None, None, one, plan, transposed=transposed, heads=heads, dtype=dtype)
            check(*found, dtype, ["listed"])


@pytest.mark.parametrize("name", CASES)
def test_listed_states(name, monkeypatch):
    monkeypatch.setattr(fused, "TILE", 64)
    monkeypatch.setattr(plain, "BATCH_ELEMENTS", 1000)
    plan, *_, normal, _ = make(name)
    heads = plan.heads
    states = normal(20, heads, 1, 100)
    check_listed(plan, normal(4, heads, 1, 100), states, heads > 1, torch.float32)


def test_a_state_in_place():
    """Parts of a plan are taken out one after another, in the dtype that is asked for."""
    plan, *_, normal, _ = make("softmax")
    states, total = normal(len(plan.keys), 2, 1, 50), normal(len(plan.queries), 2, 1, 50)
    rows, options = torch.arange(len(plan.queries)).int(), {"transposed": False, "heads": 2}
    once = fused.listed(total, rows, states, plan, **options, dtype=torch.float32)
    twice = fused.listed(once, rows, states, plan, **options, dtype=torch.bfloat16)
    assert twice.dtype == torch.bfloat16
    torch.testing.assert_close(twice.float(), 2 * once - total, atol=3e-2, rtol=2e-2)


def test_what_the_kernels_refuse():
    assert choose("cpu", torch.float32, 64, 64, (128, 64))[0] is plain
    assert fused.refusal(torch.bfloat16, 128, 64, (128, 64)) is None
    assert "not torch.float16" in fused.refusal(torch.float16, 64, 64, (128, 64))
    assert "up to 64 wide, not 128" in fused.refusal(torch.float32, 128, 64, (128, 64))
    assert "not 48" in fused.refusal(torch.bfloat16, 64, 64, (48, 64))


class TestOnGpu:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("inside", [False, True], ids=["before", "inside"])
    @pytest.mark.parametrize(
        "dtype, dim", [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 32), (torch.float32, 64)], ids=str
    )
    @pytest.mark.parametrize("sizes", telling((128, 64), (16, 16), rest=[(64, 64), (128, 128)]), ids=str)
    def test_equals_plain_pytorch(self, sizes, dtype, dim, inside):
        for feature_map in ("softmax", "elu1"):
            where = {"device": "cuda", "offsets": (0, 1, 700, 1500), "sizes": sizes}
            check_all("gpu", dtype, inside, case=(4, 2, dim, dim, feature_map, True), **where)

    @pytest.mark.parametrize("feature_map", ["softmax", "elu1"])
    @pytest.mark.parametrize(
        "dtype, dim", [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 32), (torch.float32, 64)], ids=str
    )
    def test_whole_documents(self, dtype, dim, feature_map):
        check_whole("gpu", dtype, device="cuda", case=(4, 2, dim, dim, feature_map, False), offsets=(0, 2500))

    def test_listed_states(self):
        case = (8, 4, 128, 128, "softmax", True)
        plan, *_, normal, _ = make("gpu", device="cuda", case=case, offsets=(0, 3000, 3100), sizes=(128, 64))
        check_listed(plan, normal(4, 4, 1, 16512), normal(60, 4, 1, 16512), True, torch.float32)
