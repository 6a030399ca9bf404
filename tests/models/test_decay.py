"""Log decays: published slopes, fp32 under bf16 compute, Mamba-2's gate."""

import math

import pytest
import torch
import torch.nn.functional as F

from longspan.models.config import ModelConfig
from longspan.models.decay import FixedDecay, NoDecay, ScalarDecay, ScalarGate


def test_none():
    assert NoDecay(ModelConfig(), 0)(torch.zeros(3, 512)) is None


@pytest.mark.parametrize("layer", [0, 3, 11])
def test_lightning_slopes(layer):
    decay = FixedDecay(ModelConfig(num_layers=12, num_heads=16), layer)(torch.zeros(3, 512))
    wanted = [-8 * head / 16 * (1 - layer / 12) for head in range(16)]
    torch.testing.assert_close(decay, torch.tensor(wanted))


def test_retention_slopes_are_the_same_in_every_layer():
    config = ModelConfig(num_heads=16, decay_slopes="retention")
    wanted = torch.tensor([math.log1p(-(2.0 ** (-5 - head))) for head in range(16)], dtype=torch.float64)
    for layer in (0, 7):
        decay = FixedDecay(config, layer)(torch.zeros(3, 512, dtype=torch.float64))
        torch.testing.assert_close(decay, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32, torch.float64])
def test_fixed_decay_is_never_rounded_to_the_compute_dtype(compute):
    decay = FixedDecay(ModelConfig(num_heads=6), 1).to(compute)
    found = decay(torch.zeros(2, 512, dtype=compute))
    exact = FixedDecay(ModelConfig(num_heads=6), 1)(torch.zeros(2, 512, dtype=torch.float64))
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
    decay = ScalarDecay(ModelConfig(hidden_size=8, num_heads=2), 0)
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
