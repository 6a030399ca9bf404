"""The WY form of every chunk: with A = tril_-1(beta_i (k_i . k_j) exp(G_i - G_j)) and T = (I + A)^-1,

    W = T (beta exp(G) K)      U = T (beta V)

after which a chunk maps the state that enters it like a gated linear-attention chunk with values U - W S. No chunk
depends on another. Formulas: docs/linear-attention.md.
"""

import triton
import triton.language as tl

from longspan.kernels.linear.delta_tiles import decay_between, invert_unit_lower, load_tokens

CONFIGS = {16: (4, 2), 32: (4, 2), 64: (4, 2), 128: (4, 2), 256: (8, 2)}  # padded max(K, V): (warps, stages)


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

    k = load_tokens(k_ptr + first * k_stride_t + head * k_stride_h, k_stride_t, length, k_column, CHUNK, K, K == BLOCK_K)
    v = load_tokens(v_ptr + first * v_stride_t + head * v_stride_h, v_stride_t, length, v_column, CHUNK, V, V == BLOCK_V)
    beta_at = beta_ptr + first * beta_stride_t + head * beta_stride_h + token * beta_stride_t
    beta = tl.load(beta_at, mask=token < length, other=0.0).to(tl.float32)

    a = tl.dot(k, tl.trans(k), input_precision=PRECISION) * beta[:, None]
    beta_k = beta
    if GATE:
        g_at = g_ptr + first * g_stride_t + head * g_stride_h + token * g_stride_t
        total = tl.cumsum(tl.load(g_at, mask=token < length, other=0.0).to(tl.float64), 0)
        high = total.to(tl.float32)
        low = (total - high.to(tl.float64)).to(tl.float32)
        decay_at = decay_ptr + tile * 2 * CHUNK + token
        tl.store(decay_at, high)
        tl.store(decay_at + CHUNK, low)
        a *= decay_between(high, low, CHUNK)
        beta_k *= tl.exp(high)
    inverse = invert_unit_lower(tl.where(row > column, a, 0.0), CHUNK, 6, INVERSE_PRECISION)

    w = tl.dot((inverse * -beta_k[None, :]).to(k.dtype), k, input_precision=PRECISION)
    w_at = w_ptr + tile * CHUNK * BLOCK_K + row * BLOCK_K + k_column[None, :]
    tl.store(w_at, w.to(w_ptr.dtype.element_ty))
    u = tl.dot((inverse * beta[None, :]).to(v.dtype), v, input_precision=PRECISION)
    u_at = u_ptr + tile * CHUNK * BLOCK_V + row + v_column[None, :] * CHUNK
    tl.store(u_at, u.to(u_ptr.dtype.element_ty))
    if inverse_ptr is not None:
        inverse_at = inverse_ptr + tile * CHUNK * CHUNK + row * CHUNK + column
        tl.store(inverse_at, inverse.to(inverse_ptr.dtype.element_ty))
