"""Feature maps, the short convolution module and the norms: values against plain formulas, widths, dtypes, refusals."""

import pytest
import torch

from longspan.attention import short_convolution
from longspan.models.convolution import ShortConvolution
from longspan.models.feature_maps import (
    FEATURE_MAPS,
    POSITIVE_FEATURE_MAPS,
    build_feature_map,
    feature_width,
)
from longspan.models.layers import SimpleRMSNorm
from longspan.parallel import SequenceParallel

HEADS, SIZE = 3, 4
COMPUTE = [torch.bfloat16, torch.float32, torch.float64]


def build(name, dtype=torch.float64):
    feature_map = build_feature_map(name, HEADS, SIZE)
    for module in feature_map.modules():
        if hasattr(module, "init_weights"):
            module.init_weights()
    return feature_map.to(dtype)


def softmax(x):
    return x.exp() / x.exp().sum(-1, keepdim=True)


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


FORMULAS = {
    "identity": lambda x: x,
    "silu": lambda x: x / (1 + (-x).exp()),
    "relu": lambda x: x.clamp(min=0),
    "elu1": lambda x: torch.nn.functional.elu(x) + 1,
    "softmax": softmax,
    "hedgehog": lambda x: softmax(torch.cat([x, -x], -1)),
    "l2norm": unit,
    "silu+l2norm": lambda x: unit(x / (1 + (-x).exp())),
    "l2norm+hedgehog": lambda x: softmax(torch.cat([unit(x), -unit(x)], -1)),
}


def test_every_map_has_a_formula_here():
    assert set(FEATURE_MAPS) <= set(FORMULAS)


@pytest.mark.parametrize("dtype", COMPUTE, ids=str)
@pytest.mark.parametrize("name", FORMULAS)
def test_values(name, dtype):
    x = (3 * torch.randn(7, HEADS, SIZE, dtype=torch.float64)).to(dtype)
    feature_map = build(name, dtype)
    found, expected = feature_map(x), FORMULAS[name](x.double())
    assert found.dtype == dtype and found.shape == expected.shape
    assert found.shape[-1] == feature_map.out_size == feature_width(name, SIZE)
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    assert feature_map(x[:0]).shape == (0, *expected.shape[1:])


@pytest.mark.parametrize("name", FORMULAS)
def test_gradients_are_finite_everywhere(name):
    x = torch.tensor([-1e4, -1.0, -0.0, 0.0, 1.0, 1e4]).repeat(SIZE, HEADS, 1).transpose(0, 2).contiguous()
    x.requires_grad_()
    (build(name, torch.float32)(x).square().sum()).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", POSITIVE_FEATURE_MAPS)
def test_positive_maps_leave_a_normaliser_above_zero(name):
    x = torch.cat([torch.randn(500, HEADS, SIZE), torch.zeros(1, HEADS, SIZE), torch.full((1, HEADS, SIZE), -80.0)])
    q, k = build(name, torch.float32)(x), build(name, torch.float32)(x.flip(0)).sum(0)
    assert (q >= 0).all() and ((q * k).sum(-1) > 0).all()


@pytest.mark.parametrize("name", sorted(set(FEATURE_MAPS) - set(POSITIVE_FEATURE_MAPS)))
def test_the_other_maps_do_not(name):
    x = torch.cat([torch.full((1, HEADS, SIZE), -2.0), torch.full((1, HEADS, SIZE), 2.0), torch.randn(50, HEADS, SIZE)])
    features = build(name, torch.float32)(x)
    assert ((features[:, None] * features).sum(-1) <= 0).any()


def test_l2norm_squares_in_single_precision():
    x = torch.full((2, HEADS, 256), 300.0, dtype=torch.float16)  # whose squares are beyond fp16
    norm = build_feature_map("l2norm", HEADS, 256)(x).float().norm(dim=-1)
    torch.testing.assert_close(norm, torch.ones(2, HEADS), rtol=1e-2, atol=0)
    assert (build("l2norm", torch.bfloat16)(torch.zeros(2, HEADS, SIZE, dtype=torch.bfloat16)) == 0).all()


def test_hedgehog_turns_each_head_by_its_own_matrix():
    feature_map = build("hedgehog")
    torch.nn.init.normal_(feature_map.weight)
    x = torch.randn(5, HEADS, SIZE, dtype=torch.float64)
    found = feature_map(x)
    for head, matrix in enumerate(feature_map.weight):
        turned = x[:, head] @ matrix.t()
        torch.testing.assert_close(found[:, head], softmax(torch.cat([turned, -turned], -1)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name, words", [
    ("sliu", "'sliu' is unknown; did you mean 'silu'?"),
    ("silu+l2nrom", "'l2nrom' is unknown; did you mean 'l2norm'?"),
    ("cosine", "'cosine' is unknown; allowed: identity"),
    ("silu+", "'' is unknown; allowed"),
])  # fmt: skip
def test_unknown_maps_are_refused(name, words):
    for call in (lambda: build_feature_map(name, HEADS, SIZE), lambda: feature_width(name, SIZE)):
        with pytest.raises(ValueError, match=words.replace("?", r"\?").replace("+", r"\+")) as raised:
            call()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("dtype", COMPUTE, ids=str)
def test_simple_rms_norm(dtype):
    norm = SimpleRMSNorm(6, 1e-5)
    x = torch.randn(4, 3, 6, dtype=torch.float64).to(dtype)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    found = norm(x)
    assert found.dtype == dtype and not list(norm.parameters())
    tolerance = {torch.bfloat16: 1e-2, torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", [False, True])
def test_short_convolution_module(bias):
    module = ShortConvolution(2000, 3, activation=None, bias=bias)
    module.init_weights()
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == (
        {"weight": (2000, 3)} | ({"bias": (2000,)} if bias else {})
    )
    for parameter in module.parameters():
        assert parameter.abs().max() <= 3**-0.5 and abs(parameter.std() - 1 / 3) < 0.02  # 3**-0.5 / sqrt(3)
    seq = SequenceParallel().context((5, 2))
    x = torch.randn(7, 2000)
    assert torch.equal(module(x, seq), short_convolution(x, module.weight, module.bias, seq=seq))
    conv = torch.nn.Conv1d(2000, 2000, 3, groups=2000, padding=2, bias=bias)
    conv.weight.data, conv.bias = module.weight.data[:, None], module.bias
    torch.testing.assert_close(module(x, seq)[:5], conv(x[:5].t())[:, :5].t(), rtol=1e-5, atol=1e-5)
