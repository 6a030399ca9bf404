"""Gradients of the delta rule's inputs, chunk by chunk, once S, V', dS and E (`delta_backward`) of each are known:

    dP  = scale (dO V'^T) . Lambda        Y  = -beta tril_-1(E V'^T) . Lambda
    dQi = scale exp(G) . (dO S^T)         dQ = dQi + dP K
    dKi = exp(G_C - G) . (V' dS^T)        dK = dKi + dP^T Q + (Y + Y^T) K + beta dKw
    dKw = -exp(G) . (E S^T)               dV = beta . E
    dbeta = rowsum(Y . K K^T) / beta + rowsum(dKw . K) + rowsum(E . V)

beta dKw is what dK has of beta exp(G) K, and Y the gradient of the products k_i . k_j in A. Token t's decay lies on
every path from before t to t or later, so with N = dP . Q K^T + Y . K K^T and r_i = <Q, dQi>_i + beta_i <K, dKw>_i

    dg_t = sum_{j < t <= i} N_ij + sum_{i >= t} r_i + sum_{j < t} <K, dKi>_j + exp(G_C) <S, dS>

dP^T and Y^T are products of their own: no result of a product is ever transposed.
"""

import torch

from longspan.kernels.compiler import tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.linear import hopper
from longspan.kernels.linear.delta_backward import backward_states
from longspan.kernels.linear.delta_tiles import (
    launch_options,
    load_decay_between,
    load_row,
    load_tokens,
    load_total_decay,
    store_tokens,
)

# Element size: (columns of K at a time, of V at a time, warps, stages, registers or left to the compiler).
INPUTS = {2: (64, 128, 4, 1), 4: (32, 32, 4, 1)}


@launched
@triton.jit
def inputs_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, scores_ptr, rows_ptr, states_ptr, values_ptr, d_states_ptr, errors_ptr,
    dq_ptr, dk_ptr, dv_ptr, d_beta_ptr, d_decay_ptr, chunk_first_ptr, chunk_length_ptr,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, d_out_stride_t, d_out_stride_h, scale, H,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, STEP_K: tl.constexpr,
    STEP_V: tl.constexpr, CHUNK: tl.constexpr, GATE: tl.constexpr, D_GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one head: dq, dk [T, H, K], dv [T, H, V], d_beta and, if D_GATE, d_log_decay [T, H]."""
    tile = tl.program_id(0).to(tl.int64)
    chunk, head = tile // H, tile % H
    first, length = tl.load(chunk_first_ptr + chunk).to(tl.int64), tl.load(chunk_length_ptr + chunk)
    token = tl.arange(0, CHUNK)
    row, column = token[:, None], token[None, :]
    square = tile * CHUNK * CHUNK + row * CHUNK + column
    q_ptr += first * q_stride_t + head * q_stride_h
    k_ptr += first * k_stride_t + head * k_stride_h
    v_ptr += first * v_stride_t + head * v_stride_h
    d_out_ptr += first * d_out_stride_t + head * d_out_stride_h
    states_ptr += tile * BLOCK_V * BLOCK_K
    d_states_ptr += tile * BLOCK_V * BLOCK_K
    values_ptr += tile * BLOCK_V * CHUNK
    errors_ptr += tile * BLOCK_V * CHUNK
    dq_ptr += (first * H + head) * K
    dk_ptr += (first * H + head) * K
    dv_ptr += (first * H + head) * V
    beta = load_row(rows_ptr, tile, 0, CHUNK)
    values_at = d_out_ptr, values_ptr, errors_ptr, d_out_stride_t, length
    ALL: tl.constexpr = STEP_V == BLOCK_V  # then what the two loops over V read is read once
    if ALL:
        d_out, values_t, errors = load_values(values_at, 0, STEP_V, CHUNK, V, BLOCK_V)

    # What lives on pairs of tokens: first as [i, j] ...
    d_beta = tl.zeros([CHUNK], dtype=tl.float32)
    d_scores = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    x = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)  # -Y / beta
    kk = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    for start in range(0, BLOCK_V, STEP_V):
        if not ALL:
            d_out, values_t, errors = load_values(values_at, start, STEP_V, CHUNK, V, BLOCK_V)
        value = start + tl.arange(0, STEP_V)
        v = load_tokens(v_ptr, v_stride_t, length, value, CHUNK, V, V == BLOCK_V)
        d_beta += tl.sum(errors.to(tl.float32) * v.to(tl.float32), 1)
        store_tokens(dv_ptr, H * V, length, value, errors.to(tl.float32) * beta[:, None], CHUNK, V)
        d_scores = tl.dot(d_out, values_t, d_scores, input_precision=PRECISION)
        x = tl.dot(errors, values_t, x, input_precision=PRECISION)
    for start in range(0, BLOCK_K, STEP_K):
        k = load_tokens(k_ptr, k_stride_t, length, start + tl.arange(0, STEP_K), CHUNK, K, K == BLOCK_K)
        kk = tl.dot(k, tl.trans(k), kk, input_precision=PRECISION)
    pairs = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    if D_GATE:
        pairs = tl.where(row > column, d_scores * tl.load(scores_ptr + square).to(tl.float32), 0.0)
    if GATE:
        between = load_decay_between(rows_ptr, tile, False, k_ptr.dtype.element_ty == tl.float32, CHUNK)
    else:
        between = tl.where(row >= column, 1.0, 0.0)
    d_scores = (d_scores * between * scale).to(k_ptr.dtype.element_ty)
    x = tl.where(row > column, x * between, 0.0)
    kk *= x
    d_beta -= tl.sum(kk, 1)
    # Row sums minus column sums of the same numbers: their sum over tokens from t on is that of N over j < t <= i.
    pairs -= beta[:, None] * kk
    from_queries = tl.sum(pairs, 1) - tl.sum(pairs, 0)

    # ... then as [j, i].
    d_scores_t = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    x_t = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    for start in range(0, BLOCK_V, STEP_V):
        if not ALL:
            d_out, values_t, errors = load_values(values_at, start, STEP_V, CHUNK, V, BLOCK_V)
        d_scores_t = tl.dot(tl.trans(values_t), tl.trans(d_out), d_scores_t, input_precision=PRECISION)
        x_t = tl.dot(tl.trans(values_t), tl.trans(errors), x_t, input_precision=PRECISION)
    if GATE:
        between = load_decay_between(rows_ptr, tile, True, k_ptr.dtype.element_ty == tl.float32, CHUNK)
    else:
        between = tl.where(row <= column, 1.0, 0.0)
    d_scores_t = (d_scores_t * between * scale).to(k_ptr.dtype.element_ty)
    x_t = tl.where(row < column, x_t * between, 0.0)
    y = -(x * beta[:, None] + x_t * beta[None, :]).to(k_ptr.dtype.element_ty)

    # What takes the states.
    from_keys = tl.zeros([CHUNK], dtype=tl.float32)
    through = 0.0  # <S, dS>
    for key_start in range(0, BLOCK_K, STEP_K):
        key = key_start + tl.arange(0, STEP_K)
        if ALL:
            state, d_state = load_states(states_ptr, d_states_ptr, 0, key, STEP_V, BLOCK_K)
        dk = tl.zeros([CHUNK, STEP_K], dtype=tl.float32)
        dkw = tl.zeros([CHUNK, STEP_K], dtype=tl.float32)
        for start in range(0, BLOCK_V, STEP_V):
            if not ALL:
                state, d_state = load_states(states_ptr, d_states_ptr, start, key, STEP_V, BLOCK_K)
                d_out, values_t, errors = load_values(values_at, start, STEP_V, CHUNK, V, BLOCK_V)
            dk = tl.dot(tl.trans(values_t), d_state, dk, input_precision=PRECISION)
            dkw = tl.dot(errors, state, dkw, input_precision=PRECISION)
            if D_GATE:
                through += tl.sum(state.to(tl.float32) * d_state.to(tl.float32))
        k = load_tokens(k_ptr, k_stride_t, length, key, CHUNK, K, K == BLOCK_K)
        q = load_tokens(q_ptr, q_stride_t, length, key, CHUNK, K, K == BLOCK_K)
        if GATE:
            dk *= load_row(rows_ptr, tile, 4, CHUNK)[:, None]
            dkw *= load_row(rows_ptr, tile, 1, CHUNK)[:, None]
        k_dkw = tl.sum(k.to(tl.float32) * dkw, 1)
        d_beta -= k_dkw
        if D_GATE:
            from_queries -= beta * k_dkw
            from_keys += tl.sum(k.to(tl.float32) * dk, 1)
        dk -= beta[:, None] * dkw
        dk = tl.dot(d_scores_t, q, dk, input_precision=PRECISION)
        dk = tl.dot(y, k, dk, input_precision=PRECISION)
        store_tokens(dk_ptr, H * K, length, key, dk, CHUNK, K)

        dq = tl.zeros([CHUNK, STEP_K], dtype=tl.float32)
        for start in range(0, BLOCK_V, STEP_V):
            if not ALL:
                state, d_state = load_states(states_ptr, d_states_ptr, start, key, STEP_V, BLOCK_K)
                d_out, values_t, errors = load_values(values_at, start, STEP_V, CHUNK, V, BLOCK_V)
            dq = tl.dot(d_out, state, dq, input_precision=PRECISION)
        dq *= scale
        if GATE:
            dq *= load_row(rows_ptr, tile, 1, CHUNK)[:, None]
        if D_GATE:
            from_queries += tl.sum(q.to(tl.float32) * dq, 1)
        dq = tl.dot(d_scores, k, dq, input_precision=PRECISION)
        store_tokens(dq_ptr, H * K, length, key, dq, CHUNK, K)

    sums_at, inside = (first + token) * H + head, token < length
    tl.store(d_beta_ptr + sums_at, d_beta, mask=inside)
    if D_GATE:
        if GATE:
            through *= load_total_decay(rows_ptr, tile, CHUNK)
        from_queries += tl.where(token == CHUNK - 1, through, 0.0)
        d_decay = tl.cumsum(from_queries, 0, reverse=True) + (tl.cumsum(from_keys, 0) - from_keys)
        tl.store(d_decay_ptr + sums_at, d_decay, mask=inside)


@triton.jit
def load_values(
    values_at, start, STEP_V: tl.constexpr, CHUNK: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """dO [CHUNK, STEP_V], V'^T [STEP_V, CHUNK] and E [CHUNK, STEP_V] of the columns of V from `start` on."""
    d_out_ptr, values_ptr, errors_ptr, stride, length = values_at
    value, token = start + tl.arange(0, STEP_V), tl.arange(0, CHUNK)
    d_out = load_tokens(d_out_ptr, stride, length, value, CHUNK, V, V == BLOCK_V)
    values_t = tl.load(values_ptr + (value[:, None] * CHUNK + token[None, :]))
    return d_out, values_t, tl.load(errors_ptr + (token[:, None] * BLOCK_V + value[None, :]))


@triton.jit
def load_states(states_ptr, d_states_ptr, start, key, STEP_V: tl.constexpr, BLOCK_K: tl.constexpr):
    """S^T and dS^T [STEP_V, keys] of the columns of V from `start` on."""
    at = (start + tl.arange(0, STEP_V))[:, None] * BLOCK_K + key[None, :]
    return tl.load(states_ptr + at), tl.load(d_states_ptr + at)


def input_gradients(call, prepared, d_out, entering, exits, gate: bool):
    """dq, dk, dv in the dtype of the inputs; d_beta and, if `gate`, d_log_decay (else None), fp32 [T, H]. entering: S^T
    and V'^T of every chunk; exits: [N, H, K, V], gradients of the states leaving the splits."""
    q, k, v = call.q, call.k, call.v
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    d_beta = q.new_empty(q.shape[:2], dtype=torch.float32)
    d_decay = torch.empty_like(d_beta) if gate else None
    results = dq, dk, dv, d_beta, d_decay
    if call.num_tiles and hopper.takes(call):
        from longspan.kernels.linear.hopper import reverse

        reverse.launch(call, prepared, d_out, entering, exits, *results)
        return results
    leaving = backward_states(call, prepared, d_out, exits)
    if call.num_tiles:
        block_k, block_v = call.widths
        step_k, step_v, *options = INPUTS[q.element_size()]
        inputs_kernel[(call.num_tiles,)](
            q, k, v, d_out, prepared.scores, prepared.rows, *entering, *leaving, *results, *call.chunks,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *d_out.stride()[:2], call.scale, call.heads,
            **call.constants, STEP_K=min(step_k, block_k), STEP_V=min(step_v, block_v),
            D_GATE=gate, **launch_options(*options),
        )  # fmt: skip
    return results
