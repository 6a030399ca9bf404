"""pool as one Triton kernel: x is read once, in its own dtype, and summed in fp32. And its gradient."""

from functools import cache

import torch

from longspan.kernels.compiler import cdiv, next_power_of_2, tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.linear.splits import padded, unit_stride
from longspan.kernels.recorded import recorded
from longspan.kernels.sparse.plan import Blocks

LEVELS = 4096, 8, 4  # elements of all blocks under one, warps, and rows that are loaded before the first is added
ELEMENTS = 1024  # that a program adds at once: of one row of each of its blocks, heads side by side
STEP = 8  # rows that are loaded before the first is added


def pool_triton(several, blocks: Blocks, heads: int, mean: bool) -> torch.Tensor:
    """See kernels.sparse.pool.pool, of one or two tensors."""
    _, num_heads, head_dim = several[0].shape
    first, last = _alike(several)
    out = first.new_empty(len(blocks), len(several) * heads, head_dim, dtype=torch.float32)
    (programs,), tile = _tile(blocks, heads, head_dim)
    pool_kernel[(programs, len(several))](
        first, last, out, blocks.start, blocks.length, *first.stride()[:2], len(several) * heads * head_dim,
        len(blocks), heads, num_heads // heads, head_dim, *tile, mean,
    )  # fmt: skip
    return out


def levels_triton(several, levels, heads: int, size, dtype) -> torch.Tensor:
    """The sums of mean_levels and sum_levels, divided by `size` unless None, in `dtype`: two levels a launch."""
    return _levels(tuple(several), tuple(levels), heads, size, dtype)[0]


@recorded
def _levels(several, levels, heads, size, dtype):
    (_, num_heads, head_dim), at, counts = several[0].shape, 0, [len(blocks) for blocks in levels]
    columns, warps = len(several) * heads, LEVELS[1]
    out = several[0].new_empty(sum(counts), columns, head_dim, dtype=dtype)
    for turn in range(0, len(levels), 2):
        blocks, count, above, more = levels[turn], counts[turn], turn + 1 < len(levels), turn + 2 < len(levels)
        around, programs = (levels[turn + 1], counts[turn + 1]) if above else (blocks, 0)
        first, last = _alike(several)
        sums = first.new_empty(programs, columns, head_dim, dtype=torch.float32) if more else out
        parts, tile = _levels_tile(heads, head_dim, blocks.size, around.size if above else 0)
        levels_kernel[((programs or cdiv(count, tile[2])) * parts, len(several))](
            first, last, out, sums, blocks.start, blocks.length, around.start, around.length,
            blocks.length if size is None else size, *first.stride()[:2], columns * head_dim, at, count,
            heads, num_heads // heads, head_dim, *tile, above, more, size is not None, num_warps=warps,
        )  # fmt: skip
        several, heads, num_heads, at = (sums,), columns, columns, at + count + programs
    return (out,)


@cache
def _levels_tile(heads, head_dim, rows, children):
    """How many programs have heads of the same blocks, and columns of a head, heads and blocks of each, and rows."""
    elements, _, step = LEVELS
    children, block_d = next_power_of_2(children or elements // ELEMENTS), padded(head_dim)
    together = max(1, min(elements // (children * block_d), next_power_of_2(heads)))
    return cdiv(heads, together), (block_d, together, children, rows, min(step, rows))


def _alike(several):
    """One or two tensors, of the same strides."""
    first, last = unit_stride(several[0]), unit_stride(several[-1])
    return (first, last) if first.stride() == last.stride() else (first.contiguous(), last.contiguous())


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


@triton.jit
def _sums(
    x_ptr, first, length, head, dim, there, stride_t, stride_h, GROUP: tl.constexpr, SIZE: tl.constexpr,
    STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] sums of the rows of a block each and of GROUP heads. A thread adds rows of its own columns: sums
    across warps would cost more than the loads."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for turn in range(0, GROUP):
        at = x_ptr + first * stride_t + ((head * GROUP + turn) * stride_h + dim)
        for begin in range(0, SIZE, STEP):
            for row in tl.static_range(STEP):
                mask = there & (begin + row < length)
                total += tl.load(at + (begin + row) * stride_t, mask=mask, other=0.0).to(tl.float32)
    return total


@launched
@triton.jit(do_not_specialize=["num_blocks"])
def pool_kernel(
    x_ptr, second_ptr, out_ptr, start_ptr, length_ptr, stride_t, stride_h, out_stride, num_blocks,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TOGETHER: tl.constexpr,
    COUNT: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """COUNT blocks and TOGETHER heads of out [blocks, HEADS of x and of the second, D], each the sum of GROUP heads."""
    block, first, length, head, dim, there = _place(
        start_ptr, length_ptr, num_blocks, HEADS, D, BLOCK_D, TOGETHER, COUNT
    )  # fmt: skip
    if tl.program_id(1) == 1:
        x_ptr = second_ptr
    total = _sums(
        x_ptr, first, length, head, dim, there, stride_t, stride_h, GROUP, SIZE, STEP, COUNT, TOGETHER * BLOCK_D
    )  # fmt: skip
    if MEAN:
        total = total / tl.maximum(length * GROUP, 1).to(tl.float32)
    tl.store(out_ptr + block * out_stride + (tl.program_id(1) * HEADS * D + head * D + dim), total, mask=there)


@launched
@triton.jit(do_not_specialize=["out_at", "num_blocks"])
def levels_kernel(
    x_ptr, second_ptr, out_ptr, sums_ptr, start_ptr, length_ptr, above_start, above_length, size_ptr,
    stride_t, stride_h, out_stride, out_at, num_blocks,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TOGETHER: tl.constexpr,
    CHILDREN: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr, ABOVE: tl.constexpr, MORE: tl.constexpr,
    MEAN: tl.constexpr,
):  # fmt: skip
    """TOGETHER heads of the blocks under one of the next level, which lie in rows of out from out_at on, and of that
    one, with MORE in sums as well; without ABOVE of CHILDREN blocks."""
    PARTS: tl.constexpr = (HEADS + TOGETHER - 1) // TOGETHER
    around = tl.program_id(0) // PARTS
    column = tl.arange(0, TOGETHER * BLOCK_D)[None, :]
    head, dim = tl.program_id(0) % PARTS * TOGETHER + column // BLOCK_D, column % BLOCK_D
    begin, count = around * CHILDREN, tl.minimum(CHILDREN, num_blocks - around * CHILDREN)
    if ABOVE:
        begin, count = tl.load(above_start + around), tl.load(above_length + around)
    child = tl.arange(0, CHILDREN)[:, None]
    block = begin + child
    first = tl.load(start_ptr + block, mask=child < count, other=0).to(tl.int64)
    length = tl.load(length_ptr + block, mask=child < count, other=0)
    here = (head < HEADS) & (dim < D)
    there = (child < count) & here
    if tl.program_id(1) == 1:
        x_ptr = second_ptr
    total = _sums(
        x_ptr, first, length, head, dim, there, stride_t, stride_h, GROUP, SIZE, STEP, CHILDREN, TOGETHER * BLOCK_D
    )  # fmt: skip
    to = tl.program_id(1) * HEADS * D + head * D + dim
    out_ptr += tl.full([], out_at, tl.int64) * out_stride
    size_ptr += out_at
    means = total
    if MEAN:
        means = total / tl.load(size_ptr + block, mask=child < count, other=1).to(tl.float32)
    tl.store(out_ptr + block.to(tl.int64) * out_stride + to, means.to(out_ptr.dtype.element_ty), mask=there)
    if ABOVE:
        total = tl.sum(total, 0)[None, :]
        if MORE:
            tl.store(sums_ptr + around.to(tl.int64) * out_stride + to, total, mask=here)
        if MEAN:
            total = total / tl.load(size_ptr + num_blocks + around).to(tl.float32)
        at = (num_blocks + around).to(tl.int64) * out_stride
        tl.store(out_ptr + at + to, total.to(out_ptr.dtype.element_ty), mask=here)


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
