"""The delta rule's recurrence backwards in time. With dS the gradient of the state that leaves a chunk:

    E = T^T (P^T dO + exp(G_C - G) K dS)      dS <- exp(G_C) dS + scale (exp(G) Q)^T dO - (beta exp(G) K)^T E

with T and P of `delta_prepare`; E is the gradient of beta (V - exp(G) K S). With a decay per key channel the decays are
in the operands already (`delta_tiles.Call`). dS is carried transposed, as the forward
sweep carries S, and for the same reason: no result of a product is ever transposed.
"""

import torch

from longspan.kernels.compiler import tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.linear import hopper
from longspan.kernels.linear.delta_tiles import (
    CHUNK,
    count_remembered,
    load_channel_decays,
    load_rows,
    load_tokens,
    load_tokens_transposed,
    load_total_decay,
)

# Element size, padded K: (columns of dS per program, warps, stages).
SWEEP = {
    2: {16: (64, 4, 2), 32: (64, 4, 2), 64: (64, 4, 2), 128: (128, 8, 3), 256: (32, 8, 2)},
    (2, "channel"): {128: (128, 8, 2)},
    4: {16: (32, 4, 2), 32: (32, 4, 2), 64: (32, 4, 2), 128: (16, 8, 2)},
}


@launched
@triton.jit
def backward_kernel(
    q_ptr, k_ptr, d_out_ptr, write_ptr, total_ptr, inverse_ptr, scores_ptr, rows_ptr, exit_ptr, d_states_ptr,
    errors_ptr, sum_ptr, list_ptr, first_ptr, length_ptr, split_chunk_ptr, exit_row_ptr, sum_row_ptr,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, d_out_stride_t, d_out_stride_h, scale, H,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, MODE: tl.constexpr, GATE: tl.constexpr, CHANNEL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """inverse, scores, rows: `Prepared`. Grid: (splits * H * blocks). MODE:

    "sum"     the gradient of the state that enters a split from the split's own outputs -> sum [row, H, K, V]
    "states"  the gradient of the state that leaves every chunk, dS^T -> d_states [tile, V, K], and E -> errors
              [tile, C, V]; with a decay per key channel beta E, which is dv, -> errors [T, H, V]
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
        chunks = tl.minimum(count_remembered(rows_ptr, tile, H, chunks, CHUNK) + 1, chunks)
    tile += (chunks - 1) * H
    token, key, column = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K), block * BLOCK + tl.arange(0, BLOCK)
    inside = (column < V)[:, None] & (key < K)[None, :]
    q_ptr += head * q_stride_h
    k_ptr += head * k_stride_h
    if CHANNEL:
        write_ptr += head * k_stride_h
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
        square = tile * CHUNK * CHUNK + token[:, None] * CHUNK + token[None, :]
        inverse, scores = tl.load(inverse_ptr + square), tl.load(scores_ptr + square)
        weight = tl.full([CHUNK], 1.0, tl.float32) * scale
        leaving = state.to(k.dtype)
        if CHANNEL:
            write = load_tokens(write_ptr + start * k_stride_t, k_stride_t, left, key, CHUNK, K, K == BLOCK_K)
            d_values = tl.dot(leaving, tl.trans(write), input_precision=PRECISION)
            state *= load_channel_decays(total_ptr, tile, key, BLOCK_K)[None, :]
        else:
            d_values = tl.dot(leaving, tl.trans(k), input_precision=PRECISION)
            if GATE:
                state *= load_total_decay(rows_ptr, tile, CHUNK)
                to_end, _, _ = load_rows(rows_ptr, tile, 4, CHUNK)
                d_values *= to_end[None, :]
        d_values = tl.dot(d_out, scores, d_values, input_precision=PRECISION)
        errors = tl.dot(d_values.to(k.dtype), inverse, input_precision=PRECISION)
        read, from_start, decayed_read = load_rows(rows_ptr, tile, 0, CHUNK)
        if MODE == "states":
            tl.store(d_states_ptr + tile * BLOCK_V * BLOCK_K + column[:, None] * BLOCK_K + key[None, :], leaving)
            if CHANNEL:
                dv_at = errors_ptr + (start * H + head) * V + (column[:, None] + token[None, :] * (H * V))
                dv_mask = (column < V)[:, None] & (token < left)[None, :]
                tl.store(dv_at, (errors * read[None, :]).to(k.dtype), mask=dv_mask)
            else:
                errors_at = errors_ptr + tile * BLOCK_V * CHUNK + column[:, None] + token[None, :] * BLOCK_V
                tl.store(errors_at, errors.to(k.dtype))
        if GATE and not CHANNEL:
            read = decayed_read
            weight *= from_start
        state = tl.dot((d_out * weight[None, :]).to(k.dtype), q, state, input_precision=PRECISION)
        state = tl.dot((errors * -read[None, :]).to(k.dtype), k, state, input_precision=PRECISION)
        tile -= H

    if MODE == "sum":
        row = tl.load(sum_row_ptr + split).to(tl.int64) * H + head
        tl.store(sum_ptr + row * K * V + key[None, :] * V + column[:, None], state, mask=inside)


def backward_sums(call, prepared, d_out):
    """Gradients of the states entering the splits of `splits.backward`, from their own outputs: [num_sums, H, K, V]."""
    sums = call.q.new_empty(call.splits.num_sums, *call.k.shape[1:], call.v.shape[2], dtype=torch.float32)
    splits = call.splits.backward.splits
    _launch("sum", call, prepared, d_out, len(splits), sums=sums, split_list=splits)
    return sums


def backward_states(call, prepared, d_out, exits):
    """dS^T leaving each chunk [tiles, V, K] and E [tiles, C, V], or with a decay per key channel dv, beta E [T, H, V].
    exits: [N, H, K, V], leaving the splits."""
    block_k, block_v = call.widths
    errors = call.scratch(CHUNK, block_v) if call.write is None else call.v.new_empty(call.v.shape)
    states = call.scratch(block_v, block_k), errors
    _launch("states", call, prepared, d_out, call.splits.num_splits, exits=exits, states=states)
    return states


def _launch(mode, call, prepared, d_out, num_splits, *, exits=None, states=(None,) * 2, sums=None, split_list=None):
    q, k, splits, block_v = call.q, call.k, call.splits, call.widths[1]
    block, options = call.columns(SWEEP, block_v)
    if num_splits and hopper.takes(call):
        from longspan.kernels.linear.hopper import backward

        backward.launch(mode, call, prepared, d_out, num_splits, exits, states, sums, split_list)
    elif num_splits:
        backward_kernel[(num_splits * call.heads * (block_v // block),)](
            q, k, d_out, call.write, call.total, *prepared, exits, *states, sums,
            split_list, splits.first, splits.length, splits.split_chunk, splits.backward.row, splits.sum_row,
            *q.stride()[:2], *k.stride()[:2], *d_out.stride()[:2], call.scale, call.heads,
            **call.constants, BLOCK=block, MODE=mode, CHANNEL=call.write is not None, **options,
        )  # fmt: skip
