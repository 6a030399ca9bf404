"""The decoder on one rank against a second implementation (decoder_oracle), and what must hold for any input."""

import pytest
import torch
from decoder_oracle import reference_logits

from longspan.models.config import LAYER_KINDS, ModelConfig
from longspan.models.decoder import Decoder
from longspan.parallel import SequenceParallel

TINY = dict(
    vocab_size=19, hidden_size=12, num_heads=2, mlp_size=20, state_size=5, gate_rank=3, rope_base=100.0, init_std=0.3,
    loss_chunk=5,
)  # fmt: skip
BLOCKS = dict(sla_keep=1, sla_query_block=4, sla_key_block=2, llsa_block=2, llsa_keep=1)
CONFIGS = {
    "softmax": dict(pattern=["softmax"], num_layers=2),
    "softmax_gqa_qk_norm_tied": dict(
        pattern=["softmax"], num_layers=1, num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=True, tie_embeddings=True,
        rope_scaling=3.0,
    ),
    "softmax_window": dict(pattern=["softmax:window", "softmax"], num_layers=2, num_kv_heads=1, window=4),
    "sla": dict(pattern=["sla"], num_layers=2, num_kv_heads=1, **BLOCKS),
    "sla_rest": dict(pattern=["sla"], num_layers=2, num_kv_heads=1, sla_linear="rest", **BLOCKS),
    "llsa": dict(pattern=["llsa"], num_layers=2, num_kv_heads=1, **BLOCKS),
    "sparse": dict(
        pattern=["sparse"], num_layers=2, num_kv_heads=1,
        sparse_selection={"name": "tokens", "keep": 2, "query_block": 4, "key_block": 2},
    ),
    "none": dict(pattern=["linear:none"], num_layers=2, feature_map="identity"),
    "fixed": dict(
        pattern=["linear"], num_layers=2, output_gate="none", feature_map="relu", output_norm="simple_rmsnorm",
    ),
    "retention": dict(pattern=["linear:fixed"], num_layers=2, decay_slopes="retention"),
    "scalar": dict(pattern=["linear:scalar"], num_layers=2),
    "normalized": dict(pattern=["linear:scalar"], num_layers=1, linear_normalize=True, feature_map="elu1"),
    "mamba2": dict(pattern=["linear:mamba2"], num_layers=2),
    "mamba2_bare": dict(
        pattern=["linear:mamba2"], num_layers=1, linear_num_heads=3, linear_value_dim=2, conv_width=0,
        feature_map="relu", output_gate="none", output_norm="simple_rmsnorm",
    ),
    "gla": dict(pattern=["linear:gla"], num_layers=2),
    "hgrn2": dict(pattern=["linear:hgrn2"], num_layers=3),
    "hgrn2_convolved": dict(pattern=["linear:hgrn2"], num_layers=1, conv_width=2, output_gate="silu"),
    "delta": dict(pattern=["linear:delta"], num_layers=2),
    "delta_elu1": dict(pattern=["linear:delta"], num_layers=1, feature_map="elu1", conv_width=0),
    "gated_delta": dict(
        pattern=["linear:gated_delta"], num_layers=2, linear_num_heads=3, linear_head_dim=5, linear_value_dim=7,
    ),
    "kda": dict(pattern=["linear:kda"], num_layers=2, linear_num_heads=3, linear_head_dim=5, linear_value_dim=7),
    "own_sizes": dict(
        pattern=["linear:none", "linear:fixed", "linear:scalar", "linear:gla", "linear:hgrn2"], num_layers=5,
        linear_num_heads=3, linear_head_dim=5, linear_value_dim=7, conv_width=3,
    ),
    "hybrid": dict(
        pattern=list(LAYER_KINDS), num_layers=len(LAYER_KINDS), window=3, **BLOCKS,
        sparse_selection={"name": "window", "window": 3},
    ),
}  # fmt: skip
LENGTHS = [6, 1, 9]


def make_model(name, dtype=torch.float64):
    model = Decoder(ModelConfig(**TINY | CONFIGS[name])).to(dtype)
    for name, parameter in model.named_parameters():
        if ".linear_" in name:  # of sla; starts at zero
            torch.nn.init.normal_(parameter)
    return model


def make_batch(lengths, vocab_size=19):
    tokens, labels = torch.randint(vocab_size, (2, sum(lengths)))
    labels[::4] = -100
    return tokens, labels, SequenceParallel().context(lengths)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_reference(name):
    torch.set_default_dtype(torch.float64)  # the reference's constants
    try:
        model = make_model(name)
        tokens, labels, seq = make_batch(LENGTHS)
        wanted = reference_logits(model, tokens, LENGTHS)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(model.logits(tokens, seq), wanted, rtol=1e-10, atol=1e-10)
    loss = sum(-wanted[t].log_softmax(-1)[label] for t, label in enumerate(labels.tolist()) if label != -100)
    torch.testing.assert_close(model(tokens, labels, seq), loss, rtol=1e-10, atol=1e-10)


def test_gradients_by_finite_differences():
    """The whole model along random directions in parameter space, block by block, every kind of layer included."""
    model = make_model("hybrid")
    batch = make_batch(LENGTHS)
    model(*batch).backward()
    inside = {id(parameter) for block in model.blocks for parameter in block.parameters()}
    outside = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    for parameters in [outside, *(list(block.parameters()) for block in model.blocks)]:
        directions, step, losses = [torch.randn_like(parameter) for parameter in parameters], 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                torch._foreach_add_(parameters, directions, alpha=sign * step)
                losses.append(model(*batch))
                torch._foreach_add_(parameters, directions, alpha=-sign * step)
        slope = (losses[0] - losses[1]) / (2 * step)
        along = sum((parameter.grad * direction).sum() for parameter, direction in zip(parameters, directions))
        torch.testing.assert_close(along, slope, rtol=1e-6, atol=1e-7)


def test_documents_do_not_see_each_other():
    model = make_model("hybrid")
    tokens, _, seq = make_batch(LENGTHS)
    together = model.logits(tokens, seq)
    apart = [model.logits(part, SequenceParallel().context([len(part)])) for part in tokens.split(LENGTHS)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-12, atol=1e-12)


def test_the_future_is_not_seen():
    model = make_model("hybrid")
    tokens, _, seq = make_batch([12])
    changed = tokens.clone()
    changed[7] = (changed[7] + 1) % 19
    before, after = model.logits(tokens, seq), model.logits(changed, seq)
    assert torch.equal(before[:7], after[:7])
    assert not torch.isclose(before[7:], after[7:]).all(-1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_lower_precision(dtype):
    exact = make_model("hybrid", torch.float32)
    model = Decoder(exact.config)
    model.load_state_dict(exact.state_dict())
    tokens, labels, seq = make_batch(LENGTHS)
    loss = model.to(dtype)(tokens, labels, seq)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())
    limit = 1e-5 if dtype == torch.float32 else 3e-2
    assert loss.item() == pytest.approx(exact.double()(tokens, labels, seq).item(), rel=limit)


@pytest.mark.parametrize(
    "settings, embedding_std",
    [({}, 1.0), ({"tie_embeddings": True}, 0.1), ({"embedding_std": 0.4}, 0.4)],
    ids=["untied", "tied", "given"],
)
def test_initialisation(settings, embedding_std):
    config = ModelConfig(num_layers=8, hidden_size=128, num_heads=4, vocab_size=500, init_std=0.1, **settings)
    for name, parameter in Decoder(config).named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            std = 0.025 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.1
            std = embedding_std if name == "embedding.weight" else std
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.05 * std, name


def test_a_start_on_the_meta_device_gives_the_same_model():
    config = ModelConfig(**TINY | CONFIGS["hybrid"])
    direct = Decoder(config)
    torch.manual_seed(3)
    direct.init_weights()
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    model.init_weights()
    for (name, a), b in zip(direct.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), name
    tokens, labels, seq = make_batch(LENGTHS)
    assert torch.equal(direct(tokens, labels, seq), model(tokens, labels, seq))


def test_an_invalid_config_is_refused():
    with pytest.raises(ValueError, match="model.pattern entry 'sofmax' is unknown; did you mean 'softmax'"):
        Decoder(ModelConfig(pattern=["sofmax"]))
