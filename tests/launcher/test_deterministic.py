"""train.deterministic sets the switches of torch before a device is touched."""

import os

import pytest
import torch

from longspan.launcher import trainer
from longspan.launcher.config import Config
from longspan.launcher.environment import make_deterministic
from longspan.launcher.errors import UserError


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn.benchmark = before


def switches():
    return torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")


@pytest.mark.parametrize("asked", [False, True])
def test_a_run_sets_the_switches_before_it_touches_a_device(monkeypatch, asked):
    seen = []

    def choose_device(setting):
        seen.append(switches())
        raise UserError("enough")

    monkeypatch.setattr(trainer, "choose_device", choose_device)
    torch.backends.cudnn.benchmark = True
    settings = ["data.corpora=[{path: data/x}]", f"train.deterministic={str(asked).lower()}"]
    with pytest.raises(UserError, match="enough"):
        trainer.run(Config.load(None, settings))
    assert seen == [(True, ":4096:8") if asked else (False, None)]
    assert torch.backends.cudnn.benchmark != asked


def test_a_workspace_of_the_user_stands_or_is_refused(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    make_deterministic()
    assert switches() == (True, ":16:8")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":8:1")
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG=:8:1 lets sums differ"):
        make_deterministic()
