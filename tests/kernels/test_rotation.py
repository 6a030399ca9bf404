"""Rotations, with norms before and without, against complex products in fp64: the PyTorch form and the kernels."""

import fp64
import pytest
import torch
import torch.nn.functional as F
from interpreted import compilations, interpreted

from longspan.kernels.rotation import (
    rotate,
    rotate_backward,
    rotate_backward_naive,
    rotate_forward,
    rotate_naive,
)

EPS = 1e-3
SHAPES = [(1, 1, 2), (13, 3, 6), (7, 5, 16), (20, 1, 10)]
FORMS = pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=str)
NORMS = pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])


def make_inputs(shape, normed, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape))
    x, d_out = (torch.randn(shape, generator=generator) for _ in range(2))
    x[0] *= 1e-2  # where eps counts
    angles = torch.randn(shape[0], 1, shape[2] // 2, generator=generator, dtype=torch.float64)
    weight = torch.randn(shape[2], generator=generator)
    wide = torch.promote_types(dtype, torch.float32)
    cos, sin = (f(angles).to(device, wide) for f in (torch.cos, torch.sin))
    return x.to(device, dtype), cos, sin, weight.to(device, dtype) if normed else None, d_out.to(device, dtype)


def definition(cos, sin):
    turn = torch.complex(cos.double(), sin.double())

    def of(x, weight):
        x = x if weight is None else F.rms_norm(x, weight.shape, weight, EPS)
        turned = torch.complex(*x.chunk(2, -1)) * turn
        return [torch.cat([turned.real, turned.imag], -1)]

    return of


def check(forward, backward, shape, normed, dtype, limit, device="cpu"):
    x, cos, sin, weight, d_out = make_inputs(shape, normed, dtype, device)
    outs, grads = fp64.exact(definition(cos, sin), (x, weight), (d_out,))
    fp64.check([forward(x, cos, sin, weight, EPS)], outs, limit, dtype)
    fp64.check(backward(d_out, cos, sin, x if normed else None, weight, EPS), grads, limit, dtype)


@FORMS
@NORMS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_naive(shape, normed, dtype, limit):
    check(rotate_naive, rotate_backward_naive, shape, normed, dtype, limit)
    check(rotate_forward, rotate_backward, shape, normed, dtype, limit)  # what the registry runs here


def test_is_differentiable():
    x, cos, sin, weight, _ = make_inputs((4, 2, 6), True, torch.float64)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, weight: rotate(x, cos, sin, weight, EPS), leaves)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cos, sin), leaves[:1])


class TestTriton:
    """In the interpreter, with several blocks of heads and of tokens to a program."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        self.kernels = interpreted("rotation_triton", monkeypatch, TILE=32, NORM_TILE=16, PROGRAMS=2)

    @FORMS
    @NORMS
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_against_fp64(self, shape, normed, dtype, limit):
        check(self.kernels.rotate_triton, self.kernels.rotate_backward_triton, shape, normed, dtype, limit)

    @NORMS
    def test_strides(self, normed):
        x, cos, sin, weight, d_out = make_inputs((9, 3, 8), normed, torch.float32)
        wide = torch.randn(2, 9, 5, 12)
        wide[:, :, 1:4, 2:10] = torch.stack([x, d_out])
        views = list(wide[:, :, 1:4, 2:10])
        found = self.kernels.rotate_triton(views[0], cos, sin, weight, EPS)
        assert torch.equal(found, self.kernels.rotate_triton(x, cos, sin, weight, EPS))
        found = self.kernels.rotate_backward_triton(views[1], cos, sin, views[0], weight, EPS)
        assert all(map(torch.equal, found, self.kernels.rotate_backward_triton(d_out, cos, sin, x, weight, EPS)))

    def test_without_tokens(self):
        x, angles, weight = torch.zeros(0, 2, 8), torch.zeros(0, 1, 4), torch.ones(8)
        assert self.kernels.rotate_triton(x, angles, angles, weight, EPS).shape == x.shape
        d_x, d_weight = self.kernels.rotate_backward_triton(x, angles, angles, x, weight, EPS)
        assert d_x.shape == x.shape and (d_weight == 0).all()


@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)], ids=str)
    @NORMS
    @pytest.mark.parametrize("shape", [*SHAPES, (3000, 16, 128), (100, 40, 96), (50, 2, 256)], ids=str)
    def test_against_fp64(self, shape, normed, dtype, limit):
        check(rotate_forward, rotate_backward, shape, normed, dtype, limit, "cuda")

    def test_fp64(self):
        check(rotate_forward, rotate_backward, SHAPES[1], True, torch.float64, 1e-14, "cuda")

    def test_repeats_bit_by_bit(self):
        x, cos, sin, weight, d_out = make_inputs((5000, 16, 128), True, torch.bfloat16, "cuda")
        first, second = (rotate_backward(d_out, cos, sin, x, weight, EPS) for _ in range(2))
        assert all(map(torch.equal, first, second))

    def test_one_compilation_for_every_number_of_tokens(self):
        from longspan.kernels.rotation_triton import norm_rotate_backward_kernel, rotate_kernel

        counts = []
        for num_tokens in (1, 16, 17, 1024):
            x, cos, sin, weight, d_out = make_inputs((num_tokens, 2, 32), True, torch.bfloat16, "cuda")
            rotate_forward(x, cos, sin, weight, EPS)
            rotate_backward(d_out, cos, sin, x, weight, EPS)
            counts.append(compilations(rotate_kernel, norm_rotate_backward_kernel))
        assert len(set(counts)) == 1

    @pytest.mark.slow
    def test_more_than_two_billion_elements(self):
        x = torch.zeros(2**31 // 2048 + 9, 16, 128, device="cuda", dtype=torch.bfloat16)
        x[-9:] = torch.randn(9, 16, 128, device="cuda")
        angles = torch.rand(len(x), 1, 64, device="cuda")
        out, tail = (rotate_forward(y, angles[-len(y) :], angles[-len(y) :], None, 0.0) for y in (x, x[-9:]))
        assert torch.equal(out[-9:], tail) and (out[:-9] == 0).all()
