"""Turns what YAML files and command lines hold into typed settings, and says clearly what does not fit.

Settings are fields of dataclasses made by `models.settings.setting`; a field that holds a dataclass is a section.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from longspan.launcher.errors import UserError
from longspan.models.settings import Tokens

MALFORMED = (yaml.YAMLError, ValueError, RecursionError)  # also a date such as 2026-02-30, and brackets without end
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Setting:
    """One setting as `--help` shows it: dotted path, type, default and help line."""

    path: str
    kind: Any
    default: Any
    help: str


def settings_of(config: Any, prefix: str = "") -> Iterator[Setting]:
    """All settings of `config` and of its sections, in the order they are declared."""
    kinds = get_type_hints(type(config))
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from settings_of(value, f"{prefix}{field.name}.")
        else:
            yield Setting(prefix + field.name, kinds[field.name], value, field.metadata["help"])


def parse_tokens(text: int | str) -> int:
    """131072, "131072", "128K", "2M" or "1G" as a number of tokens; K, M and G are 2^10, 2^20 and 2^30."""
    match = re.fullmatch(r"(\d+)([KMG]?)", str(text).strip().upper())
    if match is None:
        raise UserError(f"{text!r} is no number of tokens; write it like 131072, 128K or 2M")
    return int(match[1]) * _UNITS[match[2]]


def update(config: Any, values: Any, source: str, prefix: str = "", known: list[str] | None = None) -> Any:
    """A copy of the dataclass `config` with the settings in the mapping `values` changed.

    Keys are field names, or dotted paths that lead into sections. `source` (a file, "command line") and `prefix` (the
    section's path) name the setting in errors; `known` holds the paths an unknown key is compared with.
    Raises UserError for an unknown key and for a value of the wrong type.
    """
    known = [setting.path for setting in settings_of(config, prefix)] if known is None else known
    if values is None:  # a section of a file whose lines are all commented out
        return config
    if not isinstance(values, Mapping):
        name, example = prefix.rstrip(".") or "the file", f"{{{fields(config)[0].name}: ...}}"
        raise UserError(f"{source}: {name} is a section of settings, such as {example}, found {values!r}")
    kinds = get_type_hints(type(config))
    for key, value in values.items():
        name, _, rest = str(key).partition(".")
        current = getattr(config, name, None) if name in kinds else None
        if name not in kinds or (rest and not is_dataclass(current)):
            sections = [prefix + field for field in kinds if is_dataclass(getattr(config, field))]
            like = sections if sections and isinstance(value, Mapping) else known  # what has settings is a section
            nearest = _nearest(prefix + (name if name in kinds else str(key)), like)
            hint = " YAML wants a space behind a colon" if value is None and ":" in str(key) else ""
            raise UserError(f"{source}: unknown setting {prefix}{key}; did you mean {nearest}?{hint}")
        if is_dataclass(current):
            value = update(current, {rest: value} if rest else value, source, f"{prefix}{name}.", known)
        else:
            value = _convert(value, kinds[name], prefix + name, source)
        config = replace(config, **{name: value})
    return config


def parse_override(config: Any, text: str) -> dict[str, Any]:
    """`optim.lr=3e-4` as {"optim.lr": value}; the value is read as YAML, except where the setting is text."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        hint = f"; did you mean --config {text}?" if text.endswith((".yaml", ".yml")) else ""
        raise UserError(f"command line: {text!r} is not of the form key=value, such as optim.lr=3e-4{hint}")
    kind = next((setting.kind for setting in settings_of(config) if setting.path == path), None)
    if kind is str or get_origin(kind) is Literal:
        return {path: value}
    try:
        return {path: yaml.load(value, _Loader)}
    except MALFORMED:
        raise UserError(f"command line: {path}={value} is not valid YAML; expected {describe(kind)}") from None


def read_yaml(path: Path) -> Any:
    """The content of a YAML file. Raises UserError when it is missing or malformed or sets a key twice."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; expected a YAML file of settings") from None
    except MALFORMED as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None


def describe(kind: Any) -> str:
    """What values a setting of type `kind` takes, in words."""
    if get_origin(kind) is Literal:
        return " | ".join(str(choice) for choice in get_args(kind))
    if get_origin(kind) is list:
        item = get_args(kind)[0]
        example = "{" + f"{fields(item)[0].name}: x" + "}" if is_dataclass(item) else _EXAMPLES[item]
        return f"a list of {describe(item)}, in brackets: [{example}]"
    if is_dataclass(kind):
        return "{" + ", ".join(field.name for field in fields(kind)) + "}"
    return _KINDS[kind][1] if kind in _KINDS else "a setting"


def _convert(value: Any, kind: Any, name: str, source: str) -> Any:
    """`value` as a setting of type `kind`; nothing is rounded, and only numbers may be given as text (3e-4, 128K)."""
    if is_dataclass(kind):
        return update(kind(), value, source, f"{name}.")
    if get_origin(kind) is list and isinstance(value, list):
        return [_convert(item, get_args(kind)[0], f"{name}[{index}]", source) for index, item in enumerate(value)]
    if get_origin(kind) is Literal and isinstance(value, str) and value in get_args(kind):
        return value
    if kind in _KINDS:
        try:
            return _KINDS[kind][0](value)
        except (TypeError, ValueError, OverflowError, UserError):
            pass
    found = "nothing" if value is None else repr(value)
    raise UserError(f"{source}: {name}: expected {describe(kind)}, found {found}")


def _exactly(kind: type) -> Any:
    def check(value: Any) -> Any:
        if type(value) is not kind:  # bool is an int to isinstance
            raise TypeError
        return value

    return check


def _number(value: Any) -> float:
    if type(value) not in (int, float, str) or not math.isfinite(number := float(value)):
        raise TypeError
    return number


_KINDS = {
    int: (_exactly(int), "an integer"),
    float: (_number, "a number"),
    bool: (_exactly(bool), "true or false"),
    str: (_exactly(str), "text"),
    dict: (_exactly(dict), "a mapping such as {name: window, window: 4096}"),
    Tokens: (parse_tokens, "a number of tokens such as 131072, 128K or 2M"),
}


_EXAMPLES = {int: "0, 1", str: "one, other"}  # of lists


def _nearest(path: str, known: list[str]) -> str:
    """The known path most like `path`: like it in its last part first of all, then in its section."""

    def likeness(candidate: str) -> float:
        name, other = path.rpartition("."), candidate.rpartition(".")
        last, section = SequenceMatcher(None, name[2], other[2]), SequenceMatcher(None, name[0], other[0])
        return last.ratio() + 0.25 * section.ratio()

    return max(known, key=likeness)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which would keep only the last of two equal keys, with an error instead."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if str(key_node.value) in seen:
                problem = f"{key_node.value} is set twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(str(key_node.value))
        return super().construct_mapping(node, deep)
