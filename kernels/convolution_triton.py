"""Short causal convolutions as two Triton kernels, one launch each way; both are bound by memory traffic.

Forward, a program makes a tile of tokens x channels; the W shifted reads of one tile meet in the cache. Backward, a
program walks down the tokens of one piece with the last W rows of x and of dx in registers, so that every element is
read once and the activation's derivative is formed once; rows on their way are requested AHEAD steps early.
"""

import torch
import triton
import triton.language as tl

BLOCK_TOKENS, BLOCK_CHANNELS, NUM_WARPS = 32, 256, 8  # forward
STEPS, WALK_CHANNELS, WALK_WARPS = 128, 256, 2  # backward: tokens walked by one program, W - 1 of them for dx only


def convolve_triton(x, weight, bias, activation, reach):
    """See kernels.convolution.convolve. bf16, fp16 or fp32."""
    (num_tokens, num_channels), width = x.shape, weight.shape[1]
    x, out = _unit_stride(x), torch.empty_like(x, memory_format=torch.contiguous_format)
    grid = triton.cdiv(num_tokens, BLOCK_TOKENS) * triton.cdiv(num_channels, BLOCK_CHANNELS)
    if grid:
        forward_kernel[(grid,)](
            x,
            weight.t().contiguous(),
            bias,
            reach,
            out,
            num_tokens,
            num_channels,
            x.stride(0),
            WIDTH=width,
            SILU=activation == "silu",
            BLOCK_T=BLOCK_TOKENS,
            BLOCK_D=BLOCK_CHANNELS,
            num_warps=NUM_WARPS,
        )
    return out


def convolve_backward_triton(d_out, x, weight, bias, activation, reach, dtype):
    """See kernels.convolution.convolve_backward. bf16, fp16 or fp32."""
    (num_tokens, num_channels), width = x.shape, weight.shape[1]
    x, d_out = _unit_stride(x), _unit_stride(d_out)
    num_pieces = triton.cdiv(num_tokens, STEPS - width + 1)
    dx = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    sums = x.new_empty(num_pieces, width + (bias is not None), num_channels, dtype=torch.float32)
    grid = num_pieces * triton.cdiv(num_channels, WALK_CHANNELS)
    if grid:
        backward_kernel[(grid,)](
            d_out,
            x,
            weight.t().contiguous(),
            bias,
            reach,
            dx,
            sums,
            num_tokens,
            num_channels,
            d_out.stride(0),
            x.stride(0),
            WIDTH=width,
            SILU=activation == "silu",
            STEPS=STEPS,
            AHEAD=4,
            BLOCK_D=WALK_CHANNELS,
            num_warps=WALK_WARPS,
        )
    total = sums.sum(0)
    return dx, total[:width].t(), None if bias is None else total[width]


def _unit_stride(x):
    return x if x.stride(1) == 1 else x.contiguous()


@triton.jit(do_not_specialize=["num_tokens"])
def forward_kernel(
    x_ptr,
    weight_ptr,  # [W, D]
    bias_ptr,
    reach_ptr,
    out_ptr,
    num_tokens,
    num_channels,
    x_stride,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    num_blocks = tl.cdiv(num_channels, BLOCK_D)
    program = tl.program_id(0)
    token = (program // num_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = program % num_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channel < num_channels
    reach = tl.load(reach_ptr + token, mask=token < num_tokens, other=-1).to(tl.int32)

    pre = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    if bias_ptr is not None:
        pre += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    x_at = x_ptr + token[:, None] * x_stride + channel[None, :]
    for lag in tl.static_range(WIDTH):
        weight = tl.load(weight_ptr + (WIDTH - 1 - lag) * num_channels + channel, mask=inside, other=0.0)
        x = tl.load(x_at - lag * x_stride, mask=(reach >= lag)[:, None] & inside[None, :], other=0.0)
        pre += x.to(tl.float32) * weight.to(tl.float32)[None, :]
    if SILU:
        pre = pre * tl.sigmoid(pre)
    out_at = out_ptr + token[:, None] * num_channels + channel[None, :]
    tl.store(out_at, pre.to(out_ptr.dtype.element_ty), mask=(reach >= 0)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def backward_kernel(
    d_out_ptr,
    x_ptr,
    weight_ptr,  # [W, D]
    bias_ptr,
    reach_ptr,
    dx_ptr,
    sums_ptr,  # [pieces, W or W + 1 with a bias, D]
    num_tokens,
    num_channels,
    d_out_stride,
    x_stride,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    STEPS: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    num_blocks = tl.cdiv(num_channels, BLOCK_D)
    program = tl.program_id(0)
    piece, channel = program // num_blocks, program % num_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channel < num_channels
    start = piece.to(tl.int64) * (STEPS - WIDTH + 1)
    token = start + tl.arange(0, STEPS)
    reach = tl.load(reach_ptr + token, mask=token < num_tokens, other=-1)
    x_ptr += channel
    d_out_ptr += channel
    dx_ptr += channel
    weight = ()
    for tap in tl.static_range(WIDTH):
        weight += (tl.load(weight_ptr + tap * num_channels + channel, mask=inside, other=0.0).to(tl.float32),)
    bias = tl.zeros([BLOCK_D], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)

    # Most pieces hold no token near a start, and then nothing is masked.
    if tl.min(reach.to(tl.int32), 0) == WIDTH - 1:
        d_weight, d_bias = walk(
            d_out_ptr, x_ptr, reach_ptr, dx_ptr, weight, bias, start, num_tokens, num_channels, inside, d_out_stride,
            x_stride, WIDTH, SILU, STEPS, AHEAD, False,
        )  # fmt: skip
    else:
        d_weight, d_bias = walk(
            d_out_ptr, x_ptr, reach_ptr, dx_ptr, weight, bias, start, num_tokens, num_channels, inside, d_out_stride,
            x_stride, WIDTH, SILU, STEPS, AHEAD, True,
        )  # fmt: skip

    sums_at = sums_ptr + piece.to(tl.int64) * (WIDTH + (bias_ptr is not None)) * num_channels + channel
    for tap in tl.static_range(WIDTH):
        tl.store(sums_at + tap * num_channels, d_weight[tap], mask=inside)
    if bias_ptr is not None:
        tl.store(sums_at + WIDTH * num_channels, d_bias, mask=inside)


@triton.jit
def walk(
    d_out_ptr, x_ptr, reach_ptr, dx_ptr, weight, bias, start, num_tokens, num_channels, inside, d_out_stride, x_stride,
    WIDTH: tl.constexpr, SILU: tl.constexpr, STEPS: tl.constexpr, AHEAD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Stores dx of the tokens start .. start + STEPS - WIDTH; their sums for dweight (a tuple of W rows) and dbias."""
    d_bias = tl.zeros_like(bias)
    window, d_window, d_weight = (), (), ()  # rows token - W + 1 .. token - 1 of x and of dx as far as it is summed
    for tap in tl.static_range(WIDTH - 1):
        token = start - (WIDTH - 1) + tap
        window += (tl.load(x_ptr + token * x_stride, mask=inside & (token >= 0), other=0.0).to(tl.float32),)
        d_window += (d_bias,)
    for tap in tl.static_range(WIDTH):
        d_weight += (d_bias,)
    coming = ()
    for early in tl.static_range(AHEAD):
        coming += (request(d_out_ptr, x_ptr, reach_ptr, start + early, num_tokens, inside, d_out_stride, x_stride),)

    for step in tl.range(0, STEPS):
        token = start + step
        grad, x, reach = coming[0]
        coming = coming[1:] + (
            request(d_out_ptr, x_ptr, reach_ptr, token + AHEAD, num_tokens, inside, d_out_stride, x_stride),
        )
        window += (x.to(tl.float32),)
        d_window += (d_bias * 0,)
        used, pre = (), bias
        for tap in tl.static_range(WIDTH):
            read = window[tap]
            if MASKED:
                read = tl.where(reach >= WIDTH - 1 - tap, read, 0.0)
            used += (read,)
            pre += read * weight[tap]
        d_pre = grad.to(tl.float32)
        if SILU:
            gate = tl.sigmoid(pre)
            d_pre *= gate * (1 + pre * (1 - gate))
        own = tl.where(step < STEPS - WIDTH + 1, d_pre, 0.0)
        d_bias += own
        d_weight_new, d_window_new = (), ()
        for tap in tl.static_range(WIDTH):
            d_weight_new += (d_weight[tap] + own * used[tap],)
            back = d_pre * weight[tap]
            if MASKED:
                back = tl.where(reach >= WIDTH - 1 - tap, back, 0.0)
            d_window_new += (d_window[tap] + back,)
        d_weight = d_weight_new
        first = token - (WIDTH - 1)  # every token that reads it has been visited
        stored = inside & (first >= start) & (first < num_tokens)
        tl.store(dx_ptr + first * num_channels, d_window_new[0].to(dx_ptr.dtype.element_ty), mask=stored)
        window, d_window = window[1:], d_window_new[1:]
    return d_weight, d_bias


@triton.jit
def request(d_out_ptr, x_ptr, reach_ptr, token, num_tokens, inside, d_out_stride, x_stride):
    """Rows `token` of d_out and x, zeros where there is none or no gradient is wanted, and the token's reach."""
    held = token < num_tokens
    reach = tl.load(reach_ptr + token, mask=held, other=-1).to(tl.int32)
    grad = tl.load(d_out_ptr + token * d_out_stride, mask=inside & (reach >= 0), other=0.0)
    x = tl.load(x_ptr + token * x_stride, mask=inside & held, other=0.0)
    return grad, x, reach
