"""The text that `longspan prepare` reads: which files of the given paths, and the documents in each."""

import json
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from longspan.launcher.errors import UserError


def find_files(inputs: Sequence[str | Path], suffixes: Collection[str] | None, exclude: Collection[Path]) -> list[Path]:
    """The files of `inputs` in the order given, each once; those of a folder sorted by path, hidden ones left out.

    Files named in `inputs` are always taken; `suffixes` (such as ".py") chooses among those of folders. `exclude`
    holds resolved paths: earlier output in an input folder is no input. Raises UserError when nothing is left.
    """
    files: dict[Path, None] = {}
    for item in inputs:
        path = Path(item).expanduser()
        if path.is_dir():
            found = _files_below(path)
            files.update(dict.fromkeys(file for file in found if not suffixes or file.name.endswith(tuple(suffixes))))
        elif path.is_file():
            files[path] = None
        else:
            raise UserError(f"input {item}: no such file or folder")
    chosen = [file for file in files if file.resolve() not in exclude]
    if not chosen:
        ending = f" ending in {', '.join(suffixes)}" if suffixes else ""
        raise UserError(
            f"input {', '.join(map(str, inputs)) or '(none)'}: no files{ending}; give files or folders of text"
        )
    return chosen


def _files_below(folder: Path) -> list[Path]:
    def unreadable(error: OSError):
        raise UserError(f"input {error.filename}: cannot be read ({error.strerror})")

    files = []
    for parent, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(parent, name) for name in names if not name.startswith("."))
        files += [path for path in paths if path.is_file()]  # no sockets, no dangling links
    return sorted(files)


def read_documents(path: Path) -> Iterator[tuple[str | None, int]]:
    """(text, bytes read for it) of each document: every line of a .jsonl file ("text" field), else the whole file.

    The text is None where a file is binary or not UTF-8; it may be empty. Raises UserError for an unreadable file
    and a malformed .jsonl line.
    """
    try:
        if path.suffix == ".jsonl":
            with path.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    yield (_text_field(line, f"{path}:{number}") if line.strip() else ""), len(line)
        else:
            content = path.read_bytes()
            yield _decode(content), len(content)
    except OSError as error:
        raise UserError(f"input {path}: cannot be read ({error.strerror})") from error


def _decode(content: bytes) -> str | None:
    if b"\0" in content:
        return None
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def _text_field(line: bytes, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:  # malformed JSON or UTF-8
        raise UserError(f"input {where}: not a JSON object ({error}); mend or remove the line") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        found = f"fields {', '.join(record)}" if isinstance(record, dict) else type(record).__name__
        raise UserError(f'input {where}: needs a field "text" that holds a string, found {found}')
    # JSON can spell half a surrogate pair, which no UTF-8 tokenizer accepts: it becomes "?".
    return record["text"].encode(errors="replace").decode()
