"""The fused kernels of none, fixed and scalar decay against the recurrence: outputs, states and every gradient."""

import math
from collections import defaultdict
from types import SimpleNamespace

import forms
import pytest
import torch
from devices import telling
from torch.utils._python_dispatch import TorchDispatchMode

from longspan.kernels.linear.chunked import Chunked
from longspan.kernels.linear.form import Spans
from longspan.kernels.linear.splits import Splits

pytest.importorskip("triton", reason="Triton is not installed")
DECAYS = [None, "fixed", "fixed_closed", "medium", "weak", "strong", "spiky", "closed"]
SIZES = [(16, 32), (32, 16), (20, 70)]
SCALE = 0.3


def fused():
    from longspan.kernels.linear.fused import CHUNK, Fused

    return Fused, CHUNK


def gate_limit(decay, limit, times, sizes):
    """e^-20 per token leaves a gate's gradient near zero: what remains is fp32's rounding of (q.k)(do.v), which cancels
    in sums of 64 tokens: typically 1.5e-5 sqrt(K V) of the floor of `errors`, 5.5e-5 in an unlucky order of sums."""
    return max(times * limit, 8e-5 * math.prod(sizes) ** 0.5) if decay == "strong" else times * limit


def check(name, sizes, decay, split, device="cpu", dtype=torch.float32, limit=2e-6):
    form, chunk = fused()
    spans = forms.spans_of(name)
    inputs = forms.random_inputs(spans, 2, *sizes, decay, 0, device=device, dtype=dtype)
    tables = Splits.of(spans, split, chunk).map(lambda x: x.to(device))
    actual = forms.run_form(form, tables, *inputs, SCALE)
    errors = forms.errors(actual, forms.expected(spans, *inputs, SCALE))
    forms.assert_within(errors, dict.fromkeys(errors, limit) | {"dlog_decay": gate_limit(decay, limit, 5, sizes)})
    return form, tables, inputs, actual


@pytest.mark.parametrize("decay", DECAYS, ids=str)
@pytest.mark.parametrize("name", forms.SPANS)
def test_equals_the_recurrence(name, decay):
    sizes = SIZES[(list(forms.SPANS).index(name) + DECAYS.index(decay)) % len(SIZES)]
    check(name, sizes, decay, split=128)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("decay", ["fixed_closed", "closed"])
def test_gates_that_close_in_plain_pytorch(decay, dtype):
    spans = forms.spans_of("mixed")
    given = forms.random_inputs(spans, 2, 16, 16, decay, 0)
    inputs = {name: x if x is None else x.to(dtype) for name, x in given[0].items()}
    actual = forms.run_form(Chunked, Chunked.tables(spans), inputs, *(x.to(dtype) for x in given[1:]), SCALE)
    errors = forms.errors(actual, forms.expected(spans, *given, SCALE))
    assert all(error < (1e-10 if dtype == torch.float64 else 1e-5) for error in errors.values()), errors


@pytest.mark.parametrize("decay", [None, "fixed", "medium", "spiky", "closed"], ids=str)
def test_bfloat16(decay):
    check("mixed", (32, 16), decay, split=128, dtype=torch.bfloat16, limit=6e-3)


def test_split_sizes_agree():
    check("mixed", (16, 16), "medium", split=64)
    check("one", (16, 16), "spiky", split=256)


LONG = 6 * 64 - 5  # tokens of a split whose chunks take two steps of the search for what is remembered


@pytest.fixture
def short_search(monkeypatch):
    """4 chunks in a step of the search, for which splits of two steps would be long in the interpreter."""
    from longspan.kernels.compiler import tl
    from longspan.kernels.linear import sweep

    monkeypatch.setattr(sweep, "SEARCHED", tl.constexpr(4))


def check_forgetting(decay, length, split, sizes=(16, 16), device="cpu", dtype=torch.float32, limit=1e-5):
    """Heads of which all, a part or nothing is forgotten, with the border where it matters."""
    form, chunk = fused()
    spans = Spans((0, length), (0,), (0,), (0,))
    inputs, *states = forms.random_inputs(spans, 6, *sizes, None, 0, device=device, dtype=dtype)
    rates = torch.tensor([-20.0, -0.2, -44.4 / length, -44.3 / length, -1.0, 0.0])
    log_decay = rates if decay == "fixed" else rates.expand(length, -1).clone()
    if decay == "scalar":
        log_decay[:, 4] = 0.0
        log_decay[length // 2, 4] = -120.0
    given = inputs | {"log_decay": log_decay.to(device)}, *states
    actual = forms.run_form(form, Splits.of(spans, split, chunk).map(lambda x: x.to(device)), *given, SCALE)
    exact = {name: x if x is None else x.double() for name, x in given[0].items()}, *(x.double() for x in states)
    wanted = forms.run_form(Chunked, Chunked.tables(spans).map(lambda x: x.to(device)), *exact, SCALE)
    errors = forms.errors(actual, {name: x.cpu() for name, x in wanted.items() if x is not None})
    forms.assert_within(errors, dict.fromkeys(errors, limit))


@pytest.mark.parametrize("split", [LONG + 5, 256])
@pytest.mark.parametrize("decay", ["fixed", "scalar"])
def test_forgetting(decay, split, short_search):
    check_forgetting(decay, LONG, split)


@pytest.mark.parametrize("decay", ["fixed", "scalar"])
def test_what_is_forgotten_is_not_read(decay, short_search):
    """NaN in the first chunks does not reach the state that is left; in the last ones, the gradient at the start."""
    form, chunk = fused()
    spans = Spans((0, LONG), (0,))
    inputs, entry, *_ = forms.random_inputs(spans, 3, 16, 16, None, 0)
    log_decay = torch.tensor([-20.0, -0.4, -0.001])
    log_decay = log_decay if decay == "fixed" else log_decay.expand(LONG, -1).clone()
    tables = Splits.of(spans, LONG + 5, chunk)
    for part in (slice(0, 2 * 64), slice(4 * 64, LONG)):
        v = inputs["v"].clone()
        v[part] = float("nan")
        work = form(tables, inputs["q"], inputs["k"], v, log_decay, None, SCALE)
        if part.start == 0:
            state, transition = work.summary()
            expected = log_decay * LONG if decay == "fixed" else log_decay.sum(0)
            torch.testing.assert_close(transition[0], expected, rtol=1e-5, atol=0)
        else:
            work.ahead()
            saved = work.output(entry, v.dtype)[1]
            work = form(tables, inputs["q"], inputs["k"], inputs["v"], log_decay, None, SCALE)
            work.start_backward(saved, v, True)
            state = work.gradient_summary()
        assert state[0].flatten(1).isfinite().all(1).tolist() == [True, True, False]


def test_without_linked_spans_no_summary_is_needed():
    form, _ = fused()
    spans = forms.spans_of("one")
    inputs = forms.random_inputs(spans, 1, 16, 16, "medium", 0)
    actual = forms.run_form(form, Splits.of(spans, 64, 64), *inputs, SCALE, states_travel=False)
    errors = forms.errors(actual, forms.expected(spans, *inputs, SCALE))
    assert all(error < 1e-5 for error in errors.values()), errors


def test_heads_may_share_keys_and_strides_may_be_any():
    form, _ = fused()
    spans = forms.spans_of("65")
    (inputs, *states) = forms.random_inputs(spans, 2, 16, 16, "medium", 0)
    strided = inputs["v"].transpose(0, 2).contiguous().transpose(0, 2)  # tokens contiguous instead of columns
    shared = inputs | {"q": inputs["q"][:, :1].expand(-1, 2, -1), "v": strided}
    plain = {name: x if x is None else x.contiguous() for name, x in shared.items()}
    tables = Splits.of(spans, 64, 64)
    actual = forms.run_form(form, tables, shared, *states, SCALE)
    for name, x in forms.run_form(form, tables, plain, *states, SCALE).items():
        assert x is None or torch.equal(x, actual[name]), name


@pytest.mark.parametrize("decay", [None, "fixed", "medium"], ids=str)
def test_token_strides_may_differ(decay):
    """v and d_out as parts of wider tensors, q and k not: dk and dv cannot share a launch then."""
    form, _ = fused()
    spans = forms.spans_of("65")
    inputs, entry, d_out, exit_grad = forms.random_inputs(spans, 2, 16, 16, decay, 0)
    tables = Splits.of(spans, 64, 64)
    plain = forms.run_form(form, tables, inputs, entry, d_out, exit_grad, SCALE)
    for wide in (("v",), ("d_out",), ("q",)):
        parts = {name: torch.cat([x, x], 1)[:, :2] if name in wide else x for name, x in inputs.items()}
        d_part = torch.cat([d_out, d_out], 1)[:, :2] if "d_out" in wide else d_out
        actual = forms.run_form(form, tables, parts, entry, d_part, exit_grad, SCALE)
        for name, x in plain.items():
            assert x is None or torch.equal(x, actual[name]), (wide, name)


def test_no_tokens():
    form, _ = fused()
    empty = torch.empty(0, 2, 16)
    tables = form.tables(Spans((0,)), 2, 16, 16)
    work = form(tables, empty, empty, empty, torch.empty(0, 2), None, SCALE)
    work.ahead()
    out, saved = work.output(torch.empty(0, 2, 16, 16), torch.float32)
    work.start_backward(saved, empty, True)
    work.gradient_ahead()
    grads = work.gradients(torch.empty(0, 2, 16, 16))
    assert out.shape == empty.shape and all(x.shape[0] == 0 for x in grads[:4])


class Allocations(TorchDispatchMode):
    """Sizes of all storages that operations make, but those of states."""

    def __init__(self, width):
        super().__init__()
        self.found, self.states = {}, (width, width)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape[-2:] != self.states:
            self.found[result.untyped_storage()._cdata] = result  # kept, or another would get its number
        return result

    def larger_than(self, size):
        return sorted(found for x in self.found.values() if (found := x.untyped_storage().nbytes()) >= size)


@pytest.mark.parametrize("on_hopper", [True, False], ids=["Hopper", "others"])
@pytest.mark.parametrize("width, dtype", [(128, torch.bfloat16), (64, torch.bfloat16), (64, torch.float32)], ids=str)
@pytest.mark.parametrize("decay", [None, "fixed", "scalar"])
def test_what_is_kept_and_held_is_what_estimates_of_memory_count(monkeypatch, decay, width, dtype, on_hopper):
    """Of what grows with tokens; no kernel runs."""
    from longspan.attention.outline.linear import Linear
    from longspan.kernels.linear import fused, hopper
    from longspan.kernels.sparse import hopper as sparse_hopper

    monkeypatch.setattr(sparse_hopper, "on_hopper", lambda x: on_hopper)
    silent = SimpleNamespace(launch=lambda *args, **options: None, PARTS=dict.fromkeys([decay or "none"], 1))
    for name in ("sweep", "sweep_reverse", "sweep_sum"):
        monkeypatch.setattr(hopper, name, silent, raising=False)
    for name in ("sum_kernel", "sweep_kernel", "reverse_kernel", "decay_kernel", "gate_kernel"):
        monkeypatch.setattr(fused, name, defaultdict(lambda: silent.launch))
    tokens, nothing, gate = 4096, torch.zeros(0, 2, width, width), decay == "scalar"
    q, k, v, d_out = torch.zeros(4, tokens, 2, width, dtype=dtype).unbind()
    log_decay = {None: None, "fixed": -torch.ones(2), "scalar": torch.zeros(tokens, 2)}[decay]
    work = fused.Fused(fused.Fused.tables(Spans((0, tokens)), 2, width, width), q, k, v, log_decay, None, SCALE)
    work.ahead()
    _, kept = work.output(nothing, dtype)
    with Allocations(width) as held:
        work.start_backward(kept, d_out, gate)
        work.gradient_ahead()
        gradients = work.gradients(nothing)
    outline = dict(gpu=True, hopper=on_hopper, spans=1, lengths=(tokens,), linked=0, record=lambda call: None)
    counted, inputs = Linear(SimpleNamespace(**outline), True, dtype), (q, k, v, log_decay, None)
    assert [x.nbytes for x in kept[1:]] == [x.nbytes for x in counted.output(None, *inputs)[1][1:]]
    if gate:
        log_decay.requires_grad_()
    with Allocations(width) as counted_held:
        counted.hold(d_out, *inputs)
        [torch.empty_like(x) for x, gradient in zip(inputs, gradients) if gradient is not None]
    assert held.larger_than(8 * tokens) == counted_held.larger_than(8 * tokens)  # fp32 numbers of tokens and heads


class TestOnGpu:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("dtype", telling(torch.bfloat16, rest=[torch.float32]), ids=str)
    @pytest.mark.parametrize(
        "sizes", telling((128, 128), rest=[(64, 64), (256, 256), (128, 64), (64, 256), (20, 70)]), ids=str
    )
    @pytest.mark.parametrize("decay", DECAYS, ids=str)
    def test_equals_fp64(self, decay, sizes, dtype):
        """Against the chunked form in fp64, which the CPU tests hold to the recurrence."""
        if dtype == torch.float32 and max(sizes) > 128:
            pytest.skip("fp32 heads wider than 128 run in plain PyTorch")
        form, chunk = fused()
        for offsets in ((0, 1), (0, 63), (0, 64), (0, 65), (0, 1000), (0, 1, 2, 1300, 1301, 5400)):
            last = len(offsets) - 2
            spans = Spans(offsets, (last,), (last,), (last,))
            inputs = forms.random_inputs(spans, 3, *sizes, decay, 0, device="cuda", dtype=dtype)
            exact = {name: x if x is None else x.double() for name, x in inputs[0].items()}
            exact = exact, *(x.double() for x in inputs[1:])
            wanted = forms.run_form(Chunked, Chunked.tables(spans).map(lambda x: x.cuda()), *exact, SCALE)
            wanted = {name: x.cpu() for name, x in wanted.items() if x is not None}
            if decay in ("closed", "fixed_closed"):  # PyTorch's form takes what closes as -800, the kernels as -128
                wanted["transition"][wanted["transition"] <= -800] = -torch.inf
            tables = Splits.of(spans, 512, chunk).map(lambda x: x.cuda())
            actual = forms.run_form(form, tables, *inputs, SCALE)
            errors = forms.errors(actual, wanted)
            limit = 6e-3 if dtype == torch.bfloat16 else 2e-5
            gate = {"dlog_decay": gate_limit(decay, limit, 2, sizes)}
            forms.assert_within(errors, dict.fromkeys(errors, limit) | gate)
            for name, x in forms.run_form(form, tables, *inputs, SCALE).items():
                assert x is None or torch.equal(x, actual[name]), f"{name} differs from run to run"

    @pytest.mark.parametrize(
        "decay, heads", [*((decay, 3) for decay in DECAYS), *((decay, 303) for decay in ("medium", "weak"))], ids=str
    )
    def test_where_nothing_travels(self, decay, heads):
        """On Hopper sums and sweep of a gate are one launch then: many splits to a document, and again in a graph. With
        more heads than an H200 runs programs at a time none of these may wait for one that has not begun."""
        form, chunk = fused()
        spans = Spans((0, 1, 2, 1300, 1301, 5400) if heads == 3 else (0, 1, 2, 300, 301, 900))
        given = forms.random_inputs(spans, heads, 128, 128, decay, 0, device="cuda", dtype=torch.bfloat16)
        if decay == "fixed":  # of unlike reach
            given[0]["log_decay"] = torch.tensor([0.0, -2.0, -0.02], device="cuda")
        elif decay == "medium":  # heads remember none, one and more splits of 512
            given[0]["log_decay"] *= torch.tensor([5.0, 0.6, 0.025], device="cuda").repeat(heads // 3)
        exact = {name: x if x is None else x.double() for name, x in given[0].items()}
        exact = exact, *(x.double() for x in given[1:])
        tables = Chunked.tables(spans).map(lambda x: x.cuda())
        wanted = forms.run_form(Chunked, tables, *exact, SCALE, states_travel=False)
        wanted = {name: x.cpu() for name, x in wanted.items() if x is not None}
        for split in (64, 512):
            tables = Splits.of(spans, split, chunk).map(lambda x: x.cuda())
            actual = forms.run_form(form, tables, *given, SCALE, states_travel=False)
            errors = forms.errors(actual, wanted)
            gate = {"dlog_decay": gate_limit(decay, 6e-3, 2, (128, 128))}
            forms.assert_within(errors, dict.fromkeys(errors, 6e-3) | gate)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                replayed = forms.run_form(form, tables, *given, SCALE, states_travel=False)
            for _ in range(20):
                graph.replay()
                for name, x in actual.items():
                    assert x is None or torch.equal(x, replayed[name]), f"{name} differs from run to run"

    @pytest.mark.parametrize("dtype", telling(torch.bfloat16, rest=[torch.float32]), ids=str)
    @pytest.mark.parametrize("split", [70 * 64, 512])
    @pytest.mark.parametrize("decay", ["fixed", "scalar"])
    def test_forgetting(self, decay, split, dtype):
        limit = 1.2e-2 if dtype == torch.bfloat16 else 1e-4
        check_forgetting(decay, 70 * 64 - 5, split, (128, 128), "cuda", dtype, limit)
