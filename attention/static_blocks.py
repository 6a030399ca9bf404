"""Selections that follow from lengths alone: lists made on the host, once per batch.

Radial attention (arXiv 2506.19852) for video, and lists of the user's own.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from longspan.attention.block_tables import Pieces, pieces
from longspan.attention.selection import require_whole
from longspan.kernels.sparse import Boxes
from longspan.parallel.exchange import to_device

MARKS = 1 << 24  # pairs of blocks that are looked at together


@dataclass(frozen=True)
class ListTables:
    """queries, keys: the blocks. lists: int32 [1 or Hkv, local query pieces, n], key blocks, ascending, -1 for
    none."""

    queries: Pieces
    keys: Pieces
    lists: torch.Tensor
    rule: Boxes | None = None

    def map(self, move) -> "ListTables":
        """The same with every tensor passed through `move`."""
        rule = self.rule and Boxes(move(self.rule.coordinates), move(self.rule.bounds), self.rule.guard)
        return ListTables(self.queries.map(move), self.keys.map(move), move(self.lists), rule)


class Static(ABC):
    """A selection that has query_block and key_block and says what they list."""

    @abstractmethod
    def listed(self, document: int, length: int, blocks: np.ndarray, causal: bool) -> np.ndarray:
        """int [heads, blocks, n] or [blocks, n]: key blocks of a document for some of its query blocks, ascending,
        -1 for none; later ones may be among them under a causal mask."""

    def check(self, lengths) -> None:
        """Raises ValueError where documents do not fit."""

    def heads(self, lengths) -> int:
        """How many lists a block of these documents has."""
        return 1

    def rule(self, layout, rank: int, causal: bool) -> Boxes | None:
        return None

    def tables(self, seq, causal: bool) -> ListTables:
        return seq.derive(list_tables, self, causal)

    def coarse(self, k, v, tables, gather):
        return None, None

    def choose(self, q, k, coarse_k, tables: ListTables, ranks):
        return tables.lists, None, tables.rule

    def pairs(self, length: int) -> float:
        """Query-key pairs of one head in a document of `length` tokens under a causal mask, the mean of heads."""
        return _pairs(self, length)


def list_tables(layout, rank: int, selection, causal: bool) -> ListTables:
    """The tables of `rank`. selection: a Static."""
    selection.check(layout.lengths)
    queries, keys = (pieces(layout, rank, size) for size in (selection.query_block, selection.key_block))
    lengths, document = np.array(layout.lengths), queries.local.document.numpy()
    query_base, key_base = (
        np.concatenate([[0], np.cumsum(-(-lengths // size))]) for size in (selection.query_block, selection.key_block)
    )
    order, found = np.argsort(document, kind="stable"), []
    numbers, starts = np.unique(document[order], return_index=True)
    for number, places in zip(numbers, np.split(order, starts[1:])):
        base, batch = key_base[number], max(1, MARKS // (key_base[number + 1] - key_base[number]))
        for at in range(0, len(places), batch):
            rows = places[at : at + batch]
            blocks = queries.block.numpy()[rows] - query_base[number]
            listed = _listed(selection, number, lengths[number], blocks, causal)
            found.append((rows, np.where(listed < 0, -1, listed + base)))
    width = max((listed.shape[2] for _, listed in found), default=1)
    lists = np.full((selection.heads(layout.lengths), len(document), width), -1, np.int32)
    for rows, listed in found:
        lists[:, rows, : listed.shape[2]] = listed
    return ListTables(queries, keys, torch.from_numpy(lists), selection.rule(layout, rank, causal))


def _listed(selection, document, length, blocks, causal):
    """[heads, blocks, n], under a causal mask without what is later than all of a query block."""
    listed = selection.listed(int(document), int(length), blocks, causal)
    listed = listed if listed.ndim == 3 else listed[None]
    if causal:
        stop = np.minimum((blocks + 1) * selection.query_block, length)[:, None]
        listed = np.where(listed * selection.key_block < stop, listed, -1)
    return listed


@lru_cache(64)
def _pairs(selection, length):
    blocks = np.arange(-(-length // selection.query_block))
    batch, total = max(1, MARKS // -(-length // selection.key_block)), 0
    for at in range(0, len(blocks), batch):
        listed = _listed(selection, 0, length, blocks[at : at + batch], True)
        begin, key = blocks[at : at + batch, None] * selection.query_block, listed * selection.key_block
        end, count = np.minimum(begin + selection.query_block, length), np.minimum(selection.key_block, length - key)

        def before(query):  # pairs of all queries before this one
            some = np.clip(query - key, 0, count)
            return some * (some + 1) // 2 + np.maximum(query - key - count, 0) * count

        total += np.where(listed >= 0, before(end) - before(begin), 0).sum()
    return float(total) / len(listed)


def compact(marks: np.ndarray) -> np.ndarray:
    """bool [rows, n] -> int64 [rows, most]: the columns that are marked, -1 for none."""
    row, column = np.nonzero(marks)
    counts = marks.sum(1)
    found = np.full((len(marks), counts.max(initial=0)), -1)
    found[row, np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)] = column
    return found


@dataclass(frozen=True)
class Radial(Static):
    """Radial attention (arXiv 2506.19852): tokens near one another in space, ever nearer as frames are further apart.

    frame: tokens of a frame, s. A token at place k of frame i sees place l of frame j where, with 2^r the largest power
    of two up to |i - j| (1 for the same frame),

        2^r <= s and |k - l| + 1 <= s / 2^r,   or   |i - j| is a multiple of ceil(2^r / s) and k = l,   or   j = 0.

    Blocks are kept whole where any of their pairs is seen, as in the paper's kernels: what a token attends to is a
    union of blocks that holds what the formula gives it. Blocks: tokens.
    """

    frame: int
    query_block: int = 128
    key_block: int = 64

    def __post_init__(self):
        require_whole(self, frame=1, query_block=1, key_block=1)

    def listed(self, document, length, blocks, causal):
        s, frames = self.frame, np.arange(-(-length // self.frame))
        begin, end = blocks * self.query_block, np.minimum((blocks + 1) * self.query_block, length)
        marks = np.zeros((len(blocks), -(-length // self.key_block) + 1), np.int32)
        for turn in range(int(((end - 1) // s - begin // s).max(initial=-1)) + 1):  # frames that a block meets
            mine = begin // s + turn
            low, high = np.maximum(begin, mine * s) - mine * s, np.minimum(end, (mine + 1) * s) - 1 - mine * s
            width = self._width(abs(mine[:, None] - frames))
            width[:, 0] = s
            start, stop = np.maximum(low[:, None] - width, 0), np.minimum(high[:, None] + width, s - 1)
            first, last = frames * s + start, np.minimum(frames * s + stop, length - 1)
            row, frame = np.nonzero((width >= 0) & (high >= low)[:, None] & (first <= last))
            np.add.at(marks, (row, first[row, frame] // self.key_block), 1)
            np.add.at(marks, (row, last[row, frame] // self.key_block + 1), -1)
        return compact(marks[:, :-1].cumsum(1) > 0)

    def _width(self, distance):
        """The largest |k - l| that is seen, -1 for none."""
        octave = 1 << (np.frexp(np.maximum(distance, 1))[1].astype(np.int64) - 1)
        diagonal = np.where(distance % -(-octave // self.frame) == 0, 0, -1)
        return np.where(octave <= self.frame, self.frame // octave - 1, diagonal)


@dataclass(frozen=True, eq=False)
class BlockLists(Static):
    """Lists of the user's own. lists: for every document of a batch in turn integers [query blocks, n] or [key heads,
    query blocks, n], numbers of key blocks in that document in any order, -1 for nothing; or a pure function of a
    document's length that gives them, such as a function of a module. Under a causal mask queries see no later token of
    what they list. Blocks: tokens."""

    lists: Callable | tuple
    query_block: int = 128
    key_block: int = 64
    name: str = field(init=False, default="")

    def __post_init__(self):
        require_whole(self, query_block=1, key_block=1)
        if callable(self.lists):
            name = getattr(self.lists, "__qualname__", type(self.lists).__qualname__)
        else:
            lists = tuple(torch.as_tensor(x).cpu().numpy().copy() for x in self.lists)
            object.__setattr__(self, "lists", lists)
            name = hashlib.sha256(b"".join(repr(x.shape).encode() + x.tobytes() for x in lists)).hexdigest()
        object.__setattr__(self, "name", name)

    def check(self, lengths) -> None:
        if not callable(self.lists) and len(self.lists) != len(lengths):
            raise ValueError(f"BlockLists.lists has {len(self.lists)} documents, the batch has {len(lengths)}")
        heads = {found.shape[0] for found in self._all(lengths) if found.ndim == 3} - {1}
        if len(heads) > 1:
            raise ValueError(f"BlockLists.lists has lists of {sorted(heads)} heads; give as many for every document")

    def heads(self, lengths) -> int:
        return max(found.shape[0] if found.ndim == 3 else 1 for found in self._all(lengths))

    def choose(self, q, k, coarse_k, tables, ranks):
        if tables.lists.shape[0] not in (1, k.shape[1]):
            raise ValueError(f"BlockLists.lists has lists of {tables.lists.shape[0]} heads for {k.shape[1]} key heads")
        return super().choose(q, k, coarse_k, tables, ranks)

    def tables(self, seq, causal: bool) -> ListTables:
        if callable(self.lists):
            return super().tables(seq, causal)
        tables = list_tables(seq.layout, seq.rank, self, causal)  # of this batch alone
        return tables.map(lambda x: to_device(x, seq.parallel.device))

    def listed(self, document, length, blocks, causal):
        return self._of(document, length)[..., blocks, :]

    def _all(self, lengths):
        return (self._of(document, length) for document, length in enumerate(lengths))

    def _of(self, document, length):
        found = np.asarray(self.lists(length) if callable(self.lists) else self.lists[document])
        rows, columns = -(-length // self.query_block), -(-length // self.key_block)
        if found.ndim not in (2, 3) or found.shape[-2] != rows or not np.issubdtype(found.dtype, np.integer):
            raise ValueError(
                f"BlockLists.lists gives {found.dtype} {list(found.shape)} for document {document} of {length} tokens;"
                f" give integers [{rows}, n] or [key heads, {rows}, n]"
            )
        if found.size and not (-1 <= found.min() and found.max() < columns):
            raise ValueError(
                f"BlockLists.lists names block {found.max() if found.max() >= columns else found.min()} in document"
                f" {document} of {length} tokens; it has {columns} blocks of {self.key_block}"
            )
        ordered = np.sort(found, -1)
        if (twice := (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
            raise ValueError(
                f"BlockLists.lists names block {ordered[..., 1:][twice][0]} twice in a list of document {document}"
            )
        return ordered

    def __eq__(self, other):
        return isinstance(other, BlockLists) and self._key == other._key

    def __hash__(self):
        return hash(self._key)

    @property
    def _key(self):
        return (self.lists if callable(self.lists) else None), self.signature

    @property
    def signature(self):
        """What ranks compare."""
        return self.name, self.query_block, self.key_block
