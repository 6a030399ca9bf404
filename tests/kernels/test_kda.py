"""KDA's kernels against the recurrence in fp64: outputs, states in and out, every gradient, decays of any strength."""

from types import SimpleNamespace

import forms
import pytest
import torch
from devices import telling
from interpreted import compilations

from longspan.kernels.linear import choose_form
from longspan.kernels.linear.form import Spans
from longspan.kernels.linear.general import General
from longspan.kernels.linear.splits import Splits

pytest.importorskip("triton", reason="Triton is not installed")
kda = pytest.importorskip("longspan.kernels.linear.kda")
from longspan.kernels.linear import channel_decay, delta, kda_gradients, kda_prepare  # noqa: E402
from longspan.kernels.linear.delta_tiles import CHUNK  # noqa: E402

SCALE = 0.3
STRENGTHS = ["weak", "medium", "strong", "spiky", "closed"]
# Norm of the error over the norm of what is wanted. Outputs, gradients, states between kernels and decayed operands are
# rounded to the inputs' dtype.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
MIXED = Spans((0, 1, 2, 66, 67, 220), (1, 2, 4), (2, 4), (1, 2))


def make(spans, strength, heads, key_size, value_size, dtype=torch.float32, device="cpu", beta=1):
    decay = f"channel_{strength}"
    return forms.random_inputs(spans, heads, key_size, value_size, decay, beta, dtype=dtype, device=device)


def tables_of(spans, split):
    """With splits of `split` tokens, smaller than those of real runs: several splits in one span."""
    return delta.DeltaTables.of(Splits.of(spans, split, CHUNK))


def check(spans, given, *, split=64, wanted=None, limit=None):
    """Compares all that a run gives, and gives it."""
    inputs, device = given[0], given[0]["q"].device
    wanted = wanted or forms.expected(spans, *given, SCALE)
    tables = tables_of(spans, split).map(lambda x: x.to(device))
    found = forms.run_form(kda.KDA, tables, *given, SCALE, states_travel=bool(spans.linked))
    assert all(found[f"d{name}"].dtype == inputs[name].dtype for name in "qkv")
    limit = limit or LIMITS[inputs["q"].dtype]
    # One number is left of sums over the width that cancel: with one token nothing averages the rounding.
    alone = spans.offsets[-1] == 1
    limits = {name: 3 * limit if alone and name in ("dbeta", "dlog_decay") else limit for name in wanted}
    if alone:  # out is q k times v, and q k may be a small part of its terms, which are rounded
        terms = inputs["q"].double() * inputs["k"].double()
        cancelled = (terms.abs().sum(-1) / terms.sum(-1).abs()).max().item()
        limits["out"] = min(3 * limit, max(limit, cancelled * torch.finfo(inputs["q"].dtype).eps / 4))
    forms.assert_within(forms.errors(found, wanted), limits)
    return found


@pytest.mark.parametrize("strength", STRENGTHS)
def test_mixed_documents(strength):
    check(MIXED, make(MIXED, strength, 1, 16, 32))


@pytest.mark.parametrize("strength", ["medium", "spiky"])
@pytest.mark.parametrize("length", [1, 63, 64, 65])
def test_lengths(length, strength):
    spans = Spans((0, length), (0,), (0,), (0,))
    check(spans, make(spans, strength, 2, 16, 16))


def test_a_long_document():
    spans = Spans((0, 1000), (0,), (0,), (0,))
    check(spans, make(spans, "medium", 1, 16, 16), split=256)


@pytest.mark.parametrize(("sizes", "split"), [((64, 64), 128), ((33, 20), 64), ((5, 3), 1024)], ids=str)
def test_sizes_and_splits(sizes, split):
    spans = Spans((0, 40, 140), (1,), (1,), (1,))
    for strength in ("medium", "spiky"):
        check(spans, make(spans, strength, 1, *sizes), split=split)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_bfloat16(strength):
    check(MIXED, make(MIXED, strength, 1, 32, 16, torch.bfloat16))


def test_reflections():
    """beta of 2 mirrors the state: nothing but the decay shrinks it."""
    for strength in ("weak", "spiky"):
        check(MIXED, make(MIXED, strength, 1, 16, 16, beta=2))


def test_tokens_that_write_nothing():
    """beta of exactly 0, whose own gradient is still wanted."""
    inputs, *states = make(MIXED, "medium", 1, 16, 16)
    inputs["beta"][::3] = 0
    check(MIXED, (inputs, *states))


def test_mild_beside_strong_channels(monkeypatch):
    """Narrow steps: scores summed over steps, and steps of both kinds in one chunk; the border in between."""
    monkeypatch.setitem(kda_prepare.PREPARE[4], 64, (16, 16, 4, 255))
    spans = Spans((0, 80), (0,), (0,), (0,))
    inputs, *states = make(spans, "medium", 1, 64, 32)
    border = channel_decay.MILD.value / CHUNK
    inputs["log_decay"][..., 16:32] -= 5
    inputs["log_decay"][..., 32:48] = -border + 1e-3
    inputs["log_decay"][..., 48:] = -border - 1e-3
    check(spans, (inputs, *states))


def test_several_parts_of_a_strong_step(monkeypatch):
    monkeypatch.setitem(kda_gradients.GRADIENTS, 4, (32, 16, 16, 4, 1))
    for strength in ("medium", "spiky"):
        spans = Spans((0, 70), (0,), (0,), (0,))
        check(spans, make(spans, strength, 1, 32, 32))


def test_what_moves_between_channels_is_not_forgotten():
    """Every channel forgets all within a split, in turns, and keys carry the state to channels that do not yet."""
    spans = Spans((0, 256), (0,), (0,), (0,))
    inputs, *states = make(spans, "weak", 1, 16, 16)
    inputs["log_decay"][:128, :, :8] = -2
    inputs["log_decay"][128:, :, 8:] = -2
    check(spans, (inputs, *states), split=256)


def test_what_is_forgotten_is_not_read():
    """NaN in the first chunks does not reach the state that is left where all channels forget."""
    spans = Spans((0, 256), (0,))
    inputs, *_ = make(spans, "medium", 2, 16, 16)
    inputs["log_decay"][:, 0] -= 0.5
    inputs["v"][:64] = torch.nan
    args = (inputs[name] for name in ("q", "k", "v", "log_decay", "beta"))
    state, transition = kda.KDA(tables_of(spans, 256), *args, SCALE).summary()
    assert state[0, 0].isfinite().all() and not state[0, 1].isfinite().any()
    assert not transition[0, 0].any() and transition[0, 1].any()


def test_a_gate_that_closes():
    """log decay -inf in all channels forgets everything; nothing turns into NaN."""
    spans = Spans((0, 100))
    inputs, *states = make(spans, "medium", 1, 16, 16)
    inputs["log_decay"][70] = -torch.inf
    check(spans, (inputs, *states))


def test_shared_heads_and_foreign_strides():
    spans = Spans((0, 100))
    inputs, entry, d_out, exit_grad = make(spans, "medium", 2, 16, 32)
    inputs["k"] = inputs["k"][:, :1].expand(-1, 2, -1)
    inputs["q"] = inputs["q"].transpose(0, 1).contiguous().transpose(0, 1)
    inputs["v"] = inputs["v"].mT.contiguous().mT
    inputs["beta"] = inputs["beta"].t().contiguous().t()
    inputs["log_decay"] = inputs["log_decay"][:, :1].expand(-1, 2, -1)
    d_out = d_out[:1, :, :1].expand(100, 2, 32)
    check(spans, (inputs, entry, d_out, exit_grad))


def test_no_tokens():
    spans = Spans((0,))
    given = make(spans, "medium", 2, 16, 32)
    found = forms.run_form(kda.KDA, kda.KDA.tables(spans, 2, 16, 32), *given, SCALE, states_travel=False)
    assert found["out"].shape == found["dv"].shape == (0, 2, 32) and found["dbeta"].shape == (0, 2)
    assert found["dk"].shape == found["dlog_decay"].shape == (0, 2, 16)


def test_a_gate_without_gradient_gets_none():
    spans = Spans((0, 70))
    for strength in ("medium", "spiky"):
        inputs, entry, d_out, exit_grad = make(spans, strength, 1, 16, 16)
        args = (*(inputs[name] for name in ("q", "k", "v", "log_decay", "beta")), SCALE)
        work = kda.KDA(tables_of(spans, 64), *args)
        work.ahead()
        _, saved = work.output(entry, torch.float32)
        found = []
        for gate in (True, False):
            work = kda.KDA(tables_of(spans, 64), *args)
            work.start_backward(saved, d_out, gate)
            work.gradient_ahead()
            found.append(work.gradients(exit_grad))
        assert found[1][3] is None and found[0][3] is not None
        assert all(torch.equal(found[0][n], found[1][n]) for n in (0, 1, 2, 4))


def test_what_the_kernels_take():
    def chosen(width, dtype):
        q, v = (SimpleNamespace(is_cuda=True, dtype=dtype, shape=(9, 2, size)) for size in (64, width))
        return choose_form(q, v, torch.zeros(9, 2, 64), torch.zeros(9, 2))

    assert chosen(128, torch.bfloat16) is chosen(128, torch.float32) is kda.KDA
    assert all(chosen(*case) is General for case in [(129, torch.bfloat16), (64, torch.float16), (64, torch.float64)])


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 1000, 4100])
@pytest.mark.parametrize("dtype", telling(torch.bfloat16, rest=[torch.float32]), ids=str)
@pytest.mark.parametrize(
    "sizes", telling((128, 128), rest=[(16, 16), (32, 32), (64, 64), (128, 64), (16, 128), (96, 100)]), ids=str
)
def test_on_a_gpu(sizes, dtype, num_tokens):
    """Also that a second run gives the same, bit by bit."""
    for spans, strength in zip(forms.documents(num_tokens) * 3, STRENGTHS):
        given = make(spans, strength, 2, *sizes, dtype, "cuda")
        given[0]["beta"] = given[0]["beta"].to(dtype)
        wanted = forms.by_general(spans, given, SCALE)
        limit = 1e-4 if dtype == torch.float32 else None
        first, again = (check(spans, given, split=512, wanted=wanted, limit=limit) for _ in range(2))
        assert all(x is None or torch.equal(x, again[name]) for name, x in first.items())


@pytest.mark.gpu
def test_lengths_do_not_recompile():
    kernels = kda_prepare.kda_prepare_kernel, kda_gradients.kda_gradients_kernel
    counts = []
    for length in (100, 1, 64, 999, 2000):
        for spans in forms.documents(length):
            given = make(spans, "medium", 2, 64, 64, torch.bfloat16, "cuda")
            check(spans, given, split=512, wanted=forms.by_general(spans, given, SCALE))
        counts.append(compilations(*kernels))
    assert counts[-1] == counts[0]


def test_what_is_kept_is_what_estimates_of_memory_count():
    from longspan.attention.outline.linear import Linear

    spans = Spans((0, 192), (), (), ())
    inputs, entry, d_out, _ = make(spans, "medium", 2, 128, 128, torch.bfloat16)
    work = kda.KDA(tables_of(spans, 192), *(inputs[name] for name in ("q", "k", "v", "log_decay", "beta")), SCALE)
    work.ahead()
    _, kept = work.output(entry[:0], d_out.dtype)
    outline = SimpleNamespace(gpu=True, hopper=True, spans=1, lengths=(192,), linked=0, record=lambda call: None)
    counted = Linear(outline, True, torch.bfloat16).output(None, *inputs.values())[1]
    sizes = [sum(x.numel() * x.element_size() for x in tensors[2:]) for tensors in (kept, counted)]
    assert sizes[0] == sizes[1]  # but for states and matrices of splits, of which nothing enters this one
