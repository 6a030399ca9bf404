"""Launches that do without Triton: none is taken for another that Triton compiles different code for, and the driver
gets what Triton would give it."""

import inspect
import os
import subprocess
import sys
from itertools import product
from types import SimpleNamespace

import pytest
import same_launches
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from longspan.kernels import launch  # noqa: E402
from longspan.kernels.compiler import knobs, tl, triton  # noqa: E402


def example_kernel(x_ptr, weight_ptr, stride, count, scale, WIDTH: tl.constexpr, MEAN: tl.constexpr = False):
    pass


def make_kernel():
    return launch.JITFunction(example_kernel, do_not_specialize=["count"])


def what_triton_sees(kernel, args, options):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(inspect.signature(example_kernel), kernel.params, backend)
    return repr(binder(*args, **options)[1:])


def test_launches_differ_where_triton_compiles_anew():
    kernel, aligned = make_kernel(), torch.zeros(64)
    tensors = [aligned, aligned[1:], aligned[2:], aligned[4:], aligned.half(), aligned.double(), torch.zeros(0)]
    pointers = [*tensors, torch.nn.Parameter(aligned), None]
    integers = [0, 1, 2, 16, 24, 32, -16, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, True, False]
    seen = {}
    cases = [(x, w, 3, 5, 0.5, 8) for x, w in product(pointers, pointers)]
    cases += [(aligned, None, stride, count, 0.5, 8) for stride, count in product(integers, integers)]
    cases += [(aligned, None, 3, 5, scale, width) for scale, width in product([0.5, 2, 16, None], [1, True, 8, "a"])]
    for args in cases:
        classes = tuple(map(type, args))
        described, passed = launch.describing(kernel.params, classes)(*args)
        triton_sees = what_triton_sees(kernel, args, {"MEAN": True})
        assert seen.setdefault((classes, described), triton_sees) == triton_sees, args
        given = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args]
        assert all(a is b or a == b for a, b in zip(passed, given, strict=True))
    assert len({key[1] for key in seen}) < len(cases) / 2  # what does not matter makes no difference


def test_a_length_that_is_not_specialized_is_one_launch():
    kernel = make_kernel()
    args = [(torch.zeros(n), None, 8, n, 0.1 * n, 8) for n in (3, 16, 1, 4096)]
    assert len({launch.describing(kernel.params, tuple(map(type, a)))(*a)[0] for a in args}) == 1


def test_other_arguments_are_refused():
    with pytest.raises(TypeError, match="kernels take no list as stride"):
        launch.describing(make_kernel().params, (torch.Tensor, type(None), list, int, float, int))


class Recorder(launch.CompiledKernel):
    """In the place of what Triton compiles: takes down what the driver gets."""

    def __init__(self, calls):
        self.calls, self.function, self.packed_metadata, self.module = calls, 7, (4, 1), None

    run = property(lambda self: lambda *args: self.calls.append(args))


@pytest.fixture
def launcher(monkeypatch):
    """(a Launcher, what goes through Triton, what goes straight to the driver)"""
    through_triton, straight, kernel = [], [], make_kernel()

    def run(*args, grid, warmup, **options):
        through_triton.append((grid, args, options))
        return Recorder(straight)

    monkeypatch.setattr(kernel, "run", run)
    device = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 11 + device)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=device))
    return launch.Launcher(kernel), through_triton, straight


def test_what_the_driver_gets(launcher):
    kernel, through_triton, straight = launcher
    x, w = torch.zeros(64), torch.zeros(8)
    for n in (5, 6):
        kernel[(n, 2)](x, w, 1, n, 0.5, WIDTH=8, num_warps=4)
    assert [grid for grid, *_ in through_triton] == [(5, 2)]
    (found,) = straight
    head = 6, 2, 1, 11, 7, (4, 1), None, None, None
    assert found == (*head, x.data_ptr(), w.data_ptr(), 1, 6, 0.5, 8, False)
    kernel[(1, 2, 3)](x, None, 1, n, 0.5, 8, True, num_warps=4)
    kernel[(1, 2, 3)](x, None, 1, n, 0.5, 8, True, num_warps=4)
    assert straight[1] == (1, 2, 3, *head[3:], x.data_ptr(), None, 1, 6, 0.5, 8, True)


def test_what_goes_through_triton(launcher, monkeypatch):
    kernel, through_triton, straight = launcher
    x = torch.zeros(64)
    variants = [(x, 0.5, 4), (x[1:], 0.5, 4), (x.half(), 0.5, 4), (x, None, 4), (x, 0.5, 8)]
    for _ in range(2):
        for tensor, scale, warps in variants:
            kernel[(1,)](tensor, None, 3, 5, scale, WIDTH=8, num_warps=warps)
    assert len(through_triton) == len(straight) == len(variants)
    monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [print])  # as a profiler does
    kernel[(1,)](x, None, 3, 5, 0.5, WIDTH=8, num_warps=4)
    assert len(through_triton) == 1 + len(straight) == 1 + len(variants)


def test_layers_launch_what_triton_would():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, same_launches.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    names = done.stdout.split()
    assert {"norm_kernel", "sweep_kernel", "scalar_gate_kernel", "fold_kernel", "forward_kernel"} <= set(names)
    assert len(names) > 35, names


@pytest.mark.gpu
def test_on_a_gpu():
    """Alignment, dtypes and lengths change from launch to launch, and results with them."""
    x = torch.randn(4096, device="cuda")
    for _ in range(3):
        for piece in (x, x[1:], x[3:100].half(), x[16:32], x[:1], x[:0], torch.nn.Parameter(x)):
            out = torch.empty_like(piece)
            if piece.numel():
                twice_kernel[(triton.cdiv(len(piece), 128),)](piece, out, len(piece), 2.0, BLOCK=128)
            assert torch.equal(out, piece.detach() * 2)
    assert len(twice_kernel._known) >= 4


@launch.launched
@triton.jit
def twice_kernel(x_ptr, out_ptr, count, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0)
    tl.store(out_ptr + at, (x * factor).to(out_ptr.dtype.element_ty), mask=at < count)
