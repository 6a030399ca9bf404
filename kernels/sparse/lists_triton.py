"""The lists of a plan as Triton kernels: counts, their sums, and entries put in place.

Columns are filled with atomic counters, in whatever order; then every entry finds its place by how many of its column
are smaller. So the lists are the same from run to run.
"""

import torch

from longspan.kernels.compiler import tl, triton

TILE = 2048  # entries at once
SCAN = 2048  # counts at once


def rows_triton(chosen: torch.Tensor, width: int, parts: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 [heads, M, K] -> row_ptr [heads, parts * M + 1], row_idx [heads, M * K]: for every part, one row after the
    other, the entries in part * width + 0:width, in their order and counted from part * width."""
    heads, num_rows, most = chosen.shape
    row_idx = chosen.new_empty(heads, num_rows * most)
    if not row_idx.numel():
        return chosen.new_zeros(heads, parts * num_rows + 1), row_idx
    counts, row_ptr = (chosen.new_empty(heads, parts * num_rows + more) for more in (0, 1))
    given = num_rows, most, width, *chosen.stride()[:2], parts
    (tiles,), tile = _row_tiles(heads, num_rows, most)
    grid = (tiles * parts,)
    count_rows_kernel[grid](chosen, counts, *given, heads, *tile)
    scan_kernel[(heads,)](counts, row_ptr, counts, counts, parts * num_rows, 0, SCAN, 0)
    fill_rows_kernel[grid](chosen, row_ptr, row_idx, *given, heads, *tile)
    return row_ptr, row_idx


def columns_triton(row_ptr, row_idx, num_cols: int, chunk: int, most_items: int):
    """(col_ptr, col_idx, item_ptr, item_col) of BlockPlan."""
    heads, num_rows, capacity = row_ptr.shape[0], row_ptr.shape[1] - 1, row_idx.shape[1]
    counts, taken = row_ptr.new_zeros(2, heads, num_cols)
    col_ptr, item_ptr = row_ptr.new_empty(2, heads, num_cols + 1)
    unordered, col_idx = torch.empty_like(row_idx), torch.empty_like(row_idx)
    item_col = row_ptr.new_empty(heads, most_items)
    given = row_ptr, row_idx
    grid, tile = _row_tiles(heads, num_rows, -(-capacity // max(num_rows, 1)))
    if capacity:
        count_columns_kernel[grid](*given, counts, num_rows, num_cols, capacity, heads, *tile)
    scan_kernel[(heads,)](counts, col_ptr, item_ptr, item_col, num_cols, most_items, SCAN, chunk)
    if capacity:
        fill_columns_kernel[grid](*given, col_ptr, taken, unordered, num_rows, num_cols, capacity, heads, *tile)
        order_kernel[(most_items * heads,)](
            unordered, col_ptr, item_ptr, item_col, col_idx, num_cols, most_items, capacity, heads, chunk,
            triton.next_power_of_2(chunk), num_warps=2,
        )  # fmt: skip
    return col_ptr, col_idx, item_ptr, item_col


def _row_tiles(heads, num_rows, most):
    """The grid, and rows and entries of a tile."""
    entries = min(256, triton.next_power_of_2(max(most, 1)))
    rows = min(TILE // entries, triton.next_power_of_2(max(num_rows, 1)))
    return (triton.cdiv(num_rows, rows) * heads,), (rows, entries)


@triton.jit
def _rows_of(heads, num_rows, ROWS: tl.constexpr):
    """(head, rows of the tile, valid) of a program."""
    row = tl.program_id(0) // heads * ROWS + tl.arange(0, ROWS)
    return (tl.program_id(0) % heads).to(tl.int64), row, row < num_rows


@triton.jit
def _part_of(parts, heads, num_rows, ROWS: tl.constexpr):
    """(part, head, rows of the tile, valid) of a program: parts of a tile and head are neighbours, which read the
    same."""
    tile = tl.program_id(0) // parts
    row = tile // heads * ROWS + tl.arange(0, ROWS)
    return tl.program_id(0) % parts, (tile % heads).to(tl.int64), row, row < num_rows


@triton.jit(do_not_specialize=["num_rows", "most", "width", "stride_h", "stride_m", "parts", "heads"])
def count_rows_kernel(
    chosen_ptr, counts_ptr, num_rows, most, width, stride_h, stride_m, parts, heads,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    part, head, row, valid = _part_of(parts, heads, num_rows, ROWS)
    at = chosen_ptr + head * stride_h + row.to(tl.int64) * stride_m
    total = tl.zeros([ROWS], tl.int32)
    for begin in range(0, most, ENTRIES):
        entry = begin + tl.arange(0, ENTRIES)[None, :]
        column = tl.load(at[:, None] + entry, mask=valid[:, None] & (entry < most), other=-1) - part * width
        total += tl.sum(((column >= 0) & (column < width)).to(tl.int32), 1)
    tl.store(counts_ptr + (head * parts + part) * num_rows + row, total, mask=valid)


@triton.jit(do_not_specialize=["num_rows", "most", "width", "stride_h", "stride_m", "parts", "heads"])
def fill_rows_kernel(
    chosen_ptr, row_ptr, row_idx, num_rows, most, width, stride_h, stride_m, parts, heads,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    part, head, row, valid = _part_of(parts, heads, num_rows, ROWS)
    at = chosen_ptr + head * stride_h + row.to(tl.int64) * stride_m
    row_idx += head * num_rows * most
    next_slot = tl.load(row_ptr + head * (parts * num_rows + 1) + part * num_rows + row, mask=valid, other=0)
    for begin in range(0, most, ENTRIES):
        entry = begin + tl.arange(0, ENTRIES)[None, :]
        column = tl.load(at[:, None] + entry, mask=valid[:, None] & (entry < most), other=-1) - part * width
        there = (column >= 0) & (column < width)
        slot = next_slot[:, None] + tl.cumsum(there.to(tl.int32), 1) - 1
        tl.store(row_idx + slot, column, mask=there)
        next_slot += tl.sum(there.to(tl.int32), 1)


@triton.jit(do_not_specialize=["count", "most_items"])
def scan_kernel(
    counts_ptr, ptr, item_ptr, item_col, count, most_items, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Sums of the counts of one head before each, [count + 1]. With CHUNK the same of counts / CHUNK, rounded up, which
    are items, and the number that each item is of, `count` past the last."""
    head = tl.program_id(0).to(tl.int64)
    counts_ptr += head * count
    ptr += head * (count + 1)
    item_ptr += head * (count + 1)
    item_col += head * most_items
    total, items = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for begin in range(0, count, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        valid = index < count
        some = tl.load(counts_ptr + index, mask=valid, other=0)
        tl.store(ptr + index, total + tl.cumsum(some, 0) - some, mask=valid)
        total += tl.sum(some, 0)
        if CHUNK:
            some = (some + (CHUNK - 1)) // CHUNK
            first = items + tl.cumsum(some, 0) - some
            tl.store(item_ptr + index, first, mask=valid)
            for turn in range(0, tl.max(some, 0)):
                tl.store(item_col + first + turn, index, mask=turn < some)
            items += tl.sum(some, 0)
    tl.store(ptr + count, total)
    if CHUNK:
        tl.store(item_ptr + count, items)
        for begin in range(items, most_items, BLOCK):
            index = begin + tl.arange(0, BLOCK)
            tl.store(item_col + index, tl.zeros([BLOCK], tl.int32) + count, mask=index < most_items)


@triton.jit
def _entries_of(row_ptr, head, row, valid, num_rows):
    """(first entry of each row, one past the last)."""
    at = row_ptr + head * (num_rows + 1) + row
    return tl.load(at, mask=valid, other=0), tl.load(at + 1, mask=valid, other=0)


@triton.jit(do_not_specialize=["num_rows", "num_cols", "capacity", "heads"])
def count_columns_kernel(
    row_ptr, row_idx, counts_ptr, num_rows, num_cols, capacity, heads, ROWS: tl.constexpr, ENTRIES: tl.constexpr
):  # fmt: skip
    head, row, valid = _rows_of(heads, num_rows, ROWS)
    first, stop = _entries_of(row_ptr, head, row, valid, num_rows)
    for begin in range(0, tl.max(stop - first), ENTRIES):
        entry = first[:, None] + begin + tl.arange(0, ENTRIES)[None, :]
        there = entry < stop[:, None]
        column = tl.load(row_idx + head * capacity + entry, mask=there, other=0)
        tl.atomic_add(counts_ptr + head * num_cols + column, 1, mask=there, sem="relaxed")


@triton.jit(do_not_specialize=["num_rows", "num_cols", "capacity", "heads"])
def fill_columns_kernel(
    row_ptr, row_idx, col_ptr, taken_ptr, unordered_ptr, num_rows, num_cols, capacity, heads,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Puts the number of every row into the lists of its columns, in any order. taken: zeros [heads, columns]."""
    head, row, valid = _rows_of(heads, num_rows, ROWS)
    first, stop = _entries_of(row_ptr, head, row, valid, num_rows)
    for begin in range(0, tl.max(stop - first), ENTRIES):
        entry = first[:, None] + begin + tl.arange(0, ENTRIES)[None, :]
        there = entry < stop[:, None]
        column = tl.load(row_idx + head * capacity + entry, mask=there, other=0)
        slot = tl.load(col_ptr + head * (num_cols + 1) + column, mask=there, other=0)
        slot += tl.atomic_add(taken_ptr + head * num_cols + column, 1, mask=there, sem="relaxed")
        tl.store(unordered_ptr + head * capacity + slot, tl.broadcast_to(row[:, None], slot.shape), mask=there)


@triton.jit(do_not_specialize=["num_cols", "items", "capacity", "heads"])
def order_kernel(
    unordered_ptr, col_ptr, item_ptr, item_col, col_idx, num_cols, items, capacity, heads,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Puts the CHUNK entries of an item where they belong in the list of their column."""
    item, head = tl.program_id(0) // heads, (tl.program_id(0) % heads).to(tl.int64)
    column = tl.load(item_col + head * items + item)
    if column < num_cols:
        at = head * (num_cols + 1) + column
        first, stop = tl.load(col_ptr + at), tl.load(col_ptr + at + 1)
        unordered_ptr += head * capacity
        inside = tl.arange(0, BLOCK)
        entry = first + (item - tl.load(item_ptr + at)) * CHUNK + inside
        mine = (inside < CHUNK) & (entry < stop)
        row = tl.load(unordered_ptr + entry, mask=mine, other=0)
        smaller = tl.zeros([BLOCK], tl.int32)
        for begin in range(first, stop, BLOCK):
            others = tl.load(unordered_ptr + begin + inside, mask=begin + inside < stop, other=2**31 - 1)
            smaller += tl.sum((others[None, :] < row[:, None]).to(tl.int32), 1)
        tl.store(col_idx + head * capacity + first + smaller, row, mask=mine)
