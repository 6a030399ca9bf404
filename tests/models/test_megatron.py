"""longspan's layers in a GPTModel: tensor- and context-parallel ranks against one rank, one rank against formulas."""

import importlib
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from spawn import run_ranks

pytest.importorskip("megatron.core")

VOCAB, SEQUENCE, BATCH = 20, 24, 2
ALL = ["softmax", "softmax:window", "sla", "llsa", "sparse"]
ALL += [f"linear:{family}" for family in ("none", "fixed", "scalar", "gla", "hgrn2", "delta", "gated_delta", "kda")]
SMALL = {
    "window": 5, "sla_keep": 1, "sla_query_block": 4, "sla_key_block": 2, "llsa_block": 2, "llsa_keep": 1,
    "sparse_selection": {"name": "window", "window": 4, "query_block": 2, "key_block": 2},
}  # fmt: skip
MIXED = ["linear:scalar", "sla", "linear:fixed", "softmax"]  # what has weights of a head, or channels of three streams
OF_HEADS = {
    "feature_map": "hedgehog", "sla_feature_map": "hedgehog", "conv_width": 3, "linear_value_dim": 6, "sla_keep": 2,
    "sla_query_block": 4, "sla_key_block": 2, "decay_slopes": "retention",
}  # fmt: skip


def transformer_config(num_layers, **settings):
    from megatron.core.transformer import TransformerConfig

    given = {
        "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 8, "attention_dropout": 0.0,
        "hidden_dropout": 0.0, "normalization": "RMSNorm", "add_bias_linear": False, "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False, "qk_layernorm": True, "bias_dropout_fusion": False,
        "hetereogenous_dist_checkpoint": True,
    }  # fmt: skip
    return TransformerConfig(num_layers=num_layers, **(given | settings))


def model_of(pattern, settings, tp=1, cp=1, rope="longspan", **more):
    from megatron.core.models.gpt import GPTModel

    from longspan.models.megatron import block_spec

    torch.manual_seed(5)
    config = transformer_config(len(pattern), tensor_model_parallel_size=tp, context_parallel_size=cp, **more)
    spec = block_spec(config, pattern, rope=rope, **settings)
    model = GPTModel(config, spec, VOCAB, SEQUENCE, position_embedding_type="none").double()
    with torch.no_grad():  # no weight of ones or zeros, which would hide that it is left out
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "linear_weight" in name:
                shared = not getattr(parameter, "tensor_model_parallel", "gate" in name)
                steps = torch.linspace(0.1, 0.5, parameter.numel(), dtype=torch.double).view_as(parameter)
                parameter.add_(steps if shared else 0.2)
    return model


def initialize(tp, cp):
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tp, context_parallel_size=cp)
    return parallel_state


def tokens_and_weights():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (BATCH, SEQUENCE), generator=generator)
    return tokens, torch.randn(BATCH, SEQUENCE, VOCAB, generator=generator, dtype=torch.double)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def part_of_rank(name, parameter, whole, rank, ranks):
    """A rank's part of a gradient of the whole model."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    if "conv" in name:
        keys = 4 * 8  # channels, of queries too
        pieces = [whole[:keys], whole[keys : 2 * keys], whole[2 * keys :]]
        return torch.cat([piece.view(ranks, -1, piece.shape[-1])[rank] for piece in pieces])
    return whole.chunk(ranks, parameter.partition_dim)[rank]


def assert_same(found, expected, what):
    error = (found - expected).norm() / expected.norm()
    assert error < 1e-9, f"{what}: {error}"


def compare_ranks(rank, world_size):
    warnings.simplefilter("ignore")
    import torch.distributed as dist
    from megatron.core.utils import get_batch_on_this_cp_rank

    tokens, weights = tokens_and_weights()
    initialize(1, 1)
    references = []
    for pattern, settings in ((ALL, SMALL), (MIXED, OF_HEADS)):
        model = model_of(pattern, settings)
        logits = model(tokens, None, None)
        references.append((pattern, settings, logits.detach(), gradients(model, (logits * weights).sum())))
    for tp, cp in ((2, 2), (1, 4)):
        state = initialize(tp, cp)
        tp_rank, cp_group = state.get_tensor_model_parallel_rank(), state.get_context_parallel_group()
        for pattern, settings, whole, expected_gradients in references:
            model = model_of(pattern, settings, tp, cp)
            batch = get_batch_on_this_cp_rank({"x": tokens, "weights": weights, "expected": whole})
            logits = model(batch["x"], None, None)
            expected, weights_here = (x.chunk(tp, -1)[tp_rank] for x in (batch["expected"], batch["weights"]))
            assert_same(logits, expected, (tp, cp))
            found = gradients(model, (logits * weights_here).sum())
            for name, parameter in model.named_parameters():
                dist.all_reduce(found[name], group=cp_group)
                if "_layernorm" in name and "self_attention" in name:  # as Megatron's finalize_model_grads
                    dist.all_reduce(found[name], group=state.get_tensor_model_parallel_group())
                part = part_of_rank(name, parameter, expected_gradients[name], tp_rank, tp)
                assert_same(found[name], part, (tp, cp, name))
        if tp == 2:
            check_checkpoints(model, tp_rank)
        compare_packed(references[1], tp, cp)


def compare_packed(reference, tp, cp):
    """Documents of a packed batch against the same documents alone, on as many ranks."""
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams

    pattern, settings, *_ = reference
    model = model_of(pattern, settings, tp, cp)
    lengths, rank = (8, 24, 8), parallel_state.get_context_parallel_rank()
    generator = torch.Generator().manual_seed(2)
    documents = [torch.randint(VOCAB, (1, length), generator=generator) for length in lengths]
    mine = [torch.cat([x.chunk(2 * cp, 1)[i] for i in (rank, 2 * cp - 1 - rank)], 1) for x in documents]
    bounds = torch.tensor([0, 8, 32, 40], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    logits = model(torch.cat(mine, 1), None, None, packed_seq_params=packed)
    for document, found in zip(mine, logits.split([x.shape[1] for x in mine], 1)):
        assert_same(found, model(document, None, None), "packed")
    with pytest.raises(ValueError, match=r"cut into 2 equal chunks .* pad it to 1[26]"):
        bounds = torch.tensor([0, 8 + 1, 8 + 1 + 31])
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
        model(torch.cat(mine, 1), None, None, packed_seq_params=packed)


def check_checkpoints(model, tp_rank):
    """Where distributed checkpoints put a rank's part of weights: 4 heads, 2 on each rank."""
    prefix = "decoder.layers.0.self_attention.mixer."
    state = model.sharded_state_dict()
    shapes = {"o_proj.weight": (32, 24), "decay.gate.A_log": (4,), "q_map.weight": (4, 8, 8)}
    for name, shape in shapes.items():
        entry, dim = state[prefix + name], int(name == "o_proj.weight")
        assert entry.key == prefix + name and entry.global_shape == shape
        assert entry.global_offset[dim] == tp_rank * shape[dim] // 2
    query, _, value = state[prefix + "conv.weight"].build()
    assert query.key == f"{prefix}conv.weight.query" and query.global_shape == (32, 3)
    assert value.global_shape == (24, 3) and value.global_offset[0] == tp_rank * 12
    assert state[prefix + "o_norm.weight"].global_shape == state[prefix + "o_norm.weight"].local_shape == (6,)


def check_one_rank(rank, world_size):
    """One rank against formulas, layer by layer; rotation by Megatron against rotation here."""
    warnings.simplefilter("ignore")
    initialize(1, 1)
    tokens, _ = tokens_and_weights()
    pattern = ["softmax", "linear:gated_delta", "linear:fixed", "linear:mamba2"]
    model = model_of(pattern, {"rope_base": 100.0})
    x_SBD = torch.randn(SEQUENCE, BATCH, 32, dtype=torch.double)

    attention = model.decoder.layers[0].self_attention
    q, k, v = attention.get_query_key_value_tensors(x_SBD)
    angles = torch.arange(SEQUENCE)[:, None, None, None] * 100.0 ** (-torch.arange(0, 8, 2, dtype=torch.double) / 8)
    turned = [torch.view_as_real(torch.polar(torch.ones_like(angles), angles) * complex_of(x)) for x in (q, k)]
    q, k = (torch.cat(x.unbind(-1), -1) for x in turned)
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).permute(2, 0, 1, 3).flatten(2)
    expected, _ = attention.linear_proj(dense)
    assert_same(attention(x_SBD, None)[0], expected, "softmax")

    # Megatron forms its angles on a GPU; these are given.
    theirs = model_of(["softmax"], {}, rope="megatron")
    theirs.load_state_dict(model.state_dict(), strict=False)
    emb = torch.cat([angles, angles], -1).squeeze(1)[:, None]
    assert_same(theirs.decoder.layers[0].self_attention(x_SBD, None, rotary_pos_emb=emb)[0], expected, "rope")

    from longspan.models.config import ModelConfig
    from longspan.models.mixers import build_mixer
    from longspan.parallel import SequenceParallel

    config = ModelConfig(hidden_size=32, num_heads=4, num_layers=4, norm_eps=1e-5)
    for layer, kind in enumerate(pattern[1:], start=1):
        attention = model.decoder.layers[layer].self_attention
        mixer = build_mixer(config, layer, kind).double()
        mixer.load_state_dict(attention.mixer.state_dict())
        found, bias = attention(x_SBD, None)
        assert bias is None and found.is_contiguous()
        with pytest.raises(ValueError, match="turned twice: .* position_embedding_type='none'"):
            attention(x_SBD, None, rotary_pos_emb=emb)
        for sequence in range(BATCH):
            alone = mixer(x_SBD[:, sequence], None, SequenceParallel().context([SEQUENCE]))
            assert_same(found[:, sequence], alone, kind)
    conv = "decoder.layers.3.self_attention.mixer.conv.weight"
    assert model.sharded_state_dict()[conv].global_shape == attention.mixer.conv.weight.shape


def complex_of(x):
    return torch.complex(*x.chunk(2, -1))


def test_ranks_have_the_logits_and_gradients_of_one_rank():
    run_ranks(compare_ranks, 4)


def test_one_rank_is_what_formulas_say():
    run_ranks(check_one_rank, 1)


def test_pipeline_stages_have_their_layers_of_the_pattern():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from longspan.models.megatron import block_spec

        config = transformer_config(6, pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
        spec = block_spec(config, ["linear:fixed", "softmax"], pp_rank=1)
    found = [layer.submodules.self_attention for layer in spec.layer_specs]
    assert [attention.module.__name__ for attention in found] == ["SelfAttention", "LinearAttention", "SelfAttention"]
    assert found[0].submodules.core_attention.params["kind"] == "softmax"


def test_absence_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    monkeypatch.delitem(sys.modules, "longspan.models.megatron", raising=False)
    with pytest.raises(ImportError, match="needs megatron-core .*; pip install 'megatron-core>=0.16.1,<0.17'"):
        importlib.import_module("longspan.models.megatron")


@pytest.mark.parametrize(
    ("pattern", "settings", "config", "message"),
    [
        (["softmx"], {}, {}, "'softmx' is unknown; did you mean 'softmax'"),
        (["softmax"], {"widow": 4}, {}, "setting 'widow' .*'window'"),
        (["softmax"], {"num_heads": 4}, {}, "setting 'num_heads' is not one of longspan's layers"),
        (["softmax"], {"rope": "none"}, {}, "rope='none' is unknown"),
        (["softmax"], {"rope": "longspan"}, {"no_rope_freq": 2}, "no_rope_freq leaves layers"),
        (
            ["softmax"],
            {"parallel": {"layout": "zigzag"}},
            {},
            "parallel has 'layout', which is none of linear, softmax",
        ),
        (["softmax"], {}, {"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported"),
        (["linear:mamba2"], {}, {"tensor_model_parallel_size": 2}, "linear:mamba2 .* cannot be shared by 2"),
        (["linear:gla"], {"linear_num_heads": 3}, {"tensor_model_parallel_size": 2}, "linear_num_heads=3"),
    ],
)
def test_what_does_not_fit_is_named(pattern, settings, config, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from longspan.models.megatron import block_spec

        with pytest.raises(ValueError, match=message):
            block_spec(transformer_config(2, **config), pattern, pp_rank=0, **settings)


def test_sequence_parallel_layers():
    run_ranks(compare_sequence_parallel, 2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_sequence_parallel_layers_on_gpus(tmp_path):
    run_ranks(compare_sequence_parallel, 2, str(tmp_path / "store"))


def compare_sequence_parallel(rank, world_size, store=None):
    """In front of a layer and behind it activations are cut among tensor-parallel ranks. store: of a run on GPUs."""
    warnings.simplefilter("ignore")
    import torch.distributed as dist

    if store is None:
        torch.cuda.current_device = lambda: "cpu"  # where Megatron puts what it receives
    else:
        torch.cuda.set_device(rank)
        dist.destroy_process_group()  # of gloo
        dist.init_process_group("nccl", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    generator = torch.Generator().manual_seed(3)
    x_SBD, weights = torch.randn(2, SEQUENCE, BATCH, 32, generator=generator, dtype=torch.double).to(
        "cuda" if store else "cpu"
    )
    for kind in ("linear:gla", "linear:gated_delta"):
        out, whole = run_layer(kind, 1, x_SBD, weights)
        x, part_of_weights, part_of_out = (x.chunk(world_size)[rank] for x in (x_SBD, weights, out))
        found, parts = run_layer(kind, world_size, x, part_of_weights)
        assert_same(found, part_of_out, kind)
        assert_same(parts["x"], whole["x"].chunk(world_size)[rank], kind)
        for name in whole.keys() - {"x"}:
            parameter = parts[name]
            assert_same(parameter.grad, part_of_rank(name, parameter, whole[name].grad, rank, world_size), name)


def run_layer(kind, tp, x, weights):
    """The output, and by name the gradient of x and parameters with theirs."""
    from megatron.core.transformer.spec_utils import build_module

    from longspan.models.megatron import block_spec

    initialize(tp, 1)
    torch.manual_seed(5)
    config = transformer_config(1, tensor_model_parallel_size=tp, sequence_parallel=tp > 1)
    (spec,) = block_spec(config, [kind]).layer_specs
    layer = build_module(spec.submodules.self_attention, config=config, layer_number=1)
    layer = layer.to(x)
    x = x.clone().requires_grad_()
    out, _ = layer(x)
    (out * weights).sum().backward()
    return out.detach(), {"x": x.grad, **dict(layer.named_parameters())}
