"""Operators: what the registry calls on GPUs exists, and the registry is for those who trace, and no others."""

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import longspan.kernels
from longspan.kernels import swiglu
from longspan.kernels.operators import kernel

FOLDER = Path(longspan.kernels.__file__).parent
FUSED = sorted(name for path in FOLDER.glob("*.py") for name in re.findall(r'fused="([\w.]+)"', path.read_text()))


def test_kernels_are_found():
    pytest.importorskip("triton", reason="Triton is not installed")
    assert len(FUSED) == len(set(FUSED)) >= 12
    assert all(callable(kernel(name)) for name in FUSED)


def test_the_registry_is_left_out_where_nobody_traces():
    x = torch.randn(3, 8)
    expected = torch.ops.longspan.swiglu(x, x)
    with torch.profiler.profile() as profile:
        found = swiglu.swiglu_forward(x, torch.nn.Parameter(x))
    assert torch.equal(found, expected)
    assert not any("longspan" in event.key for event in profile.key_averages())


def test_who_traces_sees_one_operation():
    graphs = []

    def backend(graph, _):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    x = torch.randn(3, 8)
    compiled = torch.compile(lambda x: swiglu.swiglu_forward(x, x), backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), swiglu.swiglu_forward(x, x))
    assert graphs == [[torch.ops.longspan.swiglu.default]]
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Mode():
        swiglu.swiglu_forward(x, x)
    assert seen == [torch.ops.longspan.swiglu.default]
    with FakeTensorMode():
        fake = torch.empty(3, 8, device="cuda", dtype=torch.bfloat16)
    found = swiglu.swiglu_forward(fake, fake)
    assert (found.shape, found.dtype, found.device.type) == ((3, 8), torch.bfloat16, "cuda")
