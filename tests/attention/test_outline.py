"""What plans count of kernels that need a GPU is what these say themselves; tests/kernels and test_activations compare
more."""

from types import SimpleNamespace

import pytest
import torch

from longspan.attention.outline.linear import PROCESSORS, Linear
from longspan.kernels.linear import splits
from longspan.kernels.linear.form import Spans

WIDTHS = [(16, 128, 128), (4, 64, 64), (8, 256, 256), (16, 128, 256), (3, 20, 70), (2, 256, 64), (16, 16, 16)]


@pytest.mark.parametrize("form, name", [("fused", "Fused"), ("delta", "Delta"), ("kda", "KDA"), ("channel", "Channel")])
def test_states_are_counted_for_as_many_splits_as_kernels_make(form, name, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    module = pytest.importorskip(f"longspan.kernels.linear.{form}")
    gpu = SimpleNamespace(multi_processor_count=PROCESSORS)
    monkeypatch.setattr(splits.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(splits.torch.cuda, "get_device_properties", lambda: gpu)
    outline, found = SimpleNamespace(spans=1), set()
    for heads, key_size, value_size in WIDTHS:
        for tokens in (1, 700, 2**17, 300_000):
            tables = getattr(module, name).tables(Spans((0, tokens)), heads, key_size, value_size)
            made = getattr(tables, "splits", tables).num_splits
            q, v = (torch.empty(tokens, heads, size, device="meta") for size in (key_size, value_size))
            assert Linear(outline, True, torch.bfloat16)._splits(form, q, v) == made, (heads, key_size, tokens)
            found.add(made)
    assert len(found) > 5
