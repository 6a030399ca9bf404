"""Decay per key channel in Triton kernels, against the recurrence: values, gradients, states in and out.

Here in the interpreter, at small sizes; on a GPU in bf16 and fp32 at full sizes.
"""

from types import SimpleNamespace

import forms
import pytest
import torch
from devices import telling
from interpreted import compilations

from longspan.attention.outline.linear import Linear
from longspan.kernels.linear import splits as splits_module
from longspan.kernels.linear.form import Spans
from longspan.kernels.linear.splits import Splits

pytest.importorskip("triton", reason="Triton is not installed")
channel = pytest.importorskip("longspan.kernels.linear.channel")

SCALE = 0.3
STRENGTHS = ["weak", "medium", "strong", "spiky", "closed"]
# Norm of the error over the norm of what is wanted. fp16: results are rounded to 11 bits, operands to as many.
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
GATE_LIMITS = LIMITS | {torch.float32: 1e-4}  # of gates so strong that keys passing them give next to nothing


def tables_of(spans, size):
    """With splits of `size` tokens, smaller than those of real runs: several splits in one span."""
    splits = Splits.of(spans, size, channel.CHUNK)
    return channel.Tables(splits, (*splits.split_chunk.tolist(), splits.num_chunks))


def check(
    spans, strength, dtype, *, key_size, value_size, heads=2, size=None, device="cpu", states_travel=True, **changes
):
    """Compares all that a run gives, and gives it."""
    inputs, entry, d_out, exit_grad = forms.random_inputs(
        spans, heads, key_size, value_size, f"channel_{strength}", None, device=device, dtype=dtype
    )
    inputs |= {name: change(inputs[name]) for name, change in changes.items()}
    if size is None:
        tables = channel.Channel.tables(spans, heads, key_size, value_size)
    else:
        tables = tables_of(spans, size)
    tables = tables.map(lambda x: x.to(device))
    given = inputs, entry, d_out, exit_grad, SCALE
    actual = forms.run_form(channel.Channel, tables, *given, states_travel=states_travel)
    wanted = forms.expected(spans, *given)
    if not states_travel:
        wanted = {name: x for name, x in wanted.items() if name not in ("state", "d_state", "transition")}
    errors = forms.errors(actual, wanted)
    limits = {name: (GATE_LIMITS if name == "dlog_decay" else LIMITS)[dtype] for name in errors}
    forms.assert_within(errors, limits)
    assert actual["dbeta"] is None and actual["dq"].dtype == actual["dv"].dtype == dtype
    return actual


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("name", ["token", "63", "64", "65"])
def test_span_lengths(name, strength):
    check(forms.spans_of(name), strength, torch.float32, key_size=16, value_size=32)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_splits_of_many_spans(strength):
    check(forms.spans_of("mixed"), strength, torch.float32, heads=1, key_size=16, value_size=16, size=128)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_bfloat16(strength):
    check(forms.spans_of("mixed"), strength, torch.bfloat16, heads=1, key_size=32, value_size=16, size=128)


def test_one_chunk_per_split():
    check(forms.spans_of("mixed"), "spiky", torch.float32, heads=1, key_size=16, value_size=16, size=64)


def test_states_that_stay():
    spans = forms.spans_of("one")
    check(spans, "medium", torch.float32, heads=1, key_size=16, value_size=16, size=64, states_travel=False)


@pytest.mark.parametrize("sizes", [(5, 3), (33, 20), (64, 64)], ids=str)
def test_odd_and_larger_sizes(sizes):
    spans = Spans((0, 70, 100), (0, 1), (1,), (0,))
    for strength in ("medium", "spiky"):
        check(spans, strength, torch.float32, heads=1, key_size=sizes[0], value_size=sizes[1])


def test_several_groups_of_channels(monkeypatch):
    """Narrow steps: scores summed over steps, groups of channels in programs of their own, mild beside strong."""
    monkeypatch.setitem(channel.PREPARE, (4, 64), (16, 16, 4, 255))
    monkeypatch.setitem(channel.GRADIENTS, (4, 32), (32, 16, 16, 4, 1))

    def strong_above_32(g):
        return torch.cat([g[..., :32], g[..., 32:] - 5], -1)

    spans = Spans((0, 80), (0,), (0,), (0,))
    check(spans, "medium", torch.float32, heads=1, key_size=64, value_size=32, log_decay=strong_above_32)


def test_more_value_columns_than_fit(monkeypatch):
    monkeypatch.setitem(channel.COLUMNS, 4, 16)
    for strength in ("medium", "strong"):
        check(forms.spans_of("65"), strength, torch.float32, heads=1, key_size=16, value_size=40)


def test_half_precision_and_strides():
    """fp16, q with heads first, v in rows that are not dense, and a gate that all heads share."""
    check(
        forms.spans_of("65"), "medium", torch.float16, key_size=16, value_size=16,
        q=lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), k=lambda x: x.mT.contiguous().mT,
        v=lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]], log_decay=lambda x: x[:, :1].expand_as(x),
    )  # fmt: skip


def test_waves(monkeypatch):
    """With room for the states of two chunks only, results are the same bit by bit."""
    spans, sizes = Spans((0, 1, 131, 200), (1,), (1,), (1,)), {"heads": 1, "key_size": 16, "value_size": 16, "size": 64}
    at_once = check(spans, "medium", torch.float32, **sizes)
    monkeypatch.setattr(channel, "WAVE", 2 * 16 * 16)
    assert len(tables_of(spans, 64).waves(2)) == 3
    in_waves = check(spans, "medium", torch.float32, **sizes)
    for name in ("dq", "dk", "dv", "dlog_decay"):
        assert torch.equal(at_once[name], in_waves[name]), name


def test_a_wave_has_as_many_splits_as_a_sequence_of_its_length(monkeypatch):
    hopper = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(splits_module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(splits_module.torch.cuda, "get_device_properties", lambda: hopper)
    chunks = channel.WAVE // (16 * 128 * 128)
    found, counted = {}, Linear(SimpleNamespace(spans=1), True, torch.bfloat16)
    for waves in (1, 4):
        tables = channel.Channel.tables(Spans((0, waves * chunks * 64)), 16, 128, 128)
        found[waves] = [stop - start for start, stop in tables.waves(chunks)]
        x = torch.empty(waves * chunks * 64, 16, 128, device="meta")
        assert counted._splits("channel", x, x) == tables.splits.num_splits  # what estimates of memory count
    assert found[4] == found[1] * 4 and found[1] == [8]


def test_waves_cover_all_splits():
    tables = tables_of(forms.spans_of("mixed"), 64)
    for limit in (1, 2, 3, 100):
        waves = tables.waves(limit)
        assert [split for start, stop in waves for split in range(start, stop)] == list(range(tables.splits.num_splits))
        assert all(stop == start + 1 or tables.edges[stop] - tables.edges[start] <= limit for start, stop in waves)


def test_gate_that_closes():
    """log decay -inf forgets everything; nothing turns into NaN, and the gradients of the rest are right."""
    spans = Spans((0, 100), (), (), ())

    def close(g):
        return torch.where(torch.arange(len(g), device=g.device)[:, None, None] == 70, -torch.inf, g)

    inputs, entry, d_out, exit_grad = forms.random_inputs(spans, 1, 16, 16, "channel_medium", None)
    inputs["log_decay"] = close(inputs["log_decay"])
    given = inputs, entry, d_out, exit_grad, SCALE
    actual = forms.run_form(channel.Channel, tables_of(spans, 64), *given, states_travel=False)
    errors = forms.errors(actual, forms.expected(spans, *given))
    assert all(error < LIMITS[torch.float32] for error in errors.values()), errors


def test_no_gate_gradient():
    spans = forms.spans_of("65")
    inputs, entry, d_out, exit_grad = forms.random_inputs(spans, 1, 16, 16, "channel_medium", None)
    args = (inputs["q"], inputs["k"], inputs["v"], inputs["log_decay"], None, SCALE)
    tables = tables_of(spans, 64)
    work = channel.Channel(tables, *args)
    work.ahead()
    _, saved = work.output(entry, torch.float32)
    found = []
    for gate in (True, False):
        work = channel.Channel(tables, *args)
        work.start_backward(saved, d_out, gate)
        work.gradient_ahead()
        found.append(work.gradients(exit_grad))
    assert found[1][3] is None
    assert all(torch.equal(a, b) for a, b in zip(found[0][:3], found[1][:3], strict=True))


def test_no_tokens():
    x = torch.zeros(0, 2, 16)
    tables = tables_of(Spans((0,)), 64)
    none = torch.zeros(0, 2, 16, 16)
    inputs = {"q": x, "k": x, "v": x, "log_decay": x, "beta": None}
    result = forms.run_form(channel.Channel, tables, inputs, none, x, none, SCALE)
    assert all(result[name].shape == x.shape for name in ("out", "dq", "dk", "dv", "dlog_decay"))


def fits(dtype, *sizes):
    if dtype == torch.float32 and max(sizes) > 128:
        pytest.skip("fp32 heads wider than 128 run in plain PyTorch")


class TestOnGpu:
    pytestmark = pytest.mark.gpu

    @staticmethod
    def spans(length):
        """A document of `length` tokens that a state enters and leaves, after some short ones and before one more."""
        edges = (0, 1, 3, 130, 130 + length, 140 + length, 270 + length)
        return Spans(edges, (3, 5), (3, 5), (3,))

    @pytest.mark.parametrize("strength", STRENGTHS)
    @pytest.mark.parametrize("dtype", telling(torch.bfloat16, rest=[torch.float32, torch.float16]), ids=str)
    @pytest.mark.parametrize("size", telling(128, rest=[64, 256]))
    def test_sizes(self, size, dtype, strength):
        fits(dtype, size)
        spans = self.spans(1000 if size < 256 else 200)
        check(spans, strength, dtype, heads=1, key_size=size, value_size=size, size=256, device="cuda")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_lengths(self, dtype):
        for length in (1, 63, 64, 65):
            spans = Spans((0, length), (0,), (0,), (0,))
            check(spans, "medium", dtype, key_size=128, value_size=128, device="cuda")

    @pytest.mark.parametrize("dtype", telling(torch.bfloat16, rest=[torch.float32]), ids=str)
    @pytest.mark.parametrize(
        "sizes", telling((20, 128), rest=[(5, 3), (16, 256), (256, 16), (32, 64), (100, 200)]), ids=str
    )
    def test_table_rows(self, sizes, dtype):
        fits(dtype, *sizes)
        for strength in ("medium", "spiky"):
            check(self.spans(200), strength, dtype, heads=1, key_size=sizes[0], value_size=sizes[1], device="cuda")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_long_and_repeated(self, dtype, monkeypatch):
        """All is the same bit by bit in a second run, and with room for the states of 20 chunks only."""
        spans, device = self.spans(4100), "cuda"
        first = check(spans, "medium", dtype, heads=1, key_size=64, value_size=64, device=device)
        given = forms.random_inputs(spans, 1, 64, 64, "channel_medium", None, device=device, dtype=dtype)
        tables = channel.Channel.tables(spans, 1, 64, 64).map(lambda x: x.to(device))
        for wave in (channel.WAVE, 20 * 64 * 64):
            monkeypatch.setattr(channel, "WAVE", wave)
            again = forms.run_form(channel.Channel, tables, *given, SCALE)
            for name, x in first.items():
                assert x is None or torch.equal(x, again[name]), f"{name} differs"

    def test_lengths_do_not_recompile(self):
        kernels = channel.prepare_kernel, channel.states_kernel, channel.sweep_kernel, channel.gradients_kernel
        sizes = {"key_size": 64, "value_size": 64, "device": "cuda"}
        check(self.spans(100), "medium", torch.bfloat16, **sizes)
        before = compilations(*kernels)
        for length in (1, 64, 999, 2000):
            check(self.spans(length), "medium", torch.bfloat16, **sizes)
        assert compilations(*kernels) == before
