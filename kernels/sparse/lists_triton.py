"""The lists of a plan as Triton kernels, one launch by query block and three by key block.

By query block every program writes the entries of a few rows, and counts itself what comes before them: reading lists
again costs less than another launch. By key block there is a bit for every pair of row and column: programs of rows set
those of their rows, programs of columns find where each word of them begins in the lists, then programs of rows write
their entries there. Where that would be too many bits, a counting sort makes the lists (cells_triton). So they are the
same from run to run.
"""

import torch

from longspan.kernels.compiler import cdiv, next_power_of_2, tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.sparse.cells_triton import sorted_columns
from longspan.kernels.sparse.items_triton import fill_items, list_items

TILE, WARPS = 4096, 16  # entries, or words of bits, at once
PROGRAMS = 128  # one for a processor
WORDS = 64  # most words of bits for an entry that lists have room for
COLUMNS, GROUPS = 32, 256  # columns of a program that scans them, at least, and such programs of a head, at most
SCANNED, SCANNING_WARPS = 4096, 8  # words of bits of these columns at once
PLACING = 1024  # programs that write entries
ITEM_COLUMNS = 2048  # key blocks whose items are listed at once


def rows_triton(chosen: torch.Tensor, width: int, parts: int = 1):
    """int32 [heads, M, K] -> row_ptr [heads, parts * M + 1], row_idx [heads, M * K]: for every part, one row after the
    other, the entries in part * width + 0:width, in their order and counted from part * width."""
    heads, num_rows, most = chosen.shape
    row_idx = chosen.new_empty(heads, num_rows * most)
    if not row_idx.numel():
        return chosen.new_zeros(heads, parts * num_rows + 1), row_idx
    row_ptr, tile = chosen.new_empty(heads, parts * num_rows + 1), _tile(num_rows, most)
    span = max(tile[0], cdiv(num_rows * heads * parts, PROGRAMS))
    list_rows_kernel[(cdiv(num_rows, span) * heads * parts,)](
        chosen, row_ptr, row_idx, num_rows, most, width, *chosen.stride()[:2], parts, heads, span, *tile,
        num_warps=WARPS,
    )  # fmt: skip
    return row_ptr, row_idx


def columns_triton(row_ptr, row_idx, num_cols: int, chunk: int, most_items: int):
    """(col_ptr, col_idx, item_ptr, item_col) of BlockPlan; entries from num_cols on are left out."""
    (heads, capacity), num_rows = row_idx.shape, row_ptr.shape[1] - 1
    col_idx = torch.empty_like(row_idx)
    if not capacity or not num_cols:
        col_ptr, item_ptr = row_ptr.new_zeros(2, heads, num_cols + 1)
        return col_ptr, col_idx, item_ptr, row_ptr.new_full((heads, most_items), num_cols)
    col_ptr, words = row_ptr.new_empty(heads, num_cols + 1), cdiv(num_rows, 32)
    item_ptr, item_col = torch.empty_like(col_ptr), row_ptr.new_empty(heads, most_items)
    made = col_ptr, col_idx, item_ptr, item_col
    if words * num_cols > WORDS * capacity:
        sorted_columns(row_ptr, row_idx, *made, chunk)
        return made
    columns = max(COLUMNS, next_power_of_2(cdiv(num_cols, GROUPS)))
    groups, span = cdiv(num_cols, columns), cdiv(words * heads, PROGRAMS)
    parts, at_once = cdiv(words, span), min(SCANNED // columns, next_power_of_2(words))
    # Bits and where they begin [2, heads, words, columns], entries [heads, groups, parts], programs that are done.
    scratch = row_ptr.new_empty(heads * (2 * words * num_cols + groups * parts + 1))
    sizes, tile = (num_cols, words, groups, parts, capacity, heads), _tile(num_rows, -(-capacity // num_rows))
    mark_rows_kernel[(parts * heads,)](
        row_ptr, row_idx, scratch, num_rows, span, *sizes, columns, *tile, TILE, num_warps=WARPS,
    )  # fmt: skip
    scan_columns_kernel[(groups * heads,)](
        scratch, col_ptr, item_ptr, item_col, most_items, chunk, *sizes, columns, at_once, TILE, ITEM_COLUMNS,
        num_warps=SCANNING_WARPS,
    )  # fmt: skip
    span = max(tile[0], cdiv(num_rows * heads, PLACING))
    list_columns_kernel[(cdiv(num_rows, span) * heads,)](
        row_ptr, row_idx, scratch, col_idx, num_rows, span, num_cols, words, capacity, heads, *tile, num_warps=WARPS,
    )  # fmt: skip
    return made


def _tile(num_rows, most):
    """Rows and entries of a tile."""
    entries = min(256, next_power_of_2(most))
    return min(TILE // entries, next_power_of_2(num_rows)), entries


@launched
@triton.jit(do_not_specialize=["num_rows", "most", "width", "stride_h", "stride_m", "parts", "heads", "span"])
def list_rows_kernel(
    chosen_ptr, row_ptr, row_idx, num_rows, most, width, stride_h, stride_m, parts, heads, span,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """`span` rows of a part and head: parts of the same rows and head are neighbours, which read the same."""
    part, head = tl.program_id(0) % parts, (tl.program_id(0) // parts % heads).to(tl.int64)
    begin = tl.program_id(0) // (parts * heads) * span
    stop, least = tl.minimum(begin + span, num_rows), part * width
    chosen_ptr += head * stride_h
    row_ptr += head * (parts * num_rows + 1) + part * num_rows
    row_idx += head * num_rows * most
    inside, beside = tl.arange(0, ROWS), tl.arange(0, ENTRIES)[None, :]
    before = tl.zeros([ROWS, ENTRIES], tl.int32)
    for first in range(0, tl.where(part > 0, num_rows, begin), ROWS):
        row = first + inside
        at = chosen_ptr + row.to(tl.int64) * stride_m
        limit = tl.where(row < begin, least + width, least)[:, None]
        for entry in range(0, most, ENTRIES):
            there = (row < num_rows)[:, None] & (entry + beside < most)
            column = tl.load(at[:, None] + (entry + beside), mask=there, other=-1)
            before += ((column >= 0) & (column < limit)).to(tl.int32)
    total = tl.sum(tl.sum(before, 1), 0)
    for first in range(begin, stop, ROWS):
        row = first + inside
        valid, at = row < stop, chosen_ptr + row.to(tl.int64) * stride_m
        counts = tl.zeros([ROWS], tl.int32)
        for entry in range(0, most, ENTRIES):
            there = valid[:, None] & (entry + beside < most)
            column = tl.load(at[:, None] + (entry + beside), mask=there, other=-1) - least
            counts += tl.sum(((column >= 0) & (column < width)).to(tl.int32), 1)
        slot = total + tl.cumsum(counts, 0) - counts
        tl.store(row_ptr + row, slot, mask=valid)
        total += tl.sum(counts, 0)
        for entry in range(0, most, ENTRIES):
            there = valid[:, None] & (entry + beside < most)
            column = tl.load(at[:, None] + (entry + beside), mask=there, other=-1) - least
            listed = (column >= 0) & (column < width)
            to = slot[:, None] + tl.cumsum(listed.to(tl.int32), 1) - 1
            tl.store(row_idx + to, column, mask=listed)
            slot += tl.sum(listed.to(tl.int32), 1)
    if (part == parts - 1) & (stop == num_rows):
        tl.store(row_ptr + num_rows, total)


@triton.jit
def _parts_of(scratch, head, num_cols, num_words, groups, parts, heads):
    """Of a head: its bits, its numbers of entries, and how many of its programs are done."""
    bits_ptr = scratch + head * num_words * num_cols
    sums_ptr = scratch + 2 * heads.to(tl.int64) * num_words * num_cols
    return bits_ptr, sums_ptr + head * groups * parts, sums_ptr + heads * groups * parts + head


@launched
@triton.jit(
    do_not_specialize=[
        "num_rows", "span", "num_cols", "num_words", "groups", "parts", "capacity", "heads",
    ]
)  # fmt: skip
def mark_rows_kernel(
    row_ptr, row_idx, scratch, num_rows, span, num_cols, num_words, groups, parts, capacity, heads,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, ENTRIES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Bits of `span` words of 32 rows and a head, and how many are in every group of COLUMNS columns."""
    part, head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    bits_ptr, sums_ptr, done_ptr = _parts_of(scratch, head, num_cols, num_words, groups, parts, heads)
    begin, place = part * span, tl.arange(0, TILE)
    stop = tl.minimum(begin + span, num_words)
    row_ptr += head * (num_rows + 1)
    row_idx += head * capacity
    bits_ptr += begin.to(tl.int64) * num_cols
    for at in range(0, (stop - begin) * num_cols, TILE):
        tl.store(bits_ptr + at + place, tl.zeros([TILE], tl.int32), mask=at + place < (stop - begin) * num_cols)
    for at in range(0, groups, TILE):
        group = at + place
        tl.store(sums_ptr + (group * parts + part), tl.zeros([TILE], tl.int32), mask=group < groups)
    if part == 0:
        tl.store(done_ptr, 0)
    tl.debug_barrier()
    for first_row in range(begin * 32, tl.minimum(stop * 32, num_rows), ROWS):
        row = first_row + tl.arange(0, ROWS)
        there = row < tl.minimum(stop * 32, num_rows)
        first = tl.load(row_ptr + row, mask=there, other=0)
        last = tl.load(row_ptr + row + 1, mask=there, other=0)
        bit = (tl.full([ROWS], 1, tl.uint32) << (row & 31).to(tl.uint32)).to(tl.int32, bitcast=True)[:, None]
        words = bits_ptr + ((row >> 5) - begin) * num_cols
        for at in range(0, tl.max(last - first), ENTRIES):
            entry = first[:, None] + at + tl.arange(0, ENTRIES)[None, :]
            mine = entry < last[:, None]
            column = tl.load(row_idx + entry, mask=mine, other=num_cols)
            mine = column < num_cols
            tl.atomic_or(words[:, None] + column, tl.where(mine, bit, 0), mask=mine, sem="relaxed")
            tl.atomic_add(sums_ptr + (column // COLUMNS * parts + part), 1, mask=mine, sem="relaxed")


@triton.jit
def _ones(bits):
    """How many bits of an int32 are set."""
    x = bits.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@launched
@triton.jit(
    do_not_specialize=[
        "items", "chunk", "num_cols", "num_words", "groups", "parts", "capacity", "heads",
    ]
)  # fmt: skip
def scan_columns_kernel(
    scratch, col_ptr, item_ptr, item_col, items, chunk, num_cols, num_words, groups, parts, capacity, heads,
    COLUMNS: tl.constexpr, WORDS: tl.constexpr, TILE: tl.constexpr, ITEM_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Where COLUMNS columns of a head begin, and each of their words with bits; the last program of a head lists the
    items of all."""
    group, head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    bits_ptr, sums_ptr, done_ptr = _parts_of(scratch, head, num_cols, num_words, groups, parts, heads)
    begin_ptr = bits_ptr + heads.to(tl.int64) * num_words * num_cols
    col_ptr += head * (num_cols + 1)
    before = tl.zeros([TILE], tl.int32)  # entries of columns before these
    for at in range(0, group * parts, TILE):
        part = at + tl.arange(0, TILE)
        before += tl.load(sums_ptr + part, mask=part < group * parts, other=0)
    column = group * COLUMNS + tl.arange(0, COLUMNS)
    valid, counts = column < num_cols, tl.zeros([COLUMNS], tl.int32)
    for first in range(0, num_words, WORDS):
        _, bits = _bits_of(bits_ptr, first, column, num_words, num_cols, WORDS)
        counts += tl.sum(_ones(bits), 0)
    slot = tl.sum(before, 0) + tl.cumsum(counts, 0) - counts
    tl.store(col_ptr + column, slot, mask=valid)
    if group == groups - 1:
        tl.store(col_ptr + num_cols, tl.sum(before, 0) + tl.sum(counts, 0))
    for first in range(0, num_words, WORDS):
        word, bits = _bits_of(bits_ptr, first, column, num_words, num_cols, WORDS)
        ones = _ones(bits)
        tl.store(begin_ptr + word, slot[None, :] + tl.cumsum(ones, 0) - ones, mask=bits != 0)
        slot += tl.sum(ones, 0)
    tl.debug_barrier()
    if tl.atomic_add(done_ptr, 1, sem="acq_rel") == groups - 1:
        item_ptr += head * (num_cols + 1)
        item_col += head * items
        total = tl.zeros([], tl.int32)
        for first in range(0, num_cols, ITEM_COLUMNS):
            place = first + tl.arange(0, ITEM_COLUMNS)
            there = place < num_cols
            begin = tl.load(col_ptr + place, mask=there, other=0, cache_modifier=".cg")
            stop = tl.load(col_ptr + place + 1, mask=there, other=0, cache_modifier=".cg")
            total = list_items(stop - begin, place, there, total, item_ptr, item_col, chunk)
        fill_items(total, item_ptr, item_col, num_cols, items, ITEM_COLUMNS)


@launched
@triton.jit(do_not_specialize=["num_rows", "span", "num_cols", "num_words", "capacity", "heads"])
def list_columns_kernel(
    row_ptr, row_idx, scratch, col_idx, num_rows, span, num_cols, num_words, capacity, heads,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """`span` rows of a head, each behind those of its column that have bits below its own in its word."""
    begin, head = tl.program_id(0) // heads * span, (tl.program_id(0) % heads).to(tl.int64)
    bits_ptr = scratch + head * num_words * num_cols
    begin_ptr = bits_ptr + heads.to(tl.int64) * num_words * num_cols
    row_ptr += head * (num_rows + 1)
    row_idx += head * capacity
    col_idx += head * capacity
    stop = tl.minimum(begin + span, num_rows)
    for first_row in range(begin, stop, ROWS):
        row = first_row + tl.arange(0, ROWS)
        first = tl.load(row_ptr + row, mask=row < stop, other=0)
        last = tl.load(row_ptr + row + 1, mask=row < stop, other=0)
        below = ((tl.full([ROWS], 1, tl.uint32) << (row & 31).to(tl.uint32)) - 1).to(tl.int32, bitcast=True)[:, None]
        word = ((row >> 5).to(tl.int64) * num_cols)[:, None]
        for at in range(0, tl.max(last - first), ENTRIES):
            entry = first[:, None] + at + tl.arange(0, ENTRIES)[None, :]
            column = tl.load(row_idx + entry, mask=entry < last[:, None], other=num_cols)
            mine = column < num_cols
            bits = tl.load(bits_ptr + (word + column), mask=mine, other=0) & below
            to = tl.load(begin_ptr + (word + column), mask=mine, other=0) + _ones(bits)
            tl.store(col_idx + to, row[:, None] + entry * 0, mask=mine)


@triton.jit
def _bits_of(bits_ptr, first, column, num_words, num_cols, WORDS: tl.constexpr):
    """(places, bits) [WORDS, columns] of words from `first` on; none where there is no word."""
    word = first + tl.arange(0, WORDS)[:, None]
    at = word.to(tl.int64) * num_cols + column[None, :]
    return at, tl.load(bits_ptr + at, mask=(word < num_words) & (column < num_cols)[None, :], other=0)
