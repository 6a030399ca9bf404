"""Norms of rows and all their gradients against torch in fp64: the PyTorch form, and the kernels in the interpreter."""

import fp64
import pytest
import torch
import torch.nn.functional as F
from interpreted import compilations, interpreted

from longspan.kernels.norm import (
    l2_norm,
    norm,
    norm_backward,
    norm_backward_naive,
    norm_naive,
    residual_rms_norm,
    rms_norm,
)

EPS = 1e-3
# shape, (branch, weight, gate), mean: single rows, odd widths, tiles that rows do not fill, programs with several tiles
CASES = [
    ((1, 7), (True, True, False), True),
    ((45, 20), (False, True, False), True),
    ((50, 33), (True, True, False), True),
    ((9, 3, 16), (False, True, True), True),
    ((11, 2, 5), (False, False, True), True),
    ((40, 3, 6), (False, False, False), False),
    ((33, 64), (False, False, False), True),
]
FORMS = pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=str)


def definition(mean):
    def of(x, branch, weight, gate):
        stream = x if branch is None else x + branch
        if mean:
            out = F.rms_norm(stream, stream.shape[-1:], weight, EPS)
        else:
            out = stream / (stream.square().sum(-1, keepdim=True) + EPS).sqrt()
        return stream, out if gate is None else out * F.silu(gate)

    return of


def make_inputs(shape, given, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape))
    shapes = shape, shape, shape[-1:], shape, shape, shape
    tensors = [torch.randn(n, generator=generator) for n in shapes]
    tensors[0][0] *= 1e-2  # a row in which eps counts
    tensors[3].view(-1)[::5] *= 60  # where exp overflows if it may
    x, branch, weight, gate, d_stream, d_out = (a.to(device, dtype) for a in tensors)
    if dtype != torch.float32:
        branch = x * -0.5  # a sum that is exact: its rounding is not what is tested
    options = [a if there else None for a, there in zip((branch, weight, gate), given)]
    return x, *options, d_stream, d_out


def check(forward, backward, case, dtype, limit, device="cpu"):
    shape, given, mean = case
    x, branch, weight, gate, d_stream, d_out = make_inputs(shape, given, dtype, device)
    outs, grads = fp64.exact(definition(mean), (x, branch, weight, gate), (d_stream, d_out))
    found = forward(x, branch, weight, gate, mean, EPS)
    fp64.check(found, outs if given[0] else outs[1:], limit, dtype)
    stream = found[0] if given[0] else x
    grads = grads[:1] + grads[1 + given[0] :]  # of a sum, both are one
    fp64.check(backward(d_out, d_stream, stream, weight, gate, mean, EPS), grads, limit, dtype)
    alone = fp64.exact(lambda *inputs: definition(mean)(*inputs)[1:], (stream, None, weight, gate), (d_out,))[1]
    fp64.check(backward(d_out, None, stream, weight, gate, mean, EPS), alone, limit, dtype)


@FORMS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_naive(case, dtype, limit):
    check(norm_naive, norm_backward_naive, case, dtype, limit)
    check(norm, norm_backward, case, dtype, limit)  # what the registry runs here


def test_functions_are_differentiable():
    x, gate = torch.randn(2, 5, 3, 8, dtype=torch.float64).unbind()
    weight = torch.randn(8, dtype=torch.float64)
    leaves = [a.requires_grad_() for a in (x, gate, weight)]
    functions = [
        lambda x, gate, weight: rms_norm(x, weight, EPS),
        lambda x, gate, weight: rms_norm(x, weight, EPS, gate),
        lambda x, gate, weight: rms_norm(x, None, EPS, gate),
        lambda x, gate, weight: l2_norm(x, EPS),
        lambda x, gate, weight: residual_rms_norm(x, None, weight, EPS),
        lambda x, gate, weight: residual_rms_norm(x, gate, weight, EPS),
        lambda x, gate, weight: residual_rms_norm(x, gate, weight, EPS)[0],
        lambda x, gate, weight: residual_rms_norm(x, gate, weight, EPS)[1],
    ]
    for function in functions:
        assert torch.autograd.gradcheck(function, leaves)


def test_without_a_branch_the_stream_is_the_input():
    x = torch.randn(4, 6)
    stream, _ = residual_rms_norm(x, None, torch.ones(6), EPS)
    assert stream.data_ptr() == x.data_ptr()


def test_shapes_alone():
    x, weight = torch.empty(5, 2, 6, device="meta"), torch.empty(6, device="meta")
    stream, out = norm(x, x, weight, None, True, EPS)
    assert stream.shape == out.shape == x.shape
    assert [a.shape for a in norm_backward(x, None, x, weight, x, True, EPS)] == [x.shape, weight.shape, x.shape]


class TestTriton:
    """In the interpreter, with tiles of a few rows."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        self.kernels = interpreted("norm_triton", monkeypatch, TILE=128, PROGRAMS=3)

    @FORMS
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_against_fp64(self, case, dtype, limit):
        check(self.kernels.norm_triton, self.kernels.norm_backward_triton, case, dtype, limit)

    def test_strides(self):
        x, _, weight, gate, _, d_out = make_inputs((9, 3, 16), (False, True, True), torch.float32)
        wide = torch.randn(9, 5, 24)
        wide[:, 1:4, 3:19] = x
        strided, turned = wide[:, 1:4, 3:19], gate.transpose(0, 1).contiguous().transpose(0, 1)
        for inputs in [(strided, weight, turned), (x.transpose(0, 2).contiguous().transpose(0, 2), weight, gate)]:
            found = self.kernels.norm_triton(inputs[0], None, *inputs[1:], True, EPS)
            assert torch.equal(found[0], self.kernels.norm_triton(x, None, weight, gate, True, EPS)[0])
            found = self.kernels.norm_backward_triton(d_out, None, *inputs, True, EPS)
            expected = self.kernels.norm_backward_triton(d_out, None, x, weight, gate, True, EPS)
            assert all(map(torch.equal, found, expected))

    def test_without_rows(self):
        x, weight = torch.zeros(0, 8), torch.ones(8)
        assert [a.shape for a in self.kernels.norm_triton(x, x, weight, None, True, EPS)] == [x.shape, x.shape]
        d_x, d_weight = self.kernels.norm_backward_triton(x, None, x, weight, None, True, EPS)
        assert d_x.shape == x.shape and (d_weight == 0).all()


@pytest.mark.gpu
class TestOnGpu:
    WIDE = [((1000, 2048), (True, True, False), True), ((3000, 16, 128), (False, True, True), True)]
    WIDE += [((65, 8192), (True, True, False), True), ((3000, 16, 128), (False, False, False), False)]

    @pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)], ids=str)
    @pytest.mark.parametrize("case", CASES + WIDE, ids=str)
    def test_against_fp64(self, case, dtype, limit):
        check(norm, norm_backward, case, dtype, limit, "cuda")

    def test_fp64(self):
        check(norm, norm_backward, CASES[3], torch.float64, 1e-14, "cuda")

    def test_repeats_bit_by_bit(self):
        x, branch, weight, _, d_stream, d_out = make_inputs((5000, 1024), (True, True, False), torch.bfloat16, "cuda")
        first, second = (norm_backward(d_out, d_stream, x, weight, None, True, EPS) for _ in range(2))
        assert all(map(torch.equal, first, second))

    def test_one_compilation_for_every_number_of_tokens(self):
        from longspan.kernels.norm_triton import norm_backward_kernel, norm_kernel

        counts = []
        for num_tokens in (1, 16, 17, 1024, 5000):
            x, _, weight, *_, d_out = make_inputs((num_tokens, 96), (False, True, False), torch.bfloat16, "cuda")
            norm(x, None, weight, None, True, EPS)
            norm_backward(d_out, None, x, weight, None, True, EPS)
            counts.append(compilations(norm_kernel, norm_backward_kernel))
        assert len(set(counts)) == 1

    @pytest.mark.slow
    def test_more_than_two_billion_elements(self):
        rows = 2**31 // 2048 + 70
        x = torch.zeros(rows, 2048, device="cuda", dtype=torch.bfloat16)
        x[-70:] = torch.randn(70, 2048, device="cuda")
        weight = torch.randn(2048, device="cuda", dtype=torch.bfloat16)
        out = norm(x, None, weight, None, True, EPS)[0]
        d_x, d_weight = norm_backward(x, None, x, weight, None, True, EPS)
        tail = norm(x[-70:], None, weight, None, True, EPS)[0]
        d_tail, d_weight_tail = norm_backward(x[-70:], None, x[-70:], weight, None, True, EPS)
        assert torch.equal(out[-70:], tail) and torch.equal(d_x[-70:], d_tail) and (out[:-70] == 0).all()
        torch.testing.assert_close(d_weight, d_weight_tail, rtol=1e-2, atol=1e-2)
