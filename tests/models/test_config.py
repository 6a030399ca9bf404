"""ModelConfig: what is derived and what is refused."""

import dataclasses

import pytest

from longspan.models.config import ModelConfig


def test_defaults_are_valid():
    ModelConfig().validate()


def test_every_field_has_a_help_line():
    for field in dataclasses.fields(ModelConfig):
        text = field.metadata["help"]
        assert text and "\n" not in text, field.name


def test_derived_sizes():
    config = ModelConfig(hidden_size=96, num_heads=6)
    assert (config.kv_heads, config.head_size, config.mlp_width) == (6, 16, 256)
    config = ModelConfig(hidden_size=96, num_heads=6, num_kv_heads=2, head_dim=8, mlp_size=100)
    assert (config.kv_heads, config.head_size, config.mlp_width) == (2, 8, 100)


def test_pattern_repeats_and_is_cut():
    config = ModelConfig(num_layers=5, pattern=["linear", "linear:none", "softmax"], linear_family="scalar")
    assert config.layer_kinds == ("linear:scalar", "linear:none", "softmax", "linear:scalar", "linear:none")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"vocab_size": 0}, "model.vocab_size=0 must be at least 1"),
        ({"num_layers": 0}, "model.num_layers=0 must be at least 1"),
        ({"loss_chunk": 0}, "model.loss_chunk=0 must be at least 1"),
        ({"head_dim": -1}, "model.head_dim=-1 is negative; use 0 to derive it"),
        ({"norm_eps": 0.0}, "model.norm_eps=0.0 must be greater than 0"),
        (
            {"num_heads": 4, "num_kv_heads": 3},
            "model.num_kv_heads=3 does not divide model.num_heads=4; use 1, 2 or 4",
        ),
        ({"num_heads": 1, "num_kv_heads": 3}, "model.num_kv_heads=3 does not divide model.num_heads=1; use 1"),
        (
            {"hidden_size": 100, "num_heads": 8},
            "model.num_heads=8 does not divide model.hidden_size=100; change one of them or set model.head_dim",
        ),
        (
            {"hidden_size": 20, "num_heads": 4},
            "hidden_size / num_heads = 5 is odd, but rotary embedding turns pairs of dimensions; use an even"
            " model.head_dim",
        ),
        ({"head_dim": 2, "rope_scaling": 4.0}, "model.rope_scaling=4.0 needs more than the 2 dimensions of a head"),
        ({"rope_scaling": 0.5}, "model.rope_scaling=0.5 must be at least 1; 1 means none"),
        ({"pattern": []}, "model.pattern is empty; give at least one layer, such as [linear, softmax]"),
        (
            {"pattern": ["linear:fixd"]},
            "model.pattern entry 'linear:fixd' is unknown; did you mean 'linear:fixed'? allowed: softmax, linear,"
            " linear:none, linear:fixed, linear:scalar",
        ),
        (
            {"pattern": ["attention"]},
            "model.pattern entry 'attention' is unknown; allowed: softmax, linear, linear:none, linear:fixed,"
            " linear:scalar",
        ),
        (
            {"linear_family": "scaler"},
            "model.linear_family 'scaler' is unknown; did you mean 'scalar'? allowed: none, fixed, scalar",
        ),
        (
            {"linear_normalize": True, "feature_map": "relu"},
            "model.linear_normalize=true divides by a sum that model.feature_map=relu may bring to zero; use"
            " model.feature_map=elu1 or model.linear_normalize=false",
        ),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError) as error:
        ModelConfig(**settings).validate()
    assert str(error.value) == message


def test_odd_heads_are_fine_without_rotation():
    ModelConfig(hidden_size=20, num_heads=4, pattern=["linear"]).validate()
