"""Norms of rows as one Triton kernel each way: every tensor is read once and written once.

A tile of rows is in registers, so the backward forms the statistics again. Gradients of the scale: every program walks
over tiles and leaves one row of sums, and these are added up in one order.
"""

from functools import cache

import torch

from longspan.kernels.compiler import cdiv, next_power_of_2, tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.sum_rows_triton import sum_rows_triton

TILE = 2048  # elements of a tile of several rows
PROGRAMS = 528  # of 4 warps, in the backward with a scale: as many as an H200 runs at once, 4 on a multiprocessor


def norm_triton(x, branch, weight, gate, mean, eps):
    """See kernels.norm.norm_naive. bf16, fp16 or fp32."""
    x, layout = _rows(x)
    branch, gate = (a if a is None else a.contiguous() for a in (branch, gate))
    out, stream = x.new_empty(x.shape), None if branch is None else x.new_empty(x.shape)
    if layout[0]:
        launch, block_rows = _launch(x.shape[-1], mean, TILE)
        norm_kernel[(cdiv(layout[0], block_rows),)](x, branch, weight, gate, stream, out, *layout, eps, **launch)
    return [out] if branch is None else [stream, out]


def norm_backward_triton(d_out, d_stream, x, weight, gate, mean, eps):
    """See kernels.norm.norm_backward_naive. bf16, fp16 or fp32."""
    x, layout = _rows(x)
    d_out, d_stream, gate = (a if a is None else a.contiguous() for a in (d_out, d_stream, gate))
    d_x, d_gate = x.new_empty(x.shape), None if gate is None else gate.new_empty(gate.shape)
    launch, block_rows = _launch(x.shape[-1], mean, TILE)
    programs = num_tiles = cdiv(layout[0], block_rows)
    sums = None
    if weight is not None:
        programs = min(max(1, 4 * PROGRAMS // launch["num_warps"]), cdiv(num_tiles, 4))
        sums = x.new_empty(programs, x.shape[-1], dtype=torch.float32)
    if programs:
        norm_backward_kernel[(programs,)](
            d_out, d_stream, x, weight, gate, d_x, sums, d_gate, *layout, num_tiles, programs, eps, **launch
        )
    d_weight = None if weight is None else sum_rows_triton(sums, weight.dtype)
    return [a for a in (d_x, d_weight, d_gate) if a is not None]


def _rows(x):
    """(x with unit stride in its last dimension, (number of rows, rows of a token, strides of tokens and those))."""
    if x.ndim not in (2, 3) or x.stride(-1) != 1:
        x = x.contiguous()
    if x.ndim == 3:
        return x, (x.shape[0] * x.shape[1], x.shape[1], x.stride(0), x.stride(1))
    return x, (x.numel() // x.shape[-1], 1, x.stride(-2) if x.ndim > 1 else 0, 0)


@cache
def _launch(width, mean, tile):
    """(options of a launch, rows of a tile)"""
    block_width = next_power_of_2(width)
    block_rows = max(1, tile // block_width)
    warps = min(32, max(4, block_rows * block_width // 512))
    options = dict(WIDTH=width, BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width, MEAN=mean, num_warps=warps)
    return options, block_rows


@triton.jit
def place(tile, num_rows, rows_per_token, token_stride, row_stride, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr,
          BLOCK_WIDTH: tl.constexpr):  # fmt: skip
    """(offsets of a tile in x, offsets in contiguous tensors, mask)"""
    row, column = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_WIDTH)
    mask = (row < num_rows)[:, None] & (column < WIDTH)[None, :]
    row = row.to(tl.int64)
    start = row // rows_per_token * token_stride + row % rows_per_token * row_stride
    return start[:, None] + column[None, :], row[:, None] * WIDTH + column[None, :], mask


@triton.jit
def inverse_root(x, eps, WIDTH: tl.constexpr, MEAN: tl.constexpr):
    total = tl.sum(x * x, 1)
    return tl.rsqrt((total / WIDTH if MEAN else total) + eps)[:, None]


@launched
@triton.jit(do_not_specialize=["num_rows", "eps"])
def norm_kernel(
    x_ptr, branch_ptr, weight_ptr, gate_ptr, stream_ptr, out_ptr,
    num_rows, rows_per_token, token_stride, row_stride, eps,
    WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """One tile. Pointers are None where there is no such tensor."""
    at_x, at, mask = place(
        tl.program_id(0), num_rows, rows_per_token, token_stride, row_stride, WIDTH, BLOCK_ROWS, BLOCK_WIDTH
    )
    x = tl.load(x_ptr + at_x, mask=mask, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        x += tl.load(branch_ptr + at, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(stream_ptr.dtype.element_ty)
        tl.store(stream_ptr + at, rounded, mask=mask)
        x = rounded.to(tl.float32)
    out = x * inverse_root(x, eps, WIDTH, MEAN)
    if weight_ptr is not None:
        column = tl.arange(0, BLOCK_WIDTH)
        out *= tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
        out *= gate * tl.sigmoid(gate)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


@launched
@triton.jit(do_not_specialize=["num_rows", "num_tiles", "num_programs", "eps"])
def norm_backward_kernel(
    d_out_ptr, d_stream_ptr, x_ptr, weight_ptr, gate_ptr, d_x_ptr, sums_ptr, d_gate_ptr,
    num_rows, rows_per_token, token_stride, row_stride, num_tiles, num_programs, eps,
    WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Every num_programs-th tile; the sums over their rows of d_weight -> row of sums."""
    column = tl.arange(0, BLOCK_WIDTH)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
        total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], dtype=tl.float32)
    for tile in range(tl.program_id(0), num_tiles, num_programs):
        at_x, at, mask = place(tile, num_rows, rows_per_token, token_stride, row_stride, WIDTH, BLOCK_ROWS, BLOCK_WIDTH)
        x = tl.load(x_ptr + at_x, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(d_out_ptr + at, mask=mask, other=0.0).to(tl.float32)
        scale = inverse_root(x, eps, WIDTH, MEAN)
        n = x * scale
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            d_gate = grad * n * sigmoid * (1.0 + gate * (1.0 - sigmoid))
            if weight_ptr is not None:
                d_gate *= weight
            tl.store(d_gate_ptr + at, d_gate.to(d_gate_ptr.dtype.element_ty), mask=mask)
            grad *= gate * sigmoid
        if weight_ptr is not None:
            total += grad * n
            grad *= weight
        share = tl.sum(grad * n, 1)[:, None]
        d_x = (grad - n * (share / WIDTH if MEAN else share)) * scale
        if d_stream_ptr is not None:
            d_x += tl.load(d_stream_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_x_ptr + at, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)
    if weight_ptr is not None:
        tl.store(sums_ptr + tl.program_id(0) * WIDTH + column, tl.sum(total, 0), mask=column < WIDTH)
