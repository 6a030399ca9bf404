"""Token files in Megatron's format: `prepare` writes PREFIX.bin, PREFIX.idx and PREFIX.json, `open_corpus` reads them.

Tokens go through megatron-core's indexed dataset both ways, so the files can be exchanged with Megatron. PREFIX.json
is ours: tokenizer, vocabulary size and counts; corpora written by others lack it.
"""

import json
import os
import struct
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from longspan.launcher.errors import UserError
from longspan.launcher.texts import find_files, read_documents
from longspan.launcher.tokenizer import load_tokenizer

ENCODE_BYTES = 4 << 20  # text handed to the tokenizer at a time: enough for its threads, little memory
PROGRESS_SECONDS = 2.0
MAX_SEQUENCE = 1 << 30  # the index holds lengths as int32: a longer document is stored as several sequences

_INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
_INDEX_MAGIC = b"MMIDIDX\x00\x00"


@dataclass(frozen=True)
class CorpusInfo:
    """What PREFIX.json says."""

    tokenizer: str
    vocab_size: int
    eod: int
    documents: int
    tokens: int
    bos: int | None = None


def prepare(
    inputs: Sequence[str | Path],
    output_prefix: str | Path,
    tokenizer: str = "bytes",
    *,
    eod: str | None = None,
    bos: str | None = None,
    suffixes: Collection[str] | None = None,
    progress: Callable[[str], None] = print,
) -> CorpusInfo:
    """Writes the text of `inputs` as one corpus; every document ends with the end-of-document token, and begins with
    `bos` if that is given.

    inputs: files and folders (see texts.find_files). A .jsonl file is one document a line, any other file one
    document; binary, non-UTF-8 and empty ones are left out and counted. tokenizer: "bytes" or a tokenizer.json; `eod`
    and `bos` are tokens of it. `progress` gets one line every two seconds and one at the end.
    The files appear under their names only when all is written. Raises UserError for anything that does not fit.
    """
    if Path(output_prefix).name in ("", "..") or str(output_prefix).endswith(os.sep):
        example = Path(output_prefix) / "corpus"
        raise UserError(f"output {output_prefix}: that is a folder; name the corpus in it, such as {example}")
    prefix = prefix_of(output_prefix)
    encoder = load_tokenizer(tokenizer, eod, bos)
    first = [] if encoder.bos is None else [encoder.bos]
    outputs = [Path(f"{prefix}.{kind}").resolve() for kind in ("bin", "idx", "json")]
    files = find_files(inputs, suffixes, exclude=outputs)
    indexed_dataset = _indexed_dataset()
    partial = f"{prefix}.partial-{os.getpid()}"
    try:
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)
        dtype = indexed_dataset.DType.optimal_dtype(encoder.vocab_size)
        builder = indexed_dataset.IndexedDatasetBuilder(f"{partial}.bin", dtype=dtype)
        reader = _Reader(files, progress)
        documents = tokens = 0
        for texts in reader.batches():
            for ids in encoder.encode_batch(texts):
                ids = np.concatenate((first, ids, [encoder.eod]), dtype=dtype, casting="unsafe")
                whole, rest = divmod(len(ids), MAX_SEQUENCE)
                builder.add_document(ids, [MAX_SEQUENCE] * whole + [rest] * (rest > 0))
                documents += 1
                tokens += len(ids)
            reader.report(f"{documents:,} documents, {tokens:,} tokens")
        if not documents:
            raise UserError(f"input {', '.join(map(str, inputs))}: no text in {len(files)} files ({reader.skipped()})")
        builder.finalize(f"{partial}.idx")
        info = CorpusInfo(encoder.name, encoder.vocab_size, encoder.eod, documents, tokens, encoder.bos)
        Path(f"{partial}.json").write_text(json.dumps(asdict(info), indent=2) + "\n")
        # While an older corpus is replaced there is no index: an interruption leaves nothing that looks whole.
        Path(f"{prefix}.idx").unlink(missing_ok=True)
        for kind in ("bin", "json", "idx"):
            os.replace(f"{partial}.{kind}", f"{prefix}.{kind}")
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        raise UserError(f"output {prefix}: cannot be written ({error.strerror or error}{where})") from error
    finally:
        for kind in ("bin", "idx", "json"):
            with suppress(OSError):
                os.unlink(f"{partial}.{kind}")
    progress(f"{prefix}: {documents:,} documents, {tokens:,} tokens ({encoder.name}); left out: {reader.skipped()}")
    return info


class _Reader:
    """The texts of `files` in batches, with the share of the bytes read so far and what was left out."""

    def __init__(self, files: list[Path], progress: Callable[[str], None]):
        self._files, self._progress = files, progress
        self._size = sum(file.stat().st_size for file in files)
        self._read = self._binary = self._empty = 0
        self._reported = time.monotonic()

    def batches(self) -> Iterator[list[str]]:
        texts, size = [], 0
        for file in self._files:
            for text, num_bytes in read_documents(file):
                self._read += num_bytes
                self._binary += text is None
                self._empty += text == ""
                if text:
                    texts.append(text)
                    size += num_bytes
                if size >= ENCODE_BYTES:
                    yield texts
                    texts, size = [], 0
        if texts:
            yield texts

    def report(self, counts: str) -> None:
        if time.monotonic() - self._reported >= PROGRESS_SECONDS:
            self._reported = time.monotonic()
            percent = min(100, 100 * self._read // max(1, self._size))
            self._progress(f"{percent:3d}% of {self._size / 1e6:.1f} MB, {counts}")

    def skipped(self) -> str:
        return f"{self._binary} binary or not UTF-8, {self._empty} empty"


class Corpus:
    """A corpus on disk, memory-mapped; see `open_corpus`."""

    def __init__(self, prefix: str):
        self.prefix = prefix
        index = _read_index(prefix)
        self._sequence_starts = np.concatenate(([0], np.cumsum(index.sequence_lengths, dtype=np.int64)))
        # Megatron may store one document as several sequences; ours are what the document boundaries say.
        self._document_starts = self._sequence_starts[index.boundaries]
        self.lengths = np.diff(self._document_starts)
        info = Path(f"{prefix}.json")
        self.vocab_size = read_info(info).vocab_size if info.is_file() else None
        self._dataset = _indexed_dataset().IndexedDataset(prefix, mmap=True)

    prefix: str
    """The path without .bin and .idx."""
    lengths: np.ndarray
    """int64 [num_documents]: tokens of each document, the end-of-document token included; 0 is possible."""
    vocab_size: int | None
    """Token ids are below this; None when the corpus has no PREFIX.json."""

    @property
    def num_documents(self) -> int:
        return len(self.lengths)

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: tokens [start, stop) of a document. Nothing else of the .bin file is touched."""
        assert 0 <= start < stop <= self.lengths[document], (document, start, stop)
        start, stop = self._document_starts[document] + (start, stop)
        sequence = np.searchsorted(self._sequence_starts, start, side="right") - 1
        parts = []
        while start < stop:
            end = min(stop, self._sequence_starts[sequence + 1])
            if end > start:  # sequences of no tokens exist
                parts.append(self._dataset.get(sequence, start - self._sequence_starts[sequence], end - start))
            start, sequence = end, sequence + 1
        return np.concatenate(parts, dtype=np.int64)


def open_corpus(prefix_or_path: str | Path) -> Corpus:
    """The corpus PREFIX (or PREFIX.bin, PREFIX.idx). UserError when a file is missing, not readable, truncated or
    malformed."""
    prefix = prefix_of(prefix_or_path)
    try:
        return Corpus(prefix)
    except OSError as error:
        raise UserError(
            f"corpus {prefix}: {error.filename or 'one of its files'} cannot be read ({error.strerror}); change its "
            "permissions, or copy it to where this user may read it"
        ) from None


@dataclass(frozen=True)
class _Index:
    sequence_lengths: np.ndarray  # int32 [sequences]
    boundaries: np.ndarray  # int64 [documents + 1]: the sequence at which each document starts, and the end


def _read_index(prefix: str) -> _Index:
    """The index of a corpus, after checks of both files that megatron-core would fail by assertions or wrong tokens."""
    idx, bin_ = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    remedy = "copy both files again, or write them with `longspan prepare`"
    if not idx.is_file() and not bin_.is_file():
        raise UserError(
            f"corpus {prefix}: there is no such corpus, neither {idx} nor {bin_}; write it with `longspan prepare"
            f" --output {prefix}`, or name another in data.corpora=[{{path: ...}}]"
        )
    for file in (idx, bin_):
        if not file.is_file():
            raise UserError(f"corpus {prefix}: {file} is missing; {remedy}")
        file.open("rb").close()  # raises here if it may not be read, and not inside megatron-core
    with idx.open("rb") as stream:
        header = stream.read(_INDEX_HEADER.size)
    if len(header) < _INDEX_HEADER.size:
        raise UserError(f"corpus {prefix}: {idx} is truncated, {len(header)} bytes are less than its header; {remedy}")
    magic, version, code, sequences, boundaries = _INDEX_HEADER.unpack(header)
    if magic != _INDEX_MAGIC or version != 1:
        raise UserError(f"corpus {prefix}: {idx} is not a Megatron index of version 1; {remedy}")
    dtype = {kind.value: np.dtype(kind.name) for kind in _indexed_dataset().DType}.get(code, np.dtype(float))
    if dtype.kind not in "iu":
        raise UserError(f"corpus {prefix}: {idx} says dtype code {code}, which is no integer type; {remedy}")
    needed, size = _INDEX_HEADER.size + sequences * (4 + 8) + boundaries * 8, idx.stat().st_size
    if size < needed:
        raise UserError(f"corpus {prefix}: {idx} is truncated, {size:,} of {needed:,} bytes; {remedy}")
    offset = _INDEX_HEADER.size
    lengths = np.fromfile(idx, dtype=np.int32, count=sequences, offset=offset)
    pointers = np.fromfile(idx, dtype=np.int64, count=sequences, offset=offset + 4 * sequences)
    documents = np.fromfile(idx, dtype=np.int64, count=boundaries, offset=offset + 12 * sequences)
    if boundaries < 2 or not lengths.any():
        raise UserError(f"corpus {prefix}: {idx} holds no tokens; {remedy}")
    covered = documents[0] == 0 and documents[-1] == sequences and np.all(np.diff(documents) >= 0)
    if not covered or np.any(lengths < 0) or np.any(pointers < 0):
        raise UserError(f"corpus {prefix}: {idx} contradicts itself; {remedy}")
    needed, size = int(np.max(pointers + lengths * np.int64(dtype.itemsize))), bin_.stat().st_size
    if size < needed:
        raise UserError(f"corpus {prefix}: {bin_} is truncated, {size:,} of {needed:,} bytes; {remedy}")
    return _Index(lengths, documents)


def read_info(path: Path) -> CorpusInfo:
    """What PREFIX.json says. UserError where it is not as `prepare` writes it."""
    try:
        return CorpusInfo(**json.loads(path.read_text()))
    except (ValueError, TypeError, OSError) as error:
        raise UserError(
            f"corpus {path}: not as `longspan prepare` writes it ({error}); remove it or prepare again"
        ) from error


def prefix_of(path: str | Path) -> str:
    """The path of a corpus without .bin and .idx, from the home folder where it says ~."""
    path = Path(path).expanduser()
    return str(path.with_suffix("") if path.suffix in (".bin", ".idx") else path)


def _indexed_dataset():
    """megatron.core.datasets.indexed_dataset, imported where used: it takes seconds and warns about what it lacks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from megatron.core.datasets import indexed_dataset
        except ImportError as error:
            raise UserError(
                f"reading and writing corpora needs megatron-core ({error}); pip install megatron-core"
            ) from error
    return indexed_dataset
