"""Counts against arithmetic by hand and against the module itself."""

from itertools import product

import pytest
import torch

from longspan.models.config import LAYER_KINDS, ModelConfig
from longspan.models.decoder import Decoder
from longspan.models.flops import model_flops, model_flops_by_kind, num_parameters

HYBRID = dict(
    vocab_size=31, num_layers=4, hidden_size=16, num_heads=4, num_kv_heads=2, mlp_size=24,
    pattern=["linear:none", "linear:fixed", "linear:scalar", "softmax"],
)  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{}, {"tie_embeddings": True}, {"qk_norm": True}, {"output_gate": "none"}, {"head_dim": 6, "num_kv_heads": 1}],
    ids=["plain", "tied", "qk_norm", "no_gate", "head_dim"],
)
def test_num_parameters_is_that_of_the_module(change):
    config = ModelConfig(**HYBRID | change)
    assert num_parameters(config) == sum(p.numel() for p in Decoder(config).parameters())


def test_num_parameters_by_hand():
    mlp, norms = 3 * 16 * 24, 2 * 16
    linear = 5 * 16 * 16 + 4  # q, k, v, gate, out; norm of a head
    scalar = 16 * 4 + 2 * 4  # projection; A_log, dt_bias
    softmax = 2 * 16 * 16 + 2 * 16 * 8
    assert num_parameters(ModelConfig(**HYBRID)) == 4 * (mlp + norms) + 3 * linear + scalar + softmax + 16 + 2 * 31 * 16


def test_flops_by_hand():
    config = ModelConfig(**HYBRID)
    lengths = [3, 7]
    block_weights = 4 * 3 * 16 * 24 + 3 * 5 * 16 * 16 + 16 * 4 + 2 * 16 * 16 + 2 * 16 * 8
    pairs = 3 * 4 // 2 + 7 * 8 // 2
    assert model_flops_by_kind(config, lengths) == {
        "matmul": 6 * 10 * block_weights,
        "softmax": 3 * 2 * 2 * pairs * 4 * 4,  # scores and values; head size 4, 4 heads
        "sparse": 0,
        "linear": 3 * 10 * 3 * 4 * (2 * 4 * 4 + 2 * 4 * 4),  # 3 layers, 4 heads; write and read of a 4 x 4 state
        "head": 6 * 10 * 16 * 31,
    }
    assert model_flops(config, lengths) == sum(model_flops_by_kind(config, lengths).values())


LINEAR = dict(
    vocab_size=31, num_layers=1, hidden_size=16, num_heads=4, mlp_size=24, linear_num_heads=3, linear_head_dim=5,
    linear_value_dim=7, state_size=6, gate_rank=2,
)  # fmt: skip
QKVO = 2 * 16 * 15 + 2 * 16 * 21
CONVOLUTION = 4 * (2 * 15 + 21)
# weights that multiply every token, and multiplications with the state: writes and reads of 3 heads
BY_HAND = {
    "none": (QKVO + 16 * 21, 2 * 3 * 5 * 7),
    "fixed": (QKVO + 16 * 21, 2 * 3 * 5 * 7),
    "scalar": (QKVO + 16 * 21 + 16 * 3, 2 * 3 * 5 * 7),
    "mamba2": (16 * (2 * 21 + 2 * 6 + 3) + 4 * (21 + 2 * 6) + 21 * 16, 2 * 3 * 6 * 7),
    "gla": (QKVO + 16 * 21 + 16 * 2 + 2 * 15, 2 * 3 * 5 * 7),
    "hgrn2": (QKVO, 2 * 3 * 5 * 7),  # the gate has no projection of its own
    "delta": (QKVO + CONVOLUTION + 16 * 3, 3 * 3 * 5 * 7),
    "gated_delta": (QKVO + 16 * 21 + CONVOLUTION + 2 * 16 * 3, 3 * 3 * 5 * 7),
    "kda": (QKVO + 16 * 21 + CONVOLUTION + 16 * 2 + 2 * 15 + 16 * 3, 3 * 3 * 5 * 7),
}


@pytest.mark.parametrize("family", BY_HAND)
def test_flops_of_every_family_by_hand(family):
    found = model_flops_by_kind(ModelConfig(**LINEAR, pattern=[f"linear:{family}"]), [4, 9])
    weights, state = BY_HAND[family]
    assert found["matmul"] == 6 * 13 * (weights + 3 * 16 * 24)
    assert found["linear"] == 6 * 13 * state
    assert found["softmax"] == 0


def test_a_window_leaves_few_pairs():
    """Document by document: growing up to the window, then the window for every token."""
    shape = dict(vocab_size=31, hidden_size=16, num_heads=4, mlp_size=24)

    def flops(*pattern, window=5):
        config = ModelConfig(**shape, num_layers=len(pattern), pattern=[*pattern], window=window)
        return model_flops_by_kind(config, [3, 12])

    pairs = 3 * 4 // 2 + 5 * 6 // 2 + 7 * 5
    assert flops("softmax:window")["softmax"] == 3 * 2 * 2 * pairs * 4 * 4
    full = flops("softmax", window=0)
    assert flops("softmax", "softmax:window")["softmax"] == flops("softmax:window")["softmax"] + full["softmax"]
    assert flops("softmax:window", window=12) == full


def test_sparse_layers_by_hand():
    shape = dict(vocab_size=31, hidden_size=16, num_heads=4, mlp_size=24, num_layers=1)
    # Blocks of 2 queries and 2 keys, one of the past each: the second and third block see 2 keys of the past.
    sla = ModelConfig(**shape, pattern=["sla"], sla_keep=1, sla_query_block=2, sla_key_block=2)
    pairs, tokens = 3 + (2 * 2 + 3) + 2 + 1, 5
    linear = 2 * 2 * 4 * 5 * 4  # writes and reads of a 4 x 5 state, the normaliser's column with it
    assert model_flops_by_kind(sla, [tokens])["sparse"] == 3 * (4 * 4 * 4 * pairs + tokens * (linear + 2 * 3 * 4 * 4))
    grouped = ModelConfig(**shape, pattern=["sla"], sla_keep=1, sla_query_block=2, sla_key_block=2, num_kv_heads=2)
    linear = (4 + 2) * 2 * 4 * 5  # heads read, key heads write
    assert model_flops_by_kind(grouped, [tokens])["sparse"] == 3 * (64 * pairs + tokens * (linear + 2 * 3 * 4 * 4))
    # Blocks of 2, one level: all means of blocks before one's own, one block of tokens, one's own.
    llsa = ModelConfig(**shape, pattern=["llsa"], llsa_block=2, llsa_keep=1, llsa_levels=1)
    pairs = (1 + 2) + (1 + 2 + 1 + 1 + 2 + 2) + (2 + 2 + 1)
    assert model_flops_by_kind(llsa, [5])["sparse"] == 3 * 4 * 4 * 4 * pairs
    window = ModelConfig(**shape, pattern=["sparse"], sparse_selection={"name": "window", "window": 3})
    assert model_flops_by_kind(window, [5, 2])["sparse"] == 3 * 4 * 4 * 4 * (1 + 2 + 3 + 3 + 3 + 1 + 2)


def test_layers_that_look_both_ways_by_hand():
    shape = dict(task="images", hidden_size=16, num_heads=4, mlp_size=24, num_layers=1)
    lengths, matmul = [16, 4], 3 * 16 * 24 + 4 * 16 * 16
    found = model_flops_by_kind(ModelConfig(**shape, pattern=["softmax"]), lengths)
    assert found["softmax"] == 3 * 2 * 2 * (16 * 16 + 4 * 4) * 4 * 4
    assert found["matmul"] == 6 * 20 * matmul  # nothing for the modulation, which is made once per image
    assert found["head"] == 6 * 20 * 16 * (3 + 3)  # pixels in and out
    sla = ModelConfig(**shape, pattern=["sla"], sla_keep=2, sla_query_block=8, sla_key_block=4)
    linear = 2 * 2 * 4 * 5 * 4
    sparse = 4 * 4 * 4 * (16 * 2 * 4 + 4 * 4) + 20 * (linear + 2 * 3 * 4 * 4)
    assert model_flops_by_kind(sla, lengths)["sparse"] == 3 * sparse
    llsa = ModelConfig(**shape, pattern=["llsa"], llsa_block=2, llsa_keep=1, llsa_levels=2)
    # All rows of level 2, of level 1 the two under the chosen one, and one block of tokens.
    assert model_flops_by_kind(llsa, lengths)["sparse"] == 3 * 4 * 4 * 4 * (16 * (4 + 2 + 2) + 4 * (1 + 2 + 2))


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_kinds_add_up(kind):
    """Layers count on their own: two of a kind are twice one, whatever stands beside them."""

    def flops(*pattern):
        settings = LINEAR | {"num_layers": len(pattern), "window": 4 * ("softmax:window" in pattern)}
        if "sparse" in pattern:
            settings["sparse_selection"] = {"name": "window", "window": 3}
        return model_flops_by_kind(ModelConfig(**settings, pattern=[*pattern]), [11])

    for name, other in product(("matmul", "softmax", "sparse", "linear"), ("softmax", "linear:delta")):
        assert flops(kind, other)[name] == flops(kind)[name] + flops(other)[name]


def test_features_and_the_normaliser_count():
    plain = model_flops_by_kind(ModelConfig(**LINEAR, pattern=["linear:gla"], feature_map="elu1"), [8])
    config = ModelConfig(**LINEAR, pattern=["linear:gla"], feature_map="elu1", linear_normalize=True)
    assert model_flops_by_kind(config, [8])["linear"] * 7 == plain["linear"] * 8  # one more column
    config = ModelConfig(**LINEAR, pattern=["linear:none"], feature_map="hedgehog")
    found = model_flops_by_kind(config, [8])
    assert found["linear"] == 2 * plain["linear"]  # twice as many features
    assert found["matmul"] == 6 * 8 * (BY_HAND["none"][0] + 3 * 16 * 24 + 2 * 3 * 5 * 5)  # maps of 3 heads for q and k


def test_softmax_share_grows_with_the_square_and_the_rest_with_tokens():
    config = ModelConfig(**HYBRID)
    short, long = model_flops_by_kind(config, [4096]), model_flops_by_kind(config, [8192])
    assert long["softmax"] == pytest.approx(4 * short["softmax"], rel=1e-3)
    for kind in ("matmul", "linear", "head"):
        assert long[kind] == 2 * short[kind]


def test_counting_leaves_the_default_device_alone():
    num_parameters(ModelConfig(**HYBRID | {"num_layers": 3}))
    assert torch.tensor(0).device.type == "cpu"


def test_an_invalid_config_is_refused():
    with pytest.raises(ValueError, match="model.num_kv_heads=3"):
        num_parameters(ModelConfig(num_heads=4, num_kv_heads=3))
