"""Digests of a checkpoint's files: made while they are written, checked before they are loaded.

CRC-32 finds every flipped bit and every wrong block (all but one in 4e9), and is the fastest that Python brings along.
It is no protection against somebody who changes a file on purpose.
"""

import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem

from longspan.launcher.files import naming

BLOCK = 1 << 22  # bytes read at once
THREADS = 4  # files that are read at once
LONG = 1 << 18  # bytes for which another thread is worth waking


class DigestingWriter(dcp.FileSystemWriter):
    """What torch.distributed.checkpoint writes files with. digests: of those that this rank has written, by name."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.digests: dict[str, str] = {}
        self.fs = _Files(self.digests)


class _Files(FileSystem):
    def __init__(self, digests: dict[str, str]):
        self._digests = digests

    @contextmanager
    def create_stream(self, path, mode: str) -> Iterator:
        with super().create_stream(path, mode) as stream:
            if mode != "wb":
                yield stream
                return
            with ThreadPoolExecutor(1) as beside:
                digesting = _Stream(stream, beside)
                yield digesting
        self._digests[Path(path).name] = _text(digesting.crc)

    def rename(self, path, new_path) -> None:
        super().rename(path, new_path)
        self._digests[Path(new_path).name] = self._digests.pop(Path(path).name)


class _Stream:
    """A file that is written from front to back: there is no `seek`. The digest of what is long is made beside."""

    def __init__(self, file: BinaryIO, beside: ThreadPoolExecutor):
        self._file, self._beside, self.crc = file, beside, 0
        self.tell, self.flush, self.fileno, self.close = file.tell, file.flush, file.fileno, file.close

    def write(self, data) -> int:
        if len(data) < LONG:
            self.crc = zlib.crc32(data, self.crc)
            return self._file.write(data)
        crc = self._beside.submit(zlib.crc32, data, self.crc)
        count = self._file.write(data)
        self.crc = crc.result()
        return count


def digest(content: bytes) -> str:
    return _text(zlib.crc32(content))


def digest_of_file(path: Path) -> str:
    crc, block = 0, memoryview(bytearray(BLOCK))
    with naming(path), open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            crc = zlib.crc32(block[:count], crc)
    return _text(crc)


def share(names: list[str], rank: int, world_size: int) -> list[str]:
    """Of files that ranks have written (__3_0.distcp, rng-00003.pt) those that `rank` checks. Where as many ranks load
    as have saved, they are its own, which it reads anyway."""

    def writer(name: str) -> int:
        return int("".join(filter(str.isdigit, name.removeprefix("__").partition("_")[0])) or 0)

    return [name for name in names if writer(name) % world_size == rank]


def first_difference(folder: Path, digests: dict[str, str]) -> str | None:
    """What is wrong with the first of these files that has other bytes than were written; None if all are right.
    OSError where one cannot be read."""

    def difference(name: str) -> str | None:
        found, wanted = digest_of_file(folder / name), digests[name]
        return None if found == wanted else f"{name} has other bytes than were written: {found}, not {wanted}"

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        return next(filter(None, pool.map(difference, digests)), None)


def _text(crc: int) -> str:
    return f"crc32 {crc:08x}"
