"""Log decays: published slopes and gates, fp32 under bf16 compute."""

import math

import pytest
import torch
import torch.nn.functional as F

from longspan.models.config import ModelConfig
from longspan.models.decay import BoundedDecay, ChannelDecay, ChannelGate, FixedDecay, NoDecay, ScalarDecay, ScalarGate


def test_none():
    assert NoDecay(ModelConfig(), 0, 64)(torch.zeros(3, 512)) is None


@pytest.mark.parametrize("layer", [0, 3, 11])
def test_lightning_slopes(layer):
    decay = FixedDecay(ModelConfig(num_layers=12, num_heads=16), layer, 32)(torch.zeros(3, 512))
    wanted = [-8 * head / 16 * (1 - layer / 12) for head in range(16)]
    torch.testing.assert_close(decay, torch.tensor(wanted))


def test_retention_slopes_are_the_same_in_every_layer():
    config = ModelConfig(num_heads=16, decay_slopes="retention")
    wanted = torch.tensor([math.log1p(-(2.0 ** (-5 - head))) for head in range(16)], dtype=torch.float64)
    for layer in (0, 7):
        decay = FixedDecay(config, layer, 32)(torch.zeros(3, 512, dtype=torch.float64))
        torch.testing.assert_close(decay, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32, torch.float64])
def test_fixed_decay_is_never_rounded_to_the_compute_dtype(compute):
    decay = FixedDecay(ModelConfig(linear_num_heads=6), 1, 64).to(compute)
    found = decay(torch.zeros(2, 512, dtype=compute))
    exact = FixedDecay(ModelConfig(linear_num_heads=6), 1, 64)(torch.zeros(2, 512, dtype=torch.float64))
    wide = torch.promote_types(compute, torch.float32)
    assert found.dtype == wide and not found.requires_grad
    assert torch.equal(found, exact.to(wide))


def test_scalar_gate_starts_as_mamba2():
    gate = ScalarGate(10_000)
    gate.init_weights()
    rates, steps = gate.A_log.exp(), F.softplus(gate.dt_bias)
    assert 1 <= rates.min() and rates.max() <= 16
    assert abs(rates.mean() - 8.5) < 0.2
    assert 0.999e-3 <= steps.min() and steps.max() <= 0.1001
    assert abs(steps.log().mean() - math.log(0.01)) < 0.05


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32, torch.float64])
def test_scalar_decay(compute):
    decay = ScalarDecay(ModelConfig(hidden_size=8, num_heads=2), 0, 4)
    decay.gate.init_weights()
    decay.a_proj.to(compute)
    if compute == torch.float64:
        decay.gate.to(compute)
    x = torch.randn(5, 8, dtype=compute)
    found = decay(x)
    wanted = -decay.gate.A_log.exp() * F.softplus(decay.a_proj(x).to(found.dtype) + decay.gate.dt_bias)
    assert found.dtype == torch.promote_types(compute, torch.float32)
    assert (found <= 0).all()
    assert torch.equal(found, wanted)
    assert torch.equal(found, -decay.gate.A_log.exp() * decay.gate(decay.a_proj(x))[1])  # the step of Mamba-2's write


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32, torch.float64])
def test_channel_decay(compute):
    decay = ChannelDecay(ModelConfig(hidden_size=8, num_heads=2, gate_rank=3), 0, 4)
    decay.gate.init_weights()
    assert torch.equal(decay.gate.bias, torch.zeros(8))
    torch.nn.init.uniform_(decay.gate.bias, -9, 9)
    decay.in_proj.to(compute), decay.out_proj.to(compute)
    if compute == torch.float64:
        decay.gate.to(compute)
    x = torch.randn(5, 8, dtype=compute)
    found = decay(x)
    wanted = F.logsigmoid(decay.out_proj(decay.in_proj(x)).to(found.dtype) + decay.gate.bias) / 16
    assert found.dtype == torch.promote_types(compute, torch.float32) and found.shape == (5, 2, 4)
    assert (found <= 0).all()
    torch.testing.assert_close(found.flatten(1), wanted, rtol=1e-6, atol=0)


def test_channel_gate_starts_with_memories_of_23_tokens():
    gate = ChannelGate(8)
    gate.init_weights()
    torch.testing.assert_close(gate(torch.zeros(3, 8)), torch.full((3, 8), -math.log(2) / 16))


@pytest.mark.parametrize("layer", [0, 1, 7])
@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32, torch.float64])
def test_bounded_decay(layer, compute):
    """Finite for every input, exact where memories are long, never below the bound, which rises from layer to layer."""
    decay = BoundedDecay(ModelConfig(num_layers=8, num_heads=2), layer, 4)
    inputs = torch.tensor([[-1e4, -90, -17, -3, 0, 3, 17, 80]], requires_grad=True)
    found, keys = decay(inputs.to(compute))
    assert keys.dtype == compute and keys.shape == found.shape
    torch.testing.assert_close(keys.double(), -torch.expm1(found.double()), rtol=8e-3, atol=1e-7)
    assert found.dtype == torch.promote_types(compute, torch.float32) and found.shape == (1, 2, 4)
    bound = max(layer / 8, 1e-6)
    exact = inputs.to(compute).detach().double()
    wanted = torch.log1p(-(1 - bound) * torch.sigmoid(-exact))
    rtol = 1e-12 if compute == torch.float64 else 1e-2 if layer == 0 else 1e-6
    torch.testing.assert_close(found.flatten(1).double(), wanted, rtol=rtol, atol=0)
    assert (found <= 0).all() and found.min() >= math.log(bound) * (1 + rtol)
    (found.sum() + keys.sum()).backward()
    assert inputs.grad.isfinite().all()
