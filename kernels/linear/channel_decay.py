"""Decays per key channel inside one chunk of C tokens: what the channel kernels share.

With G the inclusive cumulative log decay, a pair of tokens j <= i meets with weight exp(G_i - G_j) in every channel. A
product of matrices needs the weight split in two factors, one per token, and there are two ways:

mild    a whole chunk decays by less than exp(-MILD): both factors are measured from half the chunk's decay, and no
        exponent is above MILD / 2. Everything fits fp32 and bf16, and one product gives all pairs.
strong  otherwise a tree: on each level the chunk is cut in blocks of 2 HALF tokens, and tokens of a block's second half
        meet those of its first half; both factors are measured from the middle, so that neither is above one. All pairs
        i > j are met on one of log2(C) levels, and i = j needs no decay. Factors grow by products (`climb`), never by
        differences, so that gates of any strength, even log decay -inf, cost no accuracy.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
MILD = tl.constexpr(120.0)


@triton.jit
def load_rows(ptr, stride, row, column, inside, WIDTH: tl.constexpr):
    """[C, columns] of a tensor whose rows are `stride` apart; zero outside."""
    at = ptr + row[:, None].to(tl.int64) * stride + column[None, :]
    return tl.load(at, mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, stride, row, column, inside, value, WIDTH: tl.constexpr):
    at = ptr + row[:, None].to(tl.int64) * stride + column[None, :]
    tl.store(at, value.to(ptr.dtype.element_ty), mask=inside[:, None] & (column < WIDTH)[None, :])


@triton.jit
def is_mild(total):
    """total [channels]: log decay of a whole chunk. One answer for all channels; false for NaN and -inf."""
    return tl.min(total, 0) >= -MILD


@triton.jit
def mild_factors(log_decay, total):
    """(exp(G - total / 2), exp(total / 2 - G), exp(total / 2)); decay from the chunk's start is the first times the
    third, to its end the second times the third."""
    half = total * (0.5 * LOG2E)
    rise = tl.cumsum(log_decay * LOG2E, 0) - half[None, :]
    return tl.exp2(rise), tl.exp2(-rise), tl.exp2(half)


@triton.jit
def is_second(row, LEVEL: tl.constexpr):
    """[C, 1]: whether a token is in the second half of its block of 2^(LEVEL + 1)."""
    return ((row >> LEVEL) & 1)[:, None] == 1


@triton.jit
def meets(row, LEVEL: tl.constexpr):
    """[C, C]: whether two tokens are in different halves of one block of 2^(LEVEL + 1)."""
    return ((row >> LEVEL)[:, None] ^ (row >> LEVEL)[None, :]) == 1


@triton.jit
def climb(row, passed, from_start, to_end, LEVEL: tl.constexpr):
    """From blocks of 2^LEVEL tokens to blocks twice as long: the decay over each token's whole block, from the block's
    start to the token, the token's own included, and from after the token to the block's end. On level 0 they are the
    token's decay, the same, and one."""
    other = tl.gather(passed, tl.broadcast_to((row ^ (1 << LEVEL))[:, None], passed.shape), 0)
    second = is_second(row, LEVEL)
    return passed * other, tl.where(second, from_start * other, from_start), tl.where(second, to_end, to_end * other)
