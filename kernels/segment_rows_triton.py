"""Sums over the tokens of each run in Triton. Where runs are few, several programs share one, and their sums are added
up in one order."""

import torch

from longspan.kernels.compiler import cdiv, tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.sum_rows_triton import sum_rows_triton

ROWS, COLUMNS = 64, 64  # of a tile
PROGRAMS = 528  # as many as an H200 runs at once, 4 on a multiprocessor
LEAST = 4 * ROWS  # tokens of a program, where several share a run as long as the mean


def segment_sums_triton(x: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """See kernels.segment_rows.segment_sums_naive. bf16, fp16 or fp32."""
    (tokens, width), count, x = x.shape, len(first), x.contiguous()
    blocks = cdiv(width, COLUMNS)
    if not count or not width:
        return x.new_zeros(count, width)
    parts = max(1, min(cdiv(PROGRAMS, count * blocks), cdiv(tokens, count * LEAST)))
    sums = x.new_empty(parts, count, width, dtype=x.dtype if parts == 1 else torch.float32)
    segment_sums_kernel[(count * blocks, parts)](x, first, last, sums, count, width, parts, ROWS=ROWS, COLUMNS=COLUMNS)
    return sums[0] if parts == 1 else sum_rows_triton(sums.flatten(1), x.dtype).view(count, width)


@launched
@triton.jit(do_not_specialize=["count", "parts"])
def segment_sums_kernel(
    x_ptr, first_ptr, last_ptr, sums_ptr, count, width, parts, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    blocks = tl.cdiv(width, COLUMNS)
    run, part = tl.program_id(0) // blocks, tl.program_id(1)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = (column < width)[None, :]
    first, stop = tl.load(first_ptr + run), tl.load(last_ptr + run) + 1
    share = tl.cdiv(stop - first, parts)
    start = first + part * share
    stop = tl.minimum(stop, start + share)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for token in range(start, stop, ROWS):
        row = token + tl.arange(0, ROWS)[:, None]
        at = x_ptr + row * width + column[None, :]
        total += tl.load(at, mask=(row < stop) & inside, other=0.0).to(tl.float32)
    at = sums_ptr + (part.to(tl.int64) * count + run) * width + column
    tl.store(at, tl.sum(total, 0).to(sums_ptr.dtype.element_ty), mask=column < width)
