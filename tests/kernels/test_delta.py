"""The delta rule's kernels against the recurrence in fp64: outputs, states in and out, every gradient, any cut."""

import functools
import threading
from types import SimpleNamespace

import forms
import pytest
import torch
from devices import telling

from longspan.kernels.linear.form import Spans
from longspan.kernels.linear.splits import Splits

SCALE = 0.3
# (decay, largest beta) as in forms.random_inputs; "far": sums of thousands whose differences are hundredths.
FAMILIES = {
    "delta": (None, 1),
    "reflecting": (None, 2),
    "fixed": ("fixed", 1),
    "medium": ("medium", 1),
    "strong": ("strong", 1),
    "spiky": ("spiky", 1),
    "closed": ("closed", 1),
    "fixed_closed": ("fixed_closed", 1),
    "far": ("spiky", 1),
}
MIXED = Spans((0, 1, 2, 66, 67, 220), (1, 2, 4), (2, 4), (1, 2))


@pytest.fixture(scope="module", autouse=True)
def delta():
    """Imported late: Triton need not be installed."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from longspan.kernels.linear import delta

    return delta


def make(spans, family, heads, key_size, value_size, dtype=torch.float32, device="cpu"):
    decay, beta = FAMILIES[family]
    inputs, *states = forms.random_inputs(spans, heads, key_size, value_size, decay, beta, dtype=dtype, device=device)
    if family == "far":
        inputs["log_decay"] = torch.where(inputs["log_decay"] < -1, -500.0, inputs["log_decay"])
    return inputs, *states


def check(delta, spans, given, limit, *, split=64, wanted=None, same_again=False):
    """Relative errors of all that the Form gives, when spans are cut into splits of `split` tokens."""
    inputs, entry, d_out, exit_grad = given
    device = inputs["q"].device
    wanted = wanted or forms.expected(spans, inputs, entry, d_out, exit_grad, SCALE)
    tables = delta.DeltaTables.of(Splits.of(spans, split, 64)).map(lambda x: x.to(device))
    travel = bool(spans.linked)
    run = functools.partial(forms.run_form, delta.Delta, tables, *given, SCALE, states_travel=travel)
    found = run()
    assert all(found[f"d{name}"].dtype == inputs[name].dtype for name in "qkv")
    gated = inputs["log_decay"] is not None and inputs["log_decay"].ndim == 2
    assert (found["dlog_decay"] is None) != gated
    # One number per head is left of sums over the width that cancel: with one token nothing averages the rounding.
    alone = spans.offsets[-1] == 1
    limits = {name: 3 * limit if alone and name in ("dbeta", "dlog_decay") else limit for name in wanted}
    forms.assert_within(forms.errors(found, wanted), limits)
    if same_again:
        again = run()
        assert all(x is None or torch.equal(x, again[name]) for name, x in found.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_families(delta, family):
    check(delta, MIXED, make(MIXED, family, 1, 16, 32), 1e-5)


@pytest.mark.parametrize("name", ["token", "63", "64", "65"])
def test_lengths(delta, name):
    spans = forms.spans_of(name)
    check(delta, spans, make(spans, "medium", 1, 16, 16), 1e-5)


@pytest.mark.parametrize(("sizes", "split"), [((64, 64), 128), ((20, 40), 64), ((5, 3), 1024)], ids=str)
def test_sizes_and_splits(delta, sizes, split):
    spans = Spans((0, 40, 240))
    check(delta, spans, make(spans, "medium", 1, *sizes), 1e-5, split=split)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 3e-3), (torch.bfloat16, 1.5e-2)], ids=str)
def test_half_precision(delta, dtype, limit):
    given = make(MIXED, "medium", 1, 32, 16, dtype)
    check(delta, MIXED, given, limit)


ALIKE = [("delta", 0, 2e-2), ("reflecting", 0.3, 2e-2), ("reflecting", 0, 0.3)]


@pytest.mark.parametrize(("family", "noise", "limit"), ALIKE)
def test_half_precision_with_keys_alike(delta, family, noise, limit):
    """The hardest inverses: all pairs of tokens interact fully. Reflections about one key never forget an error."""
    spans = Spans((0, 200))
    inputs, *states = make(spans, family, 1, 32, 16, torch.float16)
    keys = inputs["k"][:1].float() + noise * inputs["k"].float()
    inputs["k"] = torch.nn.functional.normalize(keys, dim=-1).half()
    inputs["beta"] = torch.full_like(inputs["beta"], FAMILIES[family][1] - 0.01)
    check(delta, spans, (inputs, *states), limit)


def test_shared_heads_and_foreign_strides(delta):
    spans = Spans((0, 100))
    inputs, entry, d_out, exit_grad = make(spans, "medium", 2, 16, 32)
    inputs["k"] = inputs["k"][:, :1].expand(-1, 2, -1)
    inputs["q"] = inputs["q"].transpose(0, 1).contiguous().transpose(0, 1)
    inputs["v"] = inputs["v"].mT.contiguous().mT
    inputs["beta"] = inputs["beta"].t().contiguous().t()
    d_out = d_out[:1, :, :1].expand(100, 2, 32)
    check(delta, spans, (inputs, entry, d_out, exit_grad), 1e-5)


def test_no_tokens(delta):
    spans = Spans((0,))
    given = make(spans, "medium", 2, 16, 32)
    found = forms.run_form(delta.Delta, delta.Delta.tables(spans, 2, 16, 32), *given, SCALE, states_travel=False)
    assert found["out"].shape == found["dv"].shape == (0, 2, 32)
    assert found["dk"].shape == (0, 2, 16) and found["dlog_decay"].shape == found["dbeta"].shape == (0, 2)


def test_needed_parts_of_splits(delta):
    """Splits of 64: a document alone, a span that one state enters and leaves, and the first span of a document."""
    spans = Spans((0, 64, 264, 328), (1, 2), (1,), (1, 2))
    tables = delta.DeltaTables.of(Splits.of(Spans((0, 200, *(200 + x for x in spans.offsets[1:]))), 64, 64))
    assert tables.summed.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert tables.needed.tolist() == [1, 2, 2, 0, 0, 1, 2, 2, 0, 0]
    tables = delta.DeltaTables.of(Splits.of(spans, 64, 64))
    assert tables.summed.tolist() == [1, 2, 3, 4, 5]
    assert tables.needed.tolist() == [0, 2, 2, 2, 2, 2]


LONG, STEP = 7 * 64 - 5, 4  # tokens of a split whose chunks take two steps of the search for what is remembered


@pytest.fixture
def short_search(monkeypatch):
    """STEP chunks in a step of the search, for which splits of two steps would be long in the interpreter."""
    from longspan.kernels.compiler import tl
    from longspan.kernels.linear import delta_tiles

    monkeypatch.setattr(delta_tiles, "SEARCHED", tl.constexpr(STEP))


def forgetting_heads(num_tokens):
    """[T, 7]: log decays of which all, a part or nothing is forgotten, with the border in every place that matters."""
    decay = torch.zeros(num_tokens, 7)
    decay[:, 0] = -20.0
    decay[:, 1] = -0.4
    decay[:, 2] = -44.4 / num_tokens  # just below the threshold from end to end
    decay[:, 3] = -44.3 / num_tokens  # just above
    decay[70::64, 4] = -44.5 / STEP  # the chunks of one step of the search pass it at its last one
    decay[num_tokens // 2, 5] = -500.0
    return decay  # the last head never forgets


@pytest.mark.parametrize("split", [LONG + 5, 256])
def test_forgetting(delta, split, short_search):
    spans = Spans((0, LONG), (0,), (0,), (0,))
    heads = 7 if split > LONG else 4
    inputs, *states = make(spans, "medium", heads, 16, 16)
    inputs["log_decay"] = forgetting_heads(LONG)[:, -heads:]
    given = inputs, *states
    check(delta, spans, given, 1e-5, split=split, wanted=forms.by_general(spans, given, SCALE))


def test_what_is_forgotten_is_not_read(delta, short_search):
    """NaN in the first chunks does not reach the state that is left; in the last ones, the gradient at the start."""
    spans = Spans((0, LONG), (0,))
    inputs, *_ = make(spans, "medium", 7, 16, 16)
    inputs["log_decay"] = forgetting_heads(LONG)
    finite = torch.tensor([True, True, False, False, False, True, False])
    before = finite | torch.tensor([False] * 4 + [True, False, False])  # the fifth has forgotten three chunks, not four
    tables = delta.DeltaTables.of(Splits.of(spans, LONG + 5, 64))
    for part in (slice(0, 3 * 64), slice(4 * 64, LONG)):
        torn = inputs | {"v": inputs["v"].clone()}
        torn["v"][part] = float("nan")
        work = delta.Delta(tables, *(torn[name] for name in ("q", "k", "v", "log_decay", "beta")), SCALE)
        if part.start == 0:
            state, transition = work.summary()
            assert torch.equal(transition[0].flatten(1).any(1), torch.tensor([False] * 3 + [True, False, False, True]))
        else:
            work.ahead()
            work.start_backward((None, torch.zeros(1, 7, 16, 16), *work.prepared), torn["v"], True)
            state = work.gradient_summary()
        assert torch.equal(state[0].flatten(1).isfinite().all(1), finite if part.start else before)


# Outputs and gradients are rounded to the inputs' dtype; so are the states and V' between the kernels.
LIMITS = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 1e-4}


# What users can reach, with bf16 of 128: every row of the tables of tile sizes, with and without a gate.
CASES = [(torch.bfloat16, size, size) for size in (16, 32, 64, 256)]
CASES += [
    (torch.bfloat16, 16, 32),
    (torch.bfloat16, 16, 64),
    (torch.bfloat16, 96, 200),
    (torch.bfloat16, 128, 64),
    (torch.bfloat16, 64, 256),
    (torch.float16, 128, 128),
]
CASES += [(torch.float32, size, size) for size in (16, 32, 64, 128)]


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 1000, 4100])
@pytest.mark.parametrize(
    "case",
    telling((torch.bfloat16, 128, 128), rest=CASES),
    ids=lambda case: f"{case[0]}-{case[1]}-{case[2]}".removeprefix("torch."),
)
def test_on_a_gpu(delta, case, num_tokens):
    dtype, *sizes = case
    for spans, family in zip(forms.documents(num_tokens) * 3, ["delta", "medium", "spiky", "closed", "fixed"]):
        given = make(spans, family, 2, *sizes, dtype, "cuda")
        given[0]["beta"] = given[0]["beta"].to(dtype)
        check(
            delta, spans, given, LIMITS[dtype], split=512, wanted=forms.by_general(spans, given, SCALE), same_again=True
        )


@pytest.mark.gpu
def test_first_call_of_a_thread_on_a_gpu(delta):
    """A new thread has no CUDA context before a call of CUDA's runtime, and memory that is kept asks for none."""
    found, given = [], make(MIXED, "medium", 2, 128, 128, torch.bfloat16, "cuda")
    tables = delta.DeltaTables.of(Splits.of(MIXED, 128, 64)).map(lambda x: x.cuda())
    run = functools.partial(forms.run_form, delta.Delta, tables, *given, SCALE)
    wanted, thread = run(), threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join()
    assert found and all(x is None or torch.equal(x, wanted[name]) for name, x in found[0].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_of_chunks_is_what_estimates_of_memory_count(delta, dtype):
    from longspan.attention.outline.linear import Linear

    spans = Spans((0, 192))
    inputs, *_ = make(spans, "medium", 2, 32, 16, dtype)
    work = delta.Delta(delta.DeltaTables.of(Splits.of(spans, 192, 64)), *inputs.values(), SCALE)
    outline = SimpleNamespace(gpu=True, hopper=False, spans=1, lengths=(192,), linked=0, record=lambda call: None)
    _, (_, _, *counted) = Linear(outline, True, dtype).output(None, *inputs.values())
    assert sum(x.nbytes for x in counted) == sum(x.nbytes for x in work.call.room_for_prepared())
