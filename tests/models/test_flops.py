"""Counts against arithmetic by hand and against the module itself."""

import pytest
import torch

from longspan.models.config import ModelConfig
from longspan.models.decoder import Decoder
from longspan.models.flops import model_flops, model_flops_by_kind, num_parameters

HYBRID = dict(
    vocab_size=31, num_layers=4, hidden_size=16, num_heads=4, num_kv_heads=2, mlp_size=24,
    pattern=["linear:none", "linear:fixed", "linear:scalar", "softmax"],
)  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{}, {"tie_embeddings": True}, {"qk_norm": True}, {"output_gate": False}, {"head_dim": 6, "num_kv_heads": 1}],
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
        "linear": 3 * 10 * 3 * 4 * (2 * 4 * 4 + 2 * 4 * 4),  # 3 layers, 4 heads; write and read of a 4 x 4 state
        "head": 6 * 10 * 16 * 31,
    }
    assert model_flops(config, lengths) == sum(model_flops_by_kind(config, lengths).values())


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
