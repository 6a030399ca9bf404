"""pool as one Triton kernel: x is read once, in its own dtype, and summed in fp32. And its gradient."""

import torch

from longspan.kernels.compiler import cdiv, next_power_of_2, tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.linear.splits import padded, unit_stride
from longspan.kernels.sparse.plan import Blocks

ELEMENTS = 1024  # that a program adds at once: of one row of each of its blocks, heads side by side
STEP = 8  # rows that are loaded before the first is added


def pool_triton(several, blocks: Blocks, heads: int, mean: bool, means=None, size=None, sums=True) -> torch.Tensor:
    """See kernels.sparse.pool.pool, of one or two tensors. means: contiguous, alike, for the sums divided by size int32
    [blocks]; without `sums` nothing else is written."""
    _, num_heads, head_dim = several[0].shape
    first, last = unit_stride(several[0]), unit_stride(several[-1])
    if first.stride() != last.stride():
        first, last = first.contiguous(), last.contiguous()
    out = means if not sums else first.new_empty(len(blocks), len(several) * heads, head_dim, dtype=torch.float32)
    (programs,), tile = _tile(blocks, heads, head_dim)
    pool_kernel[(programs, len(several))](
        first, last, out, out if means is None else means, blocks.start, blocks.length,
        blocks.length if size is None else size, *first.stride()[:2], len(several) * heads * head_dim, len(blocks),
        heads, num_heads // heads, head_dim, *tile, mean, sums, means is not None,
    )  # fmt: skip
    return out


def spread_triton(grad: torch.Tensor, blocks: Blocks, shape, dtype, mean: bool) -> torch.Tensor:
    """The gradient of x [T, H, D] in `dtype` from that of its sums or means [blocks, heads, D]."""
    grad, heads, head_dim = unit_stride(grad), grad.shape[1], shape[2]
    out = grad.new_empty(shape, dtype=dtype)
    grid, tile = _tile(blocks, heads, head_dim)
    spread_kernel[grid](
        grad, out, blocks.start, blocks.length, *grad.stride()[:2], len(blocks),
        heads, shape[1] // heads, head_dim, *tile, mean,
    )  # fmt: skip
    return out


def _tile(blocks, heads, head_dim):
    """The grid, and columns of a head, heads and blocks of a program, and most rows of a block."""
    block_d = padded(head_dim)
    together = max(1, min(ELEMENTS // block_d, next_power_of_2(heads)))
    count = max(1, ELEMENTS // (block_d * together))
    grid = (cdiv(len(blocks), count) * cdiv(heads, together),)
    return grid, (block_d, together, count, blocks.size, min(STEP, blocks.size))


@triton.jit
def _place(
    start_ptr, length_ptr, num_blocks,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TOGETHER: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """(block, first row, rows) [COUNT, 1], and (head, dimension) [1, TOGETHER * BLOCK_D], and which are there."""
    parts: tl.constexpr = (HEADS + TOGETHER - 1) // TOGETHER
    block = (tl.program_id(0) // parts * COUNT + tl.arange(0, COUNT))[:, None]
    column = tl.arange(0, TOGETHER * BLOCK_D)[None, :]
    head, dim = tl.program_id(0) % parts * TOGETHER + column // BLOCK_D, column % BLOCK_D
    valid = block < num_blocks
    first = tl.load(start_ptr + block, mask=valid, other=0).to(tl.int64)
    length = tl.load(length_ptr + block, mask=valid, other=0)
    return block.to(tl.int64), first, length, head, dim, valid & (head < HEADS) & (dim < D)


@launched
@triton.jit(do_not_specialize=["num_blocks"])
def pool_kernel(
    x_ptr, second_ptr, out_ptr, means_ptr, start_ptr, length_ptr, size_ptr, stride_t, stride_h, out_stride, num_blocks,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TOGETHER: tl.constexpr,
    COUNT: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, MEAN: tl.constexpr, SUMS: tl.constexpr,
    MEANS: tl.constexpr,
):  # fmt: skip
    """COUNT blocks and TOGETHER heads of out [blocks, HEADS of x and of the second, D], each the sum of GROUP heads. A
    thread adds rows of its own columns: sums across warps would cost more than the loads."""
    block, first, length, head, dim, there = _place(
        start_ptr, length_ptr, num_blocks, HEADS, D, BLOCK_D, TOGETHER, COUNT
    )  # fmt: skip
    if tl.program_id(1) == 1:
        x_ptr = second_ptr
    total = tl.zeros([COUNT, TOGETHER * BLOCK_D], tl.float32)
    for turn in range(0, GROUP):
        at = x_ptr + first * stride_t + ((head * GROUP + turn) * stride_h + dim)
        for begin in range(0, SIZE, STEP):
            for row in tl.static_range(STEP):
                mask = there & (begin + row < length)
                total += tl.load(at + (begin + row) * stride_t, mask=mask, other=0.0).to(tl.float32)
    if MEAN:
        total = total / tl.maximum(length * GROUP, 1).to(tl.float32)
    to = block * out_stride + (tl.program_id(1) * HEADS * D + head * D + dim)
    if SUMS:
        tl.store(out_ptr + to, total, mask=there)
    if MEANS:
        size = tl.load(size_ptr + block, mask=block < num_blocks, other=1).to(tl.float32)
        tl.store(means_ptr + to, (total / size).to(means_ptr.dtype.element_ty), mask=there)


@launched
@triton.jit(do_not_specialize=["num_blocks"])
def spread_kernel(
    grad_ptr, out_ptr, start_ptr, length_ptr, stride_b, stride_h, num_blocks,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TOGETHER: tl.constexpr,
    COUNT: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Rows of COUNT blocks and TOGETHER * GROUP heads of out [T, HEADS * GROUP, D]."""
    block, first, length, head, dim, there = _place(
        start_ptr, length_ptr, num_blocks, HEADS, D, BLOCK_D, TOGETHER, COUNT
    )  # fmt: skip
    grad = tl.load(grad_ptr + block * stride_b + (head * stride_h + dim), mask=there, other=0.0).to(tl.float32)
    if MEAN:
        grad = grad / tl.maximum(length * GROUP, 1).to(tl.float32)
    grad = grad.to(out_ptr.dtype.element_ty)
    for turn in range(0, GROUP):
        at = out_ptr + first * (HEADS * GROUP * D) + ((head * GROUP + turn) * D + dim)
        for begin in range(0, SIZE, STEP):
            for row in tl.static_range(STEP):
                tl.store(at + (begin + row) * (HEADS * GROUP * D), grad, mask=there & (begin + row < length))
