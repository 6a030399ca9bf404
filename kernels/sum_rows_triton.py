"""Sums over the rows that the programs of a kernel leave, rounded, in one launch: in PyTorch these are two."""

from longspan.kernels.compiler import cdiv, tl, triton
from longspan.kernels.launch import launched

ROWS, COLUMNS = 64, 32  # of a tile


def sum_rows_triton(x, dtype):
    """[N, D] in fp32, contiguous -> [D] in `dtype`; zeros where N is 0. Rows are added in one order."""
    (num_rows, width), out = x.shape, x.new_empty(x.shape[1], dtype=dtype)
    sum_rows_kernel[(cdiv(width, COLUMNS),)](x, out, num_rows, width, ROWS=ROWS, COLUMNS=COLUMNS)
    return out


@launched
@triton.jit(do_not_specialize=["num_rows"])
def sum_rows_kernel(x_ptr, out_ptr, num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS)[:, None], tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, num_rows, ROWS):
        mask = (first + row < num_rows) & (column < width)[None, :]
        total += tl.load(x_ptr + (first + row) * width + column[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=column < width)
