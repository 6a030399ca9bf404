"""The lists of a plan as Triton kernels, one launch by query block and two by key block.

Every program writes the entries of a few rows, or columns, and counts itself what comes before them: reading lists
again costs less than another launch. Columns are listed by a bit for every pair of row and column: in the order of
columns, then rows, the set bits are the lists. Where that would be too many bits, a counting sort makes them
(cells_triton). So the lists are the same from run to run.
"""

import torch

from longspan.kernels.compiler import cdiv, next_power_of_2, tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.sparse.cells_triton import sorted_columns

TILE, WARPS = 4096, 16  # entries, or words of bits, at once
PROGRAMS = 128  # one for a processor: with more, more is read again
WORDS = 64  # most words of bits for an entry that lists have room for
ITEM_COLUMNS = 2048  # key blocks whose items a program lists


def rows_triton(chosen: torch.Tensor, width: int, parts: int = 1, full: bool = False):
    """int32 [heads, M, K] -> row_ptr [heads, parts * M + 1], row_idx [heads, M * K]: for every part, one row after the
    other, the entries in part * width + 0:width, in their order and counted from part * width. full: one part, and no
    entry is left out."""
    heads, num_rows, most = chosen.shape
    row_idx = chosen.new_empty(heads, num_rows * most)
    if not row_idx.numel():
        return chosen.new_zeros(heads, parts * num_rows + 1), row_idx
    row_ptr, tile = chosen.new_empty(heads, parts * num_rows + 1), _tile(num_rows, most)
    span = _span(num_rows, heads * parts, tile[0])
    list_rows_kernel[(cdiv(num_rows, span) * heads * parts,)](
        chosen, row_ptr, row_idx, num_rows, most, width, *chosen.stride()[:2], parts, heads, span, full, *tile,
        num_warps=WARPS,
    )  # fmt: skip
    return row_ptr, row_idx


def columns_triton(row_ptr, row_idx, num_cols: int, chunk: int, most_items: int):
    """(col_ptr, col_idx, item_ptr, item_col) of BlockPlan."""
    (heads, capacity), num_rows = row_idx.shape, row_ptr.shape[1] - 1
    col_idx = torch.empty_like(row_idx)
    if not capacity or not num_cols:
        col_ptr, item_ptr = row_ptr.new_zeros(2, heads, num_cols + 1)
        return col_ptr, col_idx, item_ptr, row_ptr.new_full((heads, most_items), num_cols)
    col_ptr, words = row_ptr.new_empty(heads, num_cols + 1), cdiv(num_rows, 32)

    def items_of(col_ptr):
        item_ptr, item_col = torch.empty_like(col_ptr), row_ptr.new_empty(heads, most_items)
        list_items_kernel[(cdiv(num_cols, ITEM_COLUMNS) * heads,)](
            col_ptr, item_ptr, item_col, num_cols, most_items, heads, chunk, ITEM_COLUMNS, num_warps=WARPS
        )
        return item_ptr, item_col

    if words * num_cols > WORDS * capacity:
        return col_ptr, col_idx, *sorted_columns(row_ptr, row_idx, col_ptr, col_idx, items_of, chunk)
    bits, span = row_ptr.new_empty(heads, num_cols, words), _span(num_cols, heads, 1)
    list_columns_kernel[(cdiv(num_cols, span) * heads,)](
        row_ptr, row_idx, bits, col_ptr, col_idx, num_rows, num_cols, words, capacity, span, heads,
        *_tile(num_rows, -(-capacity // num_rows)), TILE, num_warps=WARPS,
    )  # fmt: skip
    return col_ptr, col_idx, *items_of(col_ptr)


def _tile(num_rows, most):
    """Rows and entries of a tile."""
    entries = min(256, next_power_of_2(most))
    return min(TILE // entries, next_power_of_2(num_rows)), entries


def _span(count, programs, least):
    """How many of `count` rows or columns a program takes where each is gone through `programs` times."""
    return max(least, cdiv(count * programs, PROGRAMS))


@launched
@triton.jit(do_not_specialize=["num_rows", "most", "width", "stride_h", "stride_m", "parts", "heads", "span"])
def list_rows_kernel(
    chosen_ptr, row_ptr, row_idx, num_rows, most, width, stride_h, stride_m, parts, heads, span,
    FULL: tl.constexpr, ROWS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """`span` rows of a part and head: parts of the same rows and head are neighbours, which read the same."""
    part, head = tl.program_id(0) % parts, (tl.program_id(0) // parts % heads).to(tl.int64)
    begin = tl.program_id(0) // (parts * heads) * span
    stop, least = tl.minimum(begin + span, num_rows), part * width
    chosen_ptr += head * stride_h
    row_ptr += head * (parts * num_rows + 1) + part * num_rows
    row_idx += head * num_rows * most
    inside, beside = tl.arange(0, ROWS), tl.arange(0, ENTRIES)[None, :]
    if FULL:
        total = begin * most
    else:
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
def _ones(bits):
    """How many bits of an int32 are set."""
    x = bits.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@launched
@triton.jit(do_not_specialize=["num_rows", "num_cols", "num_words", "capacity", "span", "heads"])
def list_columns_kernel(
    row_ptr, row_idx, bits_ptr, col_ptr, col_idx, num_rows, num_cols, num_words, capacity, span, heads,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Lists of `span` columns of a head, by bits [heads, columns, words of 32 rows] of which a program uses its own."""
    begin, head = tl.program_id(0) // heads * span, (tl.program_id(0) % heads).to(tl.int64)
    stop = tl.minimum(begin + span, num_cols)
    row_ptr += head * (num_rows + 1)
    row_idx += head * capacity
    bits_ptr += (head * num_cols + begin) * num_words
    col_ptr += head * (num_cols + 1) + begin
    col_idx += head * capacity
    count, place = (stop - begin) * num_words, tl.arange(0, TILE)
    for at in range(0, count, TILE):
        tl.store(bits_ptr + at + place, tl.zeros([TILE], tl.int32), mask=at + place < count)
    tl.debug_barrier()
    before = tl.zeros([ROWS, ENTRIES], tl.int32)  # entries of columns before these
    for first_row in range(0, num_rows, ROWS):
        row = first_row + tl.arange(0, ROWS)
        first = tl.load(row_ptr + row, mask=row < num_rows, other=0)
        last = tl.load(row_ptr + row + 1, mask=row < num_rows, other=0)
        bit = (tl.full([ROWS], 1, tl.uint32) << (row & 31).to(tl.uint32)).to(tl.int32, bitcast=True)
        for at in range(0, tl.max(last - first), ENTRIES):
            entry = first[:, None] + at + tl.arange(0, ENTRIES)[None, :]
            column = tl.load(row_idx + entry, mask=entry < last[:, None], other=num_cols)
            before += (column < begin).to(tl.int32)
            word = (column - begin) * num_words + (row >> 5)[:, None]
            mine = (column >= begin) & (column < stop)
            tl.atomic_or(bits_ptr + word, tl.where(mine, bit[:, None], 0), mask=mine, sem="relaxed")
    tl.debug_barrier()
    total = tl.sum(tl.sum(before, 1), 0)
    for at in range(0, count, TILE):
        word = at + place
        bits = tl.load(bits_ptr + word, mask=word < count, other=0, cache_modifier=".cg")
        ones = _ones(bits)
        slot = total + tl.cumsum(ones, 0) - ones
        tl.store(col_ptr + word // num_words, slot, mask=(word < count) & (word % num_words == 0))
        total += tl.sum(ones, 0)
        row = word % num_words * 32
        for _ in range(0, tl.max(ones)):  # the lowest bit of each word that is left
            below = (bits - 1) & ~bits
            tl.store(col_idx + slot, row + _ones(below), mask=bits != 0)
            slot += 1
            bits = bits & (bits - 1)
    if stop == num_cols:
        tl.store(col_ptr + (stop - begin), total)


@launched
@triton.jit(do_not_specialize=["num_cols", "items", "heads", "chunk"])
def list_items_kernel(
    col_ptr, item_ptr, item_col, num_cols, items, heads, chunk, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Items of COLUMNS columns of a head: first item of each, and the column of each item, num_cols past the last."""
    begin, head = tl.program_id(0) // heads * COLUMNS, (tl.program_id(0) % heads).to(tl.int64)
    col_ptr += head * (num_cols + 1)
    item_ptr += head * (num_cols + 1)
    item_col += head * items
    before, place = tl.zeros([COLUMNS], tl.int32), tl.arange(0, COLUMNS)
    for first in range(0, begin, COLUMNS):
        before += _items_of(col_ptr, first + place, num_cols, chunk)
    column, total = begin + place, tl.sum(before, 0)
    counts = _items_of(col_ptr, column, num_cols, chunk)
    item = total + tl.cumsum(counts, 0) - counts
    tl.store(item_ptr + column, item, mask=column < num_cols)
    for turn in range(0, tl.max(counts)):
        tl.store(item_col + item + turn, column, mask=turn < counts)
    total += tl.sum(counts, 0)
    if begin + COLUMNS >= num_cols:
        tl.store(item_ptr + num_cols, total)
        for first in range(total, items, COLUMNS):
            tl.store(item_col + first + place, tl.zeros([COLUMNS], tl.int32) + num_cols, mask=first + place < items)


@triton.jit
def _items_of(col_ptr, column, num_cols, chunk):
    there = column < num_cols
    first, stop = tl.load(col_ptr + column, mask=there, other=0), tl.load(col_ptr + column + 1, mask=there, other=0)
    return (stop - first + (chunk - 1)) // chunk
