"""The WY form of every chunk: with A = tril_-1(beta_i (k_i . k_j) exp(G_i - G_j)) and T = (I + A)^-1,

    W = T (beta exp(G) K)      U = T (beta V)

after which a chunk maps the state that enters it like a gated linear-attention chunk with values U - W S. No chunk
depends on another. Formulas: docs/linear-attention.md.
"""

import torch
import triton
import triton.language as tl

from longspan.kernels.linear.delta_tiles import CHUNK, load_tokens

# Element size, padded max(K, V): warps.
WARPS = {2: {16: 4, 32: 4, 64: 4, 128: 4, 256: 8}, 4: {16: 4, 32: 4, 64: 4, 128: 8, 256: 8}}


@triton.jit
def wy_kernel(
    k_ptr, v_ptr, g_ptr, beta_ptr, w_ptr, u_ptr, inverse_ptr, decay_ptr, chunk_first_ptr, chunk_length_ptr,
    k_stride_t, k_stride_h, v_stride_t, v_stride_h, g_stride_t, g_stride_h, beta_stride_t, beta_stride_h, H,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    GATE: tl.constexpr, INVERSE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one head. Writes -W [CHUNK, K], U^T [V, CHUNK], T [CHUNK, CHUNK] (unless inverse_ptr is None) and,
    with a GATE, the cumulative log decay G as a sum of two fp32 rows [2, CHUNK]."""
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
        g = tl.load(g_at, mask=token < length, other=0.0).to(tl.float64)
        cumulative = tl.cumsum(g, 0)
        rounded, from_start = cumulative.to(tl.float32), tl.exp(cumulative.to(tl.float32))
        decay_at = decay_ptr + tile * 4 * CHUNK + token
        tl.store(decay_at, rounded)
        tl.store(decay_at + CHUNK, (cumulative - rounded.to(tl.float64)).to(tl.float32))
        tl.store(decay_at + 2 * CHUNK, from_start)
        tl.store(decay_at + 3 * CHUNK, tl.exp((tl.sum(g, 0) - cumulative).to(tl.float32)))
        between = (cumulative[:, None] - cumulative[None, :]).to(tl.float32)
        a *= tl.exp(tl.where(row > column, between, float("-inf")))
        beta_k *= from_start
    inverse = invert_unit_lower(tl.where(row > column, a, 0.0), CHUNK, INVERSE_PRECISION)

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
def invert_unit_lower(a, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """(I + a)^-1 for strictly lower triangular a, by block substitution: the inverses of diagonal blocks of 2, 4, ...

    Up to 16 x 16 the blocks are taken out, [CHUNK / 16, 16, 16], and multiplied side by side.
    """
    PARTS: tl.constexpr = CHUNK // 16
    part, token, small = tl.arange(0, PARTS), tl.arange(0, CHUNK), tl.arange(0, 16)
    diagonal = (part[:, None] == part[None, :])[:, None, :, None]
    blocks = tl.sum(tl.where(diagonal, tl.reshape(a, [PARTS, 16, PARTS, 16]), 0.0), 2)
    differ = small[None, :, None] ^ small[None, None, :]
    inverse = tl.where(differ == 0, 1.0, 0.0) - tl.where(differ == 1, blocks, 0.0)
    inverse = merge_blocks(inverse, blocks, differ, 1, 4, "tf32x3")
    inverse = tl.reshape(tl.where(diagonal, inverse[:, :, None, :], 0.0), [CHUNK, CHUNK])
    return merge_blocks(inverse, a, token[:, None] ^ token[None, :], 4, 6, PRECISION)


@triton.jit
def merge_blocks(inverse, a, differ, FIRST: tl.constexpr, STOP: tl.constexpr, PRECISION: tl.constexpr):
    """From the inverses of diagonal blocks of 2^FIRST to those of 2^STOP. differ: row ^ column, whose highest bit is
    the level at which the blocks of row and column merge.

    Two neighbours with inverses X and Y merge into [[X, 0], [-Y a21 X, Y]]; with T the block diagonal of all inverses
    and `below` the blocks a21, all pairs merge at once as T - T below T.
    """
    for level in tl.static_range(FIRST, STOP):
        below = tl.where(differ >> level == 1, a, 0.0)
        product = tl.dot(inverse, below, input_precision=PRECISION)
        inverse -= tl.dot(product, inverse, input_precision=PRECISION)
    return inverse


def wy(call, *, keep_inverse: bool):
    """-W [tiles, C, K], U^T [tiles, V, C], T [tiles, C, C] or None, decays (`load_decay`) [tiles, 4, C] or None."""
    block_k, block_v = call.widths
    w, u = call.scratch(CHUNK, block_k), call.scratch(block_v, CHUNK)
    inverse = call.scratch(CHUNK, CHUNK) if keep_inverse else None
    decay = None if call.log_decay is None else call.scratch(4, CHUNK, dtype=torch.float32)
    # Errors of 2^-16 in T are small beside those of 16-bit operands. The interpreter knows no bf16x3.
    exact = call.q.dtype == torch.float32 or not call.q.is_cuda
    if call.num_tiles:
        wy_kernel[(call.num_tiles,)](
            call.k, call.v, call.log_decay, call.beta, w, u, inverse, decay, *call.chunks,
            *call.k.stride()[:2], *call.v.stride()[:2], *call.decay_strides, *call.beta.stride(), call.heads,
            **call.constants, INVERSE_PRECISION="tf32x3" if exact else "bf16x3",
            num_warps=call.warps(WARPS),
        )  # fmt: skip
    return w, u, inverse, decay
