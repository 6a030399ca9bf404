"""The forward recurrence of the delta rule through a split, chunk by chunk, with the WY form of `delta_wy`:

    V' = U - W S      O = scale [ exp(G) . (Q S) + ((Q K^T) . Lambda) V' ]      S <- exp(G_C) S + (exp(G_C - G) . K)^T V'

A program owns a block of columns of S and carries it transposed, [BLOCK, K]: then every product has the carried state
or V'^T on its left and a tile as it lies in memory on its right, and neither is ever transposed.
"""

import triton
import triton.language as tl

from longspan.kernels.linear.delta_tiles import (
    decay_between_transposed,
    decay_to_end,
    load_decay,
    load_tokens,
)

# Per mode and padded K: (columns of S per program, warps, stages), for 16-bit inputs and for fp32.
CONFIGS = {
    "sum": {16: (64, 4, 3), 32: (64, 4, 3), 64: (64, 4, 3), 128: (64, 4, 3), 256: (64, 4, 2)},
    "states": {16: (64, 4, 3), 32: (64, 4, 3), 64: (64, 4, 3), 128: (64, 4, 3), 256: (64, 4, 2)},
    "output": {16: (64, 4, 2), 32: (64, 4, 2), 64: (64, 4, 2), 128: (64, 4, 2), 256: (64, 4, 2)},
}


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, w_ptr, u_ptr, decay_ptr, entry_ptr, out_ptr, states_ptr, sum_ptr, transition_ptr,
    list_ptr, first_ptr, length_ptr, split_chunk_ptr, entry_row_ptr, sum_row_ptr,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, scale, H,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, MODE: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """w, u: -W and U^T of every tile. Grid: (splits * H * blocks). MODE:

    "sum"     the state that a split leaves when it starts from zero -> sum [row, H, K, V], and M, which maps the state
              that enters to its share of the one that leaves -> transition [row, H, K, K], columns of which start from
              those of the identity and run with U = 0. Zero is written for an M that only ever meets a zero state.
    "states"  the state entering every chunk, S^T -> states [tile, V, K], and V'^T in the place of U^T
    "output"  O -> out [T, H, V]
    """
    blocks_v: tl.constexpr = BLOCK_V // BLOCK
    blocks: tl.constexpr = blocks_v + BLOCK_K // BLOCK if MODE == "sum" else blocks_v
    program = tl.program_id(0)
    block, head, split = program % blocks, (program // blocks % H).to(tl.int64), program // blocks // H
    if MODE == "sum":
        split = tl.load(list_ptr + split)
    first, length = tl.load(first_ptr + split).to(tl.int64), tl.load(length_ptr + split)
    tile = tl.load(split_chunk_ptr + split).to(tl.int64) * H + head
    entry_row = tl.load(entry_row_ptr + split).to(tl.int64)
    token, key, column = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K), block % blocks_v * BLOCK + tl.arange(0, BLOCK)
    inside = (column < V)[:, None] & (key < K)[None, :]
    chunks = tl.cdiv(length, CHUNK)

    of_identity = False
    if MODE == "sum":
        of_identity = block >= blocks_v
        if of_identity:
            column = (block - blocks_v) * BLOCK + tl.arange(0, BLOCK)
            if entry_row < 0:
                chunks = 0
        state = tl.where(of_identity & (entry_row >= 0) & (column[:, None] == key[None, :]), 1.0, 0.0)
    else:
        entry_at = entry_ptr + (entry_row * H + head) * K * V + column[:, None] + key[None, :] * V
        state = tl.load(entry_at, mask=inside & (entry_row >= 0), other=0.0)

    for n in range(0, chunks):
        start = first + n * CHUNK
        k = load_tokens(k_ptr + start * k_stride_t + head * k_stride_h, k_stride_t, length - n * CHUNK, key, CHUNK, K, K == BLOCK_K)
        w = tl.load(w_ptr + tile * CHUNK * BLOCK_K + token[:, None] * BLOCK_K + key[None, :])
        u_at = u_ptr + tile * CHUNK * BLOCK_V + column[:, None] * CHUNK + token[None, :]
        if MODE == "sum":
            u = tl.load(u_at, mask=tl.full([BLOCK, CHUNK], True, tl.int1) & ~of_identity, other=0.0)
        else:
            u = tl.load(u_at)
        if GATE:
            high, low = load_decay(decay_ptr, tile, CHUNK)
            to_end, total = decay_to_end(decay_ptr, tile, high, low, CHUNK)

        entering = state.to(k.dtype)
        values = tl.dot(entering, tl.trans(w), u.to(tl.float32), input_precision=PRECISION)
        if MODE == "states":
            tl.store(states_ptr + tile * BLOCK_V * BLOCK_K + column[:, None] * BLOCK_K + key[None, :], entering)
            tl.store(u_at, values.to(u.dtype))
        if MODE == "output":
            q = load_tokens(q_ptr + start * q_stride_t + head * q_stride_h, q_stride_t, length - n * CHUNK, key, CHUNK, K, K == BLOCK_K)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [key, query]
            out = tl.dot(entering, tl.trans(q), input_precision=PRECISION)
            if GATE:
                scores *= decay_between_transposed(high, low, CHUNK)
                out *= tl.exp(high)[None, :]
            else:
                scores = tl.where(token[:, None] <= token[None, :], scores, 0.0)
            out = tl.dot(values.to(k.dtype), scores.to(k.dtype), out, input_precision=PRECISION)
            out_at = out_ptr + ((start + token) * H + head)[None, :] * V + column[:, None]
            written = (token < length - n * CHUNK)[None, :] & (column < V)[:, None]
            tl.store(out_at, (out * scale).to(out_ptr.dtype.element_ty), mask=written)
        if GATE:
            values *= to_end[None, :]
            state *= total
        state = tl.dot(values.to(k.dtype), k, state, input_precision=PRECISION)
        tile += H

    if MODE == "sum":
        row = tl.load(sum_row_ptr + split).to(tl.int64) * H + head
        if of_identity:
            at = transition_ptr + row * K * K + key[None, :] * K + column[:, None]
            tl.store(at, state, mask=(column < K)[:, None] & (key < K)[None, :])
        else:
            tl.store(sum_ptr + row * K * V + key[None, :] * V + column[:, None], state, mask=inside)
