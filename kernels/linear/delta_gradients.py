"""Gradients of the delta rule's inputs, chunk by chunk, once S, dS, V' and E (`delta_backward`) of every chunk are known:

    dP  = scale (dO V'^T) . Lambda        Y  = -beta tril_-1(E V'^T) . Lambda
    dQi = scale exp(G) . (dO S^T)         dQ = dQi + dP K
    dKi = exp(G_C - G) . (V' dS^T)        dK = dKi + dP^T Q + (Y + Y^T) K + beta dKw
    dKw = -exp(G) . (E S^T)               dV = beta . E
    dbeta = rowsum(Y . K K^T) / beta + rowsum(dKw . K) + rowsum(E . V)

beta dKw is what dK has of beta exp(G) K, and Y the gradient of the products k_i . k_j in A. Token t's decay lies on
every path from before t to t or later, so with N = dP . Q K^T + Y . K K^T and r_i = <Q, dQi>_i + beta_i <K, dKw>_i

    dg_t = sum_{j < t <= i} N_ij + sum_{i >= t} r_i + sum_{j < t} <K, dKi>_j + exp(G_C) <S, dS>

`inputs_kernel` leaves sums over its part of K in fp32 [blocks, tile, 3, CHUNK], for `sums_kernel` to add: terms of
dbeta; of dg, those that a token gives to all t up to it (the last token has what all t get); and those that the token
before it gives to all t from it. dP^T and Y^T are products of their own: no result of a product is ever transposed.
"""

import torch

from longspan.kernels.compiler import tl, triton
from longspan.kernels.linear.delta_tiles import (
    CHUNK,
    launch_options,
    load_decay_between,
    load_row,
    load_tokens,
    load_total_decay,
    store_tokens,
)

# Element size: (columns of K per program, of V at a time, warps, stages, registers or left to the compiler).
INPUTS = {2: (128, 128, 8, 1, 128), 4: (32, 32, 4, 1)}


@triton.jit
def inputs_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, scores_ptr, rows_ptr, states_ptr, values_ptr, d_states_ptr, errors_ptr,
    dq_ptr, dk_ptr, dv_ptr, sums_ptr, chunk_first_ptr, chunk_length_ptr,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, d_out_stride_t, d_out_stride_h,
    sums_stride_block, scale, H,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, STEP_K: tl.constexpr,
    STEP_V: tl.constexpr, CHUNK: tl.constexpr, GATE: tl.constexpr, D_GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """STEP_K columns of one chunk of one head: of dq and dk [T, H, K], and what they add to the sums; the first of
    them also dv [T, H, V] and the sums over V."""
    blocks: tl.constexpr = BLOCK_K // STEP_K
    tile, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    chunk, head = tile // H, tile % H
    first, length = tl.load(chunk_first_ptr + chunk).to(tl.int64), tl.load(chunk_length_ptr + chunk)
    token, key = tl.arange(0, CHUNK), block * STEP_K + tl.arange(0, STEP_K)
    row, column = token[:, None], token[None, :]
    q_ptr += first * q_stride_t + head * q_stride_h
    k_ptr += first * k_stride_t + head * k_stride_h
    v_ptr += first * v_stride_t + head * v_stride_h
    d_out_ptr += first * d_out_stride_t + head * d_out_stride_h
    states_ptr += tile * BLOCK_V * BLOCK_K
    values_ptr += tile * BLOCK_V * CHUNK
    d_states_ptr += tile * BLOCK_V * BLOCK_K
    errors_ptr += tile * BLOCK_V * CHUNK
    dv_ptr += (first * H + head) * V
    beta = load_row(rows_ptr, tile, 0, CHUNK)

    # What lives on pairs of tokens.
    d_beta = tl.zeros([CHUNK], dtype=tl.float32)
    d_scores = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    d_scores_t = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    x = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)  # -Y / beta
    x_t = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    for start in range(0, BLOCK_V, STEP_V):
        value = start + tl.arange(0, STEP_V)
        d_out = load_tokens(d_out_ptr, d_out_stride_t, length, value, CHUNK, V, V == BLOCK_V)
        values_t = tl.load(values_ptr + (value[:, None] * CHUNK + token[None, :]))
        errors_t = tl.load(errors_ptr + (value[:, None] * CHUNK + token[None, :]))
        v = load_tokens(v_ptr, v_stride_t, length, value, CHUNK, V, V == BLOCK_V)
        d_scores = tl.dot(d_out, values_t, d_scores, input_precision=PRECISION)
        d_scores_t = tl.dot(tl.trans(values_t), tl.trans(d_out), d_scores_t, input_precision=PRECISION)
        x = tl.dot(tl.trans(errors_t), values_t, x, input_precision=PRECISION)
        x_t = tl.dot(tl.trans(values_t), errors_t, x_t, input_precision=PRECISION)
        errors = tl.trans(errors_t).to(tl.float32)
        d_beta += tl.sum(errors * v.to(tl.float32), 1)
        store_tokens(dv_ptr, H * V, length, value, errors * beta[:, None], CHUNK, V)
    kk = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    for start in range(0, BLOCK_K, STEP_K):
        k = load_tokens(k_ptr, k_stride_t, length, start + tl.arange(0, STEP_K), CHUNK, K, K == BLOCK_K)
        kk = tl.dot(k, tl.trans(k), kk, input_precision=PRECISION)

    pairs = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    square = tile * CHUNK * CHUNK + row * CHUNK + column
    if D_GATE:
        pairs = tl.where(row > column, d_scores * tl.load(scores_ptr + square).to(tl.float32), 0.0)
    if GATE:
        between = load_decay_between(rows_ptr, tile, False, k_ptr.dtype.element_ty == tl.float32, CHUNK)
        between_t = load_decay_between(rows_ptr, tile, True, k_ptr.dtype.element_ty == tl.float32, CHUNK)
        d_scores *= between * scale
        d_scores_t *= between_t * scale
        x *= between
        x_t *= between_t
    else:
        d_scores = tl.where(row >= column, d_scores * scale, 0.0)
        d_scores_t = tl.where(row <= column, d_scores_t * scale, 0.0)
    x = tl.where(row > column, x, 0.0)
    d_beta -= tl.sum(x * kk, 1)
    y = x * -beta[:, None]
    pairs += y * kk
    # Row sums minus column sums of the same numbers: their sum over tokens from t on is that of N over j < t <= i.
    from_queries = tl.sum(pairs, 1) - tl.sum(pairs, 0)
    y -= tl.where(row < column, x_t, 0.0) * beta[None, :]

    # What takes the states.
    dq = tl.zeros([CHUNK, STEP_K], dtype=tl.float32)
    dk = tl.zeros([CHUNK, STEP_K], dtype=tl.float32)
    dkw = tl.zeros([CHUNK, STEP_K], dtype=tl.float32)
    through = 0.0  # <S, dS>
    for start in range(0, BLOCK_V, STEP_V):
        value = start + tl.arange(0, STEP_V)
        d_out = load_tokens(d_out_ptr, d_out_stride_t, length, value, CHUNK, V, V == BLOCK_V)
        values_t = tl.load(values_ptr + (value[:, None] * CHUNK + token[None, :]))
        errors_t = tl.load(errors_ptr + (value[:, None] * CHUNK + token[None, :]))
        state = tl.load(states_ptr + (value[:, None] * BLOCK_K + key[None, :]))
        d_state = tl.load(d_states_ptr + (value[:, None] * BLOCK_K + key[None, :]))
        dq = tl.dot(d_out, state, dq, input_precision=PRECISION)
        dkw = tl.dot(tl.trans(errors_t), state, dkw, input_precision=PRECISION)
        dk = tl.dot(tl.trans(values_t), d_state, dk, input_precision=PRECISION)
        if D_GATE:
            through += tl.sum(state.to(tl.float32) * d_state.to(tl.float32))
    q = load_tokens(q_ptr, q_stride_t, length, key, CHUNK, K, K == BLOCK_K)
    k = load_tokens(k_ptr, k_stride_t, length, key, CHUNK, K, K == BLOCK_K)
    dq *= scale
    if GATE:
        from_start = load_row(rows_ptr, tile, 1, CHUNK)[:, None]
        dq *= from_start
        dkw *= from_start
        dk *= load_row(rows_ptr, tile, 2, CHUNK)[:, None]

    shared = tl.where(block == 0, 1.0, 0.0)  # what all blocks have
    k_dkw = -tl.sum(k.to(tl.float32) * dkw, 1)
    sums_at = sums_ptr + block * sums_stride_block + tile * 3 * CHUNK + token
    tl.store(sums_at, k_dkw + d_beta * shared)
    if D_GATE:
        from_queries = from_queries * shared + tl.sum(q.to(tl.float32) * dq, 1) + beta * k_dkw
        through *= load_total_decay(rows_ptr, tile, CHUNK)
        tl.store(sums_at + CHUNK, from_queries + tl.where(token == CHUNK - 1, through, 0.0))
        tl.store(sums_at + 2 * CHUNK + 1, tl.sum(k.to(tl.float32) * dk, 1), mask=token < CHUNK - 1)

    dq = tl.dot(d_scores.to(k.dtype), k, dq, input_precision=PRECISION)
    store_tokens(dq_ptr + (first * H + head) * K, H * K, length, key, dq, CHUNK, K)
    dk -= beta[:, None] * dkw
    dk = tl.dot(d_scores_t.to(k.dtype), q, dk, input_precision=PRECISION)
    dk = tl.dot(y.to(k.dtype), k, dk, input_precision=PRECISION)
    store_tokens(dk_ptr + (first * H + head) * K, H * K, length, key, dk, CHUNK, K)


@triton.jit
def sums_kernel(
    sums_ptr, d_beta_ptr, d_decay_ptr, chunk_first_ptr, chunk_length_ptr, sums_stride_block, H,
    BLOCKS: tl.constexpr, CHUNK: tl.constexpr, D_GATE: tl.constexpr,
):  # fmt: skip
    """One chunk of one head: d_beta and d_log_decay [T, H] from the sums that `inputs_kernel` left."""
    tile = tl.program_id(0).to(tl.int64)
    chunk, head = tile // H, tile % H
    first, length = tl.load(chunk_first_ptr + chunk).to(tl.int64), tl.load(chunk_length_ptr + chunk)
    token = tl.arange(0, CHUNK)
    out_at, inside = (first + token) * H + head, token < length
    sums_at = sums_ptr + tile * 3 * CHUNK + token
    d_beta = tl.zeros([CHUNK], dtype=tl.float32)
    from_queries = tl.zeros([CHUNK], dtype=tl.float32)
    from_keys = tl.zeros([CHUNK], dtype=tl.float32)
    for block in tl.static_range(BLOCKS):
        d_beta += tl.load(sums_at)
        if D_GATE:
            from_queries += tl.load(sums_at + CHUNK)
            from_keys += tl.load(sums_at + 2 * CHUNK, mask=token > 0, other=0.0)
        sums_at += sums_stride_block
    tl.store(d_beta_ptr + out_at, d_beta, mask=inside)
    if D_GATE:
        d_decay = tl.cumsum(from_queries, 0, reverse=True) + tl.cumsum(from_keys, 0)
        tl.store(d_decay_ptr + out_at, d_decay, mask=inside)


def input_gradients(call, prepared, d_out, entering, leaving, gate: bool):
    """dq, dk, dv in the dtype of the inputs; d_beta and, if `gate`, d_log_decay (else None), fp32 [T, H]. entering: S^T
    and V'^T of every chunk; leaving: dS^T and E^T."""
    q, k, v = call.q, call.k, call.v
    block_k, block_v = call.widths
    step_k, step_v, *options = INPUTS[q.element_size()]
    step_k, step_v = min(step_k, block_k), min(step_v, block_v)
    blocks = block_k // step_k
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    d_beta = q.new_empty(q.shape[:2], dtype=torch.float32)
    d_decay = torch.empty_like(d_beta) if gate else None
    sums = q.new_empty(blocks, call.splits.num_chunks, call.heads, 3, CHUNK, dtype=torch.float32)
    if call.num_tiles:
        inputs_kernel[(call.num_tiles * blocks,)](
            q, k, v, d_out, prepared.scores, prepared.rows, *entering, *leaving, dq, dk, dv, sums, *call.chunks,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *d_out.stride()[:2], sums.stride(0),
            call.scale, call.heads, **call.constants, STEP_K=step_k, STEP_V=step_v,
            D_GATE=gate, **launch_options(*options),
        )  # fmt: skip
        sums_kernel[(call.num_tiles,)](
            sums, d_beta, d_decay, *call.chunks, sums.stride(0), call.heads,
            BLOCKS=blocks, CHUNK=CHUNK, D_GATE=gate, num_warps=2,
        )  # fmt: skip
    return dq, dk, dv, d_beta, d_decay
