"""Lists by key block as a counting sort: what is left of `columns_triton` where lists are long and name few of many.

Rows are cut into cells of so many, and of every cell and column it is counted how many rows are in the list. What lies
before a cell in a list is a sum over cells; in the cell rows come in any order at first: then every entry finds its
place by how many of the same cell are smaller. So the lists are the same from run to run.
"""

import torch

from longspan.kernels.compiler import cdiv, next_power_of_2, tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.sparse.items_triton import fill_items, list_items

TILE = 1024  # entries at once
SCAN, SCAN_WARPS = 4096, 16  # counts at once
ORDERED = 16, 16  # items, and entries of each, that a program puts in order at once
CELLS = 8  # most cells for an entry that lists have room for


def sorted_columns(row_ptr, row_idx, col_ptr, col_idx, item_ptr, item_col, chunk: int):
    """Writes the last four, see BlockPlan."""
    (heads, capacity), num_rows, num_cols = row_idx.shape, row_ptr.shape[1] - 1, col_ptr.shape[1] - 1
    shift = _cell_shift(num_rows, num_cols, capacity)
    num_cells = -(-num_rows >> shift)
    cells, counts = row_ptr.new_zeros(heads, num_cells, num_cols), row_ptr.new_empty(heads, num_cols)
    listed, sizes = torch.empty_like(row_idx), (num_rows, num_cols, num_cells, capacity, heads, shift)
    grid, tile = _row_tiles(heads, num_rows, -(-capacity // num_rows))
    mark_kernel[grid](row_ptr, row_idx, cells, *sizes, *tile)
    sum_cells_kernel[(cdiv(num_cols, 32) * heads,)](cells, counts, num_cells, num_cols, heads, 64, 32)
    scan_kernel[(heads,)](
        counts, col_ptr, item_ptr, item_col, num_cols, item_col.shape[1], chunk, SCAN, num_warps=SCAN_WARPS
    )
    place_kernel[grid](row_ptr, row_idx, cells, col_ptr, listed, *sizes, *tile)
    order_kernel[(cdiv(item_col.shape[1], ORDERED[0]) * heads,)](
        listed, cells, col_ptr, item_ptr, item_col, col_idx, num_cols, num_cells, item_col.shape[1], capacity, heads,
        shift, chunk, *ORDERED,
    )  # fmt: skip


def _row_tiles(heads, num_rows, most):
    """The grid, and rows and entries of a tile."""
    entries = min(256, next_power_of_2(max(most, 1)))
    rows = min(TILE // entries, next_power_of_2(max(num_rows, 1)))
    return (cdiv(num_rows, rows) * heads,), (rows, entries)


def _cell_shift(num_rows, num_cols, capacity):
    """log2 of the rows of a cell."""
    shift = 5
    while num_rows >> shift and (num_rows >> shift) * num_cols > CELLS * capacity:
        shift += 1
    return shift


@triton.jit
def _rows_of(heads, num_rows, ROWS: tl.constexpr):
    """(head, rows of the tile, valid) of a program."""
    row = tl.program_id(0) // heads * ROWS + tl.arange(0, ROWS)
    return (tl.program_id(0) % heads).to(tl.int64), row, row < num_rows


@launched
@triton.jit(do_not_specialize=["num_rows", "num_cols", "num_cells", "capacity", "heads", "shift"])
def mark_kernel(
    row_ptr, row_idx, cells_ptr, num_rows, num_cols, num_cells, capacity, heads, shift,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Counts each entry in its cell [heads, cells, columns]."""
    head, row, valid = _rows_of(heads, num_rows, ROWS)
    first, stop = _entries_of(row_ptr, head, row, valid, num_rows)
    cells = cells_ptr + (head * num_cells + (row >> shift)) * num_cols
    for begin in range(0, tl.max(stop - first), ENTRIES):
        entry = first[:, None] + begin + tl.arange(0, ENTRIES)[None, :]
        column = tl.load(row_idx + head * capacity + entry, mask=entry < stop[:, None], other=num_cols)
        there = column < num_cols
        tl.atomic_add(cells[:, None] + column, 1, mask=there, sem="relaxed")


@launched
@triton.jit(do_not_specialize=["num_cells", "num_cols", "heads"])
def sum_cells_kernel(
    cells_ptr, counts_ptr, num_cells, num_cols, heads, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of COLUMNS columns and one head: in place of the entries of each cell those before it, and all in counts."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    column = tl.program_id(0) // heads * COLUMNS + tl.arange(0, COLUMNS)
    valid, total = column < num_cols, tl.zeros([COLUMNS], tl.int32)
    for begin in range(0, num_cells, ROWS):
        cell = begin + tl.arange(0, ROWS)
        at = ((head * num_cells + cell) * num_cols)[:, None] + column[None, :]
        there = (cell < num_cells)[:, None] & valid[None, :]
        some = tl.load(cells_ptr + at, mask=there, other=0)
        tl.store(cells_ptr + at, total[None, :] + tl.cumsum(some, 0) - some, mask=there)
        total += tl.sum(some, 0)
    tl.store(counts_ptr + head * num_cols + column, total, mask=valid)


@launched
@triton.jit(do_not_specialize=["count", "items", "chunk"])
def scan_kernel(counts_ptr, ptr, item_ptr, item_col, count, items, chunk, BLOCK: tl.constexpr):
    """Sums of the counts of one head before each, [count + 1], and the items of all."""
    head = tl.program_id(0).to(tl.int64)
    counts_ptr += head * count
    ptr += head * (count + 1)
    item_ptr += head * (count + 1)
    item_col += head * items
    total, all_items = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for begin in range(0, count, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        valid = index < count
        some = tl.load(counts_ptr + index, mask=valid, other=0)
        tl.store(ptr + index, total + tl.cumsum(some, 0) - some, mask=valid)
        total += tl.sum(some, 0)
        all_items = list_items(some, index, valid, all_items, item_ptr, item_col, chunk)
    tl.store(ptr + count, total)
    fill_items(all_items, item_ptr, item_col, count, items, BLOCK)


@triton.jit
def _entries_of(row_ptr, head, row, valid, num_rows):
    """(first entry of each row, one past the last)."""
    at = row_ptr + head * (num_rows + 1) + row
    return tl.load(at, mask=valid, other=0), tl.load(at + 1, mask=valid, other=0)


@launched
@triton.jit(do_not_specialize=["num_rows", "num_cols", "num_cells", "capacity", "heads", "shift"])
def place_kernel(
    row_ptr, row_idx, cells_ptr, col_ptr, listed_ptr, num_rows, num_cols, num_cells, capacity, heads, shift,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Puts the number of every row into the lists of its columns, anywhere among the rows of its cell; of cells the
    ends are left."""
    head, row, valid = _rows_of(heads, num_rows, ROWS)
    first, stop = _entries_of(row_ptr, head, row, valid, num_rows)
    cells = cells_ptr + (head * num_cells + (row >> shift)) * num_cols
    col_ptr += head * (num_cols + 1)
    for begin in range(0, tl.max(stop - first), ENTRIES):
        entry = first[:, None] + begin + tl.arange(0, ENTRIES)[None, :]
        column = tl.load(row_idx + head * capacity + entry, mask=entry < stop[:, None], other=num_cols)
        there = column < num_cols
        slot = tl.load(col_ptr + column, mask=there, other=0)
        slot += tl.atomic_add(cells[:, None] + column, 1, mask=there, sem="relaxed")
        tl.store(listed_ptr + head * capacity + slot, tl.broadcast_to(row[:, None], slot.shape), mask=there)


@launched
@triton.jit(do_not_specialize=["num_cols", "num_cells", "items", "capacity", "heads", "shift"])
def order_kernel(
    listed_ptr, ends_ptr, col_ptr, item_ptr, item_col, col_idx, num_cols, num_cells, items, capacity, heads, shift,
    CHUNK: tl.constexpr, ITEMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Puts the entries of ITEMS items, at most CHUNK each, where they belong among those of the same cells, BLOCK of
    each at once. ends: of cells in lists."""
    item, head = tl.program_id(0) // heads * ITEMS + tl.arange(0, ITEMS), (tl.program_id(0) % heads).to(tl.int64)
    column = tl.load(item_col + head * items + item, mask=item < items, other=num_cols)
    there = column < num_cols
    at = head * (num_cols + 1) + column
    first, stop = tl.load(col_ptr + at, mask=there, other=0), tl.load(col_ptr + at + 1, mask=there, other=0)
    listed_ptr += head * capacity
    ends_ptr += head * num_cells * num_cols + column
    begin = first + (item - tl.load(item_ptr + at, mask=there, other=0)) * CHUNK
    stop = tl.minimum(begin + CHUNK, stop)
    low = (tl.load(listed_ptr + begin, mask=there, other=0) >> shift).to(tl.int64)
    high = (tl.load(listed_ptr + stop - 1, mask=there, other=0) >> shift).to(tl.int64)
    low = first + tl.load(ends_ptr + (low - 1) * num_cols, mask=there & (low > 0), other=0)
    high = first + tl.load(ends_ptr + high * num_cols, mask=there, other=0)
    inside = tl.arange(0, BLOCK)[None, :]
    for start in range(0, tl.max(stop - begin), BLOCK):
        entry = begin[:, None] + start + inside
        mine = entry < stop[:, None]
        row = tl.load(listed_ptr + entry, mask=mine, other=0)
        smaller = tl.zeros([ITEMS, BLOCK], tl.int32)
        for turn in range(0, tl.max(high - low), BLOCK):
            entry = low[:, None] + turn + inside
            others = tl.load(listed_ptr + entry, mask=entry < high[:, None], other=2**31 - 1)
            smaller += tl.sum((others[:, None, :] < row[:, :, None]).to(tl.int32), 2)
        tl.store(col_idx + head * capacity + low[:, None] + smaller, row, mask=mine)
