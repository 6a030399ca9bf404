"""Gates per key channel, with all gradients, against their formulas in fp64: the PyTorch form, and the kernels."""

import fp64
import pytest
import torch
import torch.nn.functional as F
from interpreted import compilations, interpreted

from longspan.kernels.channel_gates import (
    biased_gate,
    bounded_gate,
    channel_gate,
    channel_gate_backward,
    channel_gate_backward_naive,
    channel_gate_naive,
)

SHAPES = [(1, 3), (37, 20), (16, 8), (50, 33)]
FORMS = pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)], ids=str)
BIASED = pytest.mark.parametrize("biased", [False, True], ids=["bounded", "biased"])


def make_inputs(shape, biased, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(sum(shape))
    a, d_log, d_keys = (torch.randn(shape, generator=generator) for _ in range(3))
    a.view(-1)[::3] *= 6
    a.view(-1)[::7] *= 40  # where exp overflows if it may
    bias, wide = torch.randn(shape[1], generator=generator), torch.promote_types(dtype, torch.float32)
    a, d_keys = a.to(device, dtype), d_keys.to(device, dtype)
    # A gate's parameters are fp32 whatever the compute dtype is.
    return a, bias.to(device, wide) if biased else None, d_log.to(device, wide), None if biased else d_keys


def definition(factor):
    def of(a, bias):
        if bias is not None:
            return [factor * F.logsigmoid(a + bias)]
        kept = 1 - factor + factor * torch.sigmoid(a)  # as HGRN-2 has it
        return [kept.log(), 1 - kept]

    return of


def check(forward, backward, shape, biased, dtype, limit, device="cpu", factor=0.6):
    a, bias, d_log, d_keys = make_inputs(shape, biased, dtype, device)
    d_outs = [d_log] if biased else [d_log, d_keys]
    outs, grads = fp64.exact(definition(factor), (a, bias), d_outs)
    found = forward(a, bias, factor)
    wide = torch.promote_types(dtype, torch.float32)
    fp64.check(found[:1], outs[:1], min(limit, 1e-6), wide)
    fp64.check(found[1:], outs[1:], limit, dtype)
    found = backward(d_log, d_keys, a, bias, factor)
    fp64.check(found[:1], grads[:1], limit, dtype)
    fp64.check(found[1:], grads[1:], min(limit, 1e-6), wide)


@FORMS
@BIASED
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_naive(shape, biased, dtype, limit):
    check(channel_gate_naive, channel_gate_backward_naive, shape, biased, dtype, limit)
    check(channel_gate, channel_gate_backward, shape, biased, dtype, limit)  # what the registry runs here


def test_are_differentiable():
    a, bias, *_ = make_inputs((5, 3), True, torch.float64)
    leaves = [(a / 40).requires_grad_(), bias.requires_grad_()]
    assert torch.autograd.gradcheck(lambda a, bias: biased_gate(a, bias, 0.3), leaves)
    assert torch.autograd.gradcheck(lambda a: bounded_gate(a, 0.3), leaves[:1])
    assert torch.autograd.gradcheck(lambda a: bounded_gate(a, 0.3)[1], leaves[:1])


class TestTriton:
    """In the interpreter, with small tiles and several strips."""

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch):
        self.kernels = interpreted("channel_gates_triton", monkeypatch, ROWS=4, BLOCK_CHANNELS=16, STEPS=3)

    @FORMS
    @BIASED
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_against_fp64(self, shape, biased, dtype, limit):
        kernels = self.kernels.channel_gate_triton, self.kernels.channel_gate_backward_triton
        check(*kernels, shape, biased, dtype, limit)

    @BIASED
    def test_long_memories_are_exact_number_by_number(self, biased):
        a = torch.tensor([[3.0, 9.0, 14.0, 20.0, 40.0, 80.0]])
        found = self.kernels.channel_gate_triton(a, torch.zeros(6) if biased else None, 0.6)[0].double()
        exact = a.double()
        wanted = 0.6 * F.logsigmoid(exact) if biased else torch.log1p(-0.6 * torch.sigmoid(-exact))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)

    @BIASED
    def test_strides(self, biased):
        a, bias, d_log, d_keys = make_inputs((9, 20), biased, torch.float32)
        wide = torch.randn(9, 50)
        wide[:, 7:27] = a
        forward, backward = self.kernels.channel_gate_triton, self.kernels.channel_gate_backward_triton
        assert all(map(torch.equal, forward(wide[:, 7:27], bias, 0.6), forward(a, bias, 0.6)))
        turned = [x if x is None else x.t().contiguous().t() for x in (d_log, d_keys)]
        found = backward(*turned, wide[:, 7:27], bias, 0.6)
        assert all(map(torch.equal, found, backward(d_log, d_keys, a, bias, 0.6)))

    def test_without_tokens(self):
        empty, bias = torch.zeros(0, 8), torch.ones(8)
        assert [x.shape for x in self.kernels.channel_gate_triton(empty, None, 0.5)] == [(0, 8), (0, 8)]
        d_a, d_bias = self.kernels.channel_gate_backward_triton(empty, None, empty, bias, 0.5)
        assert d_a.shape == (0, 8) and (d_bias == 0).all()


@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)], ids=str)
    @BIASED
    @pytest.mark.parametrize("shape", [*SHAPES, (1000, 2048)], ids=str)
    def test_against_fp64(self, shape, biased, dtype, limit):
        check(channel_gate, channel_gate_backward, shape, biased, dtype, limit, "cuda")

    @BIASED
    def test_long_memories_are_exact_number_by_number(self, biased):
        a = torch.tensor([[3.0, 9.0, 14.0, 20.0, 40.0, 80.0]], device="cuda")
        found = channel_gate(a, torch.zeros(6, device="cuda") if biased else None, 0.6)[0].double()
        exact = a.double()
        wanted = 0.6 * F.logsigmoid(exact) if biased else torch.log1p(-0.6 * torch.sigmoid(-exact))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)

    def test_one_compilation_for_every_number_of_tokens(self):
        from longspan.kernels.channel_gates_triton import channel_gate_backward_kernel

        counts = []
        for num_tokens in (1, 16, 17, 1024):
            a, bias, d_log, d_keys = make_inputs((num_tokens, 64), True, torch.bfloat16, "cuda")
            channel_gate_backward(d_log, d_keys, a, bias, 0.6)
            counts.append(compilations(channel_gate_backward_kernel))
        assert len(set(counts)) == 1
