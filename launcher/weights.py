"""Weights that a run starts from: safetensors with a config.json, of a published model or of `longspan export`.

Every rank reads the files into the whole model that it shards later, one tensor at a time, so that neither the engine
nor the number of ranks matters; ranks of one machine share its page cache.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import nn

from longspan.launcher.corpus import read_info
from longspan.launcher.errors import UserError
from longspan.launcher.files import replace_text
from longspan.launcher.huggingface import explicit, huggingface_name, model_settings
from longspan.launcher.parsing import update
from longspan.launcher.tokenizer import ByteTokenizer, vocabulary
from longspan.models.build import build_model
from longspan.models.config import LINEAR_KINDS, ModelConfig

log = logging.getLogger(__name__)

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
DTYPES = ("F64", "F32", "F16", "BF16")
# Without counterpart by intent: positions of old files, and the embedding stored twice.
DERIVED = ("rotary_emb.inv_freq", "lm_head.weight")
# Settings that a run has in common with its weights, and those that are only said to differ.
SAME = (
    "task", "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_size", "qk_norm",
    "tie_embeddings",
)  # fmt: skip
SAID = ("norm_eps", "rope_base", "rope_scaling", "rope_type", "rope_trained")


@dataclass(frozen=True)
class Weights:
    """What a folder holds: a model's settings, its parameters' shapes by their names here, and the names and files of
    tensors there."""

    folder: Path
    model: ModelConfig
    shapes: dict[str, torch.Size]
    rename: Callable[[str], str]
    files: dict[str, Path]


def find(folder: Path) -> Weights:
    """The weights in `folder`, whose tensors have been compared with its config.json by name, shape and dtype; none is
    read. UserError where they cannot be read or are not of a model that is known here."""
    with _readable(folder):
        config = _read_json(folder / "config.json")
        source, rename = f"{folder / 'config.json'}", str
        if "model_type" in config:  # of transformers
            model, rename = model_settings(config, source), huggingface_name
        else:
            model = update(ModelConfig(), config, source)
        try:
            with torch.device("meta"):
                shapes = {name: parameter.shape for name, parameter in build_model(model).named_parameters()}
        except ValueError as error:
            raise UserError(f"{source}: {error}") from None
        weights = Weights(folder, explicit(model), shapes, rename, dict(_files(folder)))
        _compare_tensors(weights)
    return weights


def take_over(weights: Weights, model: nn.Module) -> None:
    """Gives the parameters of `model` the values of `weights`, each layer those with its parameters' names; others stay
    as they are, and a line names them. UserError, before any is changed, where settings or shapes do not fit."""
    _compare_settings(weights, explicit(model.config))
    kinds = model.config.layer_kinds
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in weights.shapes}
    copies = {name: _copies(weights, name, kinds) for name in parameters}
    for name, parameter in parameters.items():
        shape = weights.shapes[name]
        if (shape[0] * copies[name], *shape[1:]) != parameter.shape:
            raise UserError(
                f"{weights.folder}: {weights.rename(name)} is {list(shape)} there, but {name} of a"
                f" {kinds[_layer(name)]} layer is {list(parameter.shape)} here: use the weights' widths; linear layers"
                " in place of softmax have them with model.linear_num_heads=0, linear_head_dim=0 and linear_value_dim=0"
            )
    with _readable(weights.folder), _tensors(weights.files) as tensors, torch.no_grad():
        for name, parameter in parameters.items():
            value = tensors[weights.rename(name)].get_tensor(weights.rename(name))
            if copies[name] > 1:
                heads = value.unflatten(0, (weights.model.kv_heads, -1))
                value = heads.repeat_interleave(copies[name], 0).flatten(0, 1)
            parameter.copy_(value)
    numbers = sum(parameter.numel() for parameter in parameters.values())
    log.info("weights of %s: %d tensors, %s numbers", weights.folder, len(parameters), f"{numbers:,}")
    new = [name for name, _ in model.named_parameters() if name not in weights.shapes]
    _say("initialised, without counterpart in the weights", new, kinds)
    left = [name for name in weights.shapes if name not in parameters]
    _say("not taken over", left, weights.model.layer_kinds)


def check_tokenizer(folder: Path, prefixes: Sequence[str]) -> None:
    """UserError where a corpus was prepared with other tokens than those of the tokenizer.json in `folder`. Nothing is
    compared without that file, and where the corpus's own is not there any more."""
    own, tokens = folder / TOKENIZER, None
    for prefix in prefixes if own.is_file() else ():
        info = Path(f"{prefix}.json").expanduser()
        used = Path(read_info(info).tokenizer) if info.is_file() else own
        if str(used) != ByteTokenizer.name:
            if not used.is_file() or used.read_bytes() == own.read_bytes():
                continue
            tokens = tokens or vocabulary(own)
            if vocabulary(used) == tokens:
                continue
        raise UserError(
            f"corpus {prefix} was prepared with --tokenizer {used}, whose tokens are not those of {own}: prepare it"
            " with that"
        )


def import_model(path: str, output: str) -> None:
    """Writes a config for runs that start from the weights in the folder `path`. UserError where it cannot be read, and
    where `output` exists."""
    folder, output = Path(path).expanduser().absolute(), Path(output)
    weights, default = find(folder), asdict(ModelConfig())
    model = {
        name: value for name, value in asdict(weights.model).items() if value != default[name] or name in SAME + SAID
    }
    try:
        if output.exists():
            raise UserError(f"--output {output}: exists already; delete it, or choose another name")
        text = yaml.safe_dump({"model": model, "checkpoint": {"weights": str(folder)}}, sort_keys=False)
        replace_text(output, text)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror or error})") from None
    numbers = sum(shape.numel() for shape in weights.shapes.values())
    print(f"wrote {output}: {len(weights.shapes)} tensors, {numbers:,} numbers, vocabulary of {model['vocab_size']:,}")


def _compare_tensors(weights: Weights) -> None:
    wanted, folder = {weights.rename(name): shape for name, shape in weights.shapes.items()}, weights.folder
    missing = [name for name in wanted if name not in weights.files]
    if missing:
        raise UserError(f"{folder}: has no {missing[0]}, which the model of its config.json has{_more(missing)}")
    other = [name for name in weights.files if name not in wanted and not name.endswith(DERIVED)]
    if other:
        raise UserError(
            f"{folder}: {other[0]} has no counterpart here{_more(other)}, and without it the model is another one"
        )
    with _tensors(weights.files) as tensors:
        for name, shape in wanted.items():
            found = tensors[name].get_slice(name)
            if found.get_dtype() not in DTYPES:
                raise UserError(f"{folder}: {name} is of dtype {found.get_dtype()}; use {', '.join(DTYPES)}")
            if found.get_shape() != list(shape):
                raise UserError(
                    f"{folder}: {name} is {found.get_shape()}, by the settings of its config.json {list(shape)}"
                )


def _compare_settings(weights: Weights, model: ModelConfig) -> None:
    differences = {
        name: f"model.{name} is {getattr(weights.model, name)} there and {getattr(model, name)} here"
        for name in SAME + SAID
        if getattr(weights.model, name) != getattr(model, name)
    }
    fatal = [text for name, text in differences.items() if name in SAME]
    if fatal:
        raise UserError(
            f"{weights.folder} holds another model: {'; '.join(fatal)}; `longspan import` writes its settings"
        )
    for text in differences.values():
        log.warning("changed since the weights: %s", text)


def _copies(weights: Weights, name: str, kinds: tuple[str, ...]) -> int:
    """How often each head of keys and values is needed: linear layers have one for each query head."""
    layer = _layer(name)
    if layer is None or not name.endswith((".mixer.k_proj.weight", ".mixer.v_proj.weight")):
        return 1
    linear = [of[layer] in LINEAR_KINDS for of in (kinds, weights.model.layer_kinds)]
    return weights.model.num_heads // weights.model.kv_heads if linear == [True, False] else 1


def _layer(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blocks" else None


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every tensor by name with its file."""
    files = [ONE]
    if not (folder / ONE).exists():
        named = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
            raise UserError(f"{folder / INDEX}: has no weight_map, which names the file of every tensor")
        files = sorted(set(named.values()))
    for file in files:
        with safe_open(folder / file, framework="pt") as tensors:
            yield from ((name, folder / file) for name in tensors.keys())


@contextmanager
def _tensors(files: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """By tensor its open file."""
    with ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(file, framework="pt")) for file in set(files.values())}
        yield {name: opened[file] for name, file in files.items()}


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """UserError in place of what reading damaged or missing files raises."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        name = Path(error.filename or str(error)).name
        found = f"has no {name}" if isinstance(error, FileNotFoundError) else "is no folder"
        raise UserError(
            f"{folder}: {found}; name a folder with config.json and {ONE}, or {INDEX} and its files"
        ) from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be read ({type(error).__name__}: {error})") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: is no JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: is no JSON object")
    return content


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _say(what: str, names: list[str], kinds: tuple[str, ...]) -> None:
    """A line for every kind of layer that has some of the parameters `names`."""
    found: dict[str, dict[str, int]] = {}
    for name in names:
        _, layer, name = name.split(".", 2)
        of_kind = found.setdefault(kinds[int(layer)], {})
        of_kind[name] = of_kind.get(name, 0) + 1
    for kind, layers in found.items():
        count = max(layers.values())
        log.info("%d layer%s of %s: %s: %s", count, "s" * (count > 1), kind, what, ", ".join(layers))
