"""The two Triton kernels behind none, fixed and scalar decay: the sum of a split, and the sweep through a split.

With rows x, y of width K and z of width V, G the inclusive cumulative log decay in a chunk, S the state entering it:

    out_i = scale (sum_{j <= i} exp(G_i - G_j) (x_i . y_j) z_j + exp(G_i) S^T x_i)
    S    <- exp(G_C) S + sum_j exp(G_C - G_j) y_j z_j^T

Forward is (x, y, z) = (q, k, v). dq has the same form with (d_out, v, k) and the transposed state. With time reversed,
where token i reads tokens j >= i, dk is (v, d_out, q) and dv is (k, q, d_out) with the exit gradient as state. So no
kernel transposes the result of a product, which Triton before 3.7.1 miscompiles on Hopper, and every tensor is read in
the order it lies in memory. The state stays on chip for the whole split. Derivation: docs/linear-attention.md.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _decays(g_ptr, stride_t, index, count, gamma, DECAY: tl.constexpr, EXACT: tl.constexpr):
    """log2 decay of a chunk's rows: from its start to each row (inclusive), from after each row to its end, and in all.

    The second is summed from the end, so that it is exact where it is small. EXACT: in fp64, for fp32 tensors.
    """
    if DECAY == "fixed":
        place = tl.minimum(index + 1, count).to(tl.float32)
        from_start, to_end, total = place * gamma, (count.to(tl.float32) - place) * gamma, count.to(tl.float32) * gamma
    else:
        g = tl.load(g_ptr + index * stride_t, mask=index < count, other=0.0).to(tl.float32) * LOG2E
        if EXACT:
            g = g.to(tl.float64)
        from_start, to_end, total = tl.cumsum(g, 0), tl.cumsum(g, 0, reverse=True) - g, tl.sum(g, 0)
    return from_start, to_end, total


@triton.jit(do_not_specialize=["scale"])
def sum_kernel(
    y_ptr, z_ptr, g_ptr, sum_ptr, decay_ptr,
    list_ptr, first_ptr, length_ptr, row_ptr,
    y_stride_t, y_stride_h, z_stride_t, z_stride_h, g_stride_t, g_stride_h,
    scale,
    H, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale * sum over a split of exp(w_t) y_t z_t^T -> fp32 [row, h, K, V], and the split's log decay -> [row, h].

    w_t: log decay from after t to the end of the split (forward), from the start of the split to t (REVERSE).
    """
    split = tl.load(list_ptr + tl.program_id(2))
    head = tl.program_id(1).to(tl.int64)
    first, length = tl.load(first_ptr + split).to(tl.int64), tl.load(length_ptr + split)
    row = tl.load(row_ptr + split).to(tl.int64) * H + head
    index, k, v = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K), tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    y_ptr += first * y_stride_t + head * y_stride_h
    z_ptr += first * z_stride_t + head * z_stride_h
    y_at, z_at = index[:, None] * y_stride_t + k[None, :], index[:, None] * z_stride_t + v[None, :]
    gamma = 0.0
    if DECAY == "fixed":
        gamma = tl.load(g_ptr + head * g_stride_h).to(tl.float32) * LOG2E
    elif DECAY == "scalar":
        g_ptr += first * g_stride_t + head * g_stride_h

    state = tl.zeros([BLOCK_K, BLOCK_V], dtype=tl.float32)
    passed = 0.0  # log2 decay between this chunk and the end that weights count to
    chunks = tl.cdiv(length, CHUNK)
    for n in range(0, chunks):
        start = (n if REVERSE else chunks - 1 - n) * CHUNK
        at, count = start.to(tl.int64), tl.minimum(length - start, CHUNK)
        valid = (index < count)[:, None]
        y = tl.load(y_ptr + at * y_stride_t + y_at, mask=valid & (k < K)[None, :], other=0.0)
        z = tl.load(z_ptr + at * z_stride_t + z_at, mask=valid & (v < V)[None, :], other=0.0)
        if DECAY != "none":
            from_start, to_end, total = _decays(g_ptr + at * g_stride_t, g_stride_t, index, count, gamma, DECAY, False)
            weight = tl.exp2(passed + (from_start if REVERSE else to_end))
            z = (z * weight[:, None]).to(z.dtype)
            passed += total
        state = tl.dot(tl.trans(y), z, state, input_precision=PRECISION)
    at = sum_ptr + row * K * V + k[:, None] * V + v[None, :]
    tl.store(at, state * scale, mask=(k < K)[:, None] & (v < V)[None, :])
    if DECAY != "none":
        if tl.program_id(0) == 0:
            tl.store(decay_ptr + row, passed / LOG2E)


@triton.jit
def _sweep(
    x_ptr, y_ptr, z_ptr, g_ptr, out_ptr, state_ptr,
    x_stride_t, y_stride_t, z_stride_t, g_stride_t, state_stride_k, state_stride_v,
    length, row, column, H, scale, state_scale,
    gated, extra_ptr, extra_stride_t, states_ptr, q_sum_ptr, gate_ptr,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split, head and block of columns of z; the pointers stand at its first token. row: of the state that enters,
    -1 for none.

    GATE: what the gate's gradient needs besides, where `gated`, over this block of columns only. Forward (dq): the entry
    state of every chunk -> states [chunk, h, K, V], and extra . (part of out from before the chunk) -> q_sum [T, H].
    REVERSE (dk): all of d_log_decay -> gate [T, H], from those and extra = k.
    """
    index, k, v = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K), column * BLOCK_V + tl.arange(0, BLOCK_V)
    x_at, y_at = index[:, None] * x_stride_t + k[None, :], index[:, None] * y_stride_t + k[None, :]
    z_at, out_at = index[:, None] * z_stride_t + v[None, :], index[:, None] * (H * V) + v[None, :]
    inside = (k < K)[:, None] & (v < V)[None, :]
    gamma = 0.0
    if DECAY == "fixed":
        gamma = tl.load(g_ptr).to(tl.float32) * LOG2E

    state = tl.zeros([BLOCK_K, BLOCK_V], dtype=tl.float32)
    if row >= 0:
        at = state_ptr + k[:, None] * state_stride_k + v[None, :] * state_stride_v
        state = tl.load(at, mask=inside, other=0.0) * state_scale
    reads = index[:, None] <= index[None, :] if REVERSE else index[:, None] >= index[None, :]

    chunks = tl.cdiv(length, CHUNK)
    for n in range(0, chunks):
        chunk = chunks - 1 - n if REVERSE else n
        start = chunk * CHUNK
        at, count = start.to(tl.int64), tl.minimum(length - start, CHUNK)
        valid = (index < count)[:, None]
        x = tl.load(x_ptr + at * x_stride_t + x_at, mask=valid & (k < K)[None, :], other=0.0)
        y = tl.load(y_ptr + at * y_stride_t + y_at, mask=valid & (k < K)[None, :], other=0.0)
        z = tl.load(z_ptr + at * z_stride_t + z_at, mask=valid & (v < V)[None, :], other=0.0)
        weighted, through = z, 1.0
        scores = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        out = tl.dot(x, state.to(x.dtype), input_precision=PRECISION)
        if DECAY == "none":
            scores = tl.where(reads, scores, 0.0)
        else:
            from_start, to_end, total = _decays(
                g_ptr + at * g_stride_t, g_stride_t, index, count, gamma, DECAY, x.dtype == tl.float32
            )
            between = (from_start[:, None] - from_start[None, :]).to(tl.float32)
            scores *= tl.exp2(tl.where(reads, -between if REVERSE else between, float("-inf")))
            from_start, to_end = tl.exp2(from_start.to(tl.float32)), tl.exp2(to_end.to(tl.float32))
            through = tl.exp2(total.to(tl.float32))
            out *= (to_end if REVERSE else from_start)[:, None]
            weighted = (z * (from_start if REVERSE else to_end)[:, None]).to(z.dtype)
        if GATE:
            if gated:
                extra_at = extra_ptr + at * extra_stride_t + index[:, None] * extra_stride_t + v[None, :]
                extra = tl.load(extra_at, mask=valid & (v < V)[None, :], other=0.0)
                inter = tl.sum(out * extra.to(tl.float32), 1) * scale
                states_at = states_ptr + chunk.to(tl.int64) * H * K * V + k[:, None] * V + v[None, :]
                sums_at, held = (at + index) * H, index < count
                if REVERSE:
                    pairs = scores * tl.dot(extra, tl.trans(z), input_precision=PRECISION) * scale
                    passes = tl.sum(tl.load(states_at, mask=inside, other=0.0).to(tl.float32) * state) * through * scale
                    q_inter = tl.load(q_sum_ptr + sums_at, mask=held, other=0.0)
                    before = tl.sum(pairs, 0) - tl.sum(pairs, 1) + q_inter
                    gate = tl.cumsum(before, 0, reverse=True) + tl.cumsum(inter, 0) - inter + passes
                    tl.store(gate_ptr + sums_at, gate, mask=held)
                else:
                    tl.store(states_at, state.to(states_ptr.dtype.element_ty), mask=inside)
                    tl.store(q_sum_ptr + sums_at, inter, mask=held)
        out = tl.dot(scores.to(z.dtype), z, out, input_precision=PRECISION) * scale
        tl.store(out_ptr + at * (H * V) + out_at, out.to(out_ptr.dtype.element_ty), mask=valid & (v < V)[None, :])
        if DECAY != "none":
            state *= through
        state = tl.dot(tl.trans(y), weighted, state, input_precision=PRECISION)


@triton.jit(do_not_specialize=["scale", "T"])
def sweep_kernel(
    x_ptr, y_ptr, z_ptr, g_ptr, out_ptr, state_ptr, extra_ptr, states_ptr, q_sum_ptr,
    first_ptr, length_ptr, row_ptr, split_chunk_ptr,
    x_stride_t, x_stride_h, y_stride_t, y_stride_h, z_stride_t, z_stride_h, g_stride_t, g_stride_h,
    extra_stride_t, extra_stride_h, state_stride_k, state_stride_v, scale, T,
    H, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    DECAY: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Forward in time: out [T, H, V] of every split. Grid (column blocks, H, splits)."""
    column, head, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    first, row = tl.load(first_ptr + split).to(tl.int64), tl.load(row_ptr + split).to(tl.int64)
    chunk = tl.load(split_chunk_ptr + split).to(tl.int64)
    sums = (column * T + first) * H + head
    _sweep(
        x_ptr + first * x_stride_t + head * x_stride_h, y_ptr + first * y_stride_t + head * y_stride_h,
        z_ptr + first * z_stride_t + head * z_stride_h, g_ptr + first * g_stride_t + head * g_stride_h,
        out_ptr + (first * H + head) * V, state_ptr + (row * H + head) * K * V,
        x_stride_t, y_stride_t, z_stride_t, g_stride_t, state_stride_k, state_stride_v,
        tl.load(length_ptr + split), row, column, H, scale, 1.0,
        True, extra_ptr + first * extra_stride_t + head * extra_stride_h, extra_stride_t,
        states_ptr + (chunk * H + head) * K * V, q_sum_ptr + sums, q_sum_ptr,
        K, V, BLOCK_K, BLOCK_V, CHUNK, DECAY, False, GATE, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["scale", "inverse_scale", "T", "only_dv"])
def reverse_kernel(
    v_ptr, do_ptr, q_ptr, k_ptr, g_ptr, dk_ptr, dv_ptr, state_ptr, states_ptr, q_sum_ptr, gate_ptr,
    first_ptr, length_ptr, row_ptr, split_chunk_ptr,
    v_stride_t, v_stride_h, do_stride_t, do_stride_h, q_stride_t, q_stride_h, k_stride_t, k_stride_h,
    g_stride_t, g_stride_h, scale, inverse_scale, T, only_dv,
    H, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    DECAY: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward in time. K: width of x and y, V: of z and the result. Grid (column blocks of dk, then of dv, H, splits).

    With equal widths one launch does both; its halves run side by side and read the same tokens, so that the second read
    of q and d_out comes from L2. With only_dv there are no blocks of dk.
    """
    column, head, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    columns = tl.cdiv(V, BLOCK_V)
    is_dv = (column >= columns) | (only_dv != 0)
    column = column % columns
    first, row = tl.load(first_ptr + split).to(tl.int64), tl.load(row_ptr + split).to(tl.int64)
    chunk = tl.load(split_chunk_ptr + split).to(tl.int64)
    sums = (column * T + first) * H + head
    v_ptr += first * v_stride_t + head * v_stride_h
    do_ptr += first * do_stride_t + head * do_stride_h
    q_ptr += first * q_stride_t + head * q_stride_h
    k_ptr += first * k_stride_t + head * k_stride_h
    _sweep(
        tl.where(is_dv, k_ptr, v_ptr), tl.where(is_dv, q_ptr, do_ptr), tl.where(is_dv, do_ptr, q_ptr),
        g_ptr + first * g_stride_t + head * g_stride_h,
        tl.where(is_dv, dv_ptr, dk_ptr) + (first * H + head) * V, state_ptr + (row * H + head) * K * V,
        tl.where(is_dv, k_stride_t, v_stride_t), tl.where(is_dv, q_stride_t, do_stride_t),
        tl.where(is_dv, do_stride_t, q_stride_t), g_stride_t,
        tl.where(is_dv, V, 1), tl.where(is_dv, 1, K),
        tl.load(length_ptr + split), row, column, H, scale, inverse_scale,
        is_dv == 0, k_ptr, k_stride_t, states_ptr + (chunk * H + head) * K * V, q_sum_ptr + sums, gate_ptr + sums,
        K, V, BLOCK_K, BLOCK_V, CHUNK, DECAY, True, GATE, PRECISION,
    )  # fmt: skip
