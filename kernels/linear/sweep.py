"""The Triton kernels behind none, fixed and scalar decay: the sum of a split, and the sweep through a split.

With rows x, y of width K and z of width V, G the inclusive cumulative log decay in a chunk, S the state entering it:

    out_i = scale (sum_{j <= i} exp(G_i - G_j) (x_i . y_j) z_j + exp(G_i) S^T x_i)
    S    <- exp(G_C) S + sum_j exp(G_C - G_j) y_j z_j^T

Forward is (x, y, z) = (q, k, v). dq has the same form with (d_out, v, k) and the transposed state. With time reversed,
where token i reads tokens j >= i, dk is (v, d_out, q) and dv is (k, q, d_out) with the exit gradient as state. So no
kernel transposes the result of a product, which Triton before 3.7.1 miscompiles on Hopper, and every tensor is read in
the order it lies in memory. The state stays on chip for the whole split. Derivation: docs/linear-attention.md.
"""

from longspan.kernels.compiler import tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.linear.form import CLOSED_FP32
from longspan.kernels.linear.splits import LEFT_OUT_LOG2

LOG2E = tl.constexpr(1.4426950408889634)
FORGOTTEN = tl.constexpr(-24.0)  # log2 of the decay of a chunk below which nothing is taken to pass through it
LEFT_OUT = tl.constexpr(LEFT_OUT_LOG2)
CLOSED = tl.constexpr(CLOSED_FP32)
SEARCHED = tl.constexpr(64)  # chunks whose decays are read at once


@triton.jit
def _program(columns, H):
    """(column block, head, place) of this program. One axis: the others end at 65,535, and there may be more splits."""
    program = tl.program_id(0)
    return program % columns, (program // columns % H).to(tl.int64), program // columns // H


@launched
@triton.jit(do_not_specialize=["T"])
def decay_kernel(
    g_ptr, decay_ptr, first_ptr, length_ptr, g_stride_t, g_stride_h, T,
    H, BLOCK_H: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """log2 decay from the start of each token's chunk to the token, inclusive -> decay [h, t, 0], and from after the
    token to the end of its chunk -> decay [h, t, 1]. Summed in fp64, each from its own side: small sums are exact."""
    chunk = tl.program_id(0)
    first, length = tl.load(first_ptr + chunk).to(tl.int64), tl.load(length_ptr + chunk)
    head, index = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, CHUNK)
    inside = (index < length)[:, None] & (head < H)[None, :]
    g_at = g_ptr + (first + index)[:, None] * g_stride_t + head[None, :] * g_stride_h
    g = tl.load(g_at, mask=inside, other=0.0)
    g = tl.where(g < CLOSED, CLOSED, g).to(tl.float64) * LOG2E
    at = decay_ptr + (head[None, :].to(tl.int64) * T + (first + index)[:, None]) * 2
    kind = decay_ptr.dtype.element_ty
    tl.store(at, tl.cumsum(g, 0).to(kind), mask=inside)
    tl.store(at + 1, (tl.cumsum(g, 0, reverse=True) - g).to(kind), mask=inside)


@triton.jit
def _per_token(decay_ptr, head, DECAY: tl.constexpr):
    """log2 of a fixed decay; 0 for others."""
    gamma = 0.0
    if DECAY == "fixed":
        gamma = tl.load(decay_ptr + head).to(tl.float32)
        gamma = tl.where(gamma < CLOSED, CLOSED, gamma) * LOG2E
    return gamma


@triton.jit
def _load_decays(decay_ptr, at, index, count, DECAY: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr):
    """What `_decays` needs of the chunk that starts at token `at` and has `count` tokens: both decays of each row,
    [CHUNK, 2], and that of the chunk. One load of both: a smaller one would be repeated for every layout in which they
    are used, and all of these copied ahead, with an address each in registers."""
    rows, total = 0.0, 0.0
    if DECAY == "scalar":
        rows_at = decay_ptr + at * 2 + (index[:, None] * 2 + tl.arange(0, 2)[None, :])
        if FULL:
            rows, total = tl.load(rows_at), tl.load(decay_ptr + at * 2 + 2 * (CHUNK - 1))
        else:
            rows = tl.load(rows_at, mask=(index < count)[:, None], other=0.0)
            total = tl.load(decay_ptr + at * 2 + (count - 1) * 2)
    return rows, total


@triton.jit
def _decays(rows, total, index, count, gamma, DECAY: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr):
    """log2 decay of a chunk's rows: from its start to each row (inclusive), from after each row to its end, and in all.

    Rows past `count` hold zeros wherever these are used, and must only stay finite. FULL: there are none.
    """
    if DECAY == "fixed":
        place = (index + 1).to(tl.float32)
        if FULL:
            count = tl.full([], CHUNK, tl.int32)
        from_start, to_end = place * gamma, tl.maximum(count - place, 0.0) * gamma
        total = count.to(tl.float32) * gamma
    else:
        from_start, to_end = tl.split(rows)
        if not FULL:
            from_start = tl.where(index < count, from_start, total)
        to_end, total = to_end.to(tl.float32), total.to(tl.float32)
    return from_start, to_end, total


@launched
@triton.jit(do_not_specialize=["scale", "T"])
def sum_kernel(
    y_ptr, z_ptr, decay_ptr, sum_ptr, total_ptr,
    list_ptr, first_ptr, length_ptr, row_ptr,
    y_stride_t, y_stride_h, z_stride_t, z_stride_h, scale, T,
    H, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale * sum over a split of exp(w_t) y_t z_t^T -> fp32 [row, h, K, V], and the split's log decay -> [row, h].

    w_t: log decay from after t to the end of the split (forward), from the start of the split to t (REVERSE). Chunks
    that are forgotten there are not read.
    """
    columns: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    column, head, place = _program(columns, H)
    split = tl.load(list_ptr + place)
    first, length = tl.load(first_ptr + split).to(tl.int64), tl.load(length_ptr + split)
    row = tl.load(row_ptr + split).to(tl.int64) * H + head
    index, k, v = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K), column * BLOCK_V + tl.arange(0, BLOCK_V)
    y_ptr += first * y_stride_t + head * y_stride_h
    z_ptr += first * z_stride_t + head * z_stride_h
    y_at, z_at = index[:, None] * y_stride_t + k[None, :], index[:, None] * z_stride_t + v[None, :]
    gamma = _per_token(decay_ptr, head, DECAY)
    decay_ptr += (head * T + first) * 2

    chunks = tl.cdiv(length, CHUNK)
    kept, total_log = _remembered(decay_ptr, length, chunks, gamma, CHUNK, DECAY, REVERSE)
    state = tl.zeros([BLOCK_K, BLOCK_V], dtype=tl.float32)
    passed = 0.0  # log2 decay between this chunk and the end that weights count to
    for n in range(0, kept):
        start = (n if REVERSE else chunks - 1 - n) * CHUNK
        at, count = start.to(tl.int64), tl.minimum(length - start, CHUNK)
        valid = (index < count)[:, None]
        y = tl.load(y_ptr + at * y_stride_t + y_at, mask=valid & (k < K)[None, :], other=0.0)
        z = tl.load(z_ptr + at * z_stride_t + z_at, mask=valid & (v < V)[None, :], other=0.0)
        if DECAY != "none":
            rows, total = _load_decays(decay_ptr, at, index, count, DECAY, CHUNK, False)
            from_start, to_end, total = _decays(rows, total, index, count, gamma, DECAY, CHUNK, False)
            weight = tl.exp2((passed + (from_start if REVERSE else to_end)).to(tl.float32))
            z = (z * weight[:, None]).to(z.dtype)
            passed += total
        state = tl.dot(tl.trans(y), z, state, input_precision=PRECISION)
    at = sum_ptr + row * K * V + k[:, None] * V + v[None, :]
    tl.store(at, state * scale, mask=(k < K)[:, None] & (v < V)[None, :])
    if DECAY != "none":
        if column == 0:
            tl.store(total_ptr + row, total_log / LOG2E)


@triton.jit
def _remembered(decay_ptr, length, chunks, gamma, CHUNK: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr):
    """How many chunks of a split, counted from the end that weights count to, are not forgotten there; and the log2
    decay of the whole split."""
    kept, passed = chunks, 0.0
    if DECAY == "fixed":
        passed = gamma * length.to(tl.float32)
        if passed < LEFT_OUT:  # the last chunk may be short, and one more is for rounding down
            kept = tl.minimum(chunks, (1.0 / gamma * (LEFT_OUT / CHUNK)).to(tl.int32) + 2)
    elif DECAY == "scalar":
        place, kept = tl.arange(0, SEARCHED), chunks * 0
        for block in range(0, tl.cdiv(chunks, SEARCHED)):
            nth = block * SEARCHED + place
            chunk = nth if REVERSE else chunks - 1 - nth
            last = tl.minimum(chunk.to(tl.int64) * CHUNK + CHUNK, length) - 1
            total = tl.load(decay_ptr + last * 2, mask=nth < chunks, other=0.0).to(tl.float32)
            before = passed + tl.cumsum(total, 0) - total
            kept += tl.sum(((nth < chunks) & ~(before < LEFT_OUT)).to(tl.int32))
            passed += tl.sum(total)
    return kept, passed


@triton.jit
def _load_rows(ptr, stride, column, index, count, WIDTH: tl.constexpr, ALL: tl.constexpr, FULL: tl.constexpr):
    """Rows of a chunk, zero after `count`. ALL: no column is past WIDTH; FULL: no row is past `count`."""
    at = ptr + (index[:, None] * stride + column[None, :])
    if FULL and ALL:
        return tl.load(at)
    if FULL:
        return tl.load(at, mask=(column < WIDTH)[None, :], other=0.0)
    if ALL:
        return tl.load(at, mask=(index < count)[:, None], other=0.0)
    return tl.load(at, mask=(index < count)[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def _chunk(
    state, start, count, column, x_ptr, y_ptr, z_ptr, decay_ptr, out_ptr, extra_ptr, rows_ptr, through_ptr,
    x_stride_t: tl.constexpr, y_stride_t: tl.constexpr, z_stride_t: tl.constexpr, out_stride_t: tl.constexpr,
    extra_stride_t: tl.constexpr, H, gamma, scale,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """One chunk, of which FULL says that it has all its tokens; gives the state after it."""
    index, k, v = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K), column * BLOCK_V + tl.arange(0, BLOCK_V)
    ALL_K: tl.constexpr = K == BLOCK_K
    ALL_V: tl.constexpr = V % BLOCK_V == 0
    earlier = index[:, None] <= index[None, :] if REVERSE else index[:, None] >= index[None, :]
    at = tl.full([], start, tl.int64)  # the interpreter counts loops in Python
    rows, total = _load_decays(decay_ptr, at, index, count, DECAY, CHUNK, FULL)
    x = _load_rows(x_ptr + at * x_stride_t, x_stride_t, k, index, count, K, ALL_K, FULL)
    y = _load_rows(y_ptr + at * y_stride_t, y_stride_t, k, index, count, K, ALL_K, FULL)
    z = _load_rows(z_ptr + at * z_stride_t, z_stride_t, v, index, count, V, ALL_V, FULL)
    if GATE:
        extra = _load_rows(extra_ptr + at * extra_stride_t, extra_stride_t, v, index, count, V, ALL_V, FULL)
    weighted = z
    scores = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    if REVERSE:  # measured: backward in time this product is better issued here, forward below
        out = tl.dot(x, state.to(x.dtype), input_precision=PRECISION)
    if DECAY == "none":
        weights = tl.where(earlier, scores, 0.0).to(z.dtype)
    else:
        from_start, to_end, total = _decays(rows, total, index, count, gamma, DECAY, CHUNK, FULL)
        if DECAY == "fixed":  # a difference of rounded products, contracted, would not be 0 on the diagonal
            between = (index[:, None] - index[None, :]).to(tl.float32) * gamma
        else:
            between = (from_start[:, None] - from_start[None, :]).to(tl.float32)
        between = tl.where(earlier, -between if REVERSE else between, float("-inf"))
        weights = (scores * tl.exp2(between)).to(z.dtype)
        from_start, to_end = tl.exp2(from_start.to(tl.float32)), tl.exp2(to_end)
        weighted = (z * (from_start if REVERSE else to_end)[:, None]).to(z.dtype)
    if not REVERSE:
        out = tl.dot(x, state.to(x.dtype), input_precision=PRECISION)
    if DECAY != "none":
        out *= (to_end if REVERSE else from_start)[:, None]
    if GATE and REVERSE:
        if total < FORGOTTEN:
            tl.store(through_ptr + start // CHUNK * H, tl.sum(out * extra.to(tl.float32)) * scale)
    out = tl.dot(weights, z, out, input_precision=PRECISION) * scale
    out_at = out_ptr + at * out_stride_t + (index[:, None] * out_stride_t + v[None, :])
    if FULL and ALL_V:
        tl.store(out_at, out.to(out_ptr.dtype.element_ty))
    else:
        tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=(index < count)[:, None] & (v < V)[None, :])
    if GATE:
        tl.store(rows_ptr + at + index, tl.sum(out * extra.to(tl.float32), 1), mask=index < count)
    if DECAY != "none":
        state *= tl.exp2(total)
    return tl.dot(tl.trans(y), weighted, state, input_precision=PRECISION)


@triton.jit
def _sweep(
    x_ptr, y_ptr, z_ptr, decay_ptr, out_ptr, state_ptr, extra_ptr, rows_ptr, through_ptr,
    x_stride_t: tl.constexpr, y_stride_t: tl.constexpr, z_stride_t: tl.constexpr, extra_stride_t: tl.constexpr,
    state_stride_k, state_stride_v, length, row, column, gamma, scale, state_scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split, head and block of columns of z; pointers stand at its first token. row: of the state that enters.

    GATE: what `gate_kernel` adds up, over this block of columns, from dq (extra = q) or REVERSE dk (extra = k):
    rowsum(extra . out) -> rows [t]; REVERSE, where nothing passes through a chunk, what passes its end -> through.
    """
    k, v = tl.arange(0, BLOCK_K), column * BLOCK_V + tl.arange(0, BLOCK_V)
    state = tl.zeros([BLOCK_K, BLOCK_V], dtype=tl.float32)
    if row >= 0:
        at = k[:, None] * state_stride_k + v[None, :] * state_stride_v
        state = tl.load(state_ptr + at, mask=(k < K)[:, None] & (v < V)[None, :], other=0.0) * state_scale
    full = length // CHUNK
    rest = length - full * CHUNK
    # Only the last chunk of a span may be short: whole ones need no masks, and keep their fixed decays in registers.
    if REVERSE:
        if rest > 0:
            state = _chunk(
                state, full * CHUNK, rest, column, x_ptr, y_ptr, z_ptr, decay_ptr, out_ptr, extra_ptr, rows_ptr,
                through_ptr, x_stride_t, y_stride_t, z_stride_t, H * V, extra_stride_t, H, gamma, scale,
                K, V, BLOCK_K, BLOCK_V, CHUNK, DECAY, REVERSE, GATE, PRECISION, FULL=False,
            )  # fmt: skip
    for n in range(0, full):
        state = _chunk(
            state, (full - 1 - n if REVERSE else n) * CHUNK, CHUNK, column, x_ptr, y_ptr, z_ptr, decay_ptr, out_ptr,
            extra_ptr, rows_ptr, through_ptr, x_stride_t, y_stride_t, z_stride_t, H * V, extra_stride_t, H,
            gamma, scale, K, V, BLOCK_K, BLOCK_V, CHUNK, DECAY, REVERSE, GATE, PRECISION, FULL=True,
        )  # fmt: skip
    if not REVERSE:
        if rest > 0:
            _chunk(
                state, full * CHUNK, rest, column, x_ptr, y_ptr, z_ptr, decay_ptr, out_ptr, extra_ptr, rows_ptr,
                through_ptr, x_stride_t, y_stride_t, z_stride_t, H * V, extra_stride_t, H, gamma, scale,
                K, V, BLOCK_K, BLOCK_V, CHUNK, DECAY, REVERSE, GATE, PRECISION, FULL=False,
            )  # fmt: skip


@launched
@triton.jit(do_not_specialize=["scale", "T"])
def sweep_kernel(
    x_ptr, y_ptr, z_ptr, decay_ptr, out_ptr, state_ptr, extra_ptr, rows_ptr,
    first_ptr, length_ptr, row_ptr,
    x_stride_t: tl.constexpr, x_stride_h, y_stride_t: tl.constexpr, y_stride_h, z_stride_t: tl.constexpr, z_stride_h,
    extra_stride_t: tl.constexpr, extra_stride_h, state_stride_k, state_stride_v, scale, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, DECAY: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Forward in time: out [T, H, V] of every split; GATE: rows [blocks, H, T]. Grid: column blocks x H x splits."""
    columns: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    column, head, split = _program(columns, H)
    first, row = tl.load(first_ptr + split).to(tl.int64), tl.load(row_ptr + split).to(tl.int64)
    gamma = _per_token(decay_ptr, head, DECAY)
    _sweep(
        x_ptr + first * x_stride_t + head * x_stride_h, y_ptr + first * y_stride_t + head * y_stride_h,
        z_ptr + first * z_stride_t + head * z_stride_h, decay_ptr + (head * T + first) * 2,
        out_ptr + (first * H + head) * V, state_ptr + (row * H + head) * K * V,
        extra_ptr + first * extra_stride_t + head * extra_stride_h,
        rows_ptr + (column * H + head) * T + first, rows_ptr,
        x_stride_t, y_stride_t, z_stride_t, extra_stride_t, state_stride_k, state_stride_v,
        tl.load(length_ptr + split), row, column, gamma, scale, 1.0,
        H, K, V, BLOCK_K, BLOCK_V, CHUNK, DECAY, False, GATE, PRECISION,
    )  # fmt: skip


@launched
@triton.jit(do_not_specialize=["scale", "inverse_scale", "T", "num_chunks"])
def reverse_kernel(
    v_ptr, do_ptr, q_ptr, k_ptr, decay_ptr, dk_ptr, dv_ptr, state_ptr, rows_ptr, through_ptr,
    first_ptr, length_ptr, row_ptr, split_chunk_ptr,
    v_stride_t: tl.constexpr, v_stride_h, do_stride_t: tl.constexpr, do_stride_h,
    q_stride_t: tl.constexpr, q_stride_h, k_stride_t: tl.constexpr, k_stride_h, scale, inverse_scale, T, num_chunks,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, DECAY: tl.constexpr, WHICH: tl.constexpr, GATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward in time. K: width of x and y, V: of z and the result, which is WHICH: "dk", "dv", or, where widths and
    strides are equal, "both": its halves run side by side and read the same tokens, so that the second read of q and
    d_out comes from L2. GATE, for "dk": rows [blocks, H, T] and through [blocks, chunks, H]. Grid: (column blocks of
    dk, then of dv) x H x splits.
    """
    columns: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    column, head, split = _program(columns * 2 if WHICH == "both" else columns, H)
    first, row = tl.load(first_ptr + split).to(tl.int64), tl.load(row_ptr + split).to(tl.int64)
    gamma = _per_token(decay_ptr, head, DECAY)
    rows_ptr += (column * H + head) * T + first
    through_ptr += (column.to(tl.int64) * num_chunks + tl.load(split_chunk_ptr + split)) * H + head
    v_ptr += first * v_stride_t + head * v_stride_h
    do_ptr += first * do_stride_t + head * do_stride_h
    q_ptr += first * q_stride_t + head * q_stride_h
    k_ptr += first * k_stride_t + head * k_stride_h
    is_dv = WHICH == "dv"
    if WHICH == "both":
        is_dv = column >= columns
        column = column % columns
    if WHICH == "dv":
        x_stride_t: tl.constexpr = k_stride_t
        y_stride_t: tl.constexpr = q_stride_t
        z_stride_t: tl.constexpr = do_stride_t
    else:
        x_stride_t: tl.constexpr = v_stride_t
        y_stride_t: tl.constexpr = do_stride_t
        z_stride_t: tl.constexpr = q_stride_t
    _sweep(
        tl.where(is_dv, k_ptr, v_ptr), tl.where(is_dv, q_ptr, do_ptr), tl.where(is_dv, do_ptr, q_ptr),
        decay_ptr + (head * T + first) * 2,
        tl.where(is_dv, dv_ptr, dk_ptr) + (first * H + head) * V, state_ptr + (row * H + head) * K * V,
        k_ptr, rows_ptr, through_ptr, x_stride_t, y_stride_t, z_stride_t, k_stride_t,
        tl.where(is_dv, V, 1), tl.where(is_dv, 1, K),
        tl.load(length_ptr + split), row, column, gamma, scale, inverse_scale,
        H, K, V, BLOCK_K, BLOCK_V, CHUNK, DECAY, True, GATE, PRECISION,
    )  # fmt: skip
