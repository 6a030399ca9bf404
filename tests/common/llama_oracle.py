"""Llama and Qwen3 by their published formulas: config.json and weights as transformers names them, in fp64."""

import math

import torch


def frequencies(config):
    """Radians per token of every pair of a head, and what rotated vectors are multiplied by."""
    size, base = config["head_dim"], config["rope_theta"]
    plain = [base ** (-2 * i / size) for i in range(size // 2)]
    rope = config.get("rope_scaling") or {"rope_type": "default"}
    if rope["rope_type"] == "default":
        return plain, 1.0
    factor, context = rope["factor"], rope["original_max_position_embeddings"]
    if rope["rope_type"] == "llama3":
        return [_llama3(turn, factor, context) for turn in plain], 1.0

    def index(rotations):  # of the pair that turns so often within the context
        return size * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(index(32)), 0), min(math.ceil(index(1)), size - 1)
    mixed = []
    for i, turn in enumerate(plain):
        ramp = min(max((i - low) / (high - low if high > low else 0.001), 0), 1)
        mixed.append(turn / factor * ramp + turn * (1 - ramp))
    return mixed, 0.1 * math.log(factor) + 1


def _llama3(turn, factor, context):
    wavelength = 2 * math.pi / turn
    if wavelength < context / 4:
        return turn
    if wavelength > context:
        return turn / factor
    smooth = (context / wavelength - 1) / (4 - 1)
    return (1 - smooth) * turn / factor + smooth * turn


def llama_logits(weights, config, tokens):
    """[T, V] in fp64. weights: by their names in transformers; config: its config.json; tokens: [T] of one document."""
    weights = {name: value.double() for name, value in weights.items()}

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * weights[f"{name}.weight"]

    size, count = config["head_dim"], len(tokens)
    turns, length = frequencies(config)
    angles = (torch.arange(count)[:, None] * torch.tensor(turns, dtype=torch.float64)).repeat(1, 2)[:, None]

    def heads(x, layer, name):
        x = (x @ weights[f"{layer}.self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, size))
        if f"{layer}.self_attn.{name}_norm.weight" in weights:
            x = norm(x, f"{layer}.self_attn.{name}_norm")
        if name == "v":
            return x
        first, second = x.chunk(2, -1)
        return length * (x * angles.cos() + torch.cat((-second, first), -1) * angles.sin())

    x = weights["model.embed_tokens.weight"][tokens]
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        y = norm(x, f"{layer}.input_layernorm")
        q, k, v = (heads(y, layer, name) for name in "qkv")
        shared = config["num_attention_heads"] // config["num_key_value_heads"]
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        scores = torch.einsum("thd,shd->hts", q, k) * size**-0.5
        scores = scores.masked_fill(torch.ones(count, count, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        x = x + torch.einsum("hts,shd->thd", scores, v).flatten(1) @ weights[f"{layer}.self_attn.o_proj.weight"].T
        y = norm(x, f"{layer}.post_attention_layernorm")
        gate, up, down = (weights[f"{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        x = x + (torch.nn.functional.silu(y @ gate.T) * (y @ up.T)) @ down.T
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return norm(x, "model.norm") @ weights[head].T
