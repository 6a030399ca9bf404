"""Model FLOPs and parameters: what MFU and the estimate count.

Backward is twice the forward; recomputation, norms, rotations, gates, what is done once per image and the optimizer
are not counted. Softmax attention counts the query-key pairs the mask and a window leave, document by document; sparse
attention those of chosen blocks and coarse keys, without choosing; linear attention its recurrence, whatever a chunked
kernel computes instead: per token and head a write and a read of the state, 2 K V each, and with the delta rule one
more read, of what the state holds for the key. Decay is not counted, of whatever shape.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict
from functools import lru_cache

import torch

from longspan.models.build import build_model
from longspan.models.config import CHANNELS, LINEAR_KINDS, SOFTMAX_KINDS, SPARSE_KINDS, ModelConfig
from longspan.parallel.geometry import Mask
from longspan.parallel.layout import Span


def model_flops(config: ModelConfig, lengths: Iterable[int]) -> float:
    """Forward and backward FLOPs of a batch of documents with these lengths, over all ranks."""
    return sum(model_flops_by_kind(config, lengths).values())


def model_flops_by_kind(config: ModelConfig, lengths: Iterable[int]) -> dict[str, float]:
    """The same, split: projections, MLPs, convolutions ("matmul"), "softmax", "sparse" and "linear" attention, output
    "head" (of images: pixels in and out)."""
    lengths = list(lengths)
    tokens = sum(lengths)
    pairs = sum(mask.pairs(Span(0, 0, length), length) for mask in softmax_masks(config) for length in lengths)
    forward = {
        "matmul": 2.0 * tokens * _sizes(config)["block_matmul"],
        "softmax": 4.0 * pairs * config.head_size * config.num_heads,
        "sparse": sum(_sparse(config, kind, lengths) for kind in config.layer_kinds if kind in SPARSE_KINDS),
        "linear": 1.0 * tokens * sum(_recurrence(config, kind) for kind in config.layer_kinds if kind in LINEAR_KINDS),
        "head": 2.0 * tokens * config.hidden_size * (config.vocab_size if config.task == "text" else 2 * CHANNELS),
    }
    return {kind: 3 * flops for kind, flops in forward.items()}


def softmax_masks(config: ModelConfig) -> list[Mask]:
    """The mask of every softmax layer, in their order."""
    return [Mask(config.causal, config.window_of(kind)) for kind in config.layer_kinds if kind in SOFTMAX_KINDS]


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
    return _sizes(config)["parameters"]


def _sizes(config):
    # Dataclasses that may change are not hashable; this runs once per step.
    return _measure(json.dumps(asdict(config)))


@lru_cache
def _measure(settings):
    """Counted on the module itself, built without memory, so that no second formula can disagree with it."""
    with torch.device("meta"):
        model = build_model(ModelConfig(**json.loads(settings)))
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        # Vectors scale and shift. What has more dimensions (projections, convolutions, learned feature maps) multiplies
        # every token.
        "block_matmul": sum(parameter.numel() for parameter in model.blocks.parameters() if parameter.ndim > 1),
    }
