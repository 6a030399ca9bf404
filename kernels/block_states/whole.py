"""The queries' side where many queries read the same state S, z (that of their document): it is projected beforehand,
P = S W^T, and sums over queries become states themselves. With e any multiple of phi(q), row by row,

    u = e / (e z)             out = sparse + u P + b
    D = d_out P^T             d_phi(q) = (D - c z^T) / (phi(q) z),  c = rowsum(u * D)
    G = sum u^T d_out         dS = G W      dz = -sum u^T c      dW = G^T S      db = sum d_out = G^T z, as u z = 1

Multiples of phi(q) read the same, so that softmax has the gradient of exp: rowsum(phi(q) * d_phi(q)) = 0.
"""

from longspan.kernels.block_states.tiles import in_columns, load_state, scaled_map, store_state
from longspan.kernels.compiler import tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.sparse.tiles import load_tile, store_tile


@launched
@triton.jit
def whole_output_kernel(
    sparse_ptr, q_ptr, states_ptr, rows_ptr, bias_ptr, out_ptr, start_ptr, length_ptr, q_stride_t, q_stride_h,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, ROWS: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out = sparse + u P + b [T, HEADS, V] of a block and head, ROWS at once. bias: fp32 [V]."""
    block, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    first, count = tl.load(start_ptr + block).to(tl.int64), tl.load(length_ptr + block)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    state, normalizer = load_state(
        states_ptr, tl.load(rows_ptr + block), head // (HEADS // KEY_HEADS), dtype, KEY_HEADS, K, V, BLOCK_K, BLOCK_V
    )
    weights, column = in_columns(normalizer, dtype), tl.arange(0, BLOCK_V)
    bias = tl.load(bias_ptr + column, mask=column < V, other=0.0)
    q_ptr += first * q_stride_t + head * q_stride_h
    sparse_ptr += (first * HEADS + head) * V
    out_ptr += (first * HEADS + head) * V
    for turn in tl.range(0, (count + ROWS - 1) // ROWS, num_stages=STAGES):  # also of `sparse`
        row = turn * ROWS + tl.arange(0, ROWS)
        valid = row < count
        q = load_tile(q_ptr, row, q_stride_t, 0, valid, K, BLOCK_K)
        sparse = load_tile(sparse_ptr, row, HEADS * V, 0, valid, V, BLOCK_V)
        phi = scaled_map(q, MAP, K, BLOCK_K).to(dtype)
        value = tl.dot(phi, state, input_precision=PRECISION)
        weight = tl.sum(tl.dot(phi, weights, input_precision=PRECISION), 1)
        inverse = tl.where(weight > 0, 1.0 / tl.where(weight > 0, weight, 1.0), 0.0)
        out = value * inverse[:, None] + bias[None, :] + sparse.to(tl.float32)
        store_tile(out_ptr, row, HEADS * V, 0, valid, out, V, BLOCK_V)


@launched
@triton.jit
def whole_query_gradients_kernel(
    d_out_ptr, q_ptr, states_ptr, rows_ptr, dq_ptr, sums_ptr, d_bias_ptr, start_ptr, length_ptr,
    d_out_stride_t, d_out_stride_h, q_stride_t, q_stride_h,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, ROWS: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a block and the query heads of one key head, ROWS of one head at once: dq [T, HEADS, K]; G and dz [blocks,
    KEY_HEADS, K * V + K]; db fp32 [blocks, KEY_HEADS, V]."""
    block, key_head = tl.program_id(0) // KEY_HEADS, tl.program_id(0) % KEY_HEADS
    first, count = tl.load(start_ptr + block).to(tl.int64), tl.load(length_ptr + block)
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    state, normalizer = load_state(
        states_ptr, tl.load(rows_ptr + block), key_head, dtype, KEY_HEADS, K, V, BLOCK_K, BLOCK_V
    )
    d_out_ptr += first * d_out_stride_t + key_head * GROUP * d_out_stride_h
    q_ptr += first * q_stride_t + key_head * GROUP * q_stride_h
    dq_ptr += (first * HEADS + key_head * GROUP) * K
    d_state, d_normalizer = tl.zeros([BLOCK_V, BLOCK_K], tl.float32), tl.zeros([BLOCK_K, 16], tl.float32)
    missing = tl.zeros([ROWS], tl.int32)
    for turn in range(0, (count + ROWS - 1) // ROWS * GROUP):
        member, row = turn % GROUP, turn // GROUP * ROWS + tl.arange(0, ROWS)
        valid = row < count
        q = load_tile(q_ptr + member * q_stride_h, row, q_stride_t, 0, valid, K, BLOCK_K)
        d_out = load_tile(d_out_ptr + member * d_out_stride_h, row, d_out_stride_t, 0, valid, V, BLOCK_V)
        phi = scaled_map(q, MAP, K, BLOCK_K)
        weight = tl.sum(phi * normalizer[None, :], 1)
        there = valid & (weight > 0)
        missing = missing | (valid & (weight <= 0)).to(tl.int32)
        inverse = tl.where(there, 1.0 / tl.where(there, weight, 1.0), 0.0)
        rounded = (phi * inverse[:, None]).to(dtype)
        d_state = tl.dot(tl.trans(d_out), rounded, d_state, input_precision=PRECISION)
        d_phi = tl.dot(d_out, tl.trans(state), input_precision=PRECISION)
        unit = rounded.to(tl.float32)
        along = tl.sum(unit * d_phi, 1)
        d_normalizer = tl.dot(tl.trans(rounded), in_columns(along, dtype), d_normalizer, input_precision=PRECISION)
        d_phi -= along[:, None] * normalizer[None, :]
        if MAP == "softmax":
            dq = d_phi * unit
        elif MAP == "elu1":
            dq = d_phi * tl.where(q.to(tl.float32) < 0, unit, inverse[:, None])
        else:
            dq = d_phi * inverse[:, None]
        store_tile(dq_ptr + member * K, row, HEADS * K, 0, valid, dq, K, BLOCK_K)
    d_bias, column = tl.sum(d_state * normalizer[None, :], 1), tl.arange(0, BLOCK_V)
    if tl.max(missing, 0) > 0:  # rows that weigh nothing
        for turn in range(0, (count + ROWS - 1) // ROWS * GROUP):
            member, row = turn % GROUP, turn // GROUP * ROWS + tl.arange(0, ROWS)
            q = load_tile(q_ptr + member * q_stride_h, row, q_stride_t, 0, row < count, K, BLOCK_K)
            weight = tl.sum(scaled_map(q, MAP, K, BLOCK_K) * normalizer[None, :], 1)
            d_out_at = d_out_ptr + member * d_out_stride_h
            d_out = load_tile(d_out_at, row, d_out_stride_t, 0, (row < count) & (weight <= 0), V, BLOCK_V)
            d_bias += tl.sum(d_out.to(tl.float32), 0)
    tl.store(d_bias_ptr + tl.program_id(0) * V + column, d_bias, mask=column < V)
    store_state(sums_ptr, tl.program_id(0), tl.trans(d_state), -tl.sum(d_normalizer, 1), K, V, BLOCK_K, BLOCK_V)
