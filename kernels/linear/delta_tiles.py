"""Pieces that the delta-rule kernels share: reading tiles of tokens, decays inside a chunk, inverting I + A.

Scratch tensors hold one tile per (chunk, head), [num_chunks, H, rows, columns], padded to powers of two and to whole
chunks with zeros, so that they are read without masks. Token tensors are [T, H, D].
"""

import triton
import triton.language as tl


@triton.jit
def load_tokens(ptr, stride, length, column, CHUNK: tl.constexpr, WIDTH: tl.constexpr, ALL: tl.constexpr):
    """[CHUNK, columns] of the tokens that `ptr` starts at; zero after `length` tokens and, unless ALL, WIDTH columns."""
    token = tl.arange(0, CHUNK)
    mask = (token < length)[:, None]
    if not ALL:
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(ptr + token[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def load_tokens_transposed(ptr, stride, length, column, CHUNK: tl.constexpr, WIDTH: tl.constexpr, ALL: tl.constexpr):
    """The same as [columns, CHUNK]."""
    token = tl.arange(0, CHUNK)
    mask = (token < length)[None, :]
    if not ALL:
        mask = mask & (column < WIDTH)[:, None]
    return tl.load(ptr + token[None, :] * stride + column[:, None], mask=mask, other=0.0)


@triton.jit
def store_tokens(ptr, stride, length, column, value, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """Stores [CHUNK, columns]."""
    token = tl.arange(0, CHUNK)
    mask = (token < length)[:, None] & (column < WIDTH)[None, :]
    tl.store(ptr + token[:, None] * stride + column[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_decay(decay_ptr, tile, CHUNK: tl.constexpr):
    """G of a chunk as the sum of two fp32 vectors, so that differences of large numbers stay exact (`wy_kernel`)."""
    at = decay_ptr + tile * 2 * CHUNK + tl.arange(0, CHUNK)
    return tl.load(at), tl.load(at + CHUNK)


@triton.jit
def decay_to_end(decay_ptr, tile, high, low, CHUNK: tl.constexpr):
    """exp(G_C - G), and exp(G_C)."""
    last = decay_ptr + tile * 2 * CHUNK + CHUNK - 1
    high_total, low_total = tl.load(last), tl.load(last + CHUNK)
    return tl.exp((high_total - high) + (low_total - low)), tl.exp(high_total + low_total)


@triton.jit
def decay_between(high, low, CHUNK: tl.constexpr):
    """Lambda: exp(G_i - G_j) for i >= j, else 0."""
    token = tl.arange(0, CHUNK)
    log = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    return tl.exp(tl.where(token[:, None] >= token[None, :], log, float("-inf")))


@triton.jit
def decay_between_transposed(high, low, CHUNK: tl.constexpr):
    token = tl.arange(0, CHUNK)
    log = (high[None, :] - high[:, None]) + (low[None, :] - low[:, None])
    return tl.exp(tl.where(token[None, :] >= token[:, None], log, float("-inf")))


@triton.jit
def invert_unit_lower(a, CHUNK: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + a)^-1 for strictly lower triangular a, by block substitution: diagonal blocks are inverted in sizes 2, 4, ...

    Two neighbours with inverses X and Y merge into [[X, 0], [-Y a21 X, Y]]; with T the block diagonal of all inverses
    and `below` the blocks a21, all pairs merge at once as T - T below T.
    """
    row, column = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    differ = row ^ column  # its highest bit is the level at which the blocks of row and column merge
    inverse = tl.where(row == column, 1.0, 0.0) - tl.where(differ == 1, a, 0.0)
    for level in tl.static_range(1, LEVELS):
        below = tl.where(differ >> level == 1, a, 0.0)
        product = tl.dot(inverse, below, input_precision=PRECISION)
        inverse -= tl.dot(product, inverse, input_precision=PRECISION)
    return inverse
