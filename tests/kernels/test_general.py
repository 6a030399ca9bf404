"""The PyTorch form of every linear-attention family, against the recurrence: values, gradients, states in and out."""

import forms
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import linear_attention as oracle

from longspan.kernels.linear import groups, naive
from longspan.kernels.linear.form import Spans
from longspan.kernels.linear.general import General

HEADS, KEY_SIZE, VALUE_SIZE, SCALE = 2, 5, 3, 0.6
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}

# (decay, largest beta) as in forms.random_inputs; beta up to 2 turns keys of norm one into reflections.
FAMILIES = {
    "none": (None, 0),
    "fixed": ("fixed", 0),
    "scalar": ("medium", 0),
    "scalar_strong": ("strong", 0),
    "scalar_spiky": ("spiky", 0),
    "fixed_closed": ("fixed_closed", 0),
    "scalar_closed": ("closed", 0),
    "channel": ("channel_medium", 0),
    "channel_weak": ("channel_weak", 0),
    "channel_strong": ("channel_strong", 0),
    "channel_spiky": ("channel_spiky", 0),
    "channel_closed": ("channel_closed", 0),
    "delta": (None, 1),
    "delta_reflecting": (None, 2),
    "gated_delta": ("medium", 1),
    "gated_delta_fixed": ("fixed", 1),
    "gated_delta_spiky": ("spiky", 1),
    "gated_delta_closed": ("closed", 1),
    "kda": ("channel_medium", 1),
    "kda_strong": ("channel_strong", 1),
    "kda_spiky": ("channel_spiky", 1),
    "kda_closed": ("channel_closed", 1),
    "kda_reflecting": ("channel_weak", 2),
}
# Lengths around the chunk, alone and among others; long and short spans of every kind of link side by side.
SPANS = {
    "63": ((0, 63), (0,), (0,), ()),
    "64": ((0, 64), (0,), (), (0,)),
    "65": ((0, 65), (0,), (0,), (0,)),
    "mixed": ((0, 1, 2, 130, 131, 200, 263), (1, 2, 4, 5), (2, 5), (1, 2, 4)),
}


def check(family, spans, dtype, *, device="cpu", states_travel=True, input_dtype=None, key_size=KEY_SIZE):
    decay, beta = FAMILIES[family]
    given = forms.random_inputs(spans, HEADS, key_size, VALUE_SIZE, decay, beta, device=device)
    inputs, *states = given
    if input_dtype is not None:
        inputs |= {name: inputs[name].to(input_dtype).float() for name in "qkv"}
    wanted = forms.expected(spans, inputs, *states, SCALE)
    wanted = {name: x for name, x in wanted.items() if states_travel or not name.endswith(("state", "transition"))}
    to = {name: None if x is None else x.to(dtype) for name, x in inputs.items()}
    if input_dtype is not None:
        to |= {name: to[name].to(input_dtype) for name in "qkv"}
    tables = General.tables(spans, HEADS, key_size, VALUE_SIZE).map(lambda x: x.to(device))
    found = forms.run_form(General, tables, to, *(x.to(dtype) for x in states), SCALE, states_travel=states_travel)
    # The matrix of a long span is what is left of numbers of size one.
    limits = {name: LIMITS[dtype] * (10 if name == "transition" else 1) for name in wanted}
    wrong = {name: error for name, error in forms.errors(found, wanted).items() if not error <= limits[name]}
    assert not wrong, wrong
    assert {x.dtype for x in found.values() if x is not None} == {dtype}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SPANS)
def test_equals_the_recurrence(name, family, dtype):
    check(family, Spans(*SPANS[name]), dtype)


@pytest.mark.parametrize("family", ["scalar_strong", "channel", "gated_delta", "kda_spiky"])
@pytest.mark.parametrize("length", [1, 200, 1000])
def test_one_span(length, family):
    check(family, Spans((0, length), (0,), (0,), (0,)), torch.float32)
    check(family, Spans((0, length)), torch.float64, states_travel=False)


@pytest.mark.parametrize("family", ["none", "scalar", "channel", "delta", "kda"])
def test_blocks_and_groups(monkeypatch, family):
    """Small tables make many blocks of few tokens: spans that end in different blocks, in full and in partial ones."""
    monkeypatch.setattr(groups, "CHUNK", 8)
    monkeypatch.setattr(groups, "ROWS", 5)
    monkeypatch.setattr(groups, "SIDE_BY_SIDE", 3)
    lengths = [40, 3, 17, 8, 9, 1, 33, 16, 2, 2, 25, 1, 1, 1, 1, 7, 1, 4]
    offsets = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    linked = (0, 2, 3, 4, 5, 6, 10, 16)
    check(family, Spans(tuple(offsets), linked, (0, 3, 4, 6, 10), (0, 2, 4, 5, 10, 16)), torch.float64)


@pytest.mark.parametrize("family", ["scalar", "channel", "kda"])
def test_a_single_key_channel(family):
    check(family, Spans(*SPANS["65"]), torch.float64, key_size=1)


def test_no_tokens():
    inputs = {"q": torch.ones(0, 2, 5), "k": torch.ones(0, 2, 5), "v": torch.ones(0, 2, 3)}
    inputs |= {"log_decay": -torch.ones(0, 2, 5), "beta": torch.ones(0, 2)}
    nothing = torch.zeros(0, 2, 5, 3)
    found = forms.run_form(General, General.tables(Spans((0,))), inputs, nothing, inputs["v"], nothing, SCALE)
    shapes = {name: tuple(x.shape) for name, x in found.items()}
    gradients = {"dq": (0, 2, 5), "dk": (0, 2, 5), "dv": (0, 2, 3), "dlog_decay": (0, 2, 5), "dbeta": (0, 2)}
    summaries = {"state": (0, 2, 5, 3), "transition": (0, 2, 5, 5), "d_state": (0, 2, 5, 3)}
    assert shapes == gradients | summaries | {"out": (0, 2, 3)}


@pytest.mark.parametrize("family", ["fixed", "channel", "kda"])
def test_half_precision_inputs_are_computed_in_single_precision(family):
    check(family, Spans(*SPANS["mixed"]), torch.float32, input_dtype=torch.bfloat16)


@pytest.mark.parametrize("family", ["channel", "gated_delta"])
def test_runs_repeat_bit_by_bit(family):
    spans = Spans(*SPANS["mixed"])
    given = forms.random_inputs(spans, HEADS, KEY_SIZE, VALUE_SIZE, *FAMILIES[family])
    first, second = (forms.run_form(General, General.tables(spans), *given, SCALE) for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items() if x is not None)


def test_a_gate_without_gradient_gets_none():
    spans = Spans((0, 70))
    inputs, entry, d_out, exit_grad = forms.random_inputs(spans, HEADS, KEY_SIZE, VALUE_SIZE, "channel_medium", 1)
    tables = General.tables(spans)
    args = inputs["q"], inputs["k"], inputs["v"], inputs["log_decay"], inputs["beta"], SCALE
    work = General(tables, *args)
    work.ahead()
    _, saved = work.output(entry, torch.float32)
    work = General(tables, *args)
    work.start_backward(saved, d_out, False)
    work.gradient_ahead()
    assert [x is None for x in work.gradients(exit_grad)] == [False, False, False, True, False]


# Tables


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tables_hold_every_token_once(data):
    lengths = data.draw(st.lists(st.sampled_from([1, 2, 63, 64, 65, 127, 128, 300, 3000]), max_size=60))
    offsets = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    which = [data.draw(st.sets(st.integers(0, len(lengths) - 1)) if lengths else st.just(set())) for _ in range(2)]
    entered, left = (tuple(sorted(spans)) for spans in which)
    linked = tuple(sorted({*entered, *left}))
    tables = groups.Groups.of(Spans(tuple(offsets), linked, entered, left))
    assert sorted(tables.tokens.tolist()) == list(range(offsets[-1]))
    seen = {"entered": [], "left": [], "linked": []}
    for group in tables.groups:
        for name, rows in seen.items():
            rows += [] if getattr(group, name) is None else getattr(group, name).tolist()
        assert group.blocks[0].counts[0] == group.num_spans <= groups.ROWS
        for block in group.blocks:
            assert list(block.counts) == sorted(block.counts, reverse=True)
            assert sum(block.counts) <= groups.ROWS
            slots = tables.slots[block.start : block.stop]
            assert len(set(slots.tolist())) == len(slots)
            assert int(slots.max()) < sum(block.counts) * block.length
            assert block.padded == (len(slots) < sum(block.counts) * block.length)
    for name, spans in (("entered", entered), ("left", left), ("linked", linked)):
        assert sorted(seen[name]) == list(range(len(spans)))


def test_thousands_of_short_documents_are_few_steps():
    tables = groups.Groups.of(Spans(tuple(range(4097))))
    blocks = [block for group in tables.groups for block in group.blocks]
    assert len(blocks) == 4096 // groups.ROWS
    assert {block.length for block in blocks} == {1}


# The definition


@pytest.mark.parametrize("family", FAMILIES)
def test_the_definition_equals_the_oracle(family):
    lengths = (7, 1, 12)
    spans = Spans((0, 7, 8, 20))
    inputs, *_ = forms.random_inputs(spans, HEADS, KEY_SIZE, VALUE_SIZE, *FAMILIES[family])
    inputs = {name: None if x is None else x.double() for name, x in inputs.items()}
    out, exits = naive.linear_attention(**inputs, offsets=spans.offsets, scale=SCALE)
    torch.testing.assert_close(out, oracle(**inputs, lengths=lengths, scale=SCALE), rtol=1e-12, atol=1e-12)
    # What leaves the first tokens of a segment enters the others.
    later = {name: x[3:7] if x is not None and x.ndim > 1 else x for name, x in inputs.items()}
    earlier = {name: x[:3] if x is not None and x.ndim > 1 else x for name, x in inputs.items()}
    _, between = naive.linear_attention(**earlier, offsets=(0, 3), scale=SCALE)
    out_later, exit_later = naive.linear_attention(**later, offsets=(0, 4), scale=SCALE, entry=between)
    torch.testing.assert_close(out_later, out[3:7], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(exit_later[0], exits[0], rtol=1e-12, atol=1e-12)


def test_the_definition_without_a_direction():
    q, k, v = (torch.randn(9, 2, 4, dtype=torch.float64) for _ in range(3))
    out, _ = naive.linear_attention(q, k, v, None, None, (0, 5, 9), scale=1.0, causal=False)
    expected = oracle(q, k, v, (5, 4), causal=False, scale=1.0)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu(family, dtype):
    check(family, Spans(*SPANS["mixed"]), dtype, device="cuda")
