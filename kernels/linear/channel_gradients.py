"""Gradients under decay per key channel, all chunks at once, from the states on both sides of each chunk.

The gate's gradient is a sum over the paths that a token's decay lies on: pairs around it in its chunk, the entry state
to queries from it on, keys before it to the exit, and entry to exit. What a pair gives is counted at the query and
taken off again at the key, both from the same rounded factors, so that only rounding in fp32 is left outside the pair.
"""

from longspan.kernels.compiler import tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.linear.channel_decay import (
    LOG2E,
    climb,
    factor,
    is_mild,
    is_second,
    load_rows,
    meets,
    running_sum,
    store_rows,
)

# (bytes per number, value columns padded): (key channels per program, per step, per step where gates are strong, warps,
# stages).
GRADIENTS = {
    (2, 16): (128, 32, 16, 4, 2), (2, 32): (128, 32, 16, 4, 2), (2, 64): (128, 32, 16, 4, 2),
    (2, 128): (128, 32, 16, 4, 2), (2, 256): (128, 16, 16, 4, 2),
    (4, 16): (64, 16, 16, 8, 1), (4, 32): (64, 16, 16, 8, 1), (4, 64): (64, 16, 16, 8, 1), (4, 128): (64, 16, 16, 8, 1),
}  # fmt: skip
# Bytes per number: value columns that fit on chip; gradients are sums over columns, and further columns are added by
# another launch.
COLUMNS = {2: 256, 4: 128}


@launched
@triton.jit(do_not_specialize=["scale", "first_chunk"])
def gradients_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, d_out_ptr, total_ptr, state_ptr, d_state_ptr, dq_ptr, dk_ptr, dg_ptr,
    chunk_first_ptr, chunk_length_ptr, first_chunk,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, g_stride_t, g_stride_h,
    d_out_stride_t, d_out_stride_h, scale, H, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, STRONG_K: tl.constexpr, GROUP_K: tl.constexpr, BLOCK_V: tl.constexpr,
    LEVELS: tl.constexpr, FIRST_COLUMN: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and, if GATE, d_log_decay, all contiguous, of the chunks from first_chunk on. state: what enters each
    chunk; d_state: the gradient of what leaves it, both [chunk - first_chunk, H, K, V].
    Only the part of BLOCK_V value columns from FIRST_COLUMN on; unless these are the first, on top of what is there.
    Grid (groups of channels * H * chunks)."""
    CHUNK: tl.constexpr = 1 << LEVELS
    groups: tl.constexpr = (K + GROUP_K - 1) // GROUP_K
    program, group = tl.program_id(0) // groups, tl.program_id(0) % groups * GROUP_K
    chunk, head = (program // H).to(tl.int64), (program % H).to(tl.int64)
    state_ptr += (chunk * H + head) * K * V
    d_state_ptr += (chunk * H + head) * K * V
    total_ptr += ((first_chunk + chunk) * H + head) * K
    first = tl.load(chunk_first_ptr + first_chunk + chunk).to(tl.int64)
    length = tl.load(chunk_length_ptr + first_chunk + chunk)
    q_ptr += first * q_stride_t + head * q_stride_h
    k_ptr += first * k_stride_t + head * k_stride_h
    v_ptr += first * v_stride_t + head * v_stride_h
    g_ptr += first * g_stride_t + head * g_stride_h
    d_out_ptr += first * d_out_stride_t + head * d_out_stride_h
    dq_ptr += (first * H + head) * K
    dk_ptr += (first * H + head) * K
    if GATE:
        dg_ptr += (first * H + head) * K
    token, column, every = tl.arange(0, CHUNK), FIRST_COLUMN + tl.arange(0, BLOCK_V), group + tl.arange(0, GROUP_K)
    work: tl.constexpr = state_ptr.dtype.element_ty

    from_before, from_after = token[:, None] >= token[None, :], token[:, None] <= token[None, :]
    v = load_rows(v_ptr, v_stride_t, token, column, length, V).to(work)
    d_out = load_rows(d_out_ptr, d_out_stride_t, token, column, length, V).to(work)
    # d_out_i . v_j on and below the diagonal and its transpose above: two products, as a result must not be transposed.
    d_pairs = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
    d_pairs_t = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
    d_pairs = tl.where(from_before, d_pairs, d_pairs_t).to(work)
    if is_mild(tl.load(total_ptr + every, mask=every < K, other=0.0)):
        lower, upper = tl.where(from_before, d_pairs, 0.0), tl.where(from_after, d_pairs, 0.0)
        for start in range(0, GROUP_K, BLOCK_K):
            channel = group + start + tl.arange(0, BLOCK_K)
            g = load_rows(g_ptr, g_stride_t, token, channel, length, K).to(tl.float32)
            total = tl.load(total_ptr + channel, mask=channel < K, other=0.0)
            half = total * (0.5 * LOG2E)
            rise = running_sum(g * LOG2E, from_before, work) - half[None, :]
            rise, fall, edge = tl.exp2(rise), tl.exp2(-rise), tl.exp2(half)
            q = factor(load_rows(q_ptr, q_stride_t, token, channel, length, K) * (rise * scale), work, PRECISION)
            k = factor(load_rows(k_ptr, k_stride_t, token, channel, length, K) * fall, work, PRECISION)
            state = _load_state(state_ptr, channel, column, K, V)
            d_state = _load_state(d_state_ptr, channel, column, K, V)
            dq = tl.dot(d_out, tl.trans(state), input_precision=PRECISION) * edge[None, :]
            dk = tl.dot(v, tl.trans(d_state), input_precision=PRECISION) * edge[None, :]
            gate = _through(state, d_state, total) + tl.sum(k * dk, 0)
            dq = tl.dot(lower, k, dq, input_precision=PRECISION)
            dk = tl.dot(upper, q, dk, input_precision=PRECISION)
            _store(dq_ptr, H * K, token, channel, length, dq * (rise * scale), K, FIRST_COLUMN > 0)
            _store(dk_ptr, H * K, token, channel, length, dk * fall, K, FIRST_COLUMN > 0)
            if GATE:
                gate = gate[None, :] + running_sum(q * dq - k * dk, from_after, work)
                _store(dg_ptr, H * K, token, channel, length, gate, K, FIRST_COLUMN > 0)
    else:
        d_self = tl.sum(d_out.to(tl.float32) * v, 1)[:, None]
        for start in range(0, GROUP_K, STRONG_K):
            channel = group + start + tl.arange(0, STRONG_K)
            g = load_rows(g_ptr, g_stride_t, token, channel, length, K).to(tl.float32)
            total = tl.load(total_ptr + channel, mask=channel < K, other=0.0)
            q = load_rows(q_ptr, q_stride_t, token, channel, length, K).to(tl.float32) * scale
            k = load_rows(k_ptr, k_stride_t, token, channel, length, K).to(tl.float32)
            passed, to_end = tl.exp(g), tl.full([CHUNK, STRONG_K], 1.0, tl.float32)
            from_start = passed
            dq, dk, change = d_self * k, d_self * q, tl.zeros_like(g)
            for level in range(LEVELS):
                second = is_second(token, level)
                decay = tl.where(second, from_start, to_end)
                x = factor(tl.where(second, q, k) * decay, work, PRECISION)
                dx = tl.dot(tl.where(meets(token, level), d_pairs, 0.0), x, input_precision=PRECISION)
                dq += tl.where(second, dx * decay, 0.0)
                dk += tl.where(second, 0.0, dx * decay)
                change += tl.where(second, x * dx, -x * dx)
                passed, from_start, to_end = climb(passed, from_start, to_end, token ^ (1 << level), second)
            state = _load_state(state_ptr, channel, column, K, V)
            d_state = _load_state(d_state_ptr, channel, column, K, V)
            dq_entry = tl.dot(d_out, tl.trans(state), input_precision=PRECISION) * from_start
            dk_exit = tl.dot(v, tl.trans(d_state), input_precision=PRECISION) * to_end
            _store(dq_ptr, H * K, token, channel, length, (dq + dq_entry) * scale, K, FIRST_COLUMN > 0)
            _store(dk_ptr, H * K, token, channel, length, dk + dk_exit, K, FIRST_COLUMN > 0)
            if GATE:
                # Next to strong gates even fp32 would drown in keys counted and taken off again: these are not.
                gate = running_sum(change + q * dq_entry, from_after, work)
                gate += running_sum(k * dk_exit, token[:, None] > token[None, :], work)
                gate += _through(state, d_state, total)[None, :]
                _store(dg_ptr, H * K, token, channel, length, gate, K, FIRST_COLUMN > 0)


@triton.jit
def _store(ptr, stride, token, channel, length, value, K: tl.constexpr, ADD: tl.constexpr):
    if ADD:
        value += load_rows(ptr, stride, token, channel, length, K)
    store_rows(ptr, stride, token, channel, length, value, K)


@triton.jit
def _load_state(ptr, channel, column, K: tl.constexpr, V: tl.constexpr):
    inside = (channel < K)[:, None] & (column < V)[None, :]
    return tl.load(ptr + channel[:, None] * V + column[None, :], mask=inside, other=0.0)


@triton.jit
def _through(state, d_state, total):
    """What the decay of a whole chunk means to the loss by way of its entry state alone, per channel."""
    return tl.sum(state.to(tl.float32) * d_state, 1) * tl.exp(total)
