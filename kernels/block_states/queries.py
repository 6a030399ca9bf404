"""The queries' side: a program per block of queries and head."""

from longspan.kernels.block_states.tiles import map_gradient, mapped, read
from longspan.kernels.compiler import tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.sparse.tiles import load_tile, store_tile


@launched
@triton.jit
def output_kernel(
    sparse_ptr, q_ptr, k_ptr, v_ptr, states_ptr, totals_ptr, rows_ptr, weight_ptr, bias_ptr, out_ptr,
    start_ptr, length_ptr, q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, lost,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, ROWS: tl.constexpr, MAP: tl.constexpr, INSIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = sparse + o W^T + b, [T, HEADS, V]. weight: [V, V], bias: fp32 [V]."""
    block, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    state, _, value, _, first, row, valid = read(
        q_ptr, k_ptr, v_ptr, states_ptr, totals_ptr, rows_ptr, start_ptr, length_ptr, block, head,
        head // (HEADS // KEY_HEADS), q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, lost,
        KEY_HEADS, K, V, BLOCK_K, BLOCK_V, ROWS, MAP, INSIDE, PRECISION,
    )  # fmt: skip
    column = tl.arange(0, BLOCK_V)
    weight = load_tile(weight_ptr, column, V, 0, column < V, V, BLOCK_V)
    bias = tl.load(bias_ptr + column, mask=column < V, other=0.0)
    at = (first * HEADS + head) * V
    out = load_tile(sparse_ptr + at, row, HEADS * V, 0, valid, V, BLOCK_V).to(tl.float32) + bias[None, :]
    out = tl.dot(value.to(state.dtype), tl.trans(weight), out, input_precision=PRECISION)
    store_tile(out_ptr + at, row, HEADS * V, 0, valid, out, V, BLOCK_V)


@launched
@triton.jit
def query_gradients_kernel(
    d_out_ptr, q_ptr, k_ptr, v_ptr, states_ptr, totals_ptr, rows_ptr, weight_ptr, dq_ptr, d_num_ptr, d_den_ptr,
    value_ptr, start_ptr, length_ptr, d_out_stride_t, d_out_stride_h, q_stride_t, q_stride_h, k_stride_t, k_stride_h,
    v_stride_t, v_stride_h, lost,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, ROWS: tl.constexpr, MAP: tl.constexpr, INSIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [T, HEADS, K], d_num and o [T, HEADS, V], d_den fp32 [T, HEADS]."""
    block, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    key_head = head // (HEADS // KEY_HEADS)
    state, normalizer, value, inverse, first, row, valid = read(
        q_ptr, k_ptr, v_ptr, states_ptr, totals_ptr, rows_ptr, start_ptr, length_ptr, block, head, key_head,
        q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, lost,
        KEY_HEADS, K, V, BLOCK_K, BLOCK_V, ROWS, MAP, INSIDE, PRECISION,
    )  # fmt: skip
    at, column = first * HEADS + head, tl.arange(0, BLOCK_V)
    store_tile(value_ptr + at * V, row, HEADS * V, 0, valid, value, V, BLOCK_V)
    d_out_ptr += first * d_out_stride_t + head * d_out_stride_h
    d_out = load_tile(d_out_ptr, row, d_out_stride_t, 0, valid, V, BLOCK_V)
    weight = load_tile(weight_ptr, column, V, 0, column < V, V, BLOCK_V)
    d_num = tl.dot(d_out, weight, input_precision=PRECISION) * inverse[:, None]
    d_den = -tl.sum(d_num * value, 1)
    store_tile(d_num_ptr + at * V, row, HEADS * V, 0, valid, d_num, V, BLOCK_V)
    tl.store(d_den_ptr + at + row * HEADS, d_den, mask=valid)
    rounded = d_num.to(state.dtype)
    d_phi = d_den[:, None] * normalizer[None, :]
    d_phi = tl.dot(rounded, tl.trans(state), d_phi, input_precision=PRECISION)
    if INSIDE:
        k = load_tile(k_ptr + first * k_stride_t + key_head * k_stride_h, row, k_stride_t, 0, valid, K, BLOCK_K)
        v = load_tile(v_ptr + first * v_stride_t + key_head * v_stride_h, row, v_stride_t, 0, valid, V, BLOCK_V)
        phi_k = mapped(k, valid, MAP, K, BLOCK_K).to(state.dtype)
        d_scores = tl.dot(rounded, tl.trans(v), input_precision=PRECISION) + d_den[:, None]
        d_scores = tl.where((row[:, None] >= row[None, :]) & valid[None, :], d_scores, 0.0)
        d_phi = tl.dot(d_scores.to(state.dtype), phi_k, d_phi, input_precision=PRECISION)
    q = load_tile(q_ptr + first * q_stride_t + head * q_stride_h, row, q_stride_t, 0, valid, K, BLOCK_K)
    dq = map_gradient(q, mapped(q, valid, MAP, K, BLOCK_K), d_phi, MAP)  # phi(q) did not stay in registers
    store_tile(dq_ptr + at * K, row, HEADS * K, 0, valid, dq, K, BLOCK_K)
