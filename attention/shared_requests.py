"""Blocks by request where ranks share memory: each reads the blocks that its lists name from the windows of the others.

Keys and values are laid into windows while blocks are chosen. What comes has room for all that lists can name, so the
host waits for nothing until attention is queued; then it learns how much there was. Gradients are written to windows of
the owners while those of queries are made, and added there in rank order, as those that came by the group would be.
"""

from dataclasses import dataclass, field, replace

import torch

from longspan.attention.block_parts import Part
from longspan.attention.block_tables import Pieces
from longspan.attention.requests import Asked, Request
from longspan.kernels.sparse import Packing, pack
from longspan.kernels.sparse.peer_windows import fits, window_bytes
from longspan.parallel.exchange import Pending, aside, group_rank
from longspan.parallel.peer_memory import PeerMemory, Room, has_room

READY, FREE, RETURNED, TAKEN = range(4)  # keys are in windows, and have been read; gradients are, and have been added
PROGRAMS = 24  # that move blocks beside attention, each on a processor of its own
ALONE = 64  # where nothing else runs
KEPT = 0.75  # of the room for what comes; where less of it came, the rest is given back, which takes a copy


@dataclass(frozen=True)
class Windows:
    """room: what lies there of every rank, keys and values first, and from byte `returned` on what other ranks return
    for them; peers: whose signals say when."""

    peers: PeerMemory
    room: Room
    returned: int


@dataclass(frozen=True)
class Staged:
    """This rank's keys and values, in its window as well."""

    k: torch.Tensor
    v: torch.Tensor
    windows: Windows

    def request(self, *given, **options) -> "SharedRequest":
        """A Request of these arguments."""
        return SharedRequest(self, *given, **options)


def window_sizes(strategy, most: int, ranks: int, heads: int, head_dim: int, itemsize: int) -> tuple[int, int] | None:
    """window_bytes of a layer whose ranks share memory, most: tokens of the rank that has most; None where its blocks
    go by the group all the same."""
    if strategy == "ring" or ranks == 1 or not fits(head_dim, itemsize):
        return None
    sizes = window_bytes(most, ranks, heads, head_dim, itemsize)
    return sizes if has_room(sum(sizes)) else None


def room_for(tokens: int, entries: int, size: int) -> int:
    """Rows that a list of so many entries, of blocks of `size` rows, can name of so many tokens."""
    return min(tokens, entries * size)


def is_cut(rows: int, room: int) -> bool:
    """Whether room of which so many rows are used is given back."""
    return rows < KEPT * room


def stage(k, v, keys, strategy, peers) -> Staged | None:
    """Lays keys and values [T, H, D] into this rank's window, for blocks of `keys`, Pieces; None where they are not
    asked for through `peers`, a PeerMemory or None. The same on all ranks."""
    if peers is None:
        return None
    most, (_, heads, head_dim) = max(keys.tokens), k.shape
    sizes = window_sizes(strategy, most, len(keys.tokens), heads, head_dim, k.element_size())
    room = sizes and peers.room(sum(sizes))
    if room is None:
        return None
    with aside(k, v):
        peers.wait(FREE, behind=1)
        for x, window in zip((k, v), room.view(0, (2, most, heads, head_dim), k.dtype)):
            window[: len(x)].copy_(x)
        peers.signal(READY)
    return Staged(k, v, Windows(peers, room, sizes[0]))


class SharedRequest(Request):
    """What this rank's lists name of other ranks' keys. It is on its way as soon as that is known."""

    def __init__(self, staged: Staged, blocks, keys, queries, options, group, estimate, *rest):
        self.staged, self.window = staged, max(keys.tokens)
        super().__init__(blocks, keys, queries, options, group, None, *rest)

    def begin(self, table, arriving, counts):
        k, keys, tokens = self.staged.k, self.keys, sum(self.keys.tokens)
        if not self.together:
            tokens -= keys.tokens[group_rank(self.group)]
        rows = self.lists * room_for(tokens, self.wanted[0].numel(), keys.size)
        buffer = k.new_empty(rows, 2 * self.packing.heads_of(k), k.shape[2])
        numbers = table, arriving.start, counts, 0 if self.together else len(arriving)
        self.way = Read(self.packing, 0, len(k), self.groups, self.staged.windows, keys, *numbers, buffer)
        self.pending = self.way.start(k, self.staged.v, self.group)

    def parts(self, k, v):
        return [], [Part(self.plan, way=self.way)], self.pending

    def settle(self, parts, arrived):
        """The same parts and what arrived in them once it is known how much that is. Waits for the device."""
        counts, rank = self.counts.wait(), group_rank(self.group)
        rows, pieces = counts[rank, :, : self.lists], counts[rank, :, self.lists : 2 * self.lists].copy()
        own = int(rows[rank].sum()) if self.together else 0
        pieces[rank] *= self.together
        some = self.plan.keys.map(lambda x: x[: pieces.sum()])
        used = own + int(rows.sum() - rows[rank].sum())
        returned = int(counts[:, rank, : self.lists].sum() - rows[rank].sum())
        buffer = self.way.buffer[:used]
        if is_cut(used, len(self.way.buffer)):
            buffer = buffer.clone()
        row = buffer.shape[1] * buffer.shape[2] * buffer.element_size()
        self.way.windows.peers.received += row * (used - own)
        way = replace(self.way, own=own, buffer=None, returned=row * returned)
        part = Part(self.plan.over(some, int(pieces.sum(0).max())), way=way)
        return [*parts[:-1], part], [*arrived[:-2], *buffer.chunk(2, 1)]


@dataclass(frozen=True)
class Read(Asked):
    """How what was asked for is read, in so many turns. packing: others return as it lies in the window. keys: Pieces;
    table, starts, offset: numbers of blocks in the buffer, and the row of each, see kernels.sparse.place; counts: see
    kernels.sparse.count; buffer: None once it is known what arrived; returned: bytes that come back."""

    turns: int
    windows: Windows
    keys: Pieces
    table: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor
    offset: int
    buffer: torch.Tensor | None = field(repr=False)
    returned: int = 0

    def start(self, k, v, group):
        from longspan.kernels.sparse.peers_triton import clear_behind, pull_blocks

        keys, values = self.buffer.chunk(2, 1)
        peers, lists, works = self.windows.peers, len(self.table), []
        with aside(self.table, self.starts, self.counts, self.buffer) as mark:
            clear_behind(self.buffer, self.counts, peers.rank, self.packing.own >= 0, self.turns)
            peers.wait(READY)
            for turn in range(self.turns):
                some = range(turn * lists // self.turns, (turn + 1) * lists // self.turns)
                programs = ALONE if turn == 0 and self.turns > 1 else PROGRAMS
                given = self.windows.room.addresses, self.table, self.starts, self.keys, peers.rank, self.offset
                pull_blocks(keys, values, *given, some, programs)
                works.append(mark())
            peers.signal(FREE)
        own = self.packing.own
        if own >= 0:
            mine = Packing(self.packing.blocks, self.packing.places[own : own + 1], 0)
            pack((k, v), mine, 0, self.buffer)
        return Pending(works, [keys, values])

    def start_return(self, gradients, dtype, group):
        from longspan.kernels.sparse.peers_triton import push_blocks

        gradients, windows = [x.to(dtype).contiguous() for x in gradients], self.windows
        peers, (_, heads, head_dim) = windows.peers, gradients[0].shape
        with aside(self.table, self.starts, *gradients) as mark:
            peers.wait(TAKEN, behind=1)
            begun = mark()
            places = self.table, self.starts, self.keys, peers.rank, self.offset
            push_blocks(*gradients, windows.room.addresses, windows.returned, *places, PROGRAMS)
            peers.signal(RETURNED)
            done = mark()
        begun.wait()  # what follows would take all processors, for as long as it runs, before this has any
        ranks, lists = len(self.keys.tokens), len(self.table)
        shape = 2, (ranks - 1) * lists * max(self.keys.tokens), heads, head_dim
        peers.received += self.returned
        theirs = windows.room.view(windows.returned, shape, dtype)
        return Pending([done, Returned(peers)], [*theirs, *(x[: self.own] for x in gradients)], gradients)

    def add_returned(self, arrived, totals, blocks, shares):
        totals = super().add_returned(arrived, totals, blocks, shares)
        self.windows.peers.signal(TAKEN)
        return totals


@dataclass(frozen=True)
class Returned:
    """Until other ranks have returned theirs."""

    peers: PeerMemory

    def wait(self):
        self.peers.wait(RETURNED)
