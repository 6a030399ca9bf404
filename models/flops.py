"""Model FLOPs and parameters: what MFU and the estimate count.

Backward is twice the forward; recomputation, norms, rotations, gates and the optimizer are not counted. Softmax
attention counts the query-key pairs the causal mask leaves, document by document; linear attention counts its
recurrence (one state update and one read per token and head), whatever chunk length a kernel uses.
"""

from collections.abc import Iterable
from dataclasses import asdict
from functools import lru_cache

import torch
from torch import nn

from longspan.models.config import ModelConfig
from longspan.models.decoder import Decoder
from longspan.parallel.geometry import Mask
from longspan.parallel.layout import Span


def model_flops(config: ModelConfig, lengths: Iterable[int]) -> float:
    """Forward and backward FLOPs of a batch of documents with these lengths, over all ranks."""
    return sum(model_flops_by_kind(config, lengths).values())


def model_flops_by_kind(config: ModelConfig, lengths: Iterable[int]) -> dict[str, float]:
    """The same, split: projections and MLPs ("matmul"), "softmax", "linear" attention and the output "head"."""
    lengths = list(lengths)
    tokens = sum(lengths)
    pairs = sum(Mask(causal=True).pairs(Span(0, 0, length), length) for length in lengths)
    softmax_layers = config.layer_kinds.count("softmax")
    linear_layers = config.num_layers - softmax_layers
    # A normaliser is one more value column.
    state = config.head_size * (config.head_size + config.linear_normalize)
    forward = {
        "matmul": 2.0 * tokens * _sizes(config)["block_matmul"],
        "softmax": 4.0 * pairs * config.head_size * config.num_heads * softmax_layers,
        "linear": 4.0 * tokens * state * config.num_heads * linear_layers,
        "head": 2.0 * tokens * config.hidden_size * config.vocab_size,
    }
    return {kind: 3 * flops for kind, flops in forward.items()}


def num_parameters(config: ModelConfig) -> int:
    """Parameters of the model, embeddings included."""
    return _sizes(config)["parameters"]


def _sizes(config):
    # Dataclasses that may change are not hashable; this runs once per step.
    return _measure(tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in asdict(config).items()))


@lru_cache
def _measure(settings):
    """Counted on the module itself, built without memory, so that no second formula can disagree with it."""
    with torch.device("meta"):
        model = Decoder(ModelConfig(**dict(settings)))
    matmuls = (module for module in model.blocks.modules() if isinstance(module, nn.Linear))
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "block_matmul": sum(module.weight.numel() for module in matmuls),
    }
