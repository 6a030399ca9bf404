"""gather_add as one Triton kernel: every row is read once, and the whole written once."""

import torch

from longspan.kernels.compiler import cdiv, next_power_of_2, tl, triton
from longspan.kernels.launch import launched

BLOCK = 1024  # elements of a row per program


def gather_add_triton(
    total: torch.Tensor, rows: slice | torch.Tensor, places: torch.Tensor, part: torch.Tensor
) -> None:
    """See kernels.gather_add.gather_add. total is fp32 and contiguous."""
    width, indexed = part[:1].numel(), isinstance(rows, torch.Tensor)
    assert total.is_contiguous() and total.dtype == torch.float32 and total.shape[1:] == part.shape[1:], total.shape
    assert places.is_contiguous() and len(places) == (len(rows) if indexed else rows.stop - rows.start), places.shape
    if places.numel() and width:
        block = min(BLOCK, next_power_of_2(width))
        grid = (places.shape[0] * cdiv(width, block),)
        first = 0 if indexed else rows.start
        gather_add_kernel[grid](
            total, rows if indexed else places, places, part.contiguous(), first, places.shape[1], width, block, indexed
        )


@launched
@triton.jit(do_not_specialize=["first_row", "most"])
def gather_add_kernel(
    total_ptr, rows_ptr, places_ptr, part_ptr, first_row, most, width, BLOCK: tl.constexpr, INDEXED: tl.constexpr
):
    blocks = tl.cdiv(width, BLOCK)
    number = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    row = first_row + number
    if INDEXED:
        row = tl.load(rows_ptr + number)
    total_at = total_ptr + row * width + column
    value = tl.load(total_at, mask=inside)
    for n in range(most):
        place = tl.load(places_ptr + number * most + n).to(tl.int64)
        value += tl.load(part_ptr + place * width + column, mask=inside & (place >= 0), other=0.0).to(tl.float32)
    tl.store(total_at, value, mask=inside)
