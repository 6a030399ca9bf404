"""silu(gate) * up and both gradients against torch in fp64: the PyTorch form, and the kernels in the interpreter."""

import fp64
import pytest
import torch
import torch.nn.functional as F
from interpreted import compilations, interpreted

from longspan.kernels.swiglu import swiglu, swiglu_backward, swiglu_backward_naive, swiglu_forward, swiglu_naive

SHAPES = [(1, 5), (17, 33), (6, 64), (5, 3, 7)]
FORMS = pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=str)


def make_inputs(shape, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape))
    gate, up, d_out = (torch.randn(shape, generator=generator) for _ in range(3))
    gate.view(-1)[::4] *= 60  # where exp overflows if it may
    return [x.to(device, dtype) for x in (gate, up, d_out)]


def check(forward, backward, shape, dtype, limit, device="cpu"):
    gate, up, d_out = make_inputs(shape, dtype, device)
    outs, grads = fp64.exact(lambda gate, up: [F.silu(gate) * up], (gate, up), (d_out,))
    fp64.check([forward(gate, up)], outs, limit, dtype)
    fp64.check(backward(d_out, gate, up), grads, limit, dtype)


@FORMS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_naive(shape, dtype, limit):
    check(swiglu_naive, swiglu_backward_naive, shape, dtype, limit)
    check(swiglu_forward, swiglu_backward, shape, dtype, limit)  # what the registry runs here


def test_is_differentiable():
    inputs = [x.requires_grad_() for x in torch.randn(2, 4, 5, dtype=torch.float64).unbind()]
    assert torch.autograd.gradcheck(swiglu, inputs)


class TestTriton:
    """In the interpreter, with several programs to a row."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        self.kernels = interpreted("swiglu_triton", monkeypatch, BLOCK=16)

    @FORMS
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_against_fp64(self, shape, dtype, limit):
        check(self.kernels.swiglu_triton, self.kernels.swiglu_backward_triton, shape, dtype, limit)

    def test_strides(self):
        gate, up, d_out = make_inputs((9, 20), torch.float32)
        both = torch.cat([up, gate], 1)
        views, turned = (both[:, 20:], both[:, :20]), d_out.t().contiguous().t()
        assert torch.equal(self.kernels.swiglu_triton(*views), self.kernels.swiglu_triton(gate, up))
        found = self.kernels.swiglu_backward_triton(turned, *views)
        assert all(map(torch.equal, found, self.kernels.swiglu_backward_triton(d_out, gate, up)))

    def test_without_rows(self):
        empty = torch.zeros(0, 8)
        assert self.kernels.swiglu_triton(empty, empty).shape == (0, 8)
        assert [x.shape for x in self.kernels.swiglu_backward_triton(empty, empty, empty)] == [(0, 8), (0, 8)]


@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)], ids=str)
    @pytest.mark.parametrize("shape", [*SHAPES, (1000, 5632), (33, 1100)], ids=str)
    def test_against_fp64(self, shape, dtype, limit):
        check(swiglu_forward, swiglu_backward, shape, dtype, limit, "cuda")

    def test_fp64(self):
        check(swiglu_forward, swiglu_backward, SHAPES[1], torch.float64, 1e-14, "cuda")

    def test_one_compilation_for_every_number_of_tokens(self):
        from longspan.kernels.swiglu_triton import swiglu_kernel

        counts = []
        for num_tokens in (1, 16, 17, 1024):
            gate, up, _ = make_inputs((num_tokens, 96), torch.bfloat16, "cuda")
            swiglu_forward(gate, up)
            counts.append(compilations(swiglu_kernel))
        assert len(set(counts)) == 1

    @pytest.mark.slow
    def test_more_than_two_billion_elements(self):
        gate = torch.zeros(2**31 // 4096 + 9, 4096, device="cuda", dtype=torch.bfloat16)
        gate[-9:] = torch.randn(9, 4096, device="cuda")
        out, tail = swiglu_forward(gate, gate), swiglu_forward(gate[-9:], gate[-9:])
        assert torch.equal(out[-9:], tail) and (out[:-9] == 0).all()
