"""Spans cut into splits, the units the fused kernels work on in parallel: tables made once per batch.

A split is a run of whole chunks of one span. State passes sum each split on its own; folds then run along the splits of
a span (`Chains`) and give every split its entry state, so that all splits can be swept at once.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from longspan.kernels.linear.form import Spans

# log2 of the decay below which the sum of a split leaves out what was written before. fp32 carries 24 bits, so what is
# kept would have to be 2^40 times smaller than what is left out was for the last bit of the sum to tell.
LEFT_OUT_LOG2 = -64.0
LEFT_OUT_LOG2_SHORT = -52.0  # where states are rounded to 16 bits before they are used, of which 12 count at most
MIN_SPLIT = 512  # tokens; a split of 128 x 128 costs a state of 64 KiB, written and read, against 768 B per token


def split_size(
    spans: Spans, programs_per_split: int, chunk: int, rounds: int = 2, processors: int | None = None
) -> int:
    """Tokens per split such that about `rounds` programs run on every multiprocessor, of this GPU unless said
    otherwise; a multiple of `chunk`."""
    if processors is None:
        processors = torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 1
    splits = max(1, rounds * processors // programs_per_split)
    return -(-max(MIN_SPLIT, -(-spans.offsets[-1] // splits)) // chunk) * chunk


def padded(size: int) -> int:
    """The next power of two, at least 16: what tl.dot takes."""
    return max(16, 1 << (size - 1).bit_length())


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x itself where its last dimension is contiguous, as the kernels take it, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


@dataclass(frozen=True)
class Chains:
    """Folds to run; see kernels.fold. sources, targets: int32 [N, L], -1 where nothing is read or written.
    initial: int32 [N], row of the state each chain starts from, -1 for zero. num_out: rows written."""

    sources: torch.Tensor
    targets: torch.Tensor
    initial: torch.Tensor
    num_out: int

    @classmethod
    def of(cls, chains, num_out: int) -> "Chains":
        """chains: (initial, [(source, target), ...]) of each."""
        table = np.full((2, len(chains), max((len(chain) for _, chain in chains), default=0)), -1, np.int32)
        for n, (_, chain) in enumerate(chains):
            table[:, n, : len(chain)] = np.transpose(chain)
        return cls(torch.from_numpy(table[0]), torch.from_numpy(table[1]), _int32([i for i, _ in chains]), num_out)

    def map(self, move) -> "Chains":
        """The same with every tensor passed through `move`."""
        return _map(self, move)


@dataclass(frozen=True)
class Direction:
    """One direction of time. splits: int32, the splits whose sums are needed. summary: folds the sums of a linked span
    into one, row n for linked span n. inner: gives every split what enters it, from what enters its span (`initial`).
    row: int32 [S], where `inner` puts what enters each split, -1 for nothing; next_row: what leaves it, if that is the
    entry of another split or (going forward) the span is `left`. place: int32 [S], how many splits of its span come
    before it."""

    splits: torch.Tensor
    summary: Chains
    inner: Chains
    row: torch.Tensor
    next_row: torch.Tensor
    place: torch.Tensor


@dataclass(frozen=True)
class Splits:
    """first, length: int32 [S], tokens of each split. sum_row: int32 [S], row of its sum among `num_sums`, or -1.
    chunk_first, chunk_length: int32 [num_chunks]; split_chunk: int32 [S], first chunk of each split.
    forward, backward: states from earlier splits, gradients from later ones. linked: whether some span is."""

    first: torch.Tensor
    length: torch.Tensor
    sum_row: torch.Tensor
    num_sums: int
    chunk_first: torch.Tensor
    chunk_length: torch.Tensor
    split_chunk: torch.Tensor
    forward: Direction
    backward: Direction
    linked: bool

    @classmethod
    def of(cls, spans: Spans, size: int, chunk: int) -> "Splits":
        """Splits of about `size` tokens, a multiple of `chunk` (tokens): each span in equal parts of whole chunks."""
        assert size % chunk == 0 and size > 0, (size, chunk)
        assert set(spans.entered) | set(spans.left) <= set(spans.linked), spans
        firsts, lengths, members = [], [], []  # members: the splits of each span
        for start, stop in zip(spans.offsets, spans.offsets[1:]):
            chunks = -(-(stop - start) // chunk)
            parts = -(-chunks // (size // chunk))
            edges = [min(start + chunks * part // parts * chunk, stop) for part in range(parts + 1)]
            members.append(range(len(firsts), len(firsts) + parts))
            firsts += edges[:-1]
            lengths += np.diff(edges).tolist()
        linked = set(spans.linked)
        summed = [split for span, splits in enumerate(members) if len(splits) > 1 or span in linked for split in splits]
        sum_row = np.full(len(firsts), -1, np.int32)
        sum_row[summed] = np.arange(len(summed))
        chunk_counts = [-(-length // chunk) for length in lengths]
        chunk_first = [first + chunk * n for first, count in zip(firsts, chunk_counts) for n in range(count)]
        chunk_length = [
            min(chunk, length - chunk * n) for length, count in zip(lengths, chunk_counts) for n in range(count)
        ]
        reverse = [splits[::-1] for splits in members]
        return cls(
            _int32(firsts),
            _int32(lengths),
            torch.from_numpy(sum_row),
            len(summed),
            _int32(chunk_first),
            _int32(chunk_length),
            _int32(np.cumsum([0, *chunk_counts])[:-1]),
            _direction(members, sum_row, spans.linked, spans.entered, spans.left),
            _direction(reverse, sum_row, spans.linked, spans.left, ()),
            bool(spans.linked),
        )

    @property
    def num_splits(self) -> int:
        return len(self.first)

    @property
    def num_chunks(self) -> int:
        return len(self.chunk_first)

    def map(self, move) -> "Splits":
        """The same tables with every tensor passed through `move`."""
        return _map(self, move)


def _direction(members, sum_row, linked, entered, left) -> Direction:
    """members: the splits of each span in the order of passing; entered: spans that something enters; left: spans whose
    last state is kept too."""
    entry, rows, next_rows, chains, needed = {span: row for row, span in enumerate(entered)}, {}, {}, [], set()
    num_rows = 0
    for span, splits in enumerate(members):
        if len(splits) == 1 and span not in entry and span not in left:
            continue
        chain = []
        for place, split in enumerate(splits):
            if place or span in entry:
                rows[split] = num_rows
                num_rows += 1
            is_last = place == len(splits) - 1
            passes_on = not is_last or span in left
            chain.append((sum_row[split] if passes_on else -1, rows.get(split, -1)))
            if passes_on:
                needed.add(split)
                next_rows[split] = num_rows
        if span in left:
            chain.append((-1, num_rows))
            num_rows += 1
        chains.append((entry.get(span, -1), chain))
    totals = [(-1, [(sum_row[split], -1) for split in members[span]] + [(-1, n)]) for n, span in enumerate(linked)]
    needed |= {split for span in linked for split in members[span]}
    num_splits = sum(map(len, members))
    row, next_row, places = (np.full(num_splits, -1, np.int32) for _ in range(3))
    row[list(rows)], next_row[list(next_rows)] = list(rows.values()), list(next_rows.values())
    for splits in members:
        places[splits] = range(len(splits))
    return Direction(
        _int32(sorted(needed)),
        Chains.of(totals, len(linked)),
        Chains.of(chains, num_rows),
        torch.from_numpy(row),
        torch.from_numpy(next_row),
        torch.from_numpy(places),
    )


def _int32(values) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, np.int32).reshape(-1))


def _map(table, move):
    moved = {}
    for name, value in vars(table).items():
        if isinstance(value, torch.Tensor):
            moved[name] = move(value)
        elif isinstance(value, (Direction, Chains)):
            moved[name] = _map(value, move)
    return replace(table, **moved)
