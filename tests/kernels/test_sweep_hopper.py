"""No, fixed and scalar decay by their sweeps for Hopper, emulated, against the recurrence in fp64."""

import forms
import gluon_emulator
import pytest
import torch

from longspan.kernels.linear.form import Spans
from longspan.kernels.linear.splits import Splits

MODULES = "sweep", "sweep_reverse", "sweep_sum"
SPANS = Spans((0, 1, 2, 66, 67, 690), (1, 2, 4), (2, 4), (1, 2))


@pytest.fixture(scope="module")
def emulated():
    pytest.importorskip("triton", reason="Triton is not installed")
    names = [f"longspan.kernels.linear.hopper.{name}" for name in ("tiles", "decays", *MODULES)]
    _, _, _, *modules = gluon_emulator.load("longspan.kernels.sparse.hopper.tiles", *names)
    return dict(zip(MODULES, modules, strict=True))


@pytest.fixture
def launched(emulated, monkeypatch):
    """Which of the sweeps for Hopper, emulated, have run; other kernels are interpreted."""
    from longspan.kernels.linear import hopper
    from longspan.kernels.sparse import hopper as sparse_hopper

    names = []
    monkeypatch.setattr(sparse_hopper, "on_hopper", lambda x: True)
    monkeypatch.setattr(hopper, "SWEEPS", ("sum", "output", "dq", "reverse"))
    for name, module in emulated.items():
        launch = lambda *args, name=name, launch=module.launch, **options: names.append(name) or launch(*args, **options)  # noqa: E731
        monkeypatch.setattr(module, "launch", launch)
        monkeypatch.setattr(hopper, name, module, raising=False)
    return names


def run(given):
    from longspan.kernels.linear.fused import Fused

    return forms.run_form(Fused, Splits.of(SPANS, 384, 64), *given, 0.3)


@pytest.mark.parametrize("decay", [None, "fixed", "fixed_closed", "medium", "weak", "strong", "spiky", "closed"])
def test_equals_the_recurrence(launched, decay):
    given = forms.random_inputs(SPANS, 1, 128, 128, decay, 0, dtype=torch.bfloat16)
    found = run(given)
    assert launched == ["sweep_sum", "sweep", "sweep_sum", "sweep", "sweep_reverse"]
    wanted = forms.expected(SPANS, *given, 0.3)
    errors = forms.errors(found, wanted)
    print(errors)
    forms.assert_within(errors, dict.fromkeys(wanted, 1e-2))
