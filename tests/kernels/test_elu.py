"""elu(x) + 1 and its gradient against the definition in fp64: the PyTorch form, and the kernel in the interpreter."""

import fp64
import pytest
import torch
from interpreted import interpreted

from longspan.kernels.elu import elu1, elu1_backward, elu1_backward_naive, elu1_forward, elu1_naive

SHAPES = [(1, 5), (9, 3, 7), (6, 2, 16)]
FORMS = pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=str)


def make_inputs(shape, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape))
    x, d_out = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    x.view(-1)[::4] *= 60  # where exp overflows if it may
    x.view(-1)[1::9] = 0
    return x, d_out


def check(forward, backward, shape, dtype, limit, device="cpu"):
    x, d_out = make_inputs(shape, dtype, device)
    outs, grads = fp64.exact(lambda x: [torch.nn.functional.elu(x) + 1], (x,), (d_out,))
    fp64.check([forward(x)], outs, limit, dtype)
    fp64.check([backward(d_out, x)], grads, limit, dtype)
    small = torch.tensor([[-30.0, -20.0, -8.0]], device=device).to(dtype)  # where elu(x) + 1 cancels
    torch.testing.assert_close(forward(small).double(), small.double().exp(), rtol=limit, atol=0)


@FORMS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_naive(shape, dtype, limit):
    check(elu1_naive, elu1_backward_naive, shape, dtype, limit)
    check(elu1_forward, elu1_backward, shape, dtype, limit)  # what the registry runs here


def test_is_differentiable():
    assert torch.autograd.gradcheck(elu1, [torch.randn(4, 5, dtype=torch.float64, requires_grad=True)])


class TestTriton:
    """In the interpreter, with several programs to a row."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        self.kernels = interpreted("elu_triton", monkeypatch, BLOCK=16)

    @FORMS
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_against_fp64(self, shape, dtype, limit):
        check(self.kernels.elu1_triton, self.kernels.elu1_backward_triton, shape, dtype, limit)

    def test_strides(self):
        x, d_out = make_inputs((9, 2, 10), torch.float32)
        wide = torch.randn(9, 50)
        wide[:, 7:27] = x.flatten(1)
        for view in (wide[:, 7:27].unflatten(1, (2, 10)), torch.cat([x, x], 2)[..., 10:]):
            assert torch.equal(self.kernels.elu1_triton(view), self.kernels.elu1_triton(x))
            found = self.kernels.elu1_backward_triton(d_out.transpose(0, 1).contiguous().transpose(0, 1), view)
            assert torch.equal(found, self.kernels.elu1_backward_triton(d_out, x))

    def test_without_tokens(self):
        empty = torch.zeros(0, 2, 8)
        assert (
            self.kernels.elu1_triton(empty).shape == self.kernels.elu1_backward_triton(empty, empty).shape == (0, 2, 8)
        )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 16, 128)], ids=str)
def test_on_gpu_against_fp64(shape, dtype, limit):
    check(elu1_forward, elu1_backward, shape, dtype, limit, "cuda")
