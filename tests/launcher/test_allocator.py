"""The allocator's setting: in the environment before torch is imported, unless the user has set it."""

import os
import subprocess
import sys

import pytest

from longspan.launcher.allocator import SETTING, VARIABLES, allocator_setting

CODE = """
import os, sys, types
from longspan.launcher import cli
from longspan.launcher.allocator import VARIABLES
run = lambda config: print([os.environ.get(name) for name in VARIABLES], "torch" in sys.modules)
sys.modules["longspan.launcher.trainer"] = types.SimpleNamespace(run=run)
cli.train(None)
"""


@pytest.mark.parametrize(
    "given, wanted",
    [
        ({}, [SETTING, None]),
        ({VARIABLES[0]: "backend:native"}, ["backend:native", None]),
        ({VARIABLES[1]: "max_split_size_mb:512"}, [None, "max_split_size_mb:512"]),
        ({VARIABLES[1]: ""}, [None, ""]),
    ],
)
def test_set_before_torch_is_imported_unless_it_is_set(given, wanted):
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | given
    found = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert found.stdout == f"{wanted} False\n", found.stderr


def test_the_line_of_the_log_names_what_holds(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert allocator_setting() == "PYTORCH_ALLOC_CONF is not set"
    monkeypatch.setenv(VARIABLES[1], "backend:native")
    assert allocator_setting() == "PYTORCH_CUDA_ALLOC_CONF=backend:native"
