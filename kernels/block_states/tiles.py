"""What the kernels share: feature maps of a tile, the state of a block, what queries read."""

from longspan.kernels.compiler import tl, triton
from longspan.kernels.sparse.tiles import LOG2E, load_tile


@triton.jit
def scaled_map(x, MAP: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """phi(x) in fp32 times a factor of each row, zero past K: what is divided by its weight needs no more."""
    x = x.to(tl.float32)
    there = (tl.arange(0, BLOCK_K) < K)[None, :]
    if MAP == "softmax":
        if K != BLOCK_K:
            x = tl.where(there, x, float("-inf"))
        return tl.exp2(x * LOG2E - (tl.max(x, 1) * LOG2E)[:, None])
    if MAP == "elu1":
        x = tl.where(x < 0, tl.exp2(tl.minimum(x, 0.0) * LOG2E), x + 1)
    return x if K == BLOCK_K else tl.where(there, x, 0.0)


@triton.jit
def mapped(x, valid, MAP: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """phi(x) in fp32, [rows, BLOCK_K], zero where not valid and past K."""
    phi = scaled_map(x, MAP, K, BLOCK_K)
    if MAP == "softmax":
        return phi * tl.where(valid, 1.0 / tl.sum(phi, 1), 0.0)[:, None]
    return tl.where(valid[:, None], phi, 0.0)


@triton.jit
def every_16th(x):
    """[rows, n] -> [16, n], sums of every 16th row: a thread has these itself."""
    return tl.sum(tl.reshape(x, [x.shape[0] // 16, 16, x.shape[1]]), 0)


@triton.jit
def in_columns(x, dtype: tl.constexpr):
    """fp32 [n] -> [n, 16] in `dtype`, whose columns add up to x as far as two numbers tell: for products that add."""
    column = tl.arange(0, 16)[None, :]
    high = x.to(dtype).to(tl.float32)
    return tl.where(column == 0, high[:, None], tl.where(column == 1, (x - high)[:, None], 0.0)).to(dtype)


@triton.jit
def map_gradient(x, phi, d_phi, MAP: tl.constexpr):
    """The gradient of x from phi(x), fp32, and its gradient, zero where phi is for being no row or column."""
    if MAP == "softmax":
        return phi * (d_phi - tl.sum(phi * d_phi, 1)[:, None])
    elif MAP == "elu1":
        return tl.where(x.to(tl.float32) < 0, d_phi * phi, d_phi)
    else:
        return d_phi


@triton.jit
def load_state(
    states_ptr, row, head, dtype: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """S [BLOCK_K, BLOCK_V] in `dtype` and z [BLOCK_K] in fp32; zero for row -1 and past K, V."""
    key, value = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    there = (key < K) & (row >= 0)
    states_ptr += (row.to(tl.int64) * HEADS + head) * (K * V + K)
    at = states_ptr + key[:, None] * V + value[None, :]
    state = tl.load(at, mask=there[:, None] & (value < V)[None, :], other=0.0)
    normalizer = tl.load(states_ptr + K * V + key, mask=there, other=0.0)
    return state.to(dtype), normalizer.to(tl.float32)


@triton.jit
def store_state(
    out_ptr, number, state, normalizer,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes the number-th state."""
    key, value = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    out_ptr += number.to(tl.int64) * (K * V + K)
    at = out_ptr + key[:, None] * V + value[None, :]
    tl.store(at, state.to(out_ptr.dtype.element_ty), mask=(key < K)[:, None] & (value < V)[None, :])
    tl.store(out_ptr + K * V + key, normalizer.to(out_ptr.dtype.element_ty), mask=key < K)


@triton.jit
def read(
    q_ptr, k_ptr, v_ptr, states_ptr, totals_ptr, rows_ptr, start_ptr, length_ptr, block, head, key_head,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, lost,
    KEY_HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, MAP: tl.constexpr, INSIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the queries of a block read: (S, z, o in fp32, inverse of the denominator, first row, rows, valid)."""
    first, count = tl.load(start_ptr + block).to(tl.int64), tl.load(length_ptr + block)
    row = tl.arange(0, ROWS)
    valid = row < count
    q = load_tile(q_ptr + first * q_stride_t + head * q_stride_h, row, q_stride_t, 0, valid, K, BLOCK_K)
    phi = mapped(q, valid, MAP, K, BLOCK_K).to(q.dtype)
    state_row = tl.load(rows_ptr + block)
    state, normalizer = load_state(states_ptr, state_row, key_head, q.dtype, KEY_HEADS, K, V, BLOCK_K, BLOCK_V)
    key = tl.arange(0, BLOCK_K)
    totals_ptr += (state_row.to(tl.int64) * KEY_HEADS + key_head) * K
    totals = tl.load(totals_ptr + key, mask=(key < K) & (state_row >= 0), other=0.0)
    value = tl.dot(phi, state, input_precision=PRECISION)
    denominator = tl.sum(phi.to(tl.float32) * normalizer[None, :], 1)
    total = tl.sum(phi.to(tl.float32) * totals[None, :], 1)
    if INSIDE:
        k = load_tile(k_ptr + first * k_stride_t + key_head * k_stride_h, row, k_stride_t, 0, valid, K, BLOCK_K)
        v = load_tile(v_ptr + first * v_stride_t + key_head * v_stride_h, row, v_stride_t, 0, valid, V, BLOCK_V)
        phi_k = mapped(k, valid, MAP, K, BLOCK_K).to(q.dtype)
        scores = tl.dot(phi, tl.trans(phi_k), input_precision=PRECISION)
        scores = tl.where(row[:, None] >= row[None, :], scores, 0.0)
        value = tl.dot(scores.to(v.dtype), v, value, input_precision=PRECISION)
        within = tl.sum(scores, 1)
        denominator += within
        total += within
    there = denominator > lost * total
    inverse = tl.where(there, 1.0 / tl.where(there, denominator, 1.0), 0.0)
    return state, normalizer, value * inverse[:, None], inverse, first, row, valid
