"""What the attention functions accept and refuse, and that every rank hears of an error on one."""

import re
from functools import partial
from itertools import permutations

import pytest
import torch
import torch.distributed as dist
from devices import DEVICES
from spawn import run_ranks

from longspan.attention import TopBlocks, linear_attention, softmax_attention, sparse_attention
from longspan.parallel import SequenceParallel, Topology, contiguous, plan_attention, zigzag

TOKENS, HEADS, SIZE = 6, 2, 4


def tensors(num_tokens=TOKENS, heads=HEADS, size=SIZE, dtype=torch.float32):
    return {name: torch.randn(num_tokens, heads, size).to(dtype) for name in "qkv"}


def ones(*shape, **kwargs):
    return torch.ones(*shape, **kwargs)


# One rank. Each entry: changed arguments, and what the message must name.

BOTH = {
    "q and k of different head_dim": ({"q": ones(6, 2, 5)}, r"5"),
    "k of fewer tokens": ({"k": ones(5, 2, 4)}, r"5"),
    "v of more tokens": ({"v": ones(7, 2, 4)}, r"7"),
    "all of other tokens than the layout": ({"layout": contiguous((9,), 1)}, r"6.*9|9.*6"),
    "batch dimension": (tensors() | {"q": ones(1, 6, 2, 4)}, r"1, 6, 2, 4"),
    "flat heads": ({"v": ones(6, 8)}, r"6, 8"),
    "integers": ({name: ones(6, 2, 4, dtype=torch.int64) for name in "qkv"}, r"int64"),
    "mixed dtypes": ({"v": ones(6, 2, 4, dtype=torch.float64)}, r"float64"),
    "lengths instead of a layout": ({"layout": (6,)}, r"Layout.*tuple"),
    "a layout of two ranks without a group": ({"layout": contiguous((12,), 2)}, r"2 ranks"),
    "no tokens and no layout": (tensors(num_tokens=0), r"no tokens|token"),
}
LINEAR = BOTH | {
    "v of other heads": ({"v": ones(6, 3, 4)}, r"6, 3, 4"),
    "k of fewer heads": ({"k": ones(6, 1, 4)}, r"6, 1, 4"),
    "misspelt strategy": ({"strategy": "lsap2"}, r"lsap2.*did you mean 'lasp2'"),
    "strategy of softmax": ({"strategy": "ring"}, r"ring.*lasp2"),
    "decay of other heads": ({"log_decay": -ones(3)}, r"log_decay.*3"),
    "decay of other tokens": ({"log_decay": -ones(5, 2)}, r"log_decay.*5, 2"),
    "decay transposed": ({"log_decay": -ones(2, 6)}, r"log_decay.*2, 6"),
    "decay per channel of other channels": ({"log_decay": -ones(6, 2, 3)}, r"log_decay.*6, 2, 3.*6, 2, 4"),
    "decay of the value's channels": (
        {"v": ones(6, 2, 5), "log_decay": -ones(6, 2, 5)},
        r"log_decay.*6, 2, 5.*6, 2, 4",
    ),
    "decay of another device": ({"log_decay": -ones(6, 2, device="meta")}, r"log_decay.*meta.*cpu"),
    "beta of other heads": ({"beta": ones(6, 3)}, r"beta.*6, 3.*6, 2"),
    "beta of other tokens": ({"beta": ones(5, 2)}, r"beta.*5, 2.*6, 2"),
    "beta per channel": ({"beta": ones(6, 2, 4)}, r"beta.*6, 2, 4.*6, 2"),
    "fixed beta": ({"beta": ones(2)}, r"beta.*2.*6, 2"),
    "integer beta": ({"beta": ones(6, 2, dtype=torch.int64)}, r"beta.*int64"),
    "beta of another device": ({"beta": ones(6, 2, device="meta")}, r"beta.*meta.*cpu"),
    "delta rule without a direction": ({"beta": ones(6, 2), "causal": False}, r"beta.*causal"),
    "normalized delta rule": ({"beta": ones(6, 2), "normalize": True}, r"normalize.*beta"),
    "scalar decay": ({"log_decay": torch.tensor(-0.5)}, r"log_decay"),
    "integer decay": ({"log_decay": -ones(2, dtype=torch.int64)}, r"log_decay.*int64"),
    "learned fixed decay": ({"log_decay": (-ones(2)).requires_grad_()}, r"log_decay.*gradient"),
    "decay without a direction": ({"log_decay": -ones(2), "causal": False}, r"log_decay.*causal"),
    "ring without a direction": ({"strategy": "lasp", "causal": False}, r"lasp.*causal"),
}
PLAN = plan_attention([6], Topology(1, 1))
SOFTMAX = BOTH | {
    "heads that do not divide": (tensors(heads=3) | {"q": ones(6, 4, 4)}, r"3.*4|4.*3"),
    "more key heads than query heads": ({"q": ones(6, 1, 4)}, r"2.*1|1.*2"),
    "k and v of different heads": ({"v": ones(6, 1, 4)}, r"6, 1, 4"),
    "misspelt strategy": ({"strategy": "rign"}, r"rign.*did you mean 'ring'"),
    "strategy of linear": ({"strategy": "lasp2"}, r"lasp2.*ring"),
    "a window of nothing": ({"window": 0}, r"window=0 must be a whole number of at least 1"),
    "half a token": ({"window": 2.5}, r"window=2.5 must be a whole number"),
    "a window without a direction": ({"window": 3, "causal": False}, r"window=3 needs causal attention"),
    "plan": ({"plan": "a plan"}, r"plan must be a longspan.parallel.AttentionPlan, got str"),
    "plan of other documents": ({"plan": PLAN, "layout": contiguous((4, 2), 1)}, r"plan is for 1 doc.* the layout"),
    "plan and strategy": ({"plan": PLAN, "strategy": "ring"}, r"plan goes with layout and group"),
}


def refused(attention, changes, names):
    with pytest.raises(ValueError, match=names) as raised:
        attention(**(tensors() | changes))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("case", LINEAR)
def test_linear_attention_refuses(case):
    refused(linear_attention, *LINEAR[case])


@pytest.mark.parametrize("case", SOFTMAX)
def test_softmax_attention_refuses(case):
    refused(softmax_attention, *SOFTMAX[case])


def gated(q, k, v):
    """With a decay that lies transposed in memory."""
    return linear_attention(q, k, v, log_decay=-torch.rand(q.shape[1], q.shape[0], device=q.device).t())


ATTENTION = {
    "linear": linear_attention,
    "gated": gated,
    "softmax": softmax_attention,
    "sparse": partial(sparse_attention, selection=TopBlocks(1, 16, 16)),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", [*permutations(range(3)), "expanded"])
@pytest.mark.parametrize("name", ATTENTION)
def test_any_strides_are_read(name, order, device):
    """q, k, v and the gradient of the output transposed in memory, or the same number all along a head. On a GPU as
    kernels take them, whose sums may come in another order."""
    cases = {"cpu": (37, SIZE, torch.float64, 1e-12), "cuda": (301, 128, torch.bfloat16, 1e-2)}
    num_tokens, size, dtype, limit = cases[device]
    inputs = {name: x.to(device) for name, x in tensors(num_tokens, size=size, dtype=dtype).items()}
    d_out = torch.randn(num_tokens, HEADS, size).to(device, dtype)

    def laid_out(x):
        if order == "expanded":
            return x[..., :1].expand(x.shape)
        return x.permute(order).contiguous().permute(torch.tensor(order).argsort().tolist())

    def results(change):
        torch.manual_seed(0)
        leaves = {name: change(laid_out(x)).requires_grad_() for name, x in inputs.items()}
        out = ATTENTION[name](**leaves)
        return out, *torch.autograd.grad(out, list(leaves.values()), change(laid_out(d_out)))

    for found, wanted in zip(results(torch.Tensor.detach), results(torch.Tensor.contiguous), strict=True):
        assert (found - wanted).norm() <= limit * wanted.norm() and wanted.norm() > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ATTENTION)
def test_autocast_rounds_nothing(name, device):
    leaves, results = [x.to(device).requires_grad_() for x in tensors(37, size=16).values()], []
    options = {}
    if name == "softmax":  # by the back end whose products autocast would take
        options["seq"] = SequenceParallel(backend="math", device=device).context((37,))
    for autocast in (False, True):
        torch.manual_seed(0)
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            out = ATTENTION[name](*leaves, **options)
        results.append((out, *torch.autograd.grad(out.sum(), leaves)))
    limits = {"rtol": 0, "atol": 0} if device == "cpu" else {"rtol": 1e-5, "atol": 1e-5}
    for rounded, wanted in zip(*results, strict=True):
        torch.testing.assert_close(rounded, wanted, **limits)


@pytest.mark.parametrize("attention", [linear_attention, softmax_attention])
def test_seq_replaces_layout_group_and_strategy(attention):
    seq = SequenceParallel().context((4, 2))
    inputs = tensors()
    assert torch.equal(attention(**inputs, seq=seq), attention(**inputs, layout=contiguous((4, 2), 1)))
    for extra in ({"layout": seq.layout}, {"strategy": "lasp2" if attention is linear_attention else "ring"}):
        with pytest.raises(ValueError, match="seq"):
            attention(**inputs, seq=seq, **extra)
    with pytest.raises(ValueError, match="7"):
        attention(**tensors(7), seq=seq)


@pytest.mark.parametrize("attention", [linear_attention, softmax_attention])
def test_seq_with_an_unknown_strategy_is_refused(attention):
    seq = SequenceParallel(linear="lasp3", softmax="rign").context((6,))
    with pytest.raises(ValueError, match="did you mean"):
        attention(**tensors(), seq=seq)


# What is accepted


@pytest.mark.parametrize("attention", [linear_attention, softmax_attention])
def test_without_a_layout_the_tokens_are_one_document(attention):
    inputs = tensors()
    assert torch.equal(attention(**inputs), attention(**inputs, layout=contiguous((TOKENS,), 1)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("attention", [linear_attention, softmax_attention])
def test_the_output_has_the_dtype_of_the_inputs(attention, dtype):
    out = attention(**tensors(dtype=dtype))
    assert out.dtype == dtype
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qv"])
@pytest.mark.parametrize("attention", [linear_attention, softmax_attention])
def test_gradients_of_some_inputs_equal_those_of_all(attention, wanted):
    inputs = tensors(dtype=torch.float64)
    every = [x.clone().requires_grad_() for x in inputs.values()]
    expected = dict(zip(inputs, torch.autograd.grad(attention(*every).square().sum(), every)))
    some = {name: x.clone().requires_grad_(name in wanted) for name, x in inputs.items()}
    gradients = torch.autograd.grad(attention(**some).square().sum(), [some[name] for name in wanted])
    for name, gradient in zip(wanted, gradients):
        assert torch.equal(gradient, expected[name])


@pytest.mark.parametrize("attention", [linear_attention, softmax_attention])
def test_strided_inputs_equal_contiguous_ones(attention):
    fused = torch.randn(TOKENS, HEADS, 3 * SIZE, dtype=torch.float64)
    strided = [x.requires_grad_() for x in fused.clone().split(SIZE, -1)]
    packed = [x.detach().contiguous().requires_grad_() for x in strided]
    outs = [attention(*inputs) for inputs in (strided, packed)]
    # The gradient of the output arrives strided, too.
    grad_out = torch.randn(HEADS, TOKENS, SIZE, dtype=torch.float64).transpose(0, 1)
    torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(out, inputs, grad_out) for out, inputs in zip(outs, (strided, packed))]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attention", [linear_attention, softmax_attention])
def test_compiled_models_may_call_it(attention):
    def block(q, k, v):
        return attention(q.sin(), k, v).cos()

    inputs = [x.requires_grad_() for x in tensors(dtype=torch.float64).values()]
    plain, compiled = block(*inputs), torch.compile(block, backend="eager")(*inputs)
    assert torch.equal(plain, compiled)
    for expected, found in zip(*(torch.autograd.grad(out.sum(), inputs) for out in (plain, compiled))):
        assert torch.equal(expected, found)


# Several ranks: the last rank alone is wrong, or disagrees. Entries: (arguments of the last rank, what is named).

LAYOUT = zigzag((4 * TOKENS,), 4)
ONE_RANK_BOTH = {
    "too few tokens": (tensors(TOKENS - 1), "rank 3.*5"),
    "too many tokens": (tensors(TOKENS + 1), "rank 3.*7"),
    "another dtype": (tensors(dtype=torch.float64), "float64"),
    "one tensor of another dtype": ({"k": ones(6, 2, 4, dtype=torch.bfloat16)}, "rank 3.*bfloat16"),
    "more heads": (tensors(heads=3), "rank 3"),
    "another head_dim": (tensors(size=8), "rank 3"),
    "not packed": ({"v": ones(6, 8)}, "rank 3.*6, 8"),
    "another layout": ({"layout": contiguous((4 * TOKENS,), 4)}, "rank 3"),
    "a layout of other ranks": ({"layout": contiguous((TOKENS,), 1)}, "rank 3.*1 ranks.*4"),
    "no layout": ({"layout": None}, "rank 3.*layout"),
    "another mask": ({"causal": False}, "rank 3"),
    "another scale": ({"scale": 0.3}, "rank 3"),
    "unknown strategy": ({"strategy": "zagzig"}, "zagzig"),
}
ONE_RANK = {
    "linear": ONE_RANK_BOTH
    | {
        "a decay": ({"log_decay": -ones(2)}, "rank 3"),
        "a decay per channel": ({"log_decay": -ones(6, 2, 4)}, "rank 3"),
        "the delta rule": ({"beta": ones(6, 2)}, "rank 3"),
        "a beta of other heads": ({"beta": ones(6, 3)}, "rank 3.*beta.*6, 3"),
        "a normalized delta rule": ({"beta": ones(6, 2), "normalize": True}, "rank 3.*normalize.*beta"),
        "normalize": ({"normalize": True}, "rank 3"),
        "another strategy": ({"strategy": "lasp"}, "rank 3"),
    },
    "softmax": ONE_RANK_BOTH
    | {
        "another window": ({"window": 3}, r"rank 3 has.*\(True, 3, "),
        "a window of nothing": ({"window": 0}, "rank 3.*window=0"),
        "heads that do not divide": (tensors(heads=3) | {"q": ones(6, 4, 4)}, "rank 3"),
        "another strategy": ({"strategy": "all_gather"}, "rank 3"),
    },
}


def one_rank_is_wrong(rank, world_size, name):
    """What happened here in each case, as text; the last call must work, so nothing is left over from the others."""
    attention = {"linear": linear_attention, "softmax": softmax_attention}[name]
    group = dist.group.WORLD
    outcomes = {}
    for case, (changes, _) in ONE_RANK[name].items():
        arguments = tensors() | {"layout": LAYOUT, "group": group}
        if rank == world_size - 1:
            arguments |= changes
        try:
            attention(**arguments)
            outcomes[case] = "accepted"
        except ValueError as error:
            outcomes[case] = str(error)
    inputs = [x.requires_grad_() for x in tensors().values()]
    out = attention(*inputs, layout=LAYOUT, group=group)
    out.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in inputs)
    return outcomes


@pytest.mark.parametrize("name", ["linear", "softmax"])
def test_an_error_on_one_rank_is_raised_on_all(name):
    ranks = run_ranks(one_rank_is_wrong, 4, name, timeout=60)
    problems = []
    for case, (_, names) in ONE_RANK[name].items():
        for rank, outcome in enumerate(outcomes[case] for outcomes in ranks):
            # The rank itself need not be told its number.
            pattern = names.removeprefix("rank 3").removeprefix(".*") if rank == 3 else names
            if outcome == "accepted" or not re.search(pattern, outcome) or "\n" in outcome:
                problems.append(f"{case}, rank {rank}: {outcome}")
    assert not problems, "\n".join(problems)
