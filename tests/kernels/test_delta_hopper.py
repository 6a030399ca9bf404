"""Gradients of the delta rule's inputs by the kernel for Hopper, emulated, against the recurrence in fp64."""

import forms
import gluon_emulator
import pytest
import torch

from longspan.kernels.linear.form import Spans
from longspan.kernels.linear.splits import Splits

MODULES = "forward", "backward", "gradients", "reverse"
SPANS = Spans((0, 1, 2, 66, 67, 220, 284), (1, 2, 4), (2, 4), (1, 2))


@pytest.fixture(scope="module")
def emulated():
    pytest.importorskip("triton", reason="Triton is not installed")
    shared = "longspan.kernels.sparse.hopper.tiles", "longspan.kernels.linear.hopper.tiles"
    return {name: gluon_emulator.load(*shared, f"longspan.kernels.linear.hopper.{name}") for name in MODULES}


@pytest.fixture
def delta(emulated, monkeypatch):
    """The Form, with all kernels for Hopper emulated."""
    from longspan.kernels.linear import delta
    from longspan.kernels.linear import hopper as delta_hopper
    from longspan.kernels.sparse import hopper

    monkeypatch.setattr(hopper, "on_hopper", lambda x: True)
    for name, module in emulated.items():
        monkeypatch.setattr(delta_hopper, name, module, raising=False)
    return delta


@pytest.mark.parametrize("gradients", ["chunks", "sweep"])
@pytest.mark.parametrize("decay", [None, "fixed", "medium", "spiky", "strong"])
def test_gradients(delta, emulated, monkeypatch, decay, gradients):
    from longspan.kernels.linear import delta_gradients

    monkeypatch.setattr(delta_gradients, "HOPPER", gradients)
    monkeypatch.setattr(emulated["gradients"], "_processors", lambda device: 3)
    given = forms.random_inputs(SPANS, 2, 128, 128, decay, 1, dtype=torch.bfloat16)
    tables = delta.DeltaTables.of(Splits.of(SPANS, 128, 64))
    found = forms.run_form(delta.Delta, tables, *given, 0.3)
    wanted = forms.expected(SPANS, *given, 0.3)
    errors = forms.errors(found, wanted)
    print({name: f"{x:.1e}" for name, x in errors.items()})
    forms.assert_within(errors, dict.fromkeys(wanted, 1.5e-2))
