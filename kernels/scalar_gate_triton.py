"""Mamba-2's gate as one Triton kernel each way, for the host's sake: in PyTorch it is 15 launches of little work."""

import torch

from longspan.kernels.channel_gates_triton import log1p
from longspan.kernels.compiler import cdiv, next_power_of_2, tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.linear.splits import unit_stride

TILE, TILES = 2048, 4  # numbers of a tile, and tiles of a program in the backward


def scalar_gate_triton(a, A_log, dt_bias):
    """See kernels.scalar_gate.scalar_gate_naive. bf16, fp16 or fp32."""
    a, (block, rows) = unit_stride(a), _tile(a)
    log_decay, step = (torch.empty(a.shape, dtype=torch.float32, device=a.device) for _ in range(2))
    if a.numel():
        scalar_gate_kernel[(cdiv(a.shape[0], rows),)](
            a, A_log, dt_bias, log_decay, step, a.stride(0), *a.shape, ROWS=rows, BLOCK=block
        )
    return [log_decay, step]


def scalar_gate_backward_triton(d_log_decay, d_step, a, A_log, dt_bias):
    """See kernels.scalar_gate.scalar_gate_backward_naive. bf16, fp16 or fp32."""
    a, (block, rows) = unit_stride(a), _tile(a)
    d_log_decay, d_step = (x if x is None else x.contiguous() for x in (d_log_decay, d_step))
    d_a = a.new_empty(a.shape)
    programs = cdiv(a.shape[0], rows * TILES)
    sums = a.new_empty(2, programs, a.shape[1], dtype=torch.float32)
    if sums.numel():
        scalar_gate_backward_kernel[(programs,)](
            d_log_decay, d_step, a, A_log, dt_bias, d_a, sums, a.stride(0), *a.shape, programs,
            ROWS=rows, BLOCK=block, TILES=TILES,
        )  # fmt: skip
    d_A_log, d_dt_bias = sums.sum(1).unbind()
    return [d_a, d_A_log.to(A_log.dtype), d_dt_bias.to(dt_bias.dtype)]


def _tile(a):
    """(heads, tokens) of a tile"""
    block = next_power_of_2(a.shape[1])
    return block, max(1, TILE // block)


@triton.jit
def load_gate(a_ptr, A_log_ptr, dt_bias_ptr, tile, stride, num_tokens, heads, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(a + dt_bias, its softplus, -exp(A_log), offsets in contiguous tensors, mask) of a tile"""
    row, head = (tile * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64), tl.arange(0, BLOCK)
    mask = (row < num_tokens) & (head < heads)[None, :]
    bias = tl.load(dt_bias_ptr + head, mask=head < heads, other=0.0).to(tl.float32)
    rate = -tl.exp(tl.load(A_log_ptr + head, mask=head < heads, other=0.0).to(tl.float32))
    shifted = tl.load(a_ptr + row * stride + head[None, :], mask=mask, other=0.0).to(tl.float32) + bias[None, :]
    step = tl.maximum(shifted, 0.0) + log1p(tl.exp(-tl.abs(shifted)))
    return shifted, step, rate[None, :], row * heads + head[None, :], mask


@launched
@triton.jit(do_not_specialize=["num_tokens"])
def scalar_gate_kernel(
    a_ptr, A_log_ptr, dt_bias_ptr, log_decay_ptr, step_ptr, stride, num_tokens, heads,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _, step, rate, at, mask = load_gate(
        a_ptr, A_log_ptr, dt_bias_ptr, tl.program_id(0), stride, num_tokens, heads, ROWS, BLOCK
    )
    tl.store(log_decay_ptr + at, rate * step, mask=mask)
    tl.store(step_ptr + at, step, mask=mask)


@launched
@triton.jit(do_not_specialize=["num_tokens", "programs"])
def scalar_gate_backward_kernel(
    d_log_decay_ptr, d_step_ptr, a_ptr, A_log_ptr, dt_bias_ptr, d_a_ptr, sums_ptr, stride, num_tokens, heads, programs,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """d_step_ptr is None for zeros. sums [2, programs, heads]: of d_A_log and d_dt_bias over this program's tokens."""
    d_rate, d_bias = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(TILES):
        shifted, step, rate, at, mask = load_gate(
            a_ptr, A_log_ptr, dt_bias_ptr, tl.program_id(0) * TILES + tile, stride, num_tokens, heads, ROWS, BLOCK
        )
        d_log_decay = tl.load(d_log_decay_ptr + at, mask=mask, other=0.0)
        d_rate += d_log_decay * rate * step
        d_shifted = d_log_decay * rate
        if d_step_ptr is not None:
            d_shifted += tl.load(d_step_ptr + at, mask=mask, other=0.0)
        d_shifted *= tl.sigmoid(shifted)
        d_bias += d_shifted
        tl.store(d_a_ptr + at, d_shifted.to(d_a_ptr.dtype.element_ty), mask=mask)
    head = tl.arange(0, BLOCK)
    sums_ptr += tl.program_id(0) * heads + head
    tl.store(sums_ptr, tl.sum(d_rate, 0), mask=head < heads)
    tl.store(sums_ptr + programs * heads, tl.sum(d_bias, 0), mask=head < heads)
