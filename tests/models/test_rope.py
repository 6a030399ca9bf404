"""Rotary angles at positions of millions, against 50-digit arithmetic."""

import math
from decimal import Decimal, localcontext

import pytest
import torch
from llama_oracle import frequencies

from longspan.models.rope import Rotary, rotary_angles, rotate

POSITIONS = [0, 1, 8191, 2 * 2**20 - 1, 10 * 2**20]
TWO_PI = 2 * Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")


def exact_angle(position, dimension, head_size, base):
    """position * base**(-2 dimension / head_size), reduced to less than a turn with 50 digits."""
    with localcontext() as context:
        context.prec = 50
        return float(position * Decimal(base) ** (Decimal(-2 * dimension) / head_size) % TWO_PI)


def angles(head_size=8, base=10_000.0, scaling=1.0, dtype=torch.float64, positions=POSITIONS):
    return rotary_angles(torch.tensor(positions), head_size, base=base, scaling=scaling, dtype=dtype)


@pytest.mark.parametrize("base", [10_000, 500_000])
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-8), (torch.float32, 1e-7)], ids=["fp64", "fp32"])
def test_exact_at_ten_million(base, dtype, limit):
    found = angles(base=float(base), dtype=dtype)
    assert found.cos.dtype == dtype and found.cos.shape == (len(POSITIONS), 1, 4)
    for row, position in enumerate(POSITIONS):
        for dimension in range(4):
            angle = exact_angle(position, dimension, 8, base)
            assert abs(found.cos[row, 0, dimension].item() - math.cos(angle)) <= limit
            assert abs(found.sin[row, 0, dimension].item() - math.sin(angle)) <= limit


def test_scaling_slows_the_slowest_dimension_only():
    """NTK-aware: the slowest dimension at position 4p is where it was at p; the fastest does not change."""
    plain, scaled = angles(positions=[100]), angles(positions=[400], scaling=4.0)
    torch.testing.assert_close(scaled.cos[..., -1], plain.cos[..., -1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(angles(positions=[100], scaling=4.0).sin[..., 0], plain.sin[..., 0])


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
@pytest.mark.parametrize(
    ("base", "scaling", "trained"), [(500_000.0, 8.0, 8192), (1e6, 4.0, 32768), (100.0, 2.0, 50), (20.0, 4.0, 8192)]
)
def test_scaling_by_wavelength(kind, base, scaling, trained):
    """Against the formulas of llama_oracle, pair by pair; position 1 has the frequencies themselves as angles."""
    config = {"head_dim": 64, "rope_theta": base}
    config["rope_scaling"] = {"rope_type": kind, "factor": scaling, "original_max_position_embeddings": trained}
    wanted, length = frequencies(config)
    found = rotary_angles(
        torch.tensor([0, 1]), 64, base=base, scaling=scaling, dtype=torch.float64, kind=kind, trained=trained
    )
    assert found.cos[0].unique().tolist() == [length] and (length > 1) == (kind == "yarn")
    torch.testing.assert_close(
        torch.atan2(found.sin, found.cos)[1, 0], torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_rotation_is_a_complex_product_and_its_gradient_the_rotation_back():
    x = torch.randn(len(POSITIONS), 3, 8, dtype=torch.float64, requires_grad=True)
    turn = angles()
    out = rotate(x, turn)
    wanted = torch.complex(*x.chunk(2, -1)) * torch.complex(turn.cos, turn.sin)
    torch.testing.assert_close(out, torch.cat([wanted.real, wanted.imag], -1))
    assert torch.autograd.gradcheck(lambda x: rotate(x, turn), x)


def test_scores_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64).unbind()

    def score(query_position, key_position):
        return (rotate(q, angles(positions=[query_position])) * rotate(k, angles(positions=[key_position]))).sum()

    torch.testing.assert_close(score(2_000_017, 2_000_000), score(17, 0), rtol=1e-8, atol=1e-8)


def test_bf16_is_rounded_once():
    x = torch.randn(len(POSITIONS), 2, 8).bfloat16()
    out = rotate(x, angles(dtype=torch.float32))
    assert out.dtype == torch.bfloat16
    exact = rotate(x.double(), angles())
    assert ((out.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()


def test_no_tokens():
    empty = rotary_angles(torch.zeros(0, dtype=torch.int64), 8, base=1e4, scaling=1.0, dtype=torch.float32)
    assert isinstance(empty, Rotary)
    assert rotate(torch.zeros(0, 2, 8), empty).shape == (0, 2, 8)
