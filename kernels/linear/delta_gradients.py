"""Gradients of the delta rule's inputs, chunk by chunk, once S, dS, V' and dV' of every chunk are known:

    dP  = scale (dO V'^T) . Lambda        E = T^T dV'        Y = -beta tril_-1(E V'^T) . Lambda
    dQi = scale exp(G) . (dO S^T)         dQ = dQi + dP K
    dKi = exp(G_C - G) . (V' dS^T)        dKw = -T^T (dV' S^T)
    dV  = beta . E                        dK = dKi + dP^T Q + (Y + Y^T) K + beta exp(G) . dKw
    dbeta = rowsum(Y . K K^T) / beta + rowsum(dKw . exp(G) K) + rowsum(E . V)

T is the inverse of `delta_wy`. E and dKw are the gradients of beta V and of beta exp(G) K, Y that of the products
k_i . k_j in A. Token t's decay lies on every path from before t to t or later, so with N = dP . Q K^T + Y . K K^T and
r_i = <Q, dQi>_i + <beta exp(G) K, dKw>_i its gradient is

    dg_t = sum_{j < t <= i} N_ij + sum_{i >= t} r_i + sum_{j < t} <K, dKi>_j + exp(G_C) <S, dS>

`pairs_kernel` does what lives on pairs of tokens, `inputs_kernel` what takes the states. Both leave sums over their
part of K or V in fp32 [blocks + 1, tile, 3, CHUNK], for `sums_kernel` to add: terms of dbeta; of dg, those that a token
gives to all t up to it (the last token has what all t get); and those that the token before it gives to all t from it.
"""

import torch

from longspan.kernels.compiler import tl, triton
from longspan.kernels.linear.delta_tiles import (
    CHUNK,
    launch_options,
    load_decay,
    load_decay_between,
    load_tokens,
    load_total_decay,
    store_tokens,
)

# Element size: (columns of K at a time, of V at a time, warps, stages, registers or left to the compiler).
PAIRS = {2: (64, 64, 4, 2), 4: (32, 32, 4, 1)}
# The same; columns of K per program.
INPUTS = {2: (64, 64, 4, 2, 168), 4: (32, 32, 4, 1)}


@triton.jit
def pairs_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, beta_ptr, decay_ptr, inverse_ptr, values_ptr, d_values_ptr,
    dv_ptr, d_scores_ptr, y_ptr, sums_ptr, chunk_first_ptr, chunk_length_ptr,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, d_out_stride_t, d_out_stride_h,
    beta_stride_t, beta_stride_h, scale, H,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, STEP_K: tl.constexpr,
    STEP_V: tl.constexpr, CHUNK: tl.constexpr, GATE: tl.constexpr, D_GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one head: dv [T, H, V]; dP and Y -> d_scores, y [tile, CHUNK, CHUNK]; its part of the sums."""
    tile = tl.program_id(0).to(tl.int64)
    chunk, head = tile // H, tile % H
    first, length = tl.load(chunk_first_ptr + chunk).to(tl.int64), tl.load(chunk_length_ptr + chunk)
    token = tl.arange(0, CHUNK)
    row, column = token[:, None], token[None, :]
    q_ptr += first * q_stride_t + head * q_stride_h
    k_ptr += first * k_stride_t + head * k_stride_h
    v_ptr += first * v_stride_t + head * v_stride_h
    d_out_ptr += first * d_out_stride_t + head * d_out_stride_h
    values_ptr += tile * BLOCK_V * CHUNK
    d_values_ptr += tile * BLOCK_V * CHUNK
    dv_ptr += (first * H + head) * V

    inverse_t = tl.load(inverse_ptr + tile * CHUNK * CHUNK + (row + column * CHUNK))
    beta_at = beta_ptr + (first + token) * beta_stride_t + head * beta_stride_h
    beta = tl.load(beta_at, mask=token < length, other=0.0).to(tl.float32)
    d_beta = tl.zeros([CHUNK], dtype=tl.float32)
    d_scores = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    x = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)  # -Y / beta
    for start in range(0, BLOCK_V, STEP_V):
        value = start + tl.arange(0, STEP_V)
        values_t = tl.load(values_ptr + (value[:, None] * CHUNK + token[None, :]))
        d_values_t = tl.load(d_values_ptr + (value[:, None] * CHUNK + token[None, :]))
        d_out = load_tokens(d_out_ptr, d_out_stride_t, length, value, CHUNK, V, V == BLOCK_V)
        v = load_tokens(v_ptr, v_stride_t, length, value, CHUNK, V, V == BLOCK_V)
        d_scores = tl.dot(d_out, values_t, d_scores, input_precision=PRECISION)
        e = tl.dot(inverse_t, tl.trans(d_values_t), input_precision=PRECISION)
        x = tl.dot(e.to(values_t.dtype), values_t, x, input_precision=PRECISION)
        d_beta += tl.sum(e * v.to(tl.float32), 1)
        store_tokens(dv_ptr, H * V, length, value, e * beta[:, None], CHUNK, V)

    if GATE:
        between = load_decay_between(decay_ptr, tile, False, inverse_t.dtype == tl.float32, CHUNK)
        d_scores *= between * scale
        x *= between
    else:
        d_scores = tl.where(row >= column, d_scores * scale, 0.0)
    x = tl.where(row > column, x, 0.0)
    y = x * -beta[:, None]
    square = row * CHUNK + column
    tl.store(d_scores_ptr + tile * CHUNK * CHUNK + square, d_scores.to(d_scores_ptr.dtype.element_ty))
    tl.store(y_ptr + tile * CHUNK * CHUNK + square, y.to(y_ptr.dtype.element_ty))

    kk = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    qk = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    for start in range(0, BLOCK_K, STEP_K):
        key = start + tl.arange(0, STEP_K)
        k = load_tokens(k_ptr, k_stride_t, length, key, CHUNK, K, K == BLOCK_K)
        kk = tl.dot(k, tl.trans(k), kk, input_precision=PRECISION)
        if D_GATE:
            q = load_tokens(q_ptr, q_stride_t, length, key, CHUNK, K, K == BLOCK_K)
            qk = tl.dot(q, tl.trans(k), qk, input_precision=PRECISION)
    sums_at = sums_ptr + tile * 3 * CHUNK + token
    tl.store(sums_at, d_beta - tl.sum(x * kk, 1))
    if D_GATE:
        # Row sums minus column sums of the same numbers: their sum over tokens from t on is that of N over j < t <= i.
        pairs = tl.where(row > column, d_scores * qk, 0.0) + y * kk
        tl.store(sums_at + CHUNK, tl.sum(pairs, 1) - tl.sum(pairs, 0))


@triton.jit
def inputs_kernel(
    q_ptr, k_ptr, d_out_ptr, beta_ptr, decay_ptr, inverse_ptr, values_ptr, d_values_ptr, d_scores_ptr, y_ptr,
    states_ptr, d_states_ptr, dq_ptr, dk_ptr, sums_ptr, chunk_first_ptr, chunk_length_ptr,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, d_out_stride_t, d_out_stride_h,
    beta_stride_t, beta_stride_h, sums_stride_block, scale, H,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, STEP_K: tl.constexpr,
    STEP_V: tl.constexpr, CHUNK: tl.constexpr, GATE: tl.constexpr, D_GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """STEP_K columns of one chunk of one head: of dq and dk [T, H, K], and what they add to the sums."""
    blocks: tl.constexpr = BLOCK_K // STEP_K
    tile, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    chunk, head = tile // H, tile % H
    first, length = tl.load(chunk_first_ptr + chunk).to(tl.int64), tl.load(chunk_length_ptr + chunk)
    token, key = tl.arange(0, CHUNK), block * STEP_K + tl.arange(0, STEP_K)
    d_out_ptr += first * d_out_stride_t + head * d_out_stride_h
    values_ptr += tile * BLOCK_V * CHUNK
    d_values_ptr += tile * BLOCK_V * CHUNK
    states_ptr += tile * BLOCK_V * BLOCK_K
    d_states_ptr += tile * BLOCK_V * BLOCK_K

    dq = tl.zeros([CHUNK, STEP_K], dtype=tl.float32)
    dk = tl.zeros([CHUNK, STEP_K], dtype=tl.float32)
    dw = tl.zeros([CHUNK, STEP_K], dtype=tl.float32)
    through = 0.0  # <S, dS>
    for start in range(0, BLOCK_V, STEP_V):
        value = start + tl.arange(0, STEP_V)
        d_out = load_tokens(d_out_ptr, d_out_stride_t, length, value, CHUNK, V, V == BLOCK_V)
        values_t = tl.load(values_ptr + (value[:, None] * CHUNK + token[None, :]))
        d_values_t = tl.load(d_values_ptr + (value[:, None] * CHUNK + token[None, :]))
        state = tl.load(states_ptr + (value[:, None] * BLOCK_K + key[None, :]))
        d_state = tl.load(d_states_ptr + (value[:, None] * BLOCK_K + key[None, :]))
        dq = tl.dot(d_out, state, dq, input_precision=PRECISION)
        dw = tl.dot(tl.trans(d_values_t), state, dw, input_precision=PRECISION)
        dk = tl.dot(tl.trans(values_t), d_state, dk, input_precision=PRECISION)
        if D_GATE:
            through += tl.sum(state.to(tl.float32) * d_state.to(tl.float32))

    q = load_tokens(q_ptr + first * q_stride_t + head * q_stride_h, q_stride_t, length, key, CHUNK, K, K == BLOCK_K)
    k = load_tokens(k_ptr + first * k_stride_t + head * k_stride_h, k_stride_t, length, key, CHUNK, K, K == BLOCK_K)
    beta_at = beta_ptr + (first + token) * beta_stride_t + head * beta_stride_h
    beta = tl.load(beta_at, mask=token < length, other=0.0).to(tl.float32)
    square = tile * CHUNK * CHUNK
    by_row, by_column = token[:, None] * CHUNK + token[None, :], token[:, None] + token[None, :] * CHUNK
    dkw = tl.dot(tl.load(inverse_ptr + square + by_column), -dw.to(k.dtype), input_precision=PRECISION)
    dq *= scale
    if GATE:
        from_start = load_decay(decay_ptr, tile, 2, CHUNK)[:, None]
        dq *= from_start
        dkw *= from_start
        dk *= load_decay(decay_ptr, tile, 3, CHUNK)[:, None]

    k_dkw = tl.sum(k.to(tl.float32) * dkw, 1)
    sums_at = sums_ptr + block * sums_stride_block + tile * 3 * CHUNK + token
    tl.store(sums_at, k_dkw)
    if D_GATE:
        from_queries = tl.sum(q.to(tl.float32) * dq, 1) + beta * k_dkw
        through *= load_total_decay(decay_ptr, tile, CHUNK)
        tl.store(sums_at + CHUNK, from_queries + tl.where(token == CHUNK - 1, through, 0.0))
        tl.store(sums_at + 2 * CHUNK + 1, tl.sum(k.to(tl.float32) * dk, 1), mask=token < CHUNK - 1)

    d_scores = tl.load(d_scores_ptr + square + by_row)
    dq = tl.dot(d_scores, k, dq, input_precision=PRECISION)
    store_tokens(dq_ptr + (first * H + head) * K, H * K, length, key, dq, CHUNK, K)
    dk += beta[:, None] * dkw
    d_scores_t = tl.load(d_scores_ptr + square + by_column)
    dk = tl.dot(d_scores_t, q, dk, input_precision=PRECISION)
    y = tl.load(y_ptr + square + by_row) + tl.load(y_ptr + square + by_column)
    dk = tl.dot(y, k, dk, input_precision=PRECISION)
    store_tokens(dk_ptr + (first * H + head) * K, H * K, length, key, dk, CHUNK, K)


@triton.jit
def sums_kernel(
    sums_ptr, d_beta_ptr, d_decay_ptr, chunk_first_ptr, chunk_length_ptr, sums_stride_block, H,
    BLOCKS: tl.constexpr, CHUNK: tl.constexpr, D_GATE: tl.constexpr,
):  # fmt: skip
    """One chunk of one head: d_beta and d_log_decay [T, H] from the sums that the other kernels left."""
    tile = tl.program_id(0).to(tl.int64)
    chunk, head = tile // H, tile % H
    first, length = tl.load(chunk_first_ptr + chunk).to(tl.int64), tl.load(chunk_length_ptr + chunk)
    token = tl.arange(0, CHUNK)
    out_at, inside = (first + token) * H + head, token < length
    sums_at = sums_ptr + tile * 3 * CHUNK + token
    d_beta = tl.zeros([CHUNK], dtype=tl.float32)
    from_queries = tl.zeros([CHUNK], dtype=tl.float32)
    from_keys = tl.zeros([CHUNK], dtype=tl.float32)
    for block in tl.static_range(BLOCKS + 1):
        d_beta += tl.load(sums_at)
        if D_GATE:
            from_queries += tl.load(sums_at + CHUNK)
            if block < BLOCKS:
                from_keys += tl.load(sums_at + 2 * CHUNK, mask=token > 0, other=0.0)
        sums_at += sums_stride_block
    tl.store(d_beta_ptr + out_at, d_beta, mask=inside)
    if D_GATE:
        d_decay = tl.cumsum(from_queries, 0, reverse=True) + tl.cumsum(from_keys, 0)
        tl.store(d_decay_ptr + out_at, d_decay, mask=inside)


def input_gradients(call, wy, d_out, values, d_values, states, d_states, gate: bool):
    """dq, dk, dv in the dtype of the inputs; d_beta and, if `gate`, d_log_decay (else None), fp32 [T, H]."""
    q, k, v, beta = call.q, call.k, call.v, call.beta
    block_k, block_v = call.widths
    pair_k, pair_v, *pair_options = PAIRS[q.element_size()]
    step_k, step_v, *options = INPUTS[q.element_size()]
    step_k, step_v = min(step_k, block_k), min(step_v, block_v)
    blocks = block_k // step_k
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    d_beta = q.new_empty(q.shape[:2], dtype=torch.float32)
    d_decay = torch.empty_like(d_beta) if gate else None
    d_scores, y = call.scratch(CHUNK, CHUNK), call.scratch(CHUNK, CHUNK)
    sums = q.new_empty(blocks + 1, call.splits.num_chunks, call.heads, 3, CHUNK, dtype=torch.float32)
    if call.num_tiles:
        _, _, inverse, decay = wy
        pairs_kernel[(call.num_tiles,)](
            q, k, v, d_out, beta, decay, inverse, values, d_values, dv, d_scores, y, sums[blocks], *call.chunks,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *d_out.stride()[:2], *beta.stride(),
            call.scale, call.heads, **call.constants, STEP_K=min(pair_k, block_k), STEP_V=min(pair_v, block_v),
            D_GATE=gate, **launch_options(*pair_options),
        )  # fmt: skip
        inputs_kernel[(call.num_tiles * blocks,)](
            q, k, d_out, beta, decay, inverse, values, d_values, d_scores, y, states, d_states, dq, dk, sums,
            *call.chunks,
            *q.stride()[:2], *k.stride()[:2], *d_out.stride()[:2], *beta.stride(), sums.stride(0),
            call.scale, call.heads, **call.constants, STEP_K=step_k, STEP_V=step_v,
            D_GATE=gate, **launch_options(*options),
        )  # fmt: skip
        sums_kernel[(call.num_tiles,)](
            sums, d_beta, d_decay, *call.chunks, sums.stride(0), call.heads,
            BLOCKS=blocks, CHUNK=CHUNK, D_GATE=gate, num_warps=2,
        )  # fmt: skip
    return dq, dk, dv, d_beta, d_decay
