"""What every chunk of the delta rule needs of its own tokens: the inverse T of its writes, and its scores P:

    A = tril_-1(beta_i (k_i . k_j) exp(G_i - G_j))      T = (I + A)^-1      P = scale tril((q_i . k_j) exp(G_i - G_j))

With S the state that enters, the chunk writes V' = T beta (V - exp(G) K S) and puts out scale exp(G) Q S + P V'. No
chunk depends on another. Formulas: docs/linear-attention.md.
"""

import torch

from longspan.kernels.compiler import tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.linear import hopper
from longspan.kernels.linear.delta_tiles import SMALLEST_BETA, Prepared, load_tokens
from longspan.kernels.linear.form import CLOSED_FP32

CLOSED = tl.constexpr(CLOSED_FP32)
# Element size, padded K: warps.
WARPS = {2: {16: 4, 32: 4, 64: 4, 128: 4, 256: 8}, 4: {16: 4, 32: 4, 64: 4, 128: 8}}
SUBSTITUTED = 4  # log2 of the size of the blocks that are inverted by substitution; larger ones are merged from them
# Inputs: precision of the merges. fp16 merges keep T within the rounding of bf16 inputs.
MERGES = {torch.bfloat16: "fp16", torch.float16: "bf16x3", torch.float32: "tf32x3"}
REGISTERS = {"fp16": 128, "bf16x3": 168, "tf32x3": None}  # per thread; None: left to the compiler


@launched
@triton.jit
def prepare_kernel(
    q_ptr, k_ptr, g_ptr, beta_ptr, inverse_ptr, scores_ptr, rows_ptr, chunk_first_ptr, chunk_length_ptr,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, g_stride_t, g_stride_h, beta_stride_t, beta_stride_h, scale, H,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    GATE: tl.constexpr, FIRST: tl.constexpr, INVERSE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
    SMALLEST: tl.constexpr,
):  # fmt: skip
    """One chunk of one head. Writes T and P [CHUNK, CHUNK] and the rows of `load_row` [2, CHUNK, 4]."""
    tile = tl.program_id(0).to(tl.int64)
    chunk, head = tile // H, tile % H
    first, length = tl.load(chunk_first_ptr + chunk).to(tl.int64), tl.load(chunk_length_ptr + chunk)
    token, key = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K)
    row, column = token[:, None], token[None, :]

    k_ptr += first * k_stride_t + head * k_stride_h
    q_ptr += first * q_stride_t + head * q_stride_h
    k = load_tokens(k_ptr, k_stride_t, length, key, CHUNK, K, K == BLOCK_K)
    beta_at = beta_ptr + first * beta_stride_t + head * beta_stride_h + token * beta_stride_t
    beta = tl.load(beta_at, mask=token < length, other=0.0).to(tl.float32)
    beta = tl.where(tl.abs(beta) < SMALLEST, SMALLEST, beta)
    rows_at = rows_ptr + tile * (8 * CHUNK) + token * 4
    tl.store(rows_at, beta)

    q = load_tokens(q_ptr, q_stride_t, length, key, CHUNK, K, K == BLOCK_K)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if GATE:
        g_at = g_ptr + first * g_stride_t + head * g_stride_h + token * g_stride_t
        g = tl.load(g_at, mask=token < length, other=0.0)
        g = tl.where(g < CLOSED, CLOSED, g).to(tl.float64)
        cumulative = tl.cumsum(g, 0)
        rounded = cumulative.to(tl.float32)
        rest = (cumulative - rounded.to(tl.float64)).to(tl.float32)
        tl.store(rows_at + 1, tl.exp(rounded))
        tl.store(rows_at + 2, beta * tl.exp(rounded))
        tl.store(rows_at + 4 * CHUNK, tl.exp((tl.sum(g, 0) - cumulative).to(tl.float32)))
        tl.store(rows_at + 4 * CHUNK + 1, rounded)
        tl.store(rows_at + 4 * CHUNK + 2, rest)
        between = rounded[:, None] - rounded[None, :]
        if k.dtype == tl.float32:  # see load_decay_between
            between += rest[:, None] - rest[None, :]
        decay = tl.exp(tl.where(row >= column, between, float("-inf")))
    else:
        decay = tl.where(row >= column, 1.0, 0.0)
    square = tile * CHUNK * CHUNK + row * CHUNK + column
    tl.store(scores_ptr + square, (scores * decay).to(scores_ptr.dtype.element_ty))
    a = tl.dot(k, tl.trans(k), input_precision=PRECISION) * beta[:, None] * decay
    a = tl.where(row > column, a, 0.0)
    inverse = invert_unit_lower(a, CHUNK, FIRST, INVERSE_PRECISION)
    tl.store(inverse_ptr + square, inverse.to(inverse_ptr.dtype.element_ty))


@triton.jit
def invert_unit_lower(a, CHUNK: tl.constexpr, FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """(I + a)^-1 for strictly lower triangular a. Inverts the diagonal blocks of 2^FIRST, taken out side by side, by
    substitution, a column at a time, and merges neighbours to blocks twice as large until one is left."""
    SIZE: tl.constexpr = 2**FIRST
    PARTS: tl.constexpr = CHUNK // SIZE
    part, token, small = tl.arange(0, PARTS), tl.arange(0, CHUNK), tl.arange(0, SIZE)
    diagonal = (part[:, None] == part[None, :])[:, None, :, None]
    blocks = tl.sum(tl.where(diagonal, tl.reshape(a, [PARTS, SIZE, PARTS, SIZE]), 0.0), 2)
    inverse = tl.where((small[:, None] == small[None, :])[None, :, :], 1.0, tl.zeros_like(blocks))
    for j in tl.static_range(SIZE - 1):
        column = tl.sum(tl.where(small[None, None, :] == j, blocks, 0.0), 2)
        row = tl.sum(tl.where(small[None, :, None] == j, inverse, 0.0), 1)
        inverse -= column[:, :, None] * row[:, None, :]
    inverse = tl.reshape(tl.where(diagonal, inverse[:, :, None, :], 0.0), [CHUNK, CHUNK])
    # Two neighbours with inverses X and Y merge into [[X, 0], [-Y a21 X, Y]]; with T the block diagonal of all inverses
    # and `below` the blocks a21, all pairs merge at once as T - T below T. The highest bit of row ^ column is the level
    # at which their blocks merge.
    differ = token[:, None] ^ token[None, :]
    for level in tl.static_range(FIRST, 6):
        below = tl.where(differ >> level == 1, a, 0.0)
        product = exact_dot(inverse, below, PRECISION)
        inverse -= exact_dot(product, inverse, PRECISION)
    return inverse


@triton.jit
def exact_dot(x, y, PRECISION: tl.constexpr):
    """x @ y of fp32. "bf16x3": both as sums of two bf16 numbers, without the product of the small ones. Triton's own
    also cares for infinities, at three times the instructions."""
    if PRECISION == "bf16x3":
        x_large, x_small = halves(x)
        y_large, y_small = halves(y)
        product = tl.dot(x_large, y_small)
        product = tl.dot(x_large, y_large, tl.dot(x_small, y_large, product))
    elif PRECISION == "fp16":
        product = tl.dot(x.to(tl.float16), y.to(tl.float16))
    else:
        product = tl.dot(x, y, input_precision=PRECISION)
    return product


@triton.jit
def halves(x):
    """x as a sum of two bf16 numbers. The first is cut off, not rounded: packed conversions are all that is left."""
    large = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return large.to(tl.bfloat16), (x - large).to(tl.bfloat16)


def prepare(call) -> Prepared:
    prepared = call.room_for_prepared()
    q, k, g, beta = call.q, call.k, call.log_decay, call.beta
    width, merges = call.widths[0], MERGES[q.dtype]
    if call.num_tiles and hopper.takes(call) and merges == "fp16":
        from longspan.kernels.linear.hopper import prepare as prepare_hopper

        prepare_hopper.launch(call, prepared)
    elif call.num_tiles:
        prepare_kernel[(call.num_tiles,)](
            q, k, g, beta, *prepared, *call.chunks,
            *q.stride()[:2], *k.stride()[:2], *call.decay_strides, *beta.stride(), call.scale, call.heads,
            **call.constants, FIRST=SUBSTITUTED, INVERSE_PRECISION=merges,
            SMALLEST=SMALLEST_BETA if hopper.takes(call) else 0.0,
            num_warps=WARPS[q.element_size()][width], maxnreg=REGISTERS[merges] if width <= 128 else None,
        )  # fmt: skip
    return prepared
