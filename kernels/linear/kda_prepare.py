"""What every chunk of KDA, the delta rule with a decay per key channel, needs of its own tokens:

    A = tril_-1(beta_i sum_c k_ic k_jc exp(G_ic - G_jc))     T = (I + A)^-1     P = scale tril(sum_c q_ic k_jc exp(..))
    scale Q . exp(G)     K . exp(G)     K . exp(G_C - G)

All are kept for the backward pass. How the decay between two tokens becomes a product of matrices: `channel_decay`.
On Hopper GPUs `hopper.kda_prepare` makes those of chunks that are mild in all channels.
"""

from dataclasses import replace

import torch

from longspan.kernels.compiler import tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.linear import hopper
from longspan.kernels.linear.channel_decay import (
    LOG2E,
    climb,
    is_mild,
    is_second,
    load_rows,
    meets,
    store_rows,
)
from longspan.kernels.linear.delta_prepare import MERGES, SUBSTITUTED, invert_unit_lower
from longspan.kernels.linear.delta_tiles import CHUNK

SMALLEST_BETA = {2: 2.0**-20, 4: 2.0**-40}  # by element size, of |beta|, by whose square gradients are divided
# Element size, padded K: (channels per step, per step where gates are strong, warps, registers).
PREPARE = {
    2: {16: (16, 16, 4, 255), 32: (32, 16, 4, 255), 64: (64, 16, 4, 255), 128: (32, 16, 4, 255)},
    4: {16: (16, 16, 4, 255), 32: (32, 16, 4, 255), 64: (32, 16, 8, 255), 128: (32, 16, 8, 255)},
}


@launched
@triton.jit(do_not_specialize=["scale"])
def kda_prepare_kernel(
    q_ptr, k_ptr, g_ptr, beta_ptr, query_ptr, read_ptr, write_ptr, total_ptr, inverse_ptr, scores_ptr, rows_ptr,
    chunk_first_ptr, chunk_length_ptr,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, g_stride_t, g_stride_h, beta_stride_t, beta_stride_h,
    scale, H,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    GATE: tl.constexpr, LEVELS: tl.constexpr, STEP_K: tl.constexpr, STRONG_K: tl.constexpr, FIRST: tl.constexpr,
    SMALLEST: tl.constexpr, REST: tl.constexpr, INVERSE_PRECISION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one head. query, read, write: the three decayed ones [T, H, K]; total: G_C [tile, BLOCK_K]; T and P
    [tile, C, C]; beta in row 0 of `load_row` and, where other gates have G_C, the sum of every token's largest g. That
    bounds what is left of a state; the largest sum of a channel would not, as keys carry from channel to channel.
    REST: `hopper.kda_prepare` has run, and chunks that are mild in all channels are left alone."""
    tile = tl.program_id(0).to(tl.int64)
    if REST:
        if is_mild(tl.load(total_ptr + tile * BLOCK_K + tl.arange(0, BLOCK_K))):
            return
    chunk, head = tile // H, tile % H
    first, length = tl.load(chunk_first_ptr + chunk).to(tl.int64), tl.load(chunk_length_ptr + chunk)
    token = tl.arange(0, CHUNK)
    row, column = token[:, None], token[None, :]
    q_ptr += first * q_stride_t + head * q_stride_h
    k_ptr += first * k_stride_t + head * k_stride_h
    g_ptr += first * g_stride_t + head * g_stride_h
    query_ptr += (first * H + head) * K
    read_ptr += (first * H + head) * K
    write_ptr += (first * H + head) * K
    total_ptr += tile * BLOCK_K
    work: tl.constexpr = query_ptr.dtype.element_ty

    scores = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    a = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    largest = tl.full([CHUNK], float("-inf"), tl.float32)
    for start in tl.range(0, BLOCK_K, STEP_K, disable_licm=True):
        key = start + tl.arange(0, STEP_K)
        g = load_rows(g_ptr, g_stride_t, token, key, length, K).to(tl.float32)
        total = tl.sum(g, 0)
        tl.store(total_ptr + key, total)
        largest = tl.maximum(largest, tl.max(tl.where((key < K)[None, :], g, float("-inf")), 1))
        if is_mild(total):
            half = total * (0.5 * LOG2E)
            rise = tl.cumsum(g, 0) * LOG2E - half[None, :]  # no product: what comes of it is transposed below
            edge = tl.exp2(half)
            k = load_rows(k_ptr, k_stride_t, token, key, length, K).to(tl.float32)
            k_fallen = k * tl.exp2(-rise)
            rise = tl.exp2(rise)
            k *= rise
            q = load_rows(q_ptr, q_stride_t, token, key, length, K).to(tl.float32) * rise
            fallen = tl.trans(k_fallen.to(work))
            scores = tl.dot(q.to(work), fallen, scores, input_precision=PRECISION)
            a = tl.dot(k.to(work), fallen, a, input_precision=PRECISION)
            store_rows(query_ptr, H * K, token, key, length, q * (edge * scale)[None, :], K)
            store_rows(read_ptr, H * K, token, key, length, k * edge[None, :], K)
            store_rows(write_ptr, H * K, token, key, length, k_fallen * edge[None, :], K)
        else:
            for part in tl.range(0, STEP_K, STRONG_K, disable_licm=True):  # the tree needs many registers per channel
                channel = start + part + tl.arange(0, STRONG_K)
                passed = tl.exp(load_rows(g_ptr, g_stride_t, token, channel, length, K).to(tl.float32))
                q = load_rows(q_ptr, q_stride_t, token, channel, length, K).to(tl.float32)
                k = load_rows(k_ptr, k_stride_t, token, channel, length, K).to(tl.float32)
                from_start, to_end = passed, tl.full([CHUNK, STRONG_K], 1.0, tl.float32)
                scores += tl.where(row == column, tl.sum(q * k, 1)[:, None], 0.0)
                for level in tl.range(0, LEVELS, disable_licm=True):
                    second = is_second(token, level)
                    decay = tl.where(second, from_start, to_end)
                    keys = (k * decay).to(work)
                    meet = meets(token, level)
                    queries = tl.where(second, q * decay, 0.0).to(work)
                    pairs = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
                    scores += tl.where(meet, pairs, 0.0)
                    pairs = tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
                    a += tl.where(meet, pairs, 0.0)
                    passed, from_start, to_end = climb(passed, from_start, to_end, token ^ (1 << level), second)
                store_rows(query_ptr, H * K, token, channel, length, q * from_start * scale, K)
                store_rows(read_ptr, H * K, token, channel, length, k * from_start, K)
                store_rows(write_ptr, H * K, token, channel, length, k * to_end, K)

    beta_at = beta_ptr + first * beta_stride_t + head * beta_stride_h + token * beta_stride_t
    beta = tl.load(beta_at, mask=token < length, other=0.0).to(tl.float32)
    beta = tl.where(tl.abs(beta) < SMALLEST, SMALLEST, beta)
    rows_at = rows_ptr + tile * (8 * CHUNK)
    tl.store(rows_at + token * 4, beta)
    tl.store(rows_at + 8 * CHUNK - 3, tl.sum(largest, 0))
    square = tile * CHUNK * CHUNK + row * CHUNK + column
    scores = tl.where(row >= column, scores * scale, 0.0)
    tl.store(scores_ptr + square, scores.to(scores_ptr.dtype.element_ty))
    # With D the roots of |beta|, D^-1 A D, whose rows and columns of small beta keep their digits in fp16.
    root = tl.sqrt(tl.abs(beta))
    a = tl.where(row > column, a * (beta / root)[:, None] * root[None, :], 0.0)
    inverse = invert_unit_lower(a, CHUNK, FIRST, INVERSE_PRECISION) * root[:, None] * (1 / root)[None, :]
    tl.store(inverse_ptr + square, inverse.to(inverse_ptr.dtype.element_ty))


def prepare(call):
    """(the Call of the sweeps, Prepared) of a Call with a decay per key channel."""
    prepared = call.room_for_prepared()
    q, k, g, beta = call.q, call.k, call.log_decay, call.beta
    decayed = [q.new_empty(q.shape) for _ in range(3)]
    total = call.scratch(call.widths[0], dtype=torch.float32)
    size, on_hopper = q.element_size(), hopper.takes(call)
    step, strong, warps, registers = PREPARE[size][call.widths[0]]
    if call.num_tiles and on_hopper:
        from longspan.kernels.linear.hopper import kda_prepare

        kda_prepare.launch(call, *decayed, total, prepared, SMALLEST_BETA[size])
    if call.num_tiles:
        kda_prepare_kernel[(call.num_tiles,)](
            q, k, g, beta, *decayed, total, *prepared, *call.chunks,
            *q.stride()[:2], *k.stride()[:2], *call.decay_strides, *beta.stride(), call.scale,
            call.heads, **call.constants, LEVELS=CHUNK.bit_length() - 1, STEP_K=step, STRONG_K=strong,
            FIRST=SUBSTITUTED, SMALLEST=SMALLEST_BETA[size], REST=on_hopper, INVERSE_PRECISION=MERGES[q.dtype],
            num_warps=warps, num_stages=1, maxnreg=registers,
        )  # fmt: skip
    return swept(call, *decayed, total), prepared


def swept(call, query, read, write, total):
    """The Call of the sweeps."""
    return replace(call, q=query, k=read, write=write, total=total, scale=1.0)
