"""Short causal convolutions as two Triton kernels, one launch each way; both are bound by memory traffic.

A program walks down the tokens of one piece of a block of channels, with the last W - 1 rows of x (and, backward, of
dx) in registers: every element is read once, and the activation is formed once. Rows are requested AHEAD steps before
they are used. Backward, the sums over tokens leave as one row per piece and are added up in one order.
"""

import torch

from longspan.kernels.compiler import cdiv, tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.linear.splits import unit_stride

AHEAD, BLOCK_CHANNELS, NUM_WARPS = 4, 256, 2
FORWARD_STEPS = 64  # tokens of a piece
BACKWARD_STEPS = 128  # tokens walked: those of a piece, and W - 1 of the next for what they give to this one's dx


def convolve_triton(x, weight, bias, activation, reach):
    """See kernels.convolution.convolve. bf16, fp16 or fp32."""
    x, out, num_pieces = unit_stride(x), x.new_empty(x.shape), cdiv(len(x), FORWARD_STEPS)
    _launch(forward_kernel, num_pieces, FORWARD_STEPS, (x,), weight, bias, activation, reach, out)
    return out


def convolve_backward_triton(d_out, x, weight, bias, activation, reach, dtype):
    """See kernels.convolution.convolve_backward. bf16, fp16 or fp32."""
    (num_tokens, num_channels), width = x.shape, weight.shape[1]
    x, d_out = unit_stride(x), unit_stride(d_out)
    num_pieces = cdiv(num_tokens, BACKWARD_STEPS - width + 1)
    dx = x.new_empty(x.shape, dtype=dtype)
    sums = x.new_empty(num_pieces, width + (bias is not None), num_channels, dtype=torch.float32)
    _launch(backward_kernel, num_pieces, BACKWARD_STEPS, (d_out, x), weight, bias, activation, reach, dx, sums)
    total = sums.sum(0)
    return dx, total[:width].t(), None if bias is None else total[width]


def _launch(kernel, num_pieces, steps, inputs, weight, bias, activation, reach, *results):
    num_tokens, num_channels = inputs[0].shape
    if programs := num_pieces * cdiv(num_channels, BLOCK_CHANNELS):
        kernel[(programs,)](
            *inputs, weight.t().contiguous(), bias, reach, *results, num_tokens, num_channels,
            *(x.stride(0) for x in inputs), WIDTH=weight.shape[1], SILU=activation == "silu", STEPS=steps, AHEAD=AHEAD,
            BLOCK_D=BLOCK_CHANNELS, num_warps=NUM_WARPS,
        )  # fmt: skip


@launched
@triton.jit(do_not_specialize=["num_tokens"])
def forward_kernel(
    x_ptr, weight_ptr, bias_ptr, reach_ptr, out_ptr, num_tokens, num_channels, x_stride,
    WIDTH: tl.constexpr, SILU: tl.constexpr, STEPS: tl.constexpr, AHEAD: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """weight: [W, D]."""
    _, start, held, channel, inside, x_ptr, reach_ptr = piece_of(
        x_ptr, reach_ptr, num_tokens, num_channels, x_stride, STEPS, STEPS, AHEAD, BLOCK_D
    )
    out_ptr += start * num_channels
    weight, bias, window = read_before(
        x_ptr, weight_ptr, bias_ptr, start, channel, inside, num_channels, x_stride, WIDTH, BLOCK_D
    )
    # Most pieces hold no token near a start: then nothing is masked.
    if reaches_back(reach_ptr, held, WIDTH, STEPS):
        walk(
            x_ptr, reach_ptr, out_ptr, weight, bias, window, held, channel, inside, num_channels, x_stride,
            WIDTH, SILU, STEPS, AHEAD, False,
        )  # fmt: skip
    else:
        walk(
            x_ptr, reach_ptr, out_ptr, weight, bias, window, held, channel, inside, num_channels, x_stride,
            WIDTH, SILU, STEPS, AHEAD, True,
        )  # fmt: skip


@triton.jit
def walk(
    x_ptr, reach_ptr, out_ptr, weight, bias, window, held, channel, inside, num_channels, x_stride,
    WIDTH: tl.constexpr, SILU: tl.constexpr, STEPS: tl.constexpr, AHEAD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Stores the outputs of the piece's tokens."""
    coming = ()
    for early in tl.static_range(AHEAD):
        coming += (tl.load(x_ptr + early * x_stride + channel, mask=inside & (early < held), other=0.0),)
    for step in tl.range(0, STEPS, loop_unroll_factor=4):
        window += (coming[0].to(tl.float32),)
        later = step + AHEAD
        coming = coming[1:] + (tl.load(x_ptr + later * x_stride + channel, mask=inside & (later < held), other=0.0),)
        stored, pre = inside, bias
        if MASKED:
            reach = tl.load(reach_ptr + step, mask=step < held, other=-1).to(tl.int32)
            stored = inside & (reach >= 0)
        for tap in tl.static_range(WIDTH):
            read = window[tap]
            if MASKED:
                read = tl.where(reach >= WIDTH - 1 - tap, read, 0.0)
            pre += read * weight[tap]
        if SILU:
            pre *= tl.sigmoid(pre)
        tl.store(out_ptr + step * num_channels + channel, pre.to(out_ptr.dtype.element_ty), mask=stored)
        window = window[1:]


@launched
@triton.jit(do_not_specialize=["num_tokens"])
def backward_kernel(
    d_out_ptr, x_ptr, weight_ptr, bias_ptr, reach_ptr, dx_ptr, sums_ptr, num_tokens, num_channels, d_out_stride,
    x_stride, WIDTH: tl.constexpr, SILU: tl.constexpr, STEPS: tl.constexpr, AHEAD: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """weight: [W, D]; sums: [pieces, W or W + 1 with a bias, D]."""
    piece, start, held, channel, inside, x_ptr, reach_ptr = piece_of(
        x_ptr, reach_ptr, num_tokens, num_channels, x_stride, STEPS - WIDTH + 1, STEPS, AHEAD, BLOCK_D
    )
    d_out_ptr += start * d_out_stride
    dx_ptr += start * num_channels
    weight, bias, window = read_before(
        x_ptr, weight_ptr, bias_ptr, start, channel, inside, num_channels, x_stride, WIDTH, BLOCK_D
    )
    if reaches_back(reach_ptr, held, WIDTH, STEPS):
        d_weight, d_bias = walk_back(
            d_out_ptr, x_ptr, reach_ptr, dx_ptr, weight, bias, window, held, channel, inside, num_channels,
            d_out_stride, x_stride, WIDTH, SILU, STEPS, AHEAD, False,
        )  # fmt: skip
    else:
        d_weight, d_bias = walk_back(
            d_out_ptr, x_ptr, reach_ptr, dx_ptr, weight, bias, window, held, channel, inside, num_channels,
            d_out_stride, x_stride, WIDTH, SILU, STEPS, AHEAD, True,
        )  # fmt: skip

    sums_at = sums_ptr + piece * (WIDTH + (bias_ptr is not None)) * num_channels + channel
    for tap in tl.static_range(WIDTH):
        tl.store(sums_at + tap * num_channels, d_weight[tap], mask=inside)
    if bias_ptr is not None:
        tl.store(sums_at + WIDTH * num_channels, d_bias, mask=inside)


@triton.jit
def walk_back(
    d_out_ptr, x_ptr, reach_ptr, dx_ptr, weight, bias, window, held, channel, inside, num_channels, d_out_stride,
    x_stride, WIDTH: tl.constexpr, SILU: tl.constexpr, STEPS: tl.constexpr, AHEAD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Stores dx of the piece's tokens; returns their sums for dweight, a tuple of W rows, and for dbias."""
    d_bias = tl.zeros_like(bias)
    d_window, d_weight, coming = (), (d_bias,), ()  # d_window: dx of the last W - 1 tokens as far as it is summed
    for tap in tl.static_range(WIDTH - 1):
        d_window += (d_bias,)
        d_weight += (d_bias,)
    for early in tl.static_range(AHEAD):
        coming += (request(d_out_ptr, x_ptr, reach_ptr, early, held, channel, inside, d_out_stride, x_stride),)

    for step in tl.range(0, STEPS, loop_unroll_factor=4):
        grad, x, reach = coming[0]
        coming = coming[1:] + (
            request(d_out_ptr, x_ptr, reach_ptr, step + AHEAD, held, channel, inside, d_out_stride, x_stride),
        )
        window += (x.to(tl.float32),)
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
        d_weight_sum, d_window_sum = (), ()
        for tap in tl.static_range(WIDTH):
            d_weight_sum += (d_weight[tap] + own * used[tap],)
            back = d_pre * weight[tap]
            if MASKED:
                back = tl.where(reach >= WIDTH - 1 - tap, back, 0.0)
            if tap < WIDTH - 1:
                back += d_window[tap]
            d_window_sum += (back,)
        first = step - (WIDTH - 1)  # every token that reads it has been visited
        complete = d_window_sum[0].to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + first * num_channels + channel, complete, mask=inside & (first >= 0) & (first < held))
        window, d_window, d_weight = window[1:], d_window_sum[1:], d_weight_sum
    return d_weight, d_bias


@triton.jit
def piece_of(
    x_ptr, reach_ptr, num_tokens, num_channels, x_stride, LENGTH: tl.constexpr, STEPS: tl.constexpr,
    AHEAD: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What a program walks: (piece of LENGTH tokens, its first token, rows from there on, channels, which of them there
    are), and x and reach from that token on."""
    num_blocks = tl.cdiv(num_channels, BLOCK_D)
    program = tl.program_id(0)
    channel = program % num_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = channel < num_channels
    piece = (program // num_blocks).to(tl.int64)
    start = piece * LENGTH
    held = tl.minimum(num_tokens - start, STEPS + AHEAD).to(tl.int32)  # within a piece int32 will do
    reach_ptr += start
    return piece, start, held, channel, inside, x_ptr + start * x_stride, reach_ptr


@triton.jit
def reaches_back(reach_ptr, held, WIDTH: tl.constexpr, STEPS: tl.constexpr):
    """Whether all tokens of a piece read W - 1 before them."""
    step = tl.arange(0, STEPS)
    reach = tl.load(reach_ptr + step, mask=step < held, other=-1).to(tl.int32)
    return tl.min(reach, 0) == WIDTH - 1


@triton.jit
def read_before(
    x_ptr, weight_ptr, bias_ptr, start, channel, inside, num_channels, x_stride, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What a walk needs at its first token: W rows of weights, a row of biases, the W - 1 rows of x before it."""
    bias = tl.zeros([BLOCK_D], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    weight, window = (), ()
    for tap in tl.static_range(WIDTH):
        weight += (tl.load(weight_ptr + tap * num_channels + channel, mask=inside, other=0.0).to(tl.float32),)
    for tap in tl.static_range(WIDTH - 1):
        before = tap - (WIDTH - 1)
        row = tl.load(x_ptr + before * x_stride + channel, mask=inside & (start + before >= 0), other=0.0)
        window += (row.to(tl.float32),)
    return weight, bias, window


@triton.jit
def request(d_out_ptr, x_ptr, reach_ptr, step, held, channel, inside, d_out_stride, x_stride):
    """Rows `step` of d_out and x, zeros where there is none or no gradient is wanted, and the token's reach."""
    reach = tl.load(reach_ptr + step, mask=step < held, other=-1).to(tl.int32)
    grad = tl.load(d_out_ptr + step * d_out_stride + channel, mask=inside & (reach >= 0), other=0.0)
    x = tl.load(x_ptr + step * x_stride + channel, mask=inside & (step < held), other=0.0)
    return grad, x, reach
