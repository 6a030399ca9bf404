"""pool as one Triton kernel: x is read once, in its own dtype, and summed in fp32. And its gradient."""

import torch

from longspan.kernels.compiler import tl, triton
from longspan.kernels.linear.splits import padded, unit_stride
from longspan.kernels.sparse.plan import Blocks

ROWS = 128  # of a tile
ELEMENTS = 1 << 14  # of a tile, heads and blocks side by side where blocks are short: many bytes are under way


def pool_triton(several, blocks: Blocks, heads: int, mean: bool) -> torch.Tensor:
    """See kernels.sparse.pool.pool."""
    rows, num_heads, head_dim = several[0].shape
    out = several[0].new_empty(len(blocks), len(several) * heads, head_dim, dtype=torch.float32)
    grid, tile = _tile(blocks, heads, head_dim)
    for place, x in enumerate(map(unit_stride, several)):
        pool_kernel[grid](
            x, out[:, place * heads :], blocks.start, blocks.length, *x.stride()[:2], out.stride(0), len(blocks),
            heads, num_heads // heads, head_dim, *tile, mean, num_warps=8,
        )  # fmt: skip
    return out


def spread_triton(grad: torch.Tensor, blocks: Blocks, shape, dtype, mean: bool) -> torch.Tensor:
    """The gradient of x [T, H, D] in `dtype` from that of its sums or means [blocks, heads, D]."""
    grad, heads, head_dim = unit_stride(grad), grad.shape[1], shape[2]
    out = grad.new_empty(shape, dtype=dtype)
    grid, tile = _tile(blocks, heads, head_dim)
    spread_kernel[grid](
        grad, out, blocks.start, blocks.length, *grad.stride()[:2], len(blocks),
        heads, shape[1] // heads, head_dim, *tile, mean, num_warps=8,
    )  # fmt: skip
    return out


def _tile(blocks, heads, head_dim):
    """The grid, and of a tile: columns of a head, heads, blocks, rows of a block, and rows that a block has."""
    block_d = padded(head_dim)
    rows = min(ROWS, triton.next_power_of_2(blocks.size), max(1, ELEMENTS // block_d))
    together = max(1, min(ELEMENTS // (rows * block_d), triton.next_power_of_2(heads)))
    count = max(1, ELEMENTS // (rows * block_d * together))
    grid = (triton.cdiv(len(blocks), count) * triton.cdiv(heads, together),)
    return grid, (block_d, together, count, rows, blocks.size)


@triton.jit
def _place(
    start_ptr, length_ptr, num_blocks,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TOGETHER: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """(block, first row, rows) [COUNT], and (head, dimension, whether they are there) [TOGETHER * BLOCK_D]."""
    parts: tl.constexpr = (HEADS + TOGETHER - 1) // TOGETHER
    block = tl.program_id(0) // parts * COUNT + tl.arange(0, COUNT)
    column = tl.arange(0, TOGETHER * BLOCK_D)
    head, dim = tl.program_id(0) % parts * TOGETHER + column // BLOCK_D, column % BLOCK_D
    first = tl.load(start_ptr + block, mask=block < num_blocks, other=0).to(tl.int64)
    return block, first, tl.load(length_ptr + block, mask=block < num_blocks, other=0), head, dim, head < HEADS


@triton.jit(do_not_specialize=["num_blocks"])
def pool_kernel(
    x_ptr, out_ptr, start_ptr, length_ptr, stride_t, stride_h, out_stride, num_blocks,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TOGETHER: tl.constexpr,
    COUNT: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """COUNT blocks and TOGETHER heads of out [blocks, HEADS, D], each the sum of GROUP heads of x."""
    block, first, length, head, dim, wanted = _place(
        start_ptr, length_ptr, num_blocks, HEADS, D, BLOCK_D, TOGETHER, COUNT
    )  # fmt: skip
    wanted = (wanted & (dim < D))[None, :]
    total = tl.zeros([COUNT, TOGETHER * BLOCK_D], tl.float32)
    x_ptr += (first * stride_t)[:, None, None]
    for begin in range(0, SIZE, ROWS):
        row = begin + tl.arange(0, ROWS)[None, :]
        there = (row < length[:, None])[:, :, None] & wanted[:, None, :]
        for turn in range(0, GROUP):
            at = (row * stride_t)[:, :, None] + ((head * GROUP + turn) * stride_h + dim)[None, None, :]
            total += tl.sum(tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32), 1)
    if MEAN:
        total = total / tl.maximum(length * GROUP, 1).to(tl.float32)[:, None]
    out_at = block.to(tl.int64)[:, None] * out_stride + (head * D + dim)[None, :]
    tl.store(out_ptr + out_at, total, mask=(block < num_blocks)[:, None] & wanted)


@triton.jit(do_not_specialize=["num_blocks"])
def spread_kernel(
    grad_ptr, out_ptr, start_ptr, length_ptr, stride_b, stride_h, num_blocks,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TOGETHER: tl.constexpr,
    COUNT: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Rows of COUNT blocks and TOGETHER * GROUP heads of out [T, HEADS * GROUP, D]."""
    block, first, length, head, dim, wanted = _place(
        start_ptr, length_ptr, num_blocks, HEADS, D, BLOCK_D, TOGETHER, COUNT
    )  # fmt: skip
    wanted = (wanted & (dim < D))[None, :]
    at = block.to(tl.int64)[:, None] * stride_b + (head * stride_h + dim)[None, :]
    grad = tl.load(grad_ptr + at, mask=(block < num_blocks)[:, None] & wanted, other=0.0).to(tl.float32)
    if MEAN:
        grad = grad / tl.maximum(length * GROUP, 1).to(tl.float32)[:, None]
    grad = tl.broadcast_to(grad[:, None, :], [COUNT, ROWS, TOGETHER * BLOCK_D]).to(out_ptr.dtype.element_ty)
    out_ptr += (first * HEADS * GROUP * D)[:, None, None]
    for begin in range(0, SIZE, ROWS):
        row = begin + tl.arange(0, ROWS)[None, :]
        there = (row < length[:, None])[:, :, None] & wanted[:, None, :]
        for turn in range(0, GROUP):
            out_at = (row * HEADS * GROUP * D)[:, :, None] + ((head * GROUP + turn) * D + dim)[None, None, :]
            tl.store(out_ptr + out_at, grad, mask=there)
