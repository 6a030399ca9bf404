"""The delta rule's recurrence backwards in time. With dS the gradient of the state that leaves a chunk:

    dV' = scale ((Q K^T) . Lambda)^T dO + exp(G_C - G) . (K dS)
    dS <- exp(G_C) dS + scale (exp(G) . Q)^T dO - W^T dV'

The first term of dV' is local to a chunk (`local_kernel`); the sweep (`backward_kernel`) carries dS transposed, as the
forward sweep does S, and for the same reason: no result of a product is ever transposed.
"""

import torch

from longspan.kernels.compiler import tl, triton
from longspan.kernels.linear.delta_tiles import (
    CHUNK,
    count_remembered,
    load_decay,
    load_decay_between,
    load_tokens,
    load_tokens_transposed,
    load_total_decay,
)

# Element size, padded max(K, V): warps.
LOCAL_WARPS = {2: {16: 4, 32: 4, 64: 4, 128: 4, 256: 8}, 4: {16: 4, 32: 4, 64: 4, 128: 8}}
# Mode, element size, padded K: (columns of dS per program, warps, stages).
SWEEP = {
    "sum": {
        2: {16: (64, 4, 2), 32: (64, 4, 2), 64: (64, 4, 2), 128: (128, 8, 2), 256: (32, 8, 2)},
        4: {16: (32, 4, 2), 32: (32, 4, 2), 64: (32, 4, 2), 128: (16, 8, 2)},
    },
    "states": {
        2: {16: (64, 4, 2), 32: (64, 4, 2), 64: (64, 4, 2), 128: (128, 8, 2), 256: (32, 8, 2)},
        4: {16: (32, 4, 2), 32: (32, 4, 2), 64: (32, 4, 2), 128: (16, 8, 2)},
    },
}


@triton.jit
def local_kernel(
    q_ptr, k_ptr, d_out_ptr, decay_ptr, d_values_ptr, chunk_first_ptr, chunk_length_ptr,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, d_out_stride_t, d_out_stride_h, scale, H,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one head: the first term of dV', transposed -> d_values [tile, V, CHUNK]."""
    tile = tl.program_id(0).to(tl.int64)
    chunk, head = tile // H, tile % H
    first, length = tl.load(chunk_first_ptr + chunk).to(tl.int64), tl.load(chunk_length_ptr + chunk)
    token, key, value = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    q_ptr += first * q_stride_t + head * q_stride_h
    k_ptr += first * k_stride_t + head * k_stride_h
    d_out_ptr += first * d_out_stride_t + head * d_out_stride_h
    q = load_tokens(q_ptr, q_stride_t, length, key, CHUNK, K, K == BLOCK_K)
    k = load_tokens(k_ptr, k_stride_t, length, key, CHUNK, K, K == BLOCK_K)
    d_out = load_tokens(d_out_ptr, d_out_stride_t, length, value, CHUNK, V, V == BLOCK_V)
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale  # [key, query]
    if GATE:
        scores *= load_decay_between(decay_ptr, tile, True, k.dtype == tl.float32, CHUNK)
    else:
        scores = tl.where(token[:, None] <= token[None, :], scores, 0.0)
    d_values = tl.dot(scores.to(k.dtype), d_out, input_precision=PRECISION)
    d_values_at = d_values_ptr + tile * BLOCK_V * CHUNK + token[:, None] + value[None, :] * CHUNK
    tl.store(d_values_at, d_values.to(d_values_ptr.dtype.element_ty))


@triton.jit
def backward_kernel(
    q_ptr, k_ptr, d_out_ptr, w_ptr, d_values_ptr, decay_ptr, exit_ptr, d_states_ptr, sum_ptr,
    list_ptr, first_ptr, length_ptr, split_chunk_ptr, exit_row_ptr, sum_row_ptr,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, d_out_stride_t, d_out_stride_h, scale, H,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, MODE: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """w: -W of every tile; d_values: what `local_kernel` wrote. Grid: (splits * H * blocks). MODE:

    "sum"     the gradient of the state that enters a split from the split's own outputs -> sum [row, H, K, V]
    "states"  the gradient of the state that leaves every chunk, dS^T -> d_states [tile, V, K], and all of dV'^T in
              the place of its first term
    """
    blocks: tl.constexpr = BLOCK_V // BLOCK
    program = tl.program_id(0)
    block, head, split = program % blocks, (program // blocks % H).to(tl.int64), program // blocks // H
    if MODE == "sum":
        split = tl.load(list_ptr + split)
    first, length = tl.load(first_ptr + split).to(tl.int64), tl.load(length_ptr + split)
    chunks = tl.cdiv(length, CHUNK)
    tile = tl.load(split_chunk_ptr + split).to(tl.int64) * H + head
    if GATE and MODE == "sum":  # what comes later cannot be felt where the split starts
        chunks = tl.minimum(count_remembered(decay_ptr, tile, H, chunks, CHUNK) + 1, chunks)
    tile += (chunks - 1) * H
    token, key, column = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K), block * BLOCK + tl.arange(0, BLOCK)
    inside = (column < V)[:, None] & (key < K)[None, :]
    q_ptr += head * q_stride_h
    k_ptr += head * k_stride_h
    d_out_ptr += head * d_out_stride_h

    if MODE == "sum":
        state = tl.zeros([BLOCK, BLOCK_K], dtype=tl.float32)
    else:
        exit_row = tl.load(exit_row_ptr + split).to(tl.int64)
        exit_at = exit_ptr + (exit_row * H + head) * K * V + column[:, None] + key[None, :] * V
        state = tl.load(exit_at, mask=inside & (exit_row >= 0), other=0.0)

    for n in range(0, chunks):
        passed = (chunks - 1 - n) * CHUNK
        start, left = first + passed, length - passed
        k = load_tokens(k_ptr + start * k_stride_t, k_stride_t, left, key, CHUNK, K, K == BLOCK_K)
        q = load_tokens(q_ptr + start * q_stride_t, q_stride_t, left, key, CHUNK, K, K == BLOCK_K)
        d_out = load_tokens_transposed(
            d_out_ptr + start * d_out_stride_t, d_out_stride_t, left, column, CHUNK, V, V == BLOCK_V
        )
        w = tl.load(w_ptr + tile * CHUNK * BLOCK_K + token[:, None] * BLOCK_K + key[None, :])
        d_values_at = d_values_ptr + tile * CHUNK * BLOCK_V + column[:, None] * CHUNK + token[None, :]
        d_values = tl.load(d_values_at).to(tl.float32)
        if GATE:
            total = load_total_decay(decay_ptr, tile, CHUNK)  # early: scalars are not fetched ahead

        leaving = state.to(k.dtype)
        weight = tl.full([1, CHUNK], 1.0, tl.float32) * scale
        if GATE:
            weight *= load_decay(decay_ptr, tile, 2, CHUNK)[None, :]
            state *= total
            to_end = load_decay(decay_ptr, tile, 3, CHUNK)
            d_values += tl.dot(leaving, tl.trans(k), input_precision=PRECISION) * to_end[None, :]
        else:
            d_values = tl.dot(leaving, tl.trans(k), d_values, input_precision=PRECISION)
        if MODE == "states":
            tl.store(d_states_ptr + tile * BLOCK_V * BLOCK_K + column[:, None] * BLOCK_K + key[None, :], leaving)
            tl.store(d_values_at, d_values.to(k.dtype))
        state = tl.dot((d_out * weight).to(k.dtype), q, state, input_precision=PRECISION)
        state = tl.dot(d_values.to(k.dtype), w, state, input_precision=PRECISION)
        tile -= H

    if MODE == "sum":
        row = tl.load(sum_row_ptr + split).to(tl.int64) * H + head
        tl.store(sum_ptr + row * K * V + key[None, :] * V + column[:, None], state, mask=inside)


def local_gradients(call, wy, d_out):
    """The first term of dV'^T [tiles, V, C]."""
    d_values = call.scratch(call.widths[1], CHUNK)
    if call.num_tiles:
        local_kernel[(call.num_tiles,)](
            call.q, call.k, d_out, wy[3], d_values, *call.chunks,
            *call.q.stride()[:2], *call.k.stride()[:2], *d_out.stride()[:2], call.scale, call.heads,
            **call.constants, num_warps=call.warps(LOCAL_WARPS),
        )  # fmt: skip
    return d_values


def backward_sums(call, wy, d_out, d_values):
    """Gradients of the states entering the splits of `splits.backward`, from their own outputs: [num_sums, H, K, V]."""
    sums = call.q.new_empty(call.splits.num_sums, *call.k.shape[1:], call.v.shape[2], dtype=torch.float32)
    splits = call.splits.backward.splits
    _launch(call, wy, d_out, d_values, "sum", len(splits), sums=sums, split_list=splits)
    return sums


def backward_states(call, wy, d_out, d_values, exits):
    """dS^T leaving each chunk [tiles, V, K]; completes d_values to dV'^T. exits: [N, H, K, V], leaving the splits."""
    block_k, block_v = call.widths
    d_states = call.scratch(block_v, block_k)
    _launch(call, wy, d_out, d_values, "states", call.splits.num_splits, exits=exits, d_states=d_states)
    return d_states


def _launch(call, wy, d_out, d_values, mode, num_splits, *, exits=None, d_states=None, sums=None, split_list=None):
    splits, block_v = call.splits, call.widths[1]
    block, options = call.columns(SWEEP[mode], block_v)
    if num_splits:
        backward_kernel[(num_splits * call.heads * (block_v // block),)](
            call.q, call.k, d_out, wy[0], d_values, wy[3], exits, d_states, sums,
            split_list, splits.first, splits.length, splits.split_chunk, splits.backward.row, splits.sum_row,
            *call.q.stride()[:2], *call.k.stride()[:2], *d_out.stride()[:2], call.scale, call.heads,
            **call.constants, BLOCK=block, MODE=mode, **options,
        )  # fmt: skip
