"""Blocks of other ranks' keys and values, read from their windows, and gradients of them, written there.

Few programs with many threads each: they take some processors for themselves, whose kernels of attention would have
to wait otherwise, and a link is busy with a few.
"""

import torch

from longspan.kernels.compiler import cdiv, next_power_of_2, tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.sparse.packing import READ_PAST

WORDS = 16384  # of keys, or of values, that a program moves at once
WARPS = 32


def pull_blocks(k, v, addresses, table, starts, keys, rank: int, offset: int, lists: range, programs: int) -> None:
    """Fills rows of buffers k and v, alike, [rows, heads of a list, D], with blocks of other ranks. addresses: int64
    [ranks], their windows (peer_windows), where keys and values lie; table: int32 [lists, ranks * width], a block's
    number in the buffer plus `offset`, or -1; starts: int32, a block's first row, by number; lists: those whose blocks
    are read."""
    heads, words = k.shape[1], k.shape[2] * k.element_size() // 4
    token, most = len(table) * heads * words, max(keys.tokens)
    strides = token, heads * words, 0, most * token
    _launch(k, v, addresses, 0, table, starts, keys, rank, offset, lists, programs, strides, False)


def clear_behind(buffer, counts, rank: int, own: bool, groups: int) -> None:
    """Zeroes READ_PAST rows of a buffer [rows, heads, D], or as many as there are, behind what each group of lists
    names. Blocks lie as asking.place says; counts: see asking.count."""
    ranks, lists, words = len(counts), counts.shape[2] // 2, buffer.stride(0) * buffer.element_size() // 4
    if buffer.numel():
        given = len(buffer), rank, words, ranks, lists, own, next_power_of_2(ranks * lists), READ_PAST
        clear_behind_kernel[(groups,)](buffer.view(torch.int32), counts, *given, next_power_of_2(words))


def push_blocks(k, v, addresses, begin: int, table, starts, keys, rank: int, offset: int, programs: int) -> None:
    """Writes gradients of what was pulled to their owners' windows, from byte `begin` on; others as in pull_blocks."""
    token, most, lists = k.shape[1] * k.shape[2] * k.element_size() // 4, max(keys.tokens), len(table)
    strides = token, most * token, lists * most * token, (len(addresses) - 1) * lists * most * token
    _launch(k, v, addresses, begin, table, starts, keys, rank, offset, range(lists), programs, strides, True)


def _launch(k, v, addresses, begin, table, starts, keys, rank, offset, lists, programs, strides, away):
    assert k.stride() == v.stride() and k.stride(1) == k.shape[2] and k.stride(2) == 1, "buffers are alike"
    size, words, ranks = keys.size, k.shape[2] * k.element_size() // 4, len(addresses)
    columns = next_power_of_2(words)
    rows = max(1, WORDS // columns)
    pieces = max(1, rows // size)
    tiles = cdiv(keys.width, pieces) * (ranks - 1) * len(lists)
    if k.numel() and tiles:
        peer_blocks_kernel[(min(programs, tiles),)](
            k, v, addresses, table, starts, keys.starts, keys.lengths, k.stride(0) * k.element_size() // 4, *strides,
            begin // 4, lists.start, tiles, keys.width, rank, offset, ranks, k.shape[1], words, columns, size, pieces,
            min(rows, next_power_of_2(pieces * size)), away, num_warps=WARPS,
        )  # fmt: skip


@launched
@triton.jit(do_not_specialize=["first", "tiles", "width", "rank", "offset"])
def peer_blocks_kernel(
    k_ptr, v_ptr, addresses_ptr, table_ptr, starts_ptr, key_starts_ptr, lengths_ptr, row_stride, token_stride,
    list_stride, slot_stride, second, begin, first, tiles, width, rank, offset,
    RANKS: tl.constexpr, HEADS: tl.constexpr, W: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr,
    PIECES: tl.constexpr, ROWS: tl.constexpr, AWAY: tl.constexpr,
):  # fmt: skip
    """PIECES blocks of one list and rank at once, SIZE rows each at most; AWAY: from here to there. Strides and
    positions in words: token, list and slot, one for each other rank, are those of a window, where values are `second`
    behind keys."""
    own = tl.multiple_of(k_ptr.to(tl.pointer_type(tl.int32), bitcast=True), 16)
    own_second = tl.multiple_of(v_ptr.to(tl.pointer_type(tl.int32), bitcast=True), 16)
    per_rank = tl.cdiv(width, PIECES)
    column = tl.arange(0, COLUMNS)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        listed = first + tile // (per_rank * (RANKS - 1))
        peer = (rank + 1 + tile // per_rank % (RANKS - 1)) % RANKS
        there = tl.multiple_of(tl.load(addresses_ptr + peer).to(tl.pointer_type(tl.int32)), 16)
        slot = rank - (rank > peer).to(tl.int32)
        there += begin + listed.to(tl.int64) * list_stride + slot.to(tl.int64) * slot_stride
        for start in tl.static_range(0, SIZE, ROWS):
            row = start + tl.arange(0, ROWS)
            place, inside = tile % per_rank * PIECES + row // SIZE, row % SIZE
            exists = (row < PIECES * SIZE) & (place < width)
            piece = peer * width + place
            number = tl.load(table_ptr + listed.to(tl.int64) * (RANKS * width) + piece, mask=exists, other=-1)
            named = number >= 0
            named = named & (inside < tl.load(lengths_ptr + piece, mask=named, other=0))
            here = tl.load(starts_ptr + number - offset, mask=named, other=0) + inside
            token = tl.load(key_starts_ptr + piece, mask=named, other=0) + inside
            for head in tl.static_range(HEADS):
                moves = named[:, None] & (column < W)[None, :]
                near = here.to(tl.int64)[:, None] * row_stride + (head * W + column)[None, :]
                far = token.to(tl.int64)[:, None] * token_stride + (head * W + column)[None, :]
                if AWAY:
                    keys = tl.load(own + near, mask=moves)
                    values = tl.load(own_second + near, mask=moves)
                    tl.store(there + far, keys, mask=moves)
                    tl.store(there + second + far, values, mask=moves)
                else:  # past L1, which does not see what others write
                    keys = tl.load(there + far, mask=moves, cache_modifier=".cg")
                    values = tl.load(there + second + far, mask=moves, cache_modifier=".cg")
                    tl.store(own + near, keys, mask=moves)
                    tl.store(own_second + near, values, mask=moves)


@launched
@triton.jit(do_not_specialize=["rows", "rank"])
def clear_behind_kernel(
    buffer_ptr, counts_ptr, rows, rank, WORDS: tl.constexpr, RANKS: tl.constexpr, LISTS: tl.constexpr,
    OWN: tl.constexpr, SEGMENTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Behind one group of lists, of as many as there are programs."""
    every, column = tl.arange(0, SEGMENTS), tl.arange(0, COLUMNS)
    whose, which = every // LISTS, every % LISTS
    before = (whose != rank) & (which * tl.num_programs(0) < (tl.program_id(0) + 1) * LISTS)
    if OWN:  # of all lists, in front
        before = before | (whose == rank)
    before = before & (every < RANKS * LISTS)
    at = counts_ptr + (rank * RANKS + whose) * (2 * LISTS + 1) + which
    end = tl.sum(tl.load(at, mask=before, other=0))
    for begin in range(0, ROWS, 8):
        row = end + begin + tl.arange(0, 8)
        cleared = (row < rows)[:, None] & (column < WORDS)[None, :]
        to = buffer_ptr + row[:, None] * WORDS + column[None, :]
        tl.store(to, tl.zeros([8, COLUMNS], tl.int32), mask=cleared)
