"""Gradients of KDA's inputs, chunk by chunk, once S, V', dS and E (`delta_backward`) of each are known. Per channel c,
with D = tril(dO V'^T), X = tril_-1(beta E V'^T), where beta E is dv, and r = -k, what a token reads as by A:

    dq_ic = scale exp(G_ic) [ (dO S^T)_ic + sum_{j <= i} D_ij k_jc exp(-G_jc) ]
    dr_ic =       exp(G_ic) [ (dv S^T)_ic + sum_{j < i}  X_ij k_jc exp(-G_jc) ]
    dk_jc = exp(-G_jc) [ exp(G_Cc) (V' dS^T)_jc + sum_{i >= j} D_ij scale q_ic exp(G_ic) + X_ij r_ic exp(G_ic) ]

    dk = dk - dr     dbeta = rowsum(dv . V') / beta^2, with what T has of it; no beta is zero (`SMALLEST_BETA`)

The gate's gradient is a sum over paths, per channel, as in `channel_gradients`: what a pair gives is counted at the
later token and taken off again at the earlier one, both from the same rounded factors. On Hopper GPUs
`hopper.kda_gradients` takes chunks that are mild in all channels.
"""

import torch

from longspan.kernels.compiler import tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.linear import hopper
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
from longspan.kernels.linear.delta_backward import backward_states
from longspan.kernels.linear.delta_gradients import load_states
from longspan.kernels.linear.delta_tiles import CHUNK, load_row, load_tokens

# Element size: (columns of K at a time, where gates are strong, of V at a time, warps, stages).
GRADIENTS = {2: (32, 16, 128, 4, 1), 4: (16, 16, 32, 8, 1)}


@launched
@triton.jit(do_not_specialize=["scale"])
def kda_gradients_kernel(
    q_ptr, k_ptr, g_ptr, d_out_ptr, total_ptr, rows_ptr, states_ptr, values_ptr, d_states_ptr, dv_ptr,
    dq_ptr, dk_ptr, dg_ptr, d_beta_ptr, chunk_first_ptr, chunk_length_ptr,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, g_stride_t, g_stride_h, d_out_stride_t, d_out_stride_h, scale, H,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    GATE: tl.constexpr, LEVELS: tl.constexpr, STEP_K: tl.constexpr, STRONG_K: tl.constexpr, STEP_V: tl.constexpr,
    D_GATE: tl.constexpr, REST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one head, from dv and the states: dq, dk [T, H, K], d_beta [T, H] and, if D_GATE, d_log_decay
    [T, H, K]. REST: only where not all channels are mild."""
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
    d_out_ptr += first * d_out_stride_t + head * d_out_stride_h
    total_ptr += tile * BLOCK_K
    states_ptr += tile * BLOCK_V * BLOCK_K
    d_states_ptr += tile * BLOCK_V * BLOCK_K
    values_ptr += tile * BLOCK_V * CHUNK
    dq_ptr += (first * H + head) * K
    dk_ptr += (first * H + head) * K
    dv_ptr += (first * H + head) * V
    if D_GATE:
        dg_ptr += (first * H + head) * K
    work: tl.constexpr = states_ptr.dtype.element_ty
    beta = load_row(rows_ptr, tile, 0, CHUNK)
    # Read once where one step takes all columns of V.
    values_at = d_out_ptr, values_ptr, dv_ptr, d_out_stride_t, H * V, length
    d_out, values_t, dv = _load_values(values_at, 0, STEP_V, CHUNK, V, BLOCK_V)

    # D and X on and below the diagonal, their transposes above: a result must not be transposed.
    d_pairs = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    x_pairs = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    for start in range(0, BLOCK_V, STEP_V):
        if STEP_V < BLOCK_V:
            d_out, values_t, dv = _load_values(values_at, start, STEP_V, CHUNK, V, BLOCK_V)
        below = tl.dot(d_out, values_t, input_precision=PRECISION)
        above = tl.dot(tl.trans(values_t), tl.trans(d_out), input_precision=PRECISION)
        d_pairs += tl.where(row >= column, below, above)
        below = tl.dot(dv, values_t, input_precision=PRECISION)
        above = tl.dot(tl.trans(values_t), tl.trans(dv), input_precision=PRECISION)
        x_pairs += tl.where(row >= column, below, above)
    d_beta = tl.sum(tl.where(row == column, x_pairs, 0.0), 1) / (beta * beta)
    tl.store(d_beta_ptr + (first + token) * H + head, d_beta, mask=token < length)
    d_pairs = d_pairs.to(work)
    x_pairs = tl.where(row == column, 0.0, x_pairs).to(work)
    d_self = tl.sum(tl.where(row == column, d_pairs, 0.0).to(tl.float32), 1)[:, None]
    from_before, from_after = row >= column, row <= column

    pairs = token, row, column, from_before, from_after, d_pairs, x_pairs
    inputs = q_ptr, k_ptr, g_ptr, q_stride_t, k_stride_t, g_stride_t, length, scale
    values, states, to = (d_out, values_t, dv, values_at), (states_ptr, d_states_ptr), (dq_ptr, dk_ptr, dg_ptr, H * K)
    for start in tl.range(0, BLOCK_K, STEP_K, disable_licm=True):
        key = start + tl.arange(0, STEP_K)
        total = tl.load(total_ptr + key)
        if is_mild(total):
            _mild(
                key, total, inputs, values, states, pairs, to,
                STEP_K, K, V, BLOCK_K, BLOCK_V, STEP_V, CHUNK, D_GATE, PRECISION,
            )  # fmt: skip
        else:
            for part in tl.range(0, STEP_K, STRONG_K, disable_licm=True):
                _strong(
                    start + part + tl.arange(0, STRONG_K), total_ptr, d_self, inputs, values, states, pairs, to,
                    STRONG_K, K, V, BLOCK_K, BLOCK_V, STEP_V, CHUNK, LEVELS, D_GATE, PRECISION,
                )  # fmt: skip


@triton.jit
def _mild(
    key, total, inputs, values, states, pairs, to, STEP_K: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, STEP_V: tl.constexpr, CHUNK: tl.constexpr, D_GATE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes gradients of the channels `key`, which decay little in the chunk, by `total`."""
    q_ptr, k_ptr, g_ptr, q_stride_t, k_stride_t, g_stride_t, length, scale = inputs
    dq_ptr, dk_ptr, dg_ptr, stride = to
    token, row, column, from_before, from_after, d_pairs, x_pairs = pairs
    work: tl.constexpr = d_pairs.dtype
    dq, dr, dk, through = from_states(values, states, key, STEP_K, V, BLOCK_K, BLOCK_V, STEP_V, CHUNK, PRECISION)
    g = load_rows(g_ptr, g_stride_t, token, key, length, K).to(tl.float32)
    half = total * (0.5 * LOG2E)
    rise = running_sum(g * LOG2E, row >= column, work) - half[None, :]
    rise, fall, edge = tl.exp2(rise), tl.exp2(-rise), tl.exp2(half)[None, :]
    # In an order in which little has to be kept in registers.
    k = load_rows(k_ptr, k_stride_t, token, key, length, K).to(tl.float32)
    r = factor(-k * rise, work, PRECISION)
    k = factor(k * fall, work, PRECISION)
    dr = tl.dot(tl.where(from_before, x_pairs, 0.0).to(work), k, dr * edge, input_precision=PRECISION)
    gate = r * dr
    dr *= rise
    q = load_rows(q_ptr, q_stride_t, token, key, length, K).to(tl.float32)
    q = factor(q * (rise * scale), work, PRECISION)
    dq = tl.dot(tl.where(from_before, d_pairs, 0.0).to(work), k, dq * edge, input_precision=PRECISION)
    store_rows(dq_ptr, stride, token, key, length, dq * (rise * scale), K)
    gate += q * dq
    dk *= edge
    all_through = through * tl.exp(total) + tl.sum(k * dk, 0)
    dk = tl.dot(tl.where(from_after, d_pairs, 0.0).to(work), q, dk, input_precision=PRECISION)
    dk = tl.dot(tl.where(from_after, x_pairs, 0.0).to(work), r, dk, input_precision=PRECISION)
    store_rows(dk_ptr, stride, token, key, length, dk * fall - dr, K)
    if D_GATE:
        gate = running_sum(gate - k * dk, from_after, work) + all_through[None, :]
        store_rows(dg_ptr, stride, token, key, length, gate, K)


@triton.jit
def _strong(
    channel, total_ptr, d_self, inputs, values, states, pairs, to, STRONG_K: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, STEP_V: tl.constexpr, CHUNK: tl.constexpr,
    LEVELS: tl.constexpr, D_GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same of channels that may decay by any amount, by a tree. d_self: the diagonal of D."""
    q_ptr, k_ptr, g_ptr, q_stride_t, k_stride_t, g_stride_t, length, scale = inputs
    dq_ptr, dk_ptr, dg_ptr, stride = to
    token, row, column, from_before, from_after, d_pairs, x_pairs = pairs
    work: tl.constexpr = d_pairs.dtype
    dq, dr, dk, through = from_states(values, states, channel, STRONG_K, V, BLOCK_K, BLOCK_V, STEP_V, CHUNK, PRECISION)
    through *= tl.exp(tl.load(total_ptr + channel))
    g = load_rows(g_ptr, g_stride_t, token, channel, length, K).to(tl.float32)
    q = load_rows(q_ptr, q_stride_t, token, channel, length, K).to(tl.float32) * scale
    k = load_rows(k_ptr, k_stride_t, token, channel, length, K).to(tl.float32)
    r = -k
    passed, to_end = tl.exp(g), tl.full([CHUNK, STRONG_K], 1.0, tl.float32)
    from_start = passed
    dq_pairs, dk_pairs = d_self * k, d_self * q
    dr_pairs, change = tl.zeros_like(g), tl.zeros_like(g)
    for level in tl.range(0, LEVELS, disable_licm=True):
        second, meet = is_second(token, level), meets(token, level)
        decay = tl.where(second, from_start, to_end)
        x = factor(tl.where(second, q, k) * decay, work, PRECISION)
        y = factor(tl.where(second, r, k) * decay, work, PRECISION)
        dx = tl.dot(tl.where(meet, d_pairs, 0.0).to(work), x, input_precision=PRECISION)
        dy = tl.dot(tl.where(meet, x_pairs, 0.0).to(work), y, input_precision=PRECISION)
        gain = x * dx + y * dy
        change += tl.where(second, gain, -gain)
        dx *= decay
        dy *= decay
        dq_pairs += tl.where(second, dx, 0.0)
        dr_pairs += tl.where(second, dy, 0.0)
        dk_pairs += tl.where(second, 0.0, dx + dy)
        passed, from_start, to_end = climb(passed, from_start, to_end, token ^ (1 << level), second)
    dq, dr, dk = dq * from_start, dr * from_start, dk * to_end
    if D_GATE:
        # Next to strong gates even fp32 would drown in keys counted and taken off again: these are not.
        gate = running_sum(change + q * dq + r * dr, from_after, work)
        gate += running_sum(k * dk, row > column, work) + through[None, :]
        store_rows(dg_ptr, stride, token, channel, length, gate, K)
    store_rows(dq_ptr, stride, token, channel, length, (dq + dq_pairs) * scale, K)
    store_rows(dk_ptr, stride, token, channel, length, dk + dk_pairs - dr - dr_pairs, K)


@triton.jit
def from_states(
    values, states, key, STEP_K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    STEP_V: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dO S^T, dv S^T, V' dS^T, [CHUNK, keys], and rowsum <S, dS> [keys]. values: from `_load_values` if all columns of
    V are taken at once, and where it reads."""
    d_out, values_t, dv, values_at = values
    states_ptr, d_states_ptr = states
    dq = tl.zeros([CHUNK, STEP_K], dtype=tl.float32)
    dr = tl.zeros([CHUNK, STEP_K], dtype=tl.float32)
    dk = tl.zeros([CHUNK, STEP_K], dtype=tl.float32)
    through = tl.zeros([STEP_K], dtype=tl.float32)
    for start in range(0, BLOCK_V, STEP_V):
        if STEP_V < BLOCK_V:
            d_out, values_t, dv = _load_values(values_at, start, STEP_V, CHUNK, V, BLOCK_V)
        state, d_state = load_states(states_ptr, d_states_ptr, start, key, STEP_V, BLOCK_K)
        dq = tl.dot(d_out, state, dq, input_precision=PRECISION)
        dr = tl.dot(dv, state, dr, input_precision=PRECISION)
        dk = tl.dot(tl.trans(values_t), d_state, dk, input_precision=PRECISION)
        through += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 0)
    return dq, dr, dk, through


@triton.jit
def _load_values(
    values_at, start, STEP_V: tl.constexpr, CHUNK: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """dO, V'^T and dv of the columns of V from `start` on."""
    d_out_ptr, values_ptr, dv_ptr, d_out_stride_t, dv_stride_t, length = values_at
    token, value = tl.arange(0, CHUNK), start + tl.arange(0, STEP_V)
    d_out = load_tokens(d_out_ptr, d_out_stride_t, length, value, CHUNK, V, V == BLOCK_V)
    values_t = tl.load(values_ptr + (value[:, None] * CHUNK + token[None, :]))
    return d_out, values_t, load_tokens(dv_ptr, dv_stride_t, length, value, CHUNK, V, V == BLOCK_V)


def input_gradients(call, swept, prepared, d_out, entering, exits, gate: bool):
    """dq, dk, dv in the dtype of the inputs; d_beta [T, H] and, if `gate`, d_log_decay [T, H, K] (else None), fp32.
    swept: the Call of the sweeps; entering: S^T and V'^T of every chunk; exits: [N, H, K, V], gradients of the states
    leaving the splits."""
    q, k, g = call.q, call.k, call.log_decay
    dq, dk = (q.new_empty(q.shape) for _ in range(2))
    d_beta = q.new_empty(q.shape[:2], dtype=torch.float32)
    dg = q.new_empty(q.shape, dtype=torch.float32) if gate else None
    d_states, dv = backward_states(swept, prepared, d_out, exits)
    on_hopper = hopper.takes(call)
    if call.num_tiles and on_hopper:
        from longspan.kernels.linear.hopper import kda_gradients

        kda_gradients.launch(call, swept, prepared, d_out, entering, d_states, dv, dq, dk, dg, d_beta)
    if call.num_tiles:
        block_k, block_v = call.widths
        step_k, strong_k, step_v, warps, stages = GRADIENTS[q.element_size()]
        kda_gradients_kernel[(call.num_tiles,)](
            q, k, g, d_out, swept.total, prepared.rows, *entering, d_states, dv, dq, dk, dg, d_beta, *call.chunks,
            *q.stride()[:2], *k.stride()[:2], *call.decay_strides, *d_out.stride()[:2], call.scale,
            call.heads, **call.constants, LEVELS=CHUNK.bit_length() - 1, STEP_K=min(step_k, block_k),
            STRONG_K=strong_k, STEP_V=min(step_v, block_v), D_GATE=gate, REST=on_hopper,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return dq, dk, dv, d_beta, dg
