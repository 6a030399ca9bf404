"""The WY form of every chunk: with A = tril_-1(beta_i (k_i . k_j) exp(G_i - G_j)) and T = (I + A)^-1,

    W = T (beta exp(G) K)      U = T (beta V)

after which a chunk maps the state that enters it like a gated linear-attention chunk with values U - W S. No chunk
depends on another. Formulas: docs/linear-attention.md.
"""

import torch

from longspan.kernels.compiler import tl, triton
from longspan.kernels.linear.delta_tiles import CHUNK, load_tokens
from longspan.kernels.linear.form import CLOSED_FP32

CLOSED = tl.constexpr(CLOSED_FP32)
# Element size, padded max(K, V): warps.
WARPS = {2: {16: 4, 32: 4, 64: 4, 128: 4, 256: 8}, 4: {16: 4, 32: 4, 64: 4, 128: 8}}
SUBSTITUTED = 4  # log2 of the size of the blocks that are inverted by substitution; larger ones are merged from them
# Inputs: (precision of the merges, registers per thread). fp16 merges keep T within the rounding of bf16 inputs.
MERGES = {torch.bfloat16: ("fp16", 128), torch.float16: ("bf16x3", 168), torch.float32: ("tf32x3", None)}


@triton.jit
def wy_kernel(
    k_ptr, v_ptr, g_ptr, beta_ptr, w_ptr, u_ptr, inverse_ptr, decay_ptr, chunk_first_ptr, chunk_length_ptr,
    k_stride_t, k_stride_h, v_stride_t, v_stride_h, g_stride_t, g_stride_h, beta_stride_t, beta_stride_h, H,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    GATE: tl.constexpr, FIRST: tl.constexpr, INVERSE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one head. Writes -W [CHUNK, K], U^T [V, CHUNK], T [CHUNK, CHUNK] (unless inverse_ptr is None) and,
    with a GATE, the rows of `load_decay` [4, CHUNK]."""
    tile = tl.program_id(0).to(tl.int64)
    chunk, head = tile // H, tile % H
    first, length = tl.load(chunk_first_ptr + chunk).to(tl.int64), tl.load(chunk_length_ptr + chunk)
    token, k_column, v_column = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    row, column = token[:, None], token[None, :]

    k_ptr += first * k_stride_t + head * k_stride_h
    v_ptr += first * v_stride_t + head * v_stride_h
    k = load_tokens(k_ptr, k_stride_t, length, k_column, CHUNK, K, K == BLOCK_K)
    v = load_tokens(v_ptr, v_stride_t, length, v_column, CHUNK, V, V == BLOCK_V)
    beta_at = beta_ptr + first * beta_stride_t + head * beta_stride_h + token * beta_stride_t
    beta = tl.load(beta_at, mask=token < length, other=0.0).to(tl.float32)

    a = tl.dot(k, tl.trans(k), input_precision=PRECISION) * beta[:, None]
    beta_k = beta
    if GATE:
        g_at = g_ptr + first * g_stride_t + head * g_stride_h + token * g_stride_t
        g = tl.load(g_at, mask=token < length, other=0.0)
        g = tl.where(g < CLOSED, CLOSED, g).to(tl.float64)
        cumulative = tl.cumsum(g, 0)
        rounded = cumulative.to(tl.float32)
        rest, from_start = (cumulative - rounded.to(tl.float64)).to(tl.float32), tl.exp(rounded)
        decay_at = decay_ptr + tile * 4 * CHUNK + token
        tl.store(decay_at, rounded)
        tl.store(decay_at + CHUNK, rest)
        tl.store(decay_at + 2 * CHUNK, from_start)
        tl.store(decay_at + 3 * CHUNK, tl.exp((tl.sum(g, 0) - cumulative).to(tl.float32)))
        between = rounded[:, None] - rounded[None, :]
        if k.dtype == tl.float32:  # see load_decay_between
            between += rest[:, None] - rest[None, :]
        a *= tl.exp(tl.where(row > column, between, float("-inf")))
        beta_k *= from_start
    else:
        a = tl.where(row > column, a, 0.0)
    inverse = invert_unit_lower(a, CHUNK, FIRST, INVERSE_PRECISION)

    w = tl.dot((inverse * -beta_k[None, :]).to(k.dtype), k, input_precision=PRECISION)
    w_at = w_ptr + tile * CHUNK * BLOCK_K + row * BLOCK_K + k_column[None, :]
    tl.store(w_at, w.to(w_ptr.dtype.element_ty))
    u = tl.dot((inverse * beta[None, :]).to(v.dtype), v, input_precision=PRECISION)
    u_at = u_ptr + tile * CHUNK * BLOCK_V + row + v_column[None, :] * CHUNK
    tl.store(u_at, u.to(u_ptr.dtype.element_ty))
    if inverse_ptr is not None:
        inverse_at = inverse_ptr + tile * CHUNK * CHUNK + row * CHUNK + column
        tl.store(inverse_at, inverse.to(inverse_ptr.dtype.element_ty))


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


def wy(call, *, keep_inverse: bool):
    """-W [tiles, C, K], U^T [tiles, V, C], T [tiles, C, C] or None, decays (`load_decay`) [tiles, 4, C] or None."""
    block_k, block_v = call.widths
    w, u = call.scratch(CHUNK, block_k), call.scratch(block_v, CHUNK)
    inverse = call.scratch(CHUNK, CHUNK) if keep_inverse else None
    decay = None if call.log_decay is None else call.scratch(4, CHUNK, dtype=torch.float32)
    precision, registers = MERGES[call.q.dtype]
    warps = call.warps(WARPS)
    if max(call.widths) > 128:
        registers = None
    if call.num_tiles:
        wy_kernel[(call.num_tiles,)](
            call.k, call.v, call.log_decay, call.beta, w, u, inverse, decay, *call.chunks,
            *call.k.stride()[:2], *call.v.stride()[:2], *call.decay_strides, *call.beta.stride(), call.heads,
            **call.constants, FIRST=SUBSTITUTED, INVERSE_PRECISION=precision, num_warps=warps, maxnreg=registers,
        )  # fmt: skip
    return w, u, inverse, decay
