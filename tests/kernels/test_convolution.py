"""The fused convolution kernels equal the PyTorch form, at starts, borders and odd sizes; that form equals autograd."""

import pytest
import torch
from interpreted import compilations, interpreted

from longspan.kernels.convolution import convolve, convolve_backward, convolve_backward_naive, convolve_naive

# (tokens, channels, width): around and beyond the pieces and blocks that the tests below use, and single tokens
SHAPES = [(45, 20, 4), (37, 16, 3), (64, 33, 2), (1, 5, 4), (3, 8, 8), (50, 16, 8), (16, 1, 4)]


def reach_of(num_tokens, width):
    """Starts at 0, 5, 6 and 20, and a border (rows that are not computed) at 37."""
    reach, run = [], 0
    for token in range(num_tokens):
        run = 0 if token in (5, 6, 20) else run
        reach.append(-1 if 37 <= token < 37 + width - 1 else min(run, width - 1))
        run += 1
    return torch.tensor(reach, dtype=torch.int8)


def make_inputs(num_tokens, num_channels, width, with_bias, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(num_tokens + num_channels)
    shapes = (num_tokens, num_channels), (num_tokens, num_channels), (num_channels, width), (num_channels,)
    d_out, x, weight, bias = (torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes)
    reach = reach_of(num_tokens, width)
    x[::7] *= 30  # where exp overflows if it may
    d_out[reach < 0] = float("nan")  # what is not computed gives nothing
    return d_out, x, weight, bias if with_bias else None, reach.to(device)


def check(forward, backward, shape, with_bias, activation, dtype, device, limit):
    """Errors against the PyTorch form in fp64, relative to the size of what is expected."""
    d_out, x, weight, bias, reach = make_inputs(*shape, with_bias, dtype, device)
    exact = [None if a is None else a.double() for a in (d_out, x, weight, bias)]
    computed = reach >= 0
    out = forward(x, weight, bias, activation, reach)
    assert out.dtype == dtype and out.is_contiguous()
    pairs = [(out[computed], convolve_naive(*exact[1:], activation, reach)[computed])]
    for wanted in {dtype, torch.float32}:
        found = backward(d_out, x, weight, bias, activation, reach, wanted)
        expected = convolve_backward_naive(*exact, activation, reach, torch.float64)
        assert found[0].dtype == wanted and found[1].dtype == torch.float32 and (found[2] is None) == (bias is None)
        pairs += [pair for pair in zip(found, expected) if pair[0] is not None]
    for a, b in pairs:
        assert a.shape == b.shape
        assert (a.double() - b).norm() <= limit * b.norm(), (a, b)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_autograd(shape, activation):
    d_out, x, weight, bias, reach = make_inputs(*shape, True, torch.float64)
    leaves = [a.requires_grad_() for a in (x, weight, bias)]
    computed = reach >= 0
    out = convolve_naive(*leaves, activation, reach)
    expected = torch.autograd.grad(out[computed], leaves, d_out[computed])
    with torch.no_grad():
        found = convolve_backward(d_out, *leaves, activation, reach, torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_naive_in_bf16(shape, activation):
    check(convolve_naive, convolve_backward_naive, shape, True, activation, torch.bfloat16, "cpu", 5e-3)


def test_without_tokens():
    d_out, x, weight, bias, reach = make_inputs(0, 4, 3, True)
    assert convolve(x, weight, bias, "silu", reach).shape == (0, 4)
    dx, d_weight, d_bias = convolve_backward(d_out, x, weight, bias, "silu", reach, torch.float32)
    assert dx.shape == (0, 4) and (d_weight == 0).all() and (d_bias == 0).all()


class TestFused:
    """In the interpreter, with pieces and blocks small enough for starts, borders and ends to fall anywhere."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        small = {"BLOCK_CHANNELS": 16, "FORWARD_STEPS": 8, "BACKWARD_STEPS": 16}
        self.kernels = interpreted("convolution_triton", monkeypatch, **small)

    @pytest.mark.parametrize("activation", [None, "silu"])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_equals_naive(self, shape, activation):
        forward, backward = self.kernels.convolve_triton, self.kernels.convolve_backward_triton
        check(forward, backward, shape, sum(shape) % 2 == 0, activation, torch.float32, "cpu", 1e-6)
        if shape == SHAPES[0]:
            check(forward, backward, shape, False, activation, torch.float16, "cpu", 1e-3)

    def test_strides(self):
        d_out, x, weight, bias, reach = make_inputs(20, 12, 4, True)
        wide = torch.randn(20, 36)
        wide[:, 12:24] = x
        strided = wide[:, 12:24], weight, bias, "silu", reach
        turned = d_out.t().contiguous().t()
        out = self.kernels.convolve_triton(*strided)
        assert torch.equal(out, self.kernels.convolve_triton(x, weight, bias, "silu", reach))
        found = self.kernels.convolve_backward_triton(turned, *strided, torch.float32)
        expected = self.kernels.convolve_backward_triton(d_out, x, weight, bias, "silu", reach, torch.float32)
        assert all(map(torch.equal, found, expected))

    def test_without_tokens(self):
        d_out, x, weight, bias, reach = make_inputs(0, 4, 3, True)
        assert self.kernels.convolve_triton(x, weight, bias, None, reach).shape == (0, 4)
        dx, d_weight, d_bias = self.kernels.convolve_backward_triton(d_out, x, weight, bias, None, reach, x.dtype)
        assert dx.shape == (0, 4) and (d_weight == 0).all() and (d_bias == 0).all()


@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 4e-3), (torch.float32, 5e-6)], ids=str)
    def test_against_fp64(self, dtype, limit):
        for i, shape in enumerate([*SHAPES, (1000, 2048, 4), (129, 257, 4), (4097, 768, 3)]):
            activation = [None, "silu"][i % 2]  # few combinations, since each is compiled
            check(convolve, convolve_backward, shape, shape[1] % 2 == 0, activation, dtype, "cuda", limit)

    def test_repeats_bit_by_bit(self):
        inputs = make_inputs(3000, 512, 4, True, torch.bfloat16, "cuda")
        first, second = (convolve_backward(*inputs[:4], "silu", inputs[4], torch.bfloat16) for _ in range(2))
        assert all(map(torch.equal, first, second))

    def test_one_compilation_for_every_number_of_tokens(self):
        from longspan.kernels.convolution_triton import forward_kernel

        counts = []
        for num_tokens in (1, 16, 17, 1024, 5000):
            _, x, weight, _, reach = make_inputs(num_tokens, 64, 5, False, torch.bfloat16, "cuda")
            convolve(x, weight, None, None, reach)
            counts.append(compilations(forward_kernel))
        assert len(set(counts)) == 1

    @pytest.mark.slow
    def test_more_than_two_billion_elements(self):
        num_tokens = 2**31 // 2048 + 70
        x = torch.zeros(num_tokens, 2048, device="cuda", dtype=torch.bfloat16)
        x[-70:] = torch.randn(70, 2048, device="cuda")
        weight = torch.randn(2048, 4, device="cuda", dtype=torch.bfloat16)
        reach = torch.full((num_tokens,), 3, dtype=torch.int8, device="cuda")
        reach[:3] = torch.arange(3)
        out = convolve(x, weight, None, "silu", reach)
        dx, d_weight, _ = convolve_backward(x, x, weight, None, "silu", reach, torch.bfloat16)
        tail = x[-140:], weight, None, "silu", reach[-140:].clone()
        tail[-1][:3] = torch.arange(3)
        expected = convolve_backward_naive(x[-140:], *tail, torch.float32)
        torch.testing.assert_close(out[-140:].float(), convolve_naive(*tail).float(), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(dx[-140:].float(), expected[0], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(d_weight, expected[1], rtol=1e-4, atol=1e-4)
        assert (out[:-140] == 0).all()
