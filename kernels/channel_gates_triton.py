"""Gates per key channel as one Triton kernel each way. A program walks down the tokens of a block of channels."""

import torch

from longspan.kernels.compiler import cdiv, tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.linear.splits import unit_stride

ROWS, BLOCK_CHANNELS = 8, 256  # of a tile
STEPS = 16  # tiles of a strip


def channel_gate_triton(a, bias, factor):
    """See kernels.channel_gates.channel_gate_naive. bf16, fp16 or fp32."""
    a = unit_stride(a)
    log_decay, keys = a.new_empty(a.shape, dtype=torch.float32), a.new_empty(a.shape) if bias is None else None
    if a.numel():
        grid, _ = _strips(a)
        channel_gate_kernel[(grid,)](
            a, bias, log_decay, keys, a.stride(0), *a.shape, factor, ROWS=ROWS, BLOCK=BLOCK_CHANNELS, STEPS=STEPS
        )
    return [log_decay] if keys is None else [log_decay, keys]


def channel_gate_backward_triton(d_log_decay, d_keys, a, bias, factor):
    """See kernels.channel_gates.channel_gate_backward_naive. bf16, fp16 or fp32."""
    a = unit_stride(a)
    d_a, (grid, strips), sums = a.new_empty(a.shape), _strips(a), None
    if bias is not None:
        sums = a.new_empty(strips, a.shape[1], dtype=torch.float32)
    if grid:
        channel_gate_backward_kernel[(grid,)](
            d_log_decay.contiguous(), d_keys if d_keys is None else d_keys.contiguous(), a, bias, d_a, sums,
            a.stride(0), *a.shape, factor, ROWS=ROWS, BLOCK=BLOCK_CHANNELS, STEPS=STEPS,
        )  # fmt: skip
    return [d_a] if sums is None else [d_a, sums.sum(0).to(bias.dtype)]


def _strips(a):
    """(programs, strips of tokens)"""
    strips = cdiv(a.shape[0], ROWS * STEPS)
    return strips * cdiv(a.shape[1], BLOCK_CHANNELS), strips


@triton.jit
def log1p(x):
    """log(1 + x), exact for small x too: what is rounded away in 1 + x cancels (Goldberg 1991, theorem 4)."""
    above = 1.0 + x
    return tl.where(above == 1.0, x, tl.log(above) * (x / tl.where(above == 1.0, 1.0, above - 1.0)))


@triton.jit
def place(step, num_tokens, num_channels, ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """(row, column, mask) of a tile of this program's strip"""
    blocks = tl.cdiv(num_channels, BLOCK)
    row = (tl.program_id(0) // blocks * STEPS + step) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return row[:, None].to(tl.int64), column[None, :], (row < num_tokens)[:, None] & (column < num_channels)[None, :]


@launched
@triton.jit(do_not_specialize=["num_tokens", "factor"])
def channel_gate_kernel(
    a_ptr, bias_ptr, log_decay_ptr, keys_ptr, stride, num_tokens, num_channels, factor,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """bias_ptr is None for a bound, keys_ptr for a bias."""
    for step in range(STEPS):
        row, column, mask = place(step, num_tokens, num_channels, ROWS, BLOCK, STEPS)
        a = tl.load(a_ptr + row * stride + column, mask=mask, other=0.0).to(tl.float32)
        at = row * num_channels + column
        if bias_ptr is not None:
            a += tl.load(bias_ptr + column, mask=column < num_channels, other=0.0).to(tl.float32)
            log_decay = factor * (tl.minimum(a, 0.0) - log1p(tl.exp(-tl.abs(a))))
        else:
            forgotten = factor * tl.sigmoid(-a)
            tl.store(keys_ptr + at, forgotten.to(keys_ptr.dtype.element_ty), mask=mask)
            log_decay = log1p(-forgotten)
        tl.store(log_decay_ptr + at, log_decay, mask=mask)


@launched
@triton.jit(do_not_specialize=["num_tokens", "factor"])
def channel_gate_backward_kernel(
    d_log_decay_ptr, d_keys_ptr, a_ptr, bias_ptr, d_a_ptr, sums_ptr, stride, num_tokens, num_channels, factor,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """sums: of d_bias over the tokens of each strip, [strips, C]."""
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for step in range(STEPS):
        row, column, mask = place(step, num_tokens, num_channels, ROWS, BLOCK, STEPS)
        a = tl.load(a_ptr + row * stride + column, mask=mask, other=0.0).to(tl.float32)
        at = row * num_channels + column
        d_a = tl.load(d_log_decay_ptr + at, mask=mask, other=0.0)
        if bias_ptr is not None:
            a += tl.load(bias_ptr + column, mask=column < num_channels, other=0.0).to(tl.float32)
            d_a *= factor * tl.sigmoid(-a)
            total += d_a
        else:
            forgotten = factor * tl.sigmoid(-a)
            d_keys = tl.load(d_keys_ptr + at, mask=mask, other=0.0).to(tl.float32)
            d_a = forgotten * tl.sigmoid(a) * (d_a / (1.0 - forgotten) - d_keys)
        tl.store(d_a_ptr + at, d_a.to(d_a_ptr.dtype.element_ty), mask=mask)
    if bias_ptr is not None:
        blocks = tl.cdiv(num_channels, BLOCK)
        column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
        at = (tl.program_id(0) // blocks).to(tl.int64) * num_channels + column
        tl.store(sums_ptr + at, tl.sum(total, 0), mask=column < num_channels)
