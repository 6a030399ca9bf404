"""Gradients of the delta rule's inputs by the kernel for Hopper, emulated, against the recurrence in fp64."""

import forms
import gluon_emulator
import pytest
import torch

from longspan.kernels.linear.form import Spans
from longspan.kernels.linear.splits import Splits

SPANS = Spans((0, 1, 2, 66, 67, 220, 284), (1, 2, 4), (2, 4), (1, 2))


@pytest.fixture(scope="module")
def emulated():
    pytest.importorskip("triton", reason="Triton is not installed")
    tiles = "longspan.kernels.sparse.hopper.tiles", "longspan.kernels.linear.hopper.tiles"
    return gluon_emulator.load(*tiles, "longspan.kernels.linear.hopper.gradients")


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize("decay", [None, "fixed", "medium", "spiky"])
def test_gradients(emulated, monkeypatch, decay, programs):
    from longspan.kernels.linear import delta
    from longspan.kernels.linear import hopper as delta_hopper
    from longspan.kernels.sparse import hopper

    launched = []
    monkeypatch.setattr(hopper, "on_hopper", lambda x: True)
    monkeypatch.setattr(emulated, "_processors", lambda device: launched.append(programs) or programs)
    monkeypatch.setattr(delta_hopper, "gradients", emulated, raising=False)
    given = forms.random_inputs(SPANS, 2, 128, 128, decay, 1, dtype=torch.bfloat16)
    tables = delta.DeltaTables.of(Splits.of(SPANS, 128, 64))
    found = forms.run_form(delta.Delta, tables, *given, 0.3)
    assert launched
    wanted = forms.expected(SPANS, *given, 0.3)
    errors = forms.errors(found, wanted)
    print({name: f"{x:.1e}" for name, x in errors.items()})
    forms.assert_within(errors, dict.fromkeys(wanted, 1.5e-2))
