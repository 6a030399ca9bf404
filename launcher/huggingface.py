"""What Hugging Face's transformers calls weights and settings of Llama and Qwen3: tables for both ways, to its layout
and from it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from longspan.launcher.errors import UserError
from longspan.launcher.parsing import update
from longspan.models.config import ModelConfig

# A softmax layer's parameters and the model's own: what they are called there.
BLOCK_NAMES = {
    "mixer_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "mixer.q_proj": "self_attn.q_proj",
    "mixer.k_proj": "self_attn.k_proj", "mixer.v_proj": "self_attn.v_proj", "mixer.o_proj": "self_attn.o_proj",
    "mixer.q_norm": "self_attn.q_norm", "mixer.k_norm": "self_attn.k_norm", "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj", "mlp.down_proj": "mlp.down_proj",
}  # fmt: skip
ROOT_NAMES = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
# Settings: the key of config.json, and what its absence means; None: it must be there.
SETTINGS = {
    "vocab_size": ("vocab_size", None), "hidden_size": ("hidden_size", None), "mlp_size": ("intermediate_size", None),
    "num_layers": ("num_hidden_layers", None), "num_heads": ("num_attention_heads", None),
    "num_kv_heads": ("num_key_value_heads", 0), "head_dim": ("head_dim", 0), "norm_eps": ("rms_norm_eps", 1e-6),
    "rope_base": ("rope_theta", 10_000.0), "tie_embeddings": ("tie_word_embeddings", False),
}  # fmt: skip
TYPES = {False: ("llama", "Llama"), True: ("qwen3", "Qwen3")}  # by model.qk_norm
# What all models here have in common, where config.json says something of it.
COMMON = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
# Of rope_scaling there, by rope_type: constants of models.rope, where it says something of them.
ROPE_CONSTANTS = {
    "default": {"factor": 1.0, "partial_rotary_factor": 1.0},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True},
}
ORIGINAL = "original_max_position_embeddings"


def huggingface_name(name: str) -> str:
    """What transformers calls the parameter `name` of a decoder of softmax layers."""
    module, _, kind = name.rpartition(".")
    if module.startswith("blocks."):
        _, layer, module = module.split(".", 2)
        return f"model.layers.{layer}.{BLOCK_NAMES[module]}.{kind}"
    return f"{ROOT_NAMES[module]}.{kind}"


def huggingface_config(model: ModelConfig, length: int, dtype: str) -> dict[str, Any]:
    """config.json of transformers: Llama, with norms of queries and keys Qwen3. UserError where a layer is not softmax
    over all that came before."""
    other = [kind for kind in dict.fromkeys(model.layer_kinds) if kind != "softmax"]
    if other or model.task != "text":
        what = f"layers of {', '.join(other)}" if other else f"a model of model.task={model.task}"
        raise UserError(f"--layout huggingface: transformers has no model with {what}: use --layout longspan")
    scaling = {}
    if model.rope_scaling != 1 and model.rope_type == "ntk":
        stretch = model.rope_scaling ** (model.head_size / (model.head_size - 2))
        model = replace(model, rope_base=model.rope_base * stretch)
    elif model.rope_scaling != 1:
        scaling = {"rope_type": model.rope_type, "factor": model.rope_scaling, ORIGINAL: model.rope_trained}
        scaling = {"rope_scaling": scaling | ROPE_CONSTANTS[model.rope_type]}
    kind, name = TYPES[model.qk_norm]
    settings = {key: getattr(explicit(model), setting) for setting, (key, _) in SETTINGS.items()}
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": kind,
        "torch_dtype": dtype,
        "max_position_embeddings": length,
        "bos_token_id": None,
        "eos_token_id": None,
    } | settings | scaling | COMMON  # fmt: skip


def explicit(model: ModelConfig) -> ModelConfig:
    """The same with widths and numbers of heads, of softmax layers and MLPs, that are otherwise derived."""
    return replace(model, num_kv_heads=model.kv_heads, head_dim=model.head_size, mlp_size=model.mlp_width)


def model_settings(config: Mapping[str, Any], source: str) -> ModelConfig:
    """The model that a config.json of transformers describes. UserError, which names `source`, where there is no such
    model here."""
    config = {key: value for key, value in config.items() if value is not None}
    qk_norm = {kind: normed for normed, (kind, _) in TYPES.items()}
    if config.get("model_type") not in tuple(qk_norm):
        raise UserError(
            f"{source}: model_type={config.get('model_type')} cannot be read, only {' and '.join(qk_norm)}: layers here"
            " have no biases and no experts"
        )
    for key, value in COMMON.items():
        _require(source, key, config.get(key, value), value)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}  # the first since transformers 5
    if not isinstance(rope, Mapping):
        raise UserError(f"{source}: rope_scaling is {rope} there, and has settings in the layout of transformers")
    config |= {key: value for key, value in rope.items() if key == "rope_theta"}
    missing = [key for key, default in SETTINGS.values() if default is None and key not in config]
    if missing:
        raise UserError(f"{source}: has no {', '.join(missing)}, which the layout of transformers has")
    values = {name: config.get(key, default) for name, (key, default) in SETTINGS.items()}
    values |= {"pattern": ["softmax"], "qk_norm": qk_norm[config["model_type"]]} | _rope(rope, config, source)
    return update(ModelConfig(), values, source)


def _rope(rope: Mapping[str, Any], config: Mapping[str, Any], source: str) -> dict[str, Any]:
    given = {key: value for key, value in rope.items() if value is not None and key != "rope_theta"}
    kind = given.pop("rope_type", given.pop("type", "default"))
    if kind not in tuple(ROPE_CONSTANTS):
        raise UserError(f"{source}: positions of rope_type={kind} are not known here: {', '.join(ROPE_CONSTANTS)}")
    settings = {}
    if kind != "default":
        if "factor" not in given:
            raise UserError(f"{source}: {kind} has no factor, which the layout of transformers has")
        trained = given.pop(ORIGINAL, config.get("max_position_embeddings", 0))
        settings = {"rope_type": kind, "rope_scaling": given.pop("factor"), "rope_trained": trained}
    for key, value in given.items():
        _require(source, f"{kind}'s {key}", value, ROPE_CONSTANTS[kind].get(key))
    return settings


def _require(source: str, key: str, found: Any, wanted: Any) -> None:
    if found != wanted:
        only = "has no counterpart here" if wanted is None else f"is {wanted} in all models here"
        raise UserError(f"{source}: {key} is {found} there and {only}: start from another model")
