"""Declares one setting of a configuration dataclass: its type, its default and the line that `--help` shows for it."""

import copy
from dataclasses import field
from typing import Any, NewType

Tokens = NewType("Tokens", int)
"""Type of a setting that counts tokens: an int that may be written 128K, 2M or 1G (K, M, G = 2^10, 2^20, 2^30)."""


def setting(default: Any, help: str) -> Any:
    """A dataclass field with `default` and a one-line `help` text, kept in `field.metadata["help"]`.

    A list or dict default is copied for every instance. Choices are declared by the field's type: `Literal["a", "b"]`.
    """
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.deepcopy(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})
