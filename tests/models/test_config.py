"""ModelConfig: what is derived and what is refused."""

import dataclasses

import pytest

from longspan.models.config import LINEAR_KINDS, ModelConfig
from longspan.models.families import LINEAR_FAMILIES


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
        (
            {"pattern": ["softmax:window"]},
            "model.pattern has softmax:window, but model.window=0; set the keys that it sees, such as model.window=4K",
        ),
        (
            {"window": 4096},
            "model.window=4096 is for softmax:window layers, of which model.pattern has none; use softmax:window there,"
            " or model.window=0",
        ),
        (
            {"pattern": ["softmax:window"], "window": -1},
            "model.window=-1 is negative; give the keys that softmax:window sees",
        ),
        (
            {"pattern": ["linear", "softmax:window"], "hidden_size": 20, "num_heads": 4, "window": 8},
            "hidden_size / num_heads = 5 is odd, but rotary embedding turns pairs of dimensions; use an even"
            " model.head_dim",
        ),
        (
            {"task": "images", "pattern": ["softmax", "linear:gla"]},
            "model.task=images has no direction, but linear:gla layers look back; use softmax, sla, llsa or linear:none"
            " in model.pattern",
        ),
        (
            {"task": "images", "pattern": ["linear:none"], "conv_width": 4},
            "model.task=images has no direction, but linear:none layers with a convolution look back; use softmax, sla,"
            " llsa or linear:none in model.pattern, and model.conv_width=0",
        ),
        (
            {"task": "images", "pattern": ["llsa"], "head_dim": 6},
            "model.head_dim=6 is no multiple of 4, but rotary embedding of images turns pairs by row and as many by"
            " column; use another model.head_dim",
        ),
        (
            {"task": "images", "pattern": ["llsa"], "tie_embeddings": True},
            "model.tie_embeddings=true is for model.task=text: pixels have no vocabulary",
        ),
        ({"task": "image"}, "model.task 'image' is unknown; did you mean 'images'? allowed: text, images"),
        ({"sla_keep": 1.5}, "model.sla_keep=1.5 must be a whole number of blocks, or a share between 0 and 1"),
        ({"sla_keep": 0.0}, "model.sla_keep=0.0 must be a whole number of blocks, or a share between 0 and 1"),
        ({"llsa_block": 1}, "model.llsa_block=1 must be at least 2"),
        ({"llsa_levels": 0}, "model.llsa_levels=0 must be at least 1"),
        (
            {"sla_feature_map": "gelu"},
            "model.sla_feature_map 'gelu' is unknown; did you mean 'elu1'? allowed: elu1, softmax, hedgehog",
        ),
        ({"sla_linear": "both"}, "model.sla_linear 'both' is unknown; allowed: all, rest"),
        (
            {"sla_linear": "rest", "sla_key_block": 48},
            "model.sla_linear=rest needs whole blocks of keys in a block of queries, but model.sla_key_block=48 does"
            " not divide model.sla_query_block=128",
        ),
        (
            {"sla_linear": "rest", "sla_feature_map": "hedgehog"},
            "model.sla_linear=rest maps keys of other ranks where they arrive, which model.sla_feature_map=hedgehog"
            " with its weights per head cannot; use softmax or elu1",
        ),
        (
            {"sparse_selection": {"name": "window", "window": 4}},
            "model.sparse_selection={'name': 'window', 'window': 4} is for sparse layers, of which model.pattern has"
            " none; use sparse there, or model.sparse_selection={}",
        ),
        (
            {"pattern": ["sparse"]},
            "model.sparse_selection: name=None is unknown; use top, hierarchical, window, radial, antidiagonal,"
            " tokens, compressed, lists",
        ),
        (
            {"pattern": ["sparse"], "sparse_selection": {"name": "token"}},
            "model.sparse_selection: name='token' is unknown, did you mean 'tokens'?; use top, hierarchical, window,"
            " radial, antidiagonal, tokens, compressed, lists",
        ),
        (
            {"pattern": ["sparse"], "sparse_selection": {"name": "top", "keep": float("inf")}},
            "model.sparse_selection: top with {'keep': inf}: a value of another type is needed (cannot convert"
            " float infinity to integer)",
        ),
        (
            {"pattern": ["sparse"], "sparse_selection": {"name": "tokens", "kep": 2}},
            "model.sparse_selection: tokens has no 'kep', did you mean 'keep'?; it has keep, query_block, key_block",
        ),
        (
            {"pattern": ["sparse"], "sparse_selection": {"name": ["window"]}},
            "model.sparse_selection: name=['window'] is unknown, did you mean 'window'?; use top, hierarchical, window,"
            " radial, antidiagonal, tokens, compressed, lists",
        ),
        (
            {"pattern": ["sparse"], "sparse_selection": {"name": "window"}},
            "model.sparse_selection: window needs window, such as {name: window, window: ...}",
        ),
        (
            {"pattern": ["sparse"], "sparse_selection": {"name": "tokens", "keep": 0}},
            "model.sparse_selection: TokenTop.keep=0 must be a whole number of at least 1",
        ),
        (
            {"pattern": ["sparse"], "sparse_selection": {"name": "lists", "lists": "no_module:f"}},
            "model.sparse_selection: lists='no_module:f' is no function that can be imported; write module:function",
        ),
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
        (
            {"rope_type": "yarm"},
            "model.rope_type 'yarm' is unknown; did you mean 'yarn'? allowed: ntk, llama3, yarn",
        ),
        (
            {"rope_type": "yarn"},
            "model.rope_type=yarn needs the tokens of context trained before, such as model.rope_trained=8K",
        ),
        ({"rope_trained": 64}, "model.rope_trained=64 is for model.rope_type=llama3 and yarn; leave it out"),
        (
            {"rope_type": "llama3", "rope_trained": 64, "task": "images", "pattern": ["softmax"]},
            "model.rope_type=llama3 is for model.task=text; use ntk",
        ),
        ({"pattern": []}, "model.pattern is empty; give at least one layer, such as [linear, softmax]"),
        (
            {"pattern": ["linear:fixd"]},
            "model.pattern entry 'linear:fixd' is unknown; did you mean 'linear:fixed'? allowed: softmax,"
            " softmax:window, sla, llsa, sparse, linear, linear:none, linear:fixed, linear:scalar, linear:mamba2,"
            " linear:gla, linear:hgrn2, linear:delta, linear:gated_delta, linear:kda",
        ),
        (
            {"pattern": ["attention"]},
            "model.pattern entry 'attention' is unknown; allowed: softmax, softmax:window, sla, llsa, sparse,"
            " linear, linear:none, linear:fixed, linear:scalar, linear:mamba2, linear:gla, linear:hgrn2, linear:delta,"
            " linear:gated_delta, linear:kda",
        ),
        (
            {"linear_family": "scaler"},
            "model.linear_family 'scaler' is unknown; did you mean 'scalar'? allowed: none, fixed, scalar, mamba2, gla,"
            " hgrn2, delta, gated_delta, kda",
        ),
        (
            {"linear_normalize": True, "feature_map": "relu"},
            "model.linear_normalize=true divides by a sum that model.feature_map=relu may bring to zero; use"
            " model.feature_map=elu1 or model.linear_normalize=false",
        ),
        (
            {"linear_normalize": True, "linear_family": "hgrn2"},
            "model.linear_normalize=true divides by a sum that model.feature_map=silu may bring to zero; use"
            " model.feature_map=elu1 or model.linear_normalize=false",
        ),
        (
            {"linear_normalize": True, "linear_family": "delta"},
            "model.linear_normalize=true divides by a sum of weights, which linear:delta does not have; use"
            " model.linear_normalize=false",
        ),
        (
            {"linear_normalize": True, "linear_family": "mamba2"},
            "model.linear_normalize=true divides by a sum of weights, which linear:mamba2 does not have; use"
            " model.linear_normalize=false",
        ),
        ({"linear_num_heads": -1}, "model.linear_num_heads=-1 is negative; use 0 to derive it"),
        ({"state_size": 0}, "model.state_size=0 must be at least 1"),
        ({"gate_rank": 0}, "model.gate_rank=0 must be at least 1"),
        ({"output_gate": "sigmoid"}, "model.output_gate 'sigmoid' is unknown; allowed: auto, silu, none"),
        (
            {"output_norm": "rms"},
            "model.output_norm 'rms' is unknown; did you mean 'rmsnorm'? allowed: rmsnorm, simple_rmsnorm",
        ),
        (
            {"head_dim": 512, "linear_head_dim": 64},
            "model.head_dim=512 is wider than the 256 that attention takes; use more heads or a smaller model.head_dim",
        ),
        (
            {"hidden_size": 1024, "num_heads": 2, "pattern": ["linear"]},
            "hidden_size / num_heads = 512, but keys of linear:fixed can be 256 wide at most; use a smaller"
            " model.linear_head_dim",
        ),
        (
            {"linear_family": "mamba2", "state_size": 257},
            "model.state_size=257, but keys of linear:mamba2 can be 256 wide at most; use a smaller model.state_size",
        ),
        (
            {"linear_value_dim": 300},
            "model.linear_value_dim=300, but values of linear:fixed can be 256 wide at most; use a smaller"
            " model.linear_value_dim",
        ),
        (
            {"linear_head_dim": 256, "linear_normalize": True},
            "model.linear_head_dim=256 and a column for model.linear_normalize, but values of linear:fixed can be 256"
            " wide at most; use a smaller model.linear_value_dim",
        ),
        (
            {"linear_head_dim": 192, "feature_map": "hedgehog"},
            "model.linear_head_dim=192 and model.feature_map=hedgehog makes it 384, but keys of linear:fixed can be 256"
            " wide at most; use a smaller model.linear_head_dim",
        ),
        (
            {"linear_family": "hgrn2", "feature_map": "hedgehog"},
            "model.feature_map=hedgehog widens queries from 64 to 128, but the keys of linear:hgrn2 are its decay; use"
            " a feature map that keeps the width, such as silu",
        ),
        (
            {"feature_map": "silu+l1norm"},
            "model.feature_map=silu+l1norm: feature map 'l1norm' is unknown; did you mean 'l2norm'? allowed: identity,"
            " silu, relu, elu1, softmax, hedgehog, l2norm, or several joined by +",
        ),
        ({"conv_width": 9}, "model.conv_width=9 must be 0 (no convolution), 2 to 8, or -1 for the family's width"),
        ({"conv_width": 1}, "model.conv_width=1 must be 0 (no convolution), 2 to 8, or -1 for the family's width"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError) as error:
        ModelConfig(**settings).validate()
    assert str(error.value) == message


def test_odd_heads_are_fine_without_rotation():
    ModelConfig(hidden_size=20, num_heads=4, pattern=["linear"]).validate()


def test_limits_concern_the_layers_that_exist():
    ModelConfig(hidden_size=1024, num_heads=2, pattern=["linear"], linear_head_dim=64).validate()
    ModelConfig(state_size=999).validate()
    ModelConfig(pattern=["softmax"], linear_head_dim=999).validate()


def test_settings_change_what_families_are_made_of():
    config = ModelConfig()
    assert config.family("linear:hgrn2") == LINEAR_FAMILIES["hgrn2"]
    config = ModelConfig(feature_map="relu", conv_width=0, output_gate="none")
    for kind in LINEAR_KINDS:
        family = config.family(kind)
        delta = kind.removeprefix("linear:") in ("delta", "gated_delta", "kda")
        assert family.feature_map == ("relu+l2norm" if delta else "relu"), "the delta rule needs keys of unit length"
        assert (family.conv_width, family.output_gate, family.delta_rule) == (0, "none", delta)


def test_state_shapes():
    config = ModelConfig(hidden_size=96, num_heads=6)
    assert config.state_shape("linear:gla") == (6, 16, 16)
    assert config.state_shape("linear:mamba2") == (6, 128, 16)
    config = ModelConfig(linear_num_heads=3, linear_head_dim=8, linear_value_dim=24, feature_map="hedgehog")
    assert config.state_shape("linear:fixed") == (3, 16, 24)
