"""Mamba-2's gate, with all gradients, against its formula in fp64: the PyTorch form, and the kernels."""

import fp64
import pytest
import torch
import torch.nn.functional as F
from interpreted import interpreted

from longspan.kernels.scalar_gate import (
    scalar_gate,
    scalar_gate_backward,
    scalar_gate_backward_naive,
    scalar_gate_forward,
    scalar_gate_naive,
)

SHAPES = [(1, 3), (37, 5), (16, 8), (50, 33)]
FORMS = pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=str)
BOTH = pytest.mark.parametrize("both", [False, True], ids=["log decay", "and step"])


def make_inputs(shape, both, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape))
    a, d_log, d_step = (torch.randn(shape, generator=generator) for _ in range(3))
    A_log, dt_bias = (torch.randn(shape[1], generator=generator) for _ in range(2))
    a.view(-1)[::3] *= 6
    a.view(-1)[::7] *= 40  # where exp overflows if it may
    wide = torch.promote_types(dtype, torch.float32)  # of a gate's parameters, whatever the compute dtype is
    d_log, d_step, A_log, dt_bias = (x.to(device, wide) for x in (d_log, d_step, A_log - 2, dt_bias))
    return a.to(device, dtype), A_log, dt_bias, d_log, d_step if both else None


def definition(a, A_log, dt_bias):
    step = F.softplus(a + dt_bias)
    return [-A_log.exp() * step, step]


def check(forward, backward, shape, both, dtype, limit, device="cpu"):
    *inputs, d_log, d_step = make_inputs(shape, both, dtype, device)
    outs, grads = fp64.exact(definition, inputs, [d_log, torch.zeros_like(d_log) if d_step is None else d_step])
    wide = torch.promote_types(dtype, torch.float32)
    fp64.check(forward(*inputs), outs, min(limit, 1e-6), wide)
    found = backward(d_log, d_step, *inputs)
    fp64.check(found[:1], grads[:1], limit, dtype)
    fp64.check(found[1:], grads[1:], min(limit, 2e-6), wide)


@FORMS
@BOTH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_naive(shape, both, dtype, limit):
    check(scalar_gate_naive, scalar_gate_backward_naive, shape, both, dtype, limit)
    check(scalar_gate_forward, scalar_gate_backward, shape, both, dtype, limit)


def test_is_differentiable():
    a, A_log, dt_bias, *_ = make_inputs((5, 3), True, torch.float64)
    leaves = [x.requires_grad_() for x in (a / 40, A_log, dt_bias)]
    for pick in (slice(None), slice(0, 1), slice(1, 2)):
        assert torch.autograd.gradcheck(lambda *inputs: scalar_gate(*inputs)[pick], leaves)


def test_shapes_alone():
    a, rates = torch.empty(5, 3, device="meta", dtype=torch.bfloat16), torch.empty(3, device="meta")
    outs = scalar_gate_forward(a, rates, rates)
    grads = scalar_gate_backward(outs[0], None, a, rates, rates)
    assert [(x.shape, x.dtype) for x in outs] == 2 * [(a.shape, torch.float32)]
    assert [(x.shape, x.dtype) for x in grads] == [(x.shape, x.dtype) for x in (a, rates, rates)]


class TestTriton:
    """In the interpreter, with small tiles and several programs."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        self.kernels = interpreted("scalar_gate_triton", monkeypatch, TILE=32, TILES=3)

    @FORMS
    @BOTH
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_against_fp64(self, shape, both, dtype, limit):
        check(self.kernels.scalar_gate_triton, self.kernels.scalar_gate_backward_triton, shape, both, dtype, limit)

    def test_small_steps_are_exact_number_by_number(self):
        a = torch.tensor([[-40.0, -20.0, -9.0, 0.0, 30.0, 90.0]])
        zeros = torch.zeros(6)
        found = self.kernels.scalar_gate_triton(a, zeros, zeros)[1].double()
        torch.testing.assert_close(found, torch.log1p(a.double().exp()), rtol=1e-6, atol=0)

    def test_strides(self):
        a, A_log, dt_bias, d_log, d_step = make_inputs((9, 20), True, torch.float32)
        wide = torch.randn(9, 50)
        wide[:, 7:27] = a
        forward, backward = self.kernels.scalar_gate_triton, self.kernels.scalar_gate_backward_triton
        for view in (wide[:, 7:27], a.t().contiguous().t()):
            assert all(map(torch.equal, forward(view, A_log, dt_bias), forward(a, A_log, dt_bias)))
            turned = [x.t().contiguous().t() for x in (d_log, d_step)]
            found = backward(*turned, view, A_log, dt_bias)
            assert all(map(torch.equal, found, backward(d_log, d_step, a, A_log, dt_bias)))

    def test_without_tokens(self):
        empty, rates = torch.zeros(0, 8), torch.ones(8)
        assert [x.shape for x in self.kernels.scalar_gate_triton(empty, rates, rates)] == [(0, 8), (0, 8)]
        d_a, *others = self.kernels.scalar_gate_backward_triton(empty, None, empty, rates, rates)
        assert d_a.shape == (0, 8) and all((x == 0).all() for x in others)


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (70_000, 16)], ids=str)
def test_on_a_gpu(shape, both, dtype, limit):
    check(scalar_gate_forward, scalar_gate_backward, shape, both, dtype, limit, "cuda")
