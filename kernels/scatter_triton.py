"""scatter_rows by index as one Triton kernel: PyTorch gathers, adds and scatters in three, two of them element by
element."""

import torch

from longspan.kernels.compiler import cdiv, next_power_of_2, tl, triton
from longspan.kernels.launch import launched

BLOCK = 1024  # elements of a row per program


def scatter_rows_triton(total: torch.Tensor, rows: torch.Tensor, part: torch.Tensor, *, add: bool) -> None:
    """See kernels.scatter.scatter_rows. total is contiguous."""
    num_rows, width = part.shape[0], part[:1].numel()
    assert total.is_contiguous() and rows.shape == (num_rows,) and total.shape[1:] == part.shape[1:], total.shape
    if num_rows and width:
        part = part.contiguous()
        block = min(BLOCK, next_power_of_2(width))
        scatter_kernel[(num_rows * cdiv(width, block),)](total, rows, part, width, BLOCK=block, ADD=add)


@launched
@triton.jit
def scatter_kernel(total_ptr, rows_ptr, part_ptr, width, BLOCK: tl.constexpr, ADD: tl.constexpr):
    blocks = tl.cdiv(width, BLOCK)
    place = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total_at = total_ptr + tl.load(rows_ptr + place) * width + column
    value = tl.load(part_ptr + place * width + column, mask=inside).to(tl.float32)
    if ADD:
        value += tl.load(total_at, mask=inside).to(tl.float32)
    tl.store(total_at, value.to(total_ptr.dtype.element_ty), mask=inside)
