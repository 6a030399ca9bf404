"""KDA by its kernels for Hopper, emulated, against the recurrence in fp64."""

import forms
import gluon_emulator
import pytest
import torch

from longspan.kernels.linear.form import Spans
from longspan.kernels.linear.splits import Splits

MODULES = "prepare", "kda_prepare", "forward", "backward", "kda_gradients"
SPANS = Spans((0, 1, 2, 66, 67, 690), (1, 2, 4), (2, 4), (1, 2))


@pytest.fixture(scope="module")
def emulated():
    pytest.importorskip("triton", reason="Triton is not installed")
    return gluon_emulator.load_linear(MODULES)


@pytest.fixture
def kda(emulated, monkeypatch):
    """The Form with all kernels for Hopper emulated."""
    from longspan.kernels.linear import kda

    gluon_emulator.use_linear(emulated, monkeypatch)
    return kda.KDA


def make(strength):
    return forms.random_inputs(SPANS, 1, 128, 128, f"channel_{strength}", 1, dtype=torch.bfloat16)


def run(form, given):
    from longspan.kernels.linear.delta import DeltaTables

    return forms.run_form(form, DeltaTables.of(Splits.of(SPANS, 384, 64)), *given, 0.3)


def check(form, given):
    wanted = forms.expected(SPANS, *given, 0.3)
    forms.assert_within(forms.errors(run(form, given), wanted), dict.fromkeys(wanted, 1e-2))


@pytest.mark.parametrize("strength", ["weak", "medium", "spiky"])
def test_everything(kda, emulated, monkeypatch, strength):
    launched = []
    for name, module in emulated.items():
        if hasattr(module, "launch"):
            launch = lambda *args, name=name, launch=module.launch: launched.append(name) or launch(*args)  # noqa: E731
            monkeypatch.setattr(module, "launch", launch)
    check(kda, make(strength))
    assert launched == ["kda_prepare", "forward", "forward", "backward", "forward", "backward", "kda_gradients"]


def test_mild_beside_strong_chunks(kda):
    """One strong channel makes its chunk one for the other kernels, which leave the rest alone."""
    given = make("medium")
    given[0]["log_decay"][131:195, :, 100] = -3
    check(kda, given)


def test_tokens_that_write_nothing_or_less(kda):
    given = make("medium")
    given[0]["beta"][::3] = 0
    given[0]["beta"][1::3] *= -1
    check(kda, given)


def test_channels_that_forget_beside_others(kda):
    """Nothing may be left out of the sum of a split as long as one channel remembers."""
    given = make("weak")
    given[0]["log_decay"][..., 64:] = -1.5
    check(kda, given)


def test_documents_do_not_see_each_other(kda):
    """TMA fetches what lies beyond the end of a document with its last chunk."""
    inputs, entry, d_out, exit_grad = make("medium")
    clean = run(kda, (inputs, entry, d_out, exit_grad))
    for first in (2, 67):
        poison = {name: x.clone() for name, x in inputs.items()} | {"d_out": d_out.clone()}
        for x in poison.values():
            x[first:] = torch.nan
        poisoned = run(kda, (poison, entry, poison.pop("d_out"), exit_grad))
        for name in ("out", "dq", "dk", "dv", "dbeta", "dlog_decay"):
            assert torch.equal(clean[name][:first], poisoned[name][:first]), name
        for name in ("state", "transition", "d_state"):  # of the token before
            assert torch.equal(clean[name][0], poisoned[name][0]), name
