"""Which of Megatron's layers mix tokens by which of longspan's."""

from collections.abc import Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from typing import Literal

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from longspan.models.config import LINEAR_KINDS, ModelConfig
from longspan.models.megatron.attention import CoreAttention, LinearAttention
from longspan.models.megatron.contexts import Contexts
from longspan.models.megatron.own_heads import check_heads

# Settings of ModelConfig that a TransformerConfig or a GPTModel has itself.
MEGATRONS = (
    "task", "vocab_size", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "mlp_size", "pattern",
    "qk_norm", "tie_embeddings", "norm_eps", "init_std", "embedding_std", "loss_chunk",
)  # fmt: skip
OURS = tuple(field.name for field in fields(ModelConfig) if field.name not in MEGATRONS)


def block_spec(
    config: TransformerConfig,
    pattern: Sequence[str],
    *,
    rope: Literal["megatron", "longspan"] = "megatron",
    parallel: dict | None = None,
    base: TransformerBlockSubmodules | None = None,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    **settings,
) -> TransformerBlockSubmodules:
    """The `transformer_layer_spec` of a GPTModel whose layers mix tokens by longspan's attention.

    pattern: kind of each layer, repeated up to config.num_layers, such as ["linear:gated_delta", "softmax"]; kinds and
    settings are those of models.ModelConfig (docs/models.md): softmax, softmax:window, sla, llsa and sparse become core
    attention of Megatron's SelfAttention, linear ones stand in its place. rope: who turns queries and keys, GPTModel
    (its position_embedding_type="rope", angles in fp32) or longspan (position_embedding_type="none", angles formed in
    fp64, settings rope_base and rope_scaling). parallel: options of SequenceParallel and peer_memory, such as
    {"softmax": "zeppelin"}.
    base: the layers whose attention is replaced, of this pipeline stage; by default those of
    get_gpt_decoder_block_spec(config, use_transformer_engine=False). vp_stage, pp_rank: as there.
    Raises ValueError for what does not fit.
    """
    model = _model(config, pattern, settings)
    if rope not in ("megatron", "longspan"):
        raise ValueError(f"rope={rope!r} is unknown; use 'megatron' or 'longspan'")
    if rope == "longspan" and config.no_rope_freq:
        raise ValueError("no_rope_freq leaves layers without rotation, which rope='megatron' knows; use that")
    if base is None:
        base = get_gpt_decoder_block_spec(
            config, False, normalization=config.normalization, vp_stage=vp_stage, pp_rank=pp_rank
        )
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    contexts, layers = Contexts(parallel or {}), []
    for number, layer in enumerate(base.layer_specs, start=offset):
        kind = model.layer_kinds[number]
        check_heads(model, kind, config.tensor_model_parallel_size)
        params = {"kind": kind, "model": model, "contexts": contexts, "rotary": rope == "longspan"}
        layers.append((_with_linear if kind in LINEAR_KINDS else _with_core)(layer, params))
    return replace(base, layer_specs=layers)


def _model(config: TransformerConfig, pattern, settings) -> ModelConfig:
    """The settings of longspan's layers, validated."""
    for name in settings:
        if name not in OURS:
            near = get_close_matches(name, OURS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; those of layers are {', '.join(OURS)}"
            raise ValueError(f"setting {name!r} is not one of longspan's layers{hint}")
    for name, only in (
        ("attention_dropout", 0), ("softmax_scale", None), ("window_size", None), ("softmax_type", "vanilla"),
        ("multi_latent_attention", False), ("apply_query_key_layer_scaling", False), ("qk_clip", False),
    ):  # fmt: skip
        if getattr(config, name) != only:
            raise ValueError(f"{name}={getattr(config, name)} is not supported by longspan's layers; use {name}={only}")
    model = ModelConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_query_groups,
        head_dim=config.kv_channels,
        norm_eps=config.layernorm_epsilon,
        init_std=config.init_method_std,
        pattern=list(pattern),
        **settings,
    )
    model.validate()
    return model


def _with_linear(layer: ModuleSpec, params) -> ModuleSpec:
    if layer.submodules.input_layernorm is IdentityOp:
        raise ValueError(
            "base has layers whose norm is part of the projection that a linear layer replaces; give linear layers a"
            " spec with an input_layernorm, such as that of get_gpt_layer_local_spec"
        )
    attention = ModuleSpec(module=LinearAttention, params=params)
    return replace(layer, submodules=replace(layer.submodules, self_attention=attention))


def _with_core(layer: ModuleSpec, params) -> ModuleSpec:
    attention = layer.submodules.self_attention
    core = ModuleSpec(module=CoreAttention, params=params)
    attention = replace(attention, submodules=replace(attention.submodules, core_attention=core))
    return replace(layer, submodules=replace(layer.submodules, self_attention=attention))
