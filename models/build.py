"""The model of each task."""

from torch import nn

from longspan.models.config import ModelConfig
from longspan.models.decoder import Decoder
from longspan.models.diffusion import DiffusionTransformer

MODELS = {"text": Decoder, "images": DiffusionTransformer}


def build_model(config: ModelConfig) -> nn.Module:
    """The model that `config` describes; ValueError if the config is not valid."""
    config.validate()
    return MODELS[config.task](config)
