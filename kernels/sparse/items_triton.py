"""The items of a plan's lists by key block, for kernels that have the lists of a head at hand."""

from longspan.kernels.compiler import tl, triton


@triton.jit
def list_items(lengths, column, valid, total, item_ptr, item_col, chunk):
    """Items of columns whose lists are so long, `total` before them: the first of each, and the column of each. Gives
    how many there are then."""
    counts = (lengths + (chunk - 1)) // chunk
    item = total + tl.cumsum(counts, 0) - counts
    tl.store(item_ptr + column, item, mask=valid)
    for turn in range(0, tl.max(counts)):
        tl.store(item_col + item + turn, column, mask=turn < counts)
    return total + tl.sum(counts, 0)


@triton.jit
def fill_items(total, item_ptr, item_col, num_cols, items, TILE: tl.constexpr):
    """num_cols past the last item."""
    tl.store(item_ptr + num_cols, total)
    for first in range(total, items, TILE):
        item = first + tl.arange(0, TILE)
        tl.store(item_col + item, tl.zeros([TILE], tl.int32) + num_cols, mask=item < items)
