"""The weights of a checkpoint as safetensors, under longspan's names or under those of Hugging Face's transformers."""

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from longspan.launcher.errors import UserError
from longspan.launcher.files import replace_text
from longspan.launcher.stored_models import load_model, stored
from longspan.models.config import ModelConfig

# A softmax layer's parameters and the model's own: what they are called in Llama and Qwen3.
BLOCK_NAMES = {
    "mixer_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "mixer.q_proj": "self_attn.q_proj",
    "mixer.k_proj": "self_attn.k_proj", "mixer.v_proj": "self_attn.v_proj", "mixer.o_proj": "self_attn.o_proj",
    "mixer.q_norm": "self_attn.q_norm", "mixer.k_norm": "self_attn.k_norm", "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj", "mlp.down_proj": "mlp.down_proj",
}  # fmt: skip
ROOT_NAMES = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}


def export_run(run: str, output: str, layout: str, dtype: str) -> None:
    """Writes model.safetensors and config.json to the folder `output`: of the newest checkpoint of `run`, or of that
    checkpoint. UserError for what does not fit."""
    info, config = stored(run)
    settings, rename = asdict(config.model), str
    if layout == "huggingface":
        settings, rename = huggingface_config(config.model, config.data.seq_len, dtype), huggingface_name
    weights = load_model(info, config).state_dict()
    weights = {rename(name): value.to(getattr(torch, dtype)).contiguous() for name, value in weights.items()}
    folder = Path(output)
    partial = folder / ".model.safetensors.partial"
    metadata = {"format": "pt", "longspan_checkpoint": str(info.path), "longspan_step": str(info.step)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, partial, metadata)
        partial.replace(folder / "model.safetensors")
        replace_text(folder / "config.json", json.dumps(settings, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink()
        raise UserError(f"--output {output}: cannot be written ({getattr(error, 'strerror', None) or error})") from None
    numbers = sum(value.numel() for value in weights.values())
    print(f"wrote {folder / 'model.safetensors'}: {len(weights)} tensors, {numbers:,} numbers in {dtype}")


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
    theta = model.rope_base
    if model.rope_scaling != 1:
        theta *= model.rope_scaling ** (model.head_size / (model.head_size - 2))
    name = "Qwen3" if model.qk_norm else "Llama"
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": name.lower(),
        "torch_dtype": dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.mlp_width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": length,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": theta,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
