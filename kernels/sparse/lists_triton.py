"""The lists of a plan as Triton kernels: counts, their sums, and entries put in place.

Columns are listed by a counting sort, rows cut into cells of so many. Of every cell and column it is known which rows
are in the list, a bit for each of 32, or in long sparse lists how many of more rows are. What lies before a cell in a
list is a sum over cells; in the cell a row's place is the number of bits below its own, or any: then every entry finds
its place by how many of the same cell are smaller. So the lists are the same from run to run.
"""

import torch

from longspan.kernels.compiler import cdiv, next_power_of_2, tl, triton
from longspan.kernels.launch import launched

TILE = 1024  # entries at once
SCAN, SCAN_WARPS = 8192, 16  # counts at once
BITS = tl.constexpr(32)  # rows of the smallest cell
ORDERED = 16, 16  # items, and entries of each, that a program puts in order at once
CELLS = 8  # most cells for an entry that lists have room for


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
    scan_kernel[(heads,)](counts, row_ptr, counts, parts * num_rows, SCAN, 0, num_warps=SCAN_WARPS)
    fill_rows_kernel[grid](chosen, row_ptr, row_idx, *given, heads, *tile)
    return row_ptr, row_idx


def columns_triton(row_ptr, row_idx, num_cols: int, chunk: int, most_items: int):
    """(col_ptr, col_idx, item_ptr, item_col) of BlockPlan."""
    heads, num_rows, capacity = row_ptr.shape[0], row_ptr.shape[1] - 1, row_idx.shape[1]
    col_idx, item_col = torch.empty_like(row_idx), row_ptr.new_empty(heads, most_items)
    if not capacity or not num_cols:
        col_ptr, item_ptr = row_ptr.new_zeros(2, heads, num_cols + 1)
        return col_ptr, col_idx, item_ptr, item_col.fill_(num_cols)
    shift = _cell_shift(num_rows, num_cols, capacity)
    bits, num_cells = shift == 5, -(-num_rows >> shift)
    cells, counts = row_ptr.new_zeros(heads, num_cells, num_cols), row_ptr.new_empty(heads, num_cols)
    before = torch.empty_like(cells) if bits else cells
    col_ptr, item_ptr = row_ptr.new_empty(2, heads, num_cols + 1)
    given = row_ptr, row_idx, cells
    sizes = num_rows, num_cols, num_cells, capacity, heads, shift
    grid, tile = _row_tiles(heads, num_rows, -(-capacity // num_rows))
    mark_kernel[grid](*given, *sizes, bits, *tile)
    sum_cells_kernel[(cdiv(num_cols, 32) * heads,)](cells, before, counts, num_cells, num_cols, heads, bits, 64, 32)
    scan_kernel[(heads,)](counts, col_ptr, item_ptr, num_cols, SCAN, chunk, num_warps=SCAN_WARPS)
    listed = col_idx if bits else torch.empty_like(row_idx)
    place_kernel[grid](
        *given, before, col_ptr, listed, item_ptr, item_col, *sizes, most_items, 1 << num_cols.bit_length() - 1,
        bits, *tile, 128,
    )  # fmt: skip
    if not bits:
        order_kernel[(cdiv(most_items, ORDERED[0]) * heads,)](
            listed, before, col_ptr, item_ptr, item_col, col_idx, num_cols, num_cells, most_items, capacity, heads,
            shift, chunk, *ORDERED,
        )  # fmt: skip
    return col_ptr, col_idx, item_ptr, item_col


def _cell_shift(num_rows, num_cols, capacity):
    """log2 of the rows of a cell."""
    shift = 5
    while num_rows >> shift and (num_rows >> shift) * num_cols > CELLS * capacity:
        shift += 1
    return shift


def _row_tiles(heads, num_rows, most):
    """The grid, and rows and entries of a tile."""
    entries = min(256, next_power_of_2(max(most, 1)))
    rows = min(TILE // entries, next_power_of_2(max(num_rows, 1)))
    return (cdiv(num_rows, rows) * heads,), (rows, entries)


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


@launched
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


@launched
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


@launched
@triton.jit(do_not_specialize=["count"])
def scan_kernel(counts_ptr, ptr, item_ptr, count, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Sums of the counts of one head before each, [count + 1]. With CHUNK the same of counts / CHUNK, rounded up, which
    are items."""
    head = tl.program_id(0).to(tl.int64)
    counts_ptr += head * count
    ptr += head * (count + 1)
    item_ptr += head * (count + 1)
    total, items = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for begin in range(0, count, BLOCK):
        index = begin + tl.arange(0, BLOCK)
        valid = index < count
        some = tl.load(counts_ptr + index, mask=valid, other=0)
        tl.store(ptr + index, total + tl.cumsum(some, 0) - some, mask=valid)
        total += tl.sum(some, 0)
        if CHUNK:
            some = (some + (CHUNK - 1)) // CHUNK
            tl.store(item_ptr + index, items + tl.cumsum(some, 0) - some, mask=valid)
            items += tl.sum(some, 0)
    tl.store(ptr + count, total)
    if CHUNK:
        tl.store(item_ptr + count, items)


@triton.jit
def _entries_of(row_ptr, head, row, valid, num_rows):
    """(first entry of each row, one past the last)."""
    at = row_ptr + head * (num_rows + 1) + row
    return tl.load(at, mask=valid, other=0), tl.load(at + 1, mask=valid, other=0)


@triton.jit
def _ones(bits):
    """How many bits of an int32 are set."""
    x = bits.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _bit_of(row):
    """uint32, one bit set."""
    return tl.full(row.shape, 1, tl.uint32) << (row % BITS).to(tl.uint32)


@launched
@triton.jit(do_not_specialize=["num_rows", "num_cols", "num_cells", "capacity", "heads", "shift"])
def mark_kernel(
    row_ptr, row_idx, cells_ptr, num_rows, num_cols, num_cells, capacity, heads, shift,
    MARKS: tl.constexpr, ROWS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Adds each entry to its cell [heads, cells, columns]: with MARKS its bit, else 1."""
    head, row, valid = _rows_of(heads, num_rows, ROWS)
    first, stop = _entries_of(row_ptr, head, row, valid, num_rows)
    cells = cells_ptr + (head * num_cells + (row >> shift)) * num_cols
    bit = _bit_of(row).to(tl.int32, bitcast=True)[:, None]
    for begin in range(0, tl.max(stop - first), ENTRIES):
        entry = first[:, None] + begin + tl.arange(0, ENTRIES)[None, :]
        there = entry < stop[:, None]
        column = tl.load(row_idx + head * capacity + entry, mask=there, other=0)
        if MARKS:
            tl.atomic_or(cells[:, None] + column, tl.where(there, bit, 0), mask=there, sem="relaxed")
        else:
            tl.atomic_add(cells[:, None] + column, 1, mask=there, sem="relaxed")


@launched
@triton.jit(do_not_specialize=["num_cells", "num_cols", "heads"])
def sum_cells_kernel(
    cells_ptr, before_ptr, counts_ptr, num_cells, num_cols, heads,
    MARKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of COLUMNS columns and one head: entries in the cells before each, and in all."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    column = tl.program_id(0) // heads * COLUMNS + tl.arange(0, COLUMNS)
    valid, total = column < num_cols, tl.zeros([COLUMNS], tl.int32)
    for begin in range(0, num_cells, ROWS):
        cell = begin + tl.arange(0, ROWS)
        at = ((head * num_cells + cell) * num_cols)[:, None] + column[None, :]
        there = (cell < num_cells)[:, None] & valid[None, :]
        some = tl.load(cells_ptr + at, mask=there, other=0)
        if MARKS:
            some = _ones(some)
        tl.store(before_ptr + at, total[None, :] + tl.cumsum(some, 0) - some, mask=there)
        total += tl.sum(some, 0)
    tl.store(counts_ptr + head * num_cols + column, total, mask=valid)


@launched
@triton.jit(do_not_specialize=["num_rows", "num_cols", "num_cells", "capacity", "heads", "shift", "most_items", "half"])
def place_kernel(
    row_ptr, row_idx, cells_ptr, before_ptr, col_ptr, listed_ptr, item_ptr, item_col,
    num_rows, num_cols, num_cells, capacity, heads, shift, most_items, half,
    MARKS: tl.constexpr, ROWS: tl.constexpr, ENTRIES: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Puts the number of every row into the lists of its columns: without MARKS anywhere among the rows of its cell,
    and `before` becomes the ends of cells. And the column of every item, num_cols past the last; half: the highest
    power of two up to num_cols."""
    head, row, valid = _rows_of(heads, num_rows, ROWS)
    first, stop = _entries_of(row_ptr, head, row, valid, num_rows)
    cells = (head * num_cells + (row >> shift)) * num_cols
    col_ptr += head * (num_cols + 1)
    below = (_bit_of(row) - 1).to(tl.int32, bitcast=True)
    for begin in range(0, tl.max(stop - first), ENTRIES):
        entry = first[:, None] + begin + tl.arange(0, ENTRIES)[None, :]
        there = entry < stop[:, None]
        column = tl.load(row_idx + head * capacity + entry, mask=there, other=0)
        slot, at = tl.load(col_ptr + column, mask=there, other=0), cells[:, None] + column
        if MARKS:
            slot += tl.load(before_ptr + at, mask=there, other=0)
            slot += _ones(tl.load(cells_ptr + at, mask=there, other=0) & below[:, None])
        else:
            slot += tl.atomic_add(before_ptr + at, 1, mask=there, sem="relaxed")
        tl.store(listed_ptr + head * capacity + slot, tl.broadcast_to(row[:, None], slot.shape), mask=there)
    item_ptr += head * (num_cols + 1)
    tile, tiles = tl.program_id(0) // heads, tl.num_programs(0) // heads
    for begin in range(tile * ITEMS, most_items, tiles * ITEMS):
        item = begin + tl.arange(0, ITEMS)
        column, step = tl.zeros([ITEMS], tl.int32), half
        while step > 0:  # the last whose first item is not after this one
            further = column + step
            before = tl.load(item_ptr + further, mask=further <= num_cols, other=2**31 - 1)
            column = tl.where(before <= item, further, column)
            step = step // 2
        tl.store(item_col + head * most_items + item, column, mask=item < most_items)


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
