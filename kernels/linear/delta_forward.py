"""The forward recurrence of the delta rule through a split, chunk by chunk, with T and P of `delta_prepare`:

    V' = T beta (V - exp(G) K S)     O = scale exp(G) (Q S) + P V'     S <- exp(G_C) S + (exp(G_C - G) K)^T V'

With a decay per key channel the decays are in the operands already (`delta_tiles.Call`); exp(G_C) scales rows of S.
A program owns a block of columns of S and carries it transposed, [BLOCK, K]: then every product has the carried state
or V'^T on its left and a tile as it lies in memory on its right, and neither is ever transposed.
"""

import torch

from longspan.kernels.compiler import cdiv, next_power_of_2, tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.linear import hopper
from longspan.kernels.linear.delta_tiles import (
    CHUNK,
    count_remembered,
    load_channel_decays,
    load_rows,
    load_tokens,
    load_total_decay,
)

# Mode, element size, padded K: (columns of S per program, of S and M together for "sum", warps, stages, registers).
CONFIGS = {
    "sum": {
        2: {16: (64, 4, 3), 32: (64, 4, 3), 64: (64, 4, 3), 128: (128, 8, 3), 256: (64, 8, 2)},
        4: {16: (32, 4, 2), 32: (32, 4, 2), 64: (32, 4, 2), 128: (32, 8, 2)},
    },
    "states": {
        2: {16: (64, 4, 3), 32: (64, 4, 3), 64: (64, 4, 3), 128: (128, 8, 3), 256: (32, 8, 2)},
        4: {16: (32, 4, 2), 32: (32, 4, 2), 64: (32, 4, 2), 128: (32, 8, 2)},
    },
    "output": {
        2: {16: (64, 4, 2), 32: (64, 4, 2), 64: (64, 4, 2), 128: (64, 4, 2), 256: (32, 8, 1)},
        (2, "channel"): {128: (128, 8, 3)},
        4: {16: (32, 4, 2), 32: (32, 4, 2), 64: (32, 4, 2), 128: (32, 8, 1)},
    },
}


@launched
@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, write_ptr, total_ptr, inverse_ptr, scores_ptr, rows_ptr, entry_ptr, out_ptr,
    states_ptr, values_ptr, sum_ptr, transition_ptr,
    summed_ptr, needed_ptr, first_ptr, length_ptr, split_chunk_ptr, entry_row_ptr, sum_row_ptr,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, scale, H,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, MODE: tl.constexpr, GATE: tl.constexpr, CHANNEL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """inverse, scores, rows: `Prepared`. Grid: (splits * H * blocks). MODE:

    "sum"     the state that a split leaves when it starts from zero -> sum [row, H, K, V], and M, which maps the state
              that enters to its share of the one that leaves -> transition [row, H, K, K], columns of which start from
              those of the identity and run with V = 0. What is not needed (`DeltaTables.needed`) is written as zero.
              What is forgotten by the end of the split is left out, and M of a split that forgets everything is zero.
    "states"  the state entering every chunk, S^T -> states [tile, V, K], and V'^T -> values [tile, V, C]
    "output"  O -> out [T, H, V]
    """
    columns: tl.constexpr = BLOCK_V + BLOCK_K if MODE == "sum" else BLOCK_V
    blocks: tl.constexpr = (columns + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    block, head, split = program % blocks, (program // blocks % H).to(tl.int64), program // blocks // H
    if MODE == "sum":
        split = tl.load(summed_ptr + split)
    first, length = tl.load(first_ptr + split).to(tl.int64), tl.load(length_ptr + split)
    tile = tl.load(split_chunk_ptr + split).to(tl.int64) * H + head
    token, key, column = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K), block * BLOCK + tl.arange(0, BLOCK)
    inside = (column < V)[:, None] & (key < K)[None, :]
    begin, chunks = 0, tl.cdiv(length, CHUNK)
    q_ptr += head * q_stride_h
    k_ptr += head * k_stride_h
    if CHANNEL:
        write_ptr += head * k_stride_h
    v_ptr += head * v_stride_h

    if MODE == "sum":
        # The columns of M follow those of S; as L2 is the limit, programs that take both are the fastest.
        column_m = column - BLOCK_V
        needed = tl.load(needed_ptr + split)
        if GATE:
            remembered = count_remembered(rows_ptr, tile + (chunks - 1) * H, -H, chunks, CHUNK)
            needed = tl.minimum(needed, tl.where(remembered == chunks, 2, 1))
            begin = tl.maximum(chunks - 1 - remembered, 0)
            tile += begin * H
        chunks = tl.where(needed > tl.where(block * BLOCK >= BLOCK_V, 1, 0), chunks, 0)
        state = tl.where((needed > 1) & (column_m[:, None] == key[None, :]), 1.0, 0.0)
    else:
        entry_row = tl.load(entry_row_ptr + split).to(tl.int64)
        entry_at = entry_ptr + (entry_row * H + head) * K * V + column[:, None] + key[None, :] * V
        state = tl.load(entry_at, mask=inside & (entry_row >= 0), other=0.0)

    for n in range(begin, chunks):
        start, left = first + n * CHUNK, length - n * CHUNK
        k = load_tokens(k_ptr + start * k_stride_t, k_stride_t, left, key, CHUNK, K, K == BLOCK_K)
        # Columns of M see V = 0: they are beyond those of V.
        v = tl.trans(load_tokens(v_ptr + start * v_stride_t, v_stride_t, left, column, CHUNK, V, V == columns))
        square = tile * CHUNK * CHUNK + token[:, None] * CHUNK + token[None, :]
        inverse = tl.load(inverse_ptr + square)
        if CHANNEL:
            write = load_tokens(write_ptr + start * k_stride_t, k_stride_t, left, key, CHUNK, K, K == BLOCK_K)
            total = load_channel_decays(total_ptr, tile, key, BLOCK_K)[None, :]
        elif GATE:
            total = load_total_decay(rows_ptr, tile, CHUNK)  # early: scalars are not fetched ahead
        entering = state.to(k.dtype)
        read = tl.dot(entering, tl.trans(k), input_precision=PRECISION)
        beta, from_start, _ = load_rows(rows_ptr, tile, 0, CHUNK)
        if GATE and not CHANNEL:
            read *= from_start[None, :]
        right = (v.to(tl.float32) - read) * beta[None, :]
        values = tl.dot(right.to(k.dtype), tl.trans(inverse), input_precision=PRECISION)
        if MODE == "states":
            tl.store(states_ptr + tile * BLOCK_V * BLOCK_K + column[:, None] * BLOCK_K + key[None, :], entering)
            values_at = values_ptr + tile * BLOCK_V * CHUNK + column[:, None] * CHUNK + token[None, :]
            tl.store(values_at, values.to(k.dtype))
        if MODE == "output":
            q = load_tokens(q_ptr + start * q_stride_t, q_stride_t, left, key, CHUNK, K, K == BLOCK_K)
            scores = tl.load(scores_ptr + square)
            out = tl.dot(entering, tl.trans(q), input_precision=PRECISION) * scale
            if GATE and not CHANNEL:
                out *= from_start[None, :]
            out = tl.dot(values.to(k.dtype), tl.trans(scores), out, input_precision=PRECISION)
            out_at = out_ptr + (start * H + head) * V + (token[None, :] * (H * V) + column[:, None])
            written = (token < left)[None, :] & (column < V)[:, None]
            tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=written)
        if GATE:
            state *= total
        if CHANNEL:
            state = tl.dot(values.to(k.dtype), write, state, input_precision=PRECISION)
        else:
            if GATE:
                to_end, _, _ = load_rows(rows_ptr, tile, 4, CHUNK)
                values *= to_end[None, :]
            state = tl.dot(values.to(k.dtype), k, state, input_precision=PRECISION)
        tile += H

    if MODE == "sum":
        row = tl.load(sum_row_ptr + split).to(tl.int64) * H + head
        tl.store(sum_ptr + row * K * V + key[None, :] * V + column[:, None], state, mask=inside)
        inside = ((column_m >= 0) & (column_m < K))[:, None] & (key < K)[None, :]
        tl.store(transition_ptr + row * K * K + key[None, :] * K + column_m[:, None], state, mask=inside)


def forward_sums(call, prepared, tables):
    """(states [num_sums, H, K, V], transitions [num_sums, H, K, K]) as far as `tables`, DeltaTables, says."""
    _, heads, key_size = call.k.shape
    states = call.q.new_empty(call.splits.num_sums, heads, key_size, call.v.shape[2], dtype=torch.float32)
    transitions = states.new_empty(call.splits.num_sums, heads, key_size, key_size)
    _launch("sum", call, prepared, len(tables.summed), tables=tables, sums=(states, transitions))
    return states, transitions


def forward_states(call, prepared, entries):
    """S^T entering each chunk [tiles, V, K] and V'^T [tiles, V, C]. entries: [N, H, K, V], S entering the splits."""
    block_k, block_v = call.widths
    states = call.scratch(block_v, block_k), call.scratch(block_v, CHUNK)
    _launch("states", call, prepared, call.splits.num_splits, entries=entries, states=states)
    return states


def forward_output(call, prepared, entries, dtype):
    """O [T, H, V]. entries: [N, H, K, V], S entering the splits."""
    out = call.v.new_empty(call.v.shape, dtype=dtype)
    _launch("output", call, prepared, call.splits.num_splits, entries=entries, out=out)
    return out


def _launch(
    mode, call, prepared, num_splits, *, tables=None, entries=None, out=None, states=(None,) * 2, sums=(None,) * 2
):
    q, k, v = call.q, call.k, call.v
    splits, (block_k, block_v) = call.splits, call.widths
    columns = block_v + block_k if mode == "sum" else block_v
    block, options = call.columns(CONFIGS[mode], next_power_of_2(columns))
    if num_splits and hopper.takes(call):
        from longspan.kernels.linear.hopper import forward

        forward.launch(mode, call, prepared, num_splits, tables, entries, out, states, sums)
    elif num_splits:
        forward_kernel[(num_splits * call.heads * cdiv(columns, block),)](
            q, k, v, call.write, call.total, *prepared, entries, out, *states, *sums,
            *((tables.summed, tables.needed) if tables else (None, None)),
            splits.first, splits.length, splits.split_chunk, splits.forward.row, splits.sum_row,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], call.scale, call.heads,
            **call.constants, BLOCK=block, MODE=mode, CHANNEL=call.write is not None, **options,
        )  # fmt: skip
