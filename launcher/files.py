"""Files that others read: strict JSON, replaced whole or left as they were, and one line where the disk refuses."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longspan.launcher.errors import FULL, UserError


@contextmanager
def writing(run_dir: Path) -> Iterator[None]:
    """UserError in place of an OSError of what is written to `run_dir`."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
        full = error.errno in FULL
        remedy = "free its disk or choose another, then resume" if full else "choose another, or change its permissions"
        raise UserError(f"run.dir={run_dir}: cannot be written ({reason}); {remedy}") from None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of reading the file says of which, as one of opening it does."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def replace_text(path: Path, text: str) -> None:
    """Writes the file anew, in UTF-8, and its folder where there is none. Whoever fails or is ended on the way leaves
    the old one."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """As `replace_text`."""
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_through(partial, content)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def write_through(path: Path, content: bytes) -> None:
    """Onto the disk itself: a machine that fails later does not lose it when what it replaces is gone."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def strict_json(value: Any, indent: int | None = None) -> str:
    """`value` as JSON that every reader takes: numbers that are not finite, which it has no words for, are null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
