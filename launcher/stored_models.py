"""Models on disk, for what is done with them besides training: of checkpoints of runs, and of folders with weights."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from longspan.launcher import checkpoint, weights
from longspan.launcher.agreement import agree_on
from longspan.launcher.config import Config
from longspan.launcher.corpus import read_info
from longspan.launcher.errors import UserError
from longspan.launcher.facts import weights_in
from longspan.launcher.parsing import parse_override, update
from longspan.launcher.tokenizer import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer
from longspan.models.build import build_model
from longspan.models.config import ModelConfig
from longspan.models.decay import Gate


class StoredModel(Protocol):
    """A model on disk. config: the settings of its run, or of weights the defaults; step: of training, None where that
    is not known."""

    path: Path
    step: int | None
    config: Config

    def check(self, model: ModelConfig) -> None:
        """UserError where `model` is another one."""

    def check_corpora(self, prefixes: Sequence[str]) -> None:
        """UserError where corpora are known to be of another tokenizer. Looks at files: call it on one rank."""

    def fill(self, model: nn.Module, place: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """What `place` makes of a whole model, over ranks, with the stored values. Collective."""

    def load(self, model: ModelConfig) -> nn.Module:
        """The whole model, in fp32 on the CPU of this process alone."""

    def tokenizer(self) -> ByteTokenizer | HuggingFaceTokenizer:
        """Its own. UserError where it is not known."""


def open_model(path: str) -> StoredModel:
    """What a folder holds: with a config.json weights, as weights.find reads them, else a run's checkpoints. UserError
    where it is neither."""
    folder = Path(path).expanduser()
    return ModelOfWeights(folder) if (folder / "config.json").is_file() else ModelOfRun(folder)


class ModelOfRun:
    def __init__(self, run: Path):
        self._info, self.config = stored(run)
        self.path, self.step = self._info.path, self._info.step

    def check(self, model: ModelConfig) -> None:
        checkpoint.check_model(self._info, model, "another checkpoint")

    def check_corpora(self, prefixes: Sequence[str]) -> None:
        pass  # the number of token ids is compared where they are opened

    def fill(self, model: nn.Module, place: Callable[[nn.Module], nn.Module]) -> nn.Module:
        placed = place(model)
        state = get_model_state_dict(placed)
        checkpoint.fill(self._info, {"model": state})
        set_model_state_dict(placed, state)
        return placed

    def load(self, model: ModelConfig) -> nn.Module:
        return load_model(self._info, replace(self.config, model=model))

    def tokenizer(self) -> ByteTokenizer | HuggingFaceTokenizer:
        path = Path(f"{self.config.data.corpora[0].path}.json").expanduser()
        if not path.is_file():
            raise UserError(f"{path} is missing, which says what tokenizer the run has: name it with --tokenizer")
        info = read_info(path)
        return load_tokenizer(info.tokenizer, info.eod, info.bos)


class ModelOfWeights:
    step = None

    def __init__(self, folder: Path):
        self._weights, self.path = weights.find(folder), folder
        self.config = replace(Config(), model=self._weights.model)

    def check(self, model: ModelConfig) -> None:
        pass  # `take_over` compares: layers may be of other kinds

    def check_corpora(self, prefixes: Sequence[str]) -> None:
        weights.check_tokenizer(self.path, prefixes)

    def fill(self, model: nn.Module, place: Callable[[nn.Module], nn.Module]) -> nn.Module:
        agree_on(weights_in(self.path))
        weights.take_over(self._weights, model)
        return place(model)

    def load(self, model: ModelConfig) -> nn.Module:
        built = build_model(model)
        weights.take_over(self._weights, built)
        return built

    def tokenizer(self) -> ByteTokenizer | HuggingFaceTokenizer:
        file = self.path / weights.TOKENIZER
        if not file.is_file():
            raise UserError(f"{self.path} has no {file.name}: name the model's own with --tokenizer bytes or FILE")
        found = load_tokenizer(file)
        found.bos = found.begin()
        return found


def stored(run: str | Path) -> tuple[checkpoint.Info, Config]:
    """The newest checkpoint of a run directory, or that checkpoint, and its settings. UserError where there is none."""
    info = checkpoint.named(Path(run).expanduser())
    return info, update(Config(), info.config, str(info.path))


def changed(config: Config, overrides: Sequence[str]) -> Config:
    """The settings with key=value words. UserError for what is none."""
    for text in overrides:
        config = update(config, parse_override(config, text), "command line")
    return config


def load_model(info: checkpoint.Info, config: Config) -> nn.Module:
    """The whole model in fp32 on the CPU. UserError where the checkpoint is damaged."""
    model = build_model(config.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process alone
        checkpoint.fill(info, {"model": model.state_dict()}, alone=True)
    return model


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model with weights of `dtype`, but for those of gates: what training computes with."""
    kept = {parameter for module in model.modules() if isinstance(module, Gate) for parameter in module.parameters()}
    for parameter in model.parameters():
        if parameter not in kept:
            parameter.data = parameter.data.to(dtype)
    return model
