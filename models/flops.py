"""Model FLOPs and parameters: what MFU and the estimate count.

Backward is twice the forward, less what frozen parameters spare: their own gradients, and in front of the first block
that has something to train all of the backward. Recomputation, norms, rotations, gates, what is done once per image and
the optimizer are not counted. Softmax attention counts the query-key pairs the mask and a window leave, document by
document; sparse attention those of chosen blocks and coarse keys, without choosing; linear attention its recurrence,
whatever a chunked kernel computes instead: per token and head a write and a read of the state, 2 K V each, and with the
delta rule one more read, of what the state holds for the key. Decay is not counted, of whatever shape.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict
from functools import lru_cache

import torch

from longspan.models.build import build_model
from longspan.models.config import CHANNELS, LINEAR_KINDS, SOFTMAX_KINDS, SPARSE_KINDS, ModelConfig
from longspan.models.trainable import ALL, Trainable
from longspan.parallel.geometry import Mask
from longspan.parallel.layout import Span


def model_flops(config: ModelConfig, lengths: Iterable[int], trainable: Trainable = ALL) -> float:
    """Forward and backward FLOPs of a batch of documents with these lengths, over all ranks; trainable: what is
    trained."""
    return sum(model_flops_by_kind(config, lengths, trainable).values())


def model_flops_by_kind(config: ModelConfig, lengths: Iterable[int], trainable: Trainable = ALL) -> dict[str, float]:
    """The same, split: projections, MLPs, convolutions ("matmul"), "softmax", "sparse" and "linear" attention, output
    "head" (of images: pixels in and out)."""
    lengths = list(lengths)
    tokens, sizes = sum(lengths), _sizes(config, trainable)
    flops = dict.fromkeys(("matmul", "softmax", "sparse", "linear"), 0.0)
    for layer, kind in enumerate(config.layer_kinds):
        backward = layer >= sizes["first"]
        whole, trained = sizes["products"][layer]
        flops["matmul"] += 2.0 * tokens * ((1 + backward) * whole + trained)
        room, count = _attention(config, kind, lengths)
        flops[room] += (1 + 2 * backward) * count
    head = 2.0 * tokens * config.hidden_size * (config.vocab_size if config.task == "text" else 2 * CHANNELS)
    return flops | {"head": head * (1 + sizes["head"] + sizes["before head"])}


def softmax_masks(config: ModelConfig) -> list[Mask]:
    """The mask of every softmax layer, in their order."""
    return [Mask(config.causal, config.window_of(kind)) for kind in config.layer_kinds if kind in SOFTMAX_KINDS]


def _attention(config, kind, lengths):
    """("softmax", "sparse" or "linear", forward FLOPs of such a layer)."""
    if kind in LINEAR_KINDS:
        return "linear", 1.0 * sum(lengths) * _recurrence(config, kind)
    if kind in SPARSE_KINDS:
        return "sparse", _sparse(config, kind, lengths)
    mask = Mask(config.causal, config.window_of(kind))
    pairs = sum(mask.pairs(Span(0, 0, length), length) for length in lengths)
    return "softmax", 4.0 * pairs * config.head_size * config.num_heads


def _sparse(config, kind, lengths):
    """Forward FLOPs of a sparse layer; of sla with its linear part, whose projection "matmul" counts for one head."""
    selection, heads, width, tokens = config.selection(kind), config.num_heads, config.head_size, sum(lengths)
    direction = {} if config.causal else {"causal": False}
    flops = 4.0 * heads * width * sum(selection.pairs(length, **direction) for length in lengths)
    if kind == "sla":
        states = heads + config.kv_heads  # reads and writes
        flops += tokens * (2.0 * states * width * (width + 1) + 2.0 * (heads - 1) * width * width)
    return flops


def _recurrence(config, kind):
    """Forward FLOPs per token of a linear layer's state."""
    heads, key_size, value_size = config.state_shape(kind)
    columns = value_size + config.linear_normalize  # a normaliser is one more value column
    return (3 if config.family(kind).delta_rule else 2) * 2 * heads * key_size * columns


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the model, embeddings included."""
    return _sizes(config, ALL)["parameters"]


def num_trained(config: ModelConfig, trainable: Trainable) -> int:
    """Those that are trained. ValueError for patterns that do not fit."""
    return _sizes(config, trainable)["trained"]


def _sizes(config, trainable):
    # Dataclasses that may change are not hashable; this runs once per step.
    return _measure(json.dumps(asdict(config)), trainable)


@lru_cache
def _measure(settings, trainable):
    """Counted on the module itself, built without memory, so that no second formula can disagree with it."""
    config = ModelConfig(**json.loads(settings))
    with torch.device("meta"):
        model = build_model(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    trained = set(trainable.names(model))
    # Vectors scale and shift. What has more dimensions (projections, convolutions, learned feature maps) multiplies
    # every token.
    layers = [[name for name in shapes if name.startswith(f"blocks.{layer}.")] for layer in range(config.num_layers)]
    products = [[name for name in names if len(shapes[name]) > 1] for names in layers]
    last = ("blocks.", "norm.", "head.")
    in_front = any(not name.startswith(last) for name in trained)
    begins = [layer for layer, names in enumerate(layers) if in_front or not trained.isdisjoint(names)]

    def count(names):
        return sum(shapes[name].numel() for name in names)

    return {
        "parameters": count(shapes),
        "trained": count(trained),
        "products": [(count(names), count(trained.intersection(names))) for names in products],
        "first": min(begins, default=config.num_layers),  # block that a gradient comes to
        "head": any(name.startswith("embedding." if config.tie_embeddings else "head.") for name in trained),
        "before head": any(not name.startswith("head.") for name in trained),
    }
