"""Recorded functions: what is played gives what the function gives, for other numbers in other memory, and what differs
is recorded anew. Kernels are sums on the host that get addresses, as from the driver."""

import ctypes
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import recorded_launches
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from longspan.kernels import launch, recorded  # noqa: E402


@dataclass(frozen=True)
class Table:
    weights: torch.Tensor


def sum_kernel(a_ptr, b_ptr, out_ptr, count, factor):
    pass


class Subclass(torch.Tensor):
    pass


def numbers(at, count):
    at = at.data_ptr() if isinstance(at, torch.Tensor) else at
    return np.ctypeslib.as_array((ctypes.c_float * count).from_address(at))


class Compiled(launch.CompiledKernel):
    """out = a + factor * b."""

    function, packed_metadata, module = 0, (), None

    def __init__(self):
        pass

    @staticmethod
    def run(x, y, z, stream, function, metadata, *hooks_and_args):
        a, b, out, count, factor = hooks_and_args[3:]
        numbers(out, count)[:] = np.nan  # which shows where memory is used twice
        numbers(out, count)[:] = numbers(a, count) + np.float32(factor) * numbers(b, count)


@pytest.fixture
def add(monkeypatch):
    """The kernel, and numbers of launches that went through a Launcher in `add.launches`."""
    kernel = launch.JITFunction(sum_kernel, do_not_specialize=["count", "factor"])

    def through_triton(*args, grid, warmup):
        Compiled.run(1, 1, 1, 0, 0, (), None, None, None, *args)
        return Compiled()

    monkeypatch.setattr(kernel, "run", through_triton)
    device = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=device))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    launcher = launch.Launcher(kernel)
    launcher.launches, plain = 0, launch.Launcher._launch

    def counted(self, grid, *args):
        self.launches += 1
        return plain(self, grid, *args)

    monkeypatch.setattr(launch.Launcher, "_launch", counted)
    return launcher


def played(add, call, *args):
    """What a call gives, and whether it was played."""
    before = add.launches
    result = call(*args)
    return result, add.launches == before


def chain(add):
    """With memory of zeros, halves of a piece, pieces that can share memory, and an input among the results."""

    @recorded.recorded
    def call(x, y, factor, table, others, onto=None):
        count = x.numel()
        first, (low, high) = torch.empty_like(x), x.new_empty(2, count).unbind()
        add[(1,)](x, y, first, count, factor)
        add[(1,)](first, table.weights, low, count, 1.0)
        add[(1,)](first, others.weights, high, count, 2.0)
        zeros, last, more = x.new_zeros(count), x.new_empty(count), x.new_empty(count)
        add[(1,)](low, high, last, count, 1.0)
        out = x.new_empty(count) if onto is None else onto
        add[(1,)](last, first, more, count, 1.0)
        add[(1,)](more, zeros, out, count, 1.0)
        return out, None, y

    return call


def expected(x, y, factor, table, others, onto=None):
    return 3 * (x + factor * y) + table.weights[: len(x)] + 2 * others.weights[: len(x)]


def test_what_is_played_gives_the_same(add):
    call, table = chain(add), Table(torch.randn(200))
    for turn in range(6):
        x, y = torch.randn(200), torch.randn(200)
        (out, nothing, other), was_played = played(add, call, x, y, 0.5, table, table)
        torch.testing.assert_close(out, expected(x, y, 0.5, table, table))
        assert nothing is None and other is y and was_played == (turn > 1)


def test_what_differs_is_told_apart(add):
    call, table, memory = chain(add), Table(torch.randn(300)), torch.randn(1000)
    x, y, other = torch.randn(200), torch.randn(200), Table(torch.randn(300))
    cases = [
        (x, y, 0.5, table, table),
        (x, y, 2.0, table, table),
        (x, y, 2, table, table),
        (x[:100], y[:100], 0.5, table, table),
    ]
    cases += [
        (x, x, 0.5, table, table),
        (x, y, 0.5, other, table),
        (x, y, 0.5, table, other),
        (x, y, 0.5, table, table, torch.empty(200)),
    ]
    cases += [(memory[1:201], y, 0.5, table, table), (x, y, 0.5, Table(torch.randn(300)), table)]
    for turn in range(4):
        for args in cases:
            (out, *_), was_played = played(add, call, *args)
            torch.testing.assert_close(out, expected(*args))
            aligned = all(z.data_ptr() % 16 == 0 for z in args[:2])
            assert was_played == (turn > 1 and aligned), args
            if len(args) == 6:
                assert out is args[5]


def test_what_cannot_be_recorded_runs_as_it_is(add):
    table, elsewhere = Table(torch.randn(200)), torch.randn(200)

    @recorded.recorded
    def reads(x, table):
        out = x.new_empty(x.shape)
        add[(1,)](x, x, out, x.numel(), float(x[0].item()))
        return (out,)

    @recorded.recorded
    def foreign(x, table):
        out = x.new_empty(x.shape)
        add[(1,)](x, elsewhere, out, x.numel(), 1.0)
        return (out,)

    @recorded.recorded
    def computes(x, table):
        out = x.new_empty(x.shape)
        add[(1,)](x, x * 2, out, x.numel(), 1.0)
        return (out,)

    for turn in range(5):
        x = torch.randn(200)
        for call, right in ((reads, x + x[0] * x), (foreign, x + elsewhere), (computes, 3 * x)):
            (out,), was_played = played(add, call, x, table)
            torch.testing.assert_close(out, right)
            assert not was_played
    twice = recorded.recorded(lambda x, table: (x * 2,))
    assert all(type(twice(x.as_subclass(Subclass), table)[0]) is Subclass for _ in range(4))
    with pytest.raises(TypeError, match="recorded functions take no list"):
        reads([x], table)


def test_hooks_see_all_launches(add, monkeypatch):
    call, table, x = chain(add), Table(torch.randn(200)), torch.randn(200)
    assert [played(add, call, x, x, 0.5, table, table)[1] for _ in range(3)] == [False, False, True]
    monkeypatch.setattr(launch.knobs.runtime.launch_enter_hook, "calls", [print])  # as a profiler does
    assert not played(add, call, x, x, 0.5, table, table)[1]


def test_tapes_stay_with_their_tables_in_this_process(add, monkeypatch):
    monkeypatch.setattr(recorded, "MOST", 2)
    call, table, x = chain(add), Table(torch.randn(200)), torch.randn(200)
    for factor in (1.0, 2.0, 3.0):
        for _ in range(3):
            call(x, x, factor, table, table)
    assert len(table._tapes) == 2
    assert not pickle.loads(pickle.dumps(table))._tapes


def test_layers_launch_what_they_launch_unrecorded():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, recorded_launches.__file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == len(recorded_launches.CASES)
