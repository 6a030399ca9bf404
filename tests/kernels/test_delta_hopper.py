"""The delta rule by its kernels for Hopper, emulated, against the recurrence in fp64."""

import forms
import gluon_emulator
import pytest
import torch

from longspan.kernels.linear.form import Spans
from longspan.kernels.linear.splits import Splits

MODULES = "prepare", "forward", "backward", "reverse"
SPANS = Spans((0, 1, 2, 66, 67, 690), (1, 2, 4), (2, 4), (1, 2))


@pytest.fixture(scope="module")
def emulated():
    pytest.importorskip("triton", reason="Triton is not installed")
    return gluon_emulator.load_linear(MODULES)


@pytest.fixture
def delta(emulated, monkeypatch):
    """The Form with all kernels for Hopper emulated."""
    from longspan.kernels.linear import delta

    gluon_emulator.use_linear(emulated, monkeypatch)
    return delta


def run(delta, given):
    tables = delta.DeltaTables.of(Splits.of(SPANS, 384, 64))
    return forms.run_form(delta.Delta, tables, *given, 0.3)


@pytest.mark.parametrize("decay", [None, "fixed", "medium", "spiky"])
def test_everything(delta, emulated, monkeypatch, decay):
    launched = []
    for name, module in emulated.items():
        launch = lambda *args, name=name, launch=module.launch: launched.append(name) or launch(*args)  # noqa: E731
        monkeypatch.setattr(module, "launch", launch)
    given = forms.random_inputs(SPANS, 1, 128, 128, decay, 1, dtype=torch.bfloat16)
    found = run(delta, given)
    assert launched == ["prepare", "forward", "forward", "backward", "forward", "reverse"]
    wanted = forms.expected(SPANS, *given, 0.3)
    forms.assert_within(forms.errors(found, wanted), dict.fromkeys(wanted, 1e-2))


def test_documents_do_not_see_each_other(delta):
    """TMA fetches what lies beyond the end of a document with its last chunk."""
    inputs, entry, d_out, exit_grad = forms.random_inputs(SPANS, 1, 128, 128, "medium", 1, dtype=torch.bfloat16)
    clean = run(delta, (inputs, entry, d_out, exit_grad))
    poison = {name: x.clone() for name, x in inputs.items()} | {"d_out": d_out.clone()}
    for x in poison.values():
        x[67:] = torch.nan  # the last document
    poisoned = run(delta, (poison, entry, poison.pop("d_out"), exit_grad))
    for name in ("out", "dq", "dk", "dv", "dbeta", "dlog_decay"):
        assert torch.equal(clean[name][:67], poisoned[name][:67]), name
