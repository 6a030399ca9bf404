"""pool as one Triton kernel: x is read once, in its own dtype, and summed in fp32."""

import torch

from longspan.kernels.compiler import tl, triton
from longspan.kernels.linear.splits import padded, unit_stride
from longspan.kernels.sparse.plan import Blocks

ROWS = 128  # of a tile
ELEMENTS = 1 << 14  # of a tile, heads side by side where blocks are short


def pool_triton(x: torch.Tensor, blocks: Blocks, heads: int, mean: bool) -> torch.Tensor:
    """See kernels.sparse.pool.pool."""
    x, head_dim = unit_stride(x), x.shape[2]
    out = x.new_empty(len(blocks), heads, head_dim, dtype=torch.float32)
    block_d = padded(head_dim)
    rows = min(ROWS, triton.next_power_of_2(blocks.size), max(1, ELEMENTS // block_d))
    together = max(1, min(ELEMENTS // (rows * block_d), triton.next_power_of_2(heads)))
    pool_kernel[(len(blocks) * triton.cdiv(heads, together),)](
        x, out, blocks.start, blocks.length, x.stride(0), x.stride(1),
        heads, x.shape[1] // heads, head_dim, block_d, together, rows, blocks.size, mean,
    )  # fmt: skip
    return out


@triton.jit
def pool_kernel(
    x_ptr, out_ptr, start_ptr, length_ptr, stride_t, stride_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TOGETHER: tl.constexpr,
    ROWS: tl.constexpr, SIZE: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """One block and TOGETHER heads of out [blocks, HEADS, D], each the sum of GROUP heads of x."""
    parts: tl.constexpr = (HEADS + TOGETHER - 1) // TOGETHER
    block = tl.program_id(0) // parts
    column = tl.arange(0, TOGETHER * BLOCK_D)
    head, dim = tl.program_id(0) % parts * TOGETHER + column // BLOCK_D, column % BLOCK_D
    wanted = (head < HEADS) & (dim < D)
    first, length = tl.load(start_ptr + block).to(tl.int64), tl.load(length_ptr + block)
    x_ptr += first * stride_t
    total = tl.zeros([TOGETHER * BLOCK_D], tl.float32)
    for begin in range(0, SIZE, ROWS):
        row = begin + tl.arange(0, ROWS)
        for turn in range(0, GROUP):
            at = row[:, None] * stride_t + ((head * GROUP + turn) * stride_h + dim)[None, :]
            x = tl.load(x_ptr + at, mask=(row < length)[:, None] & wanted[None, :], other=0.0)
            total += tl.sum(x.to(tl.float32), 0)
    if MEAN:
        total = total / (length * GROUP).to(tl.float32)
    tl.store(out_ptr + block.to(tl.int64) * HEADS * D + head * D + dim, total, mask=wanted)
