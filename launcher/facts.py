"""What all ranks of a run must have in common: settings, versions, code, corpora, weights. Layouts, plans and the order
of data follow from these on every rank by itself, and ranks that differ would wait for each other or mix other tokens.
"""

import hashlib
import platform
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch

import longspan
from longspan.launcher.config import Config
from longspan.launcher.corpus import prefix_of
from longspan.launcher.environment import package_version

ROOMS = ("attention", "kernels", "launcher", "models", "parallel")
PACKAGES = ("numpy", "triton")


def facts_of(config: Config) -> dict[str, str]:
    """By name, as this rank has them."""
    settings = {
        f"{section}.{name}": str(value) for section, fields in asdict(config).items() for name, value in fields.items()
    }
    corpora = *config.data.corpora, *config.data.validation_corpora
    return settings | versions() | sizes(corpus.path for corpus in corpora)


def versions() -> dict[str, str]:
    """Of what the run is made with."""
    found = {name: package_version(name) or "not installed" for name in PACKAGES}
    code = f"{longspan.__version__} ({_code()})"
    python = ".".join(platform.python_version_tuple()[:2])
    return {"longspan": code, "python": python, "torch": torch.__version__, **found}


def sizes(corpora: Iterable[str]) -> dict[str, str]:
    """Of the files of corpora: other documents would have other lengths."""
    prefixes = [prefix_of(corpus) for corpus in corpora]
    return {file: _size(Path(file)) for prefix in prefixes for file in (f"{prefix}.idx", f"{prefix}.bin")}


def weights_in(folder: Path) -> dict[str, str]:
    """Sizes of the files that a new run starts from; one that goes on does not need them."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return {str(file): _size(file) for file in files}


def _size(path: Path) -> str:
    try:
        return f"{path.stat().st_size} bytes"
    except OSError as error:
        return str(error.strerror)


def _code() -> str:
    """The beginning of a digest of longspan's source files: clones may differ in what is not committed."""
    root, digest = Path(longspan.__file__).parent, hashlib.sha256()
    for room in ROOMS:
        folder = (root / room).resolve()
        for file in sorted(folder.rglob("*.py")):
            digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return f"code {digest.hexdigest()[:12]}"
