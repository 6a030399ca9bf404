"""The keys' side: sums of blocks, states less those that a plan lists, and gradients of keys."""

from longspan.kernels.block_states.tiles import every_16th, load_state, map_gradient, mapped, store_state
from longspan.kernels.compiler import tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.sparse.tiles import load_tile, store_tile


@launched
@triton.jit
def sums_kernel(
    x_ptr, y_ptr, weight_ptr, out_ptr, start_ptr, length_ptr, x_stride_t, x_stride_h, y_stride_t, y_stride_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, ROWS: tl.constexpr, MAP: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of phi(x) y^T and of phi(x) weight, [blocks, HEADS, K * V + K], of one block and GROUP heads, ROWS at once.
    weight: fp32 [T, HEADS * GROUP], or ones."""
    block, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    first, count = tl.load(start_ptr + block).to(tl.int64), tl.load(length_ptr + block)
    x_ptr += first * x_stride_t + head * GROUP * x_stride_h
    y_ptr += first * y_stride_t + head * GROUP * y_stride_h
    weight_ptr += first * HEADS * GROUP + head * GROUP
    # Transposed, so that both factors are multiplied from shared memory.
    state, normalizer = tl.zeros([BLOCK_V, BLOCK_K], tl.float32), tl.zeros([16, BLOCK_K], tl.float32)
    for turn in range(0, (count + ROWS - 1) // ROWS * GROUP):
        member, row = turn % GROUP, turn // GROUP * ROWS + tl.arange(0, ROWS)
        valid = row < count
        x = load_tile(x_ptr + member * x_stride_h, row, x_stride_t, 0, valid, K, BLOCK_K)
        y = load_tile(y_ptr + member * y_stride_h, row, y_stride_t, 0, valid, V, BLOCK_V)
        phi = mapped(x, valid, MAP, K, BLOCK_K).to(y.dtype)
        state = tl.dot(tl.trans(y), phi, state, input_precision=PRECISION)
        if WEIGHTED:
            weight = tl.load(weight_ptr + row * HEADS * GROUP + member, mask=valid, other=0.0)
            normalizer += every_16th(phi.to(tl.float32) * weight[:, None])
        else:
            normalizer += every_16th(phi.to(tl.float32))
    store_state(out_ptr, tl.program_id(0), tl.trans(state), tl.sum(normalizer, 0), K, V, BLOCK_K, BLOCK_V)


@launched
@triton.jit(do_not_specialize=["count", "capacity"])
def listed_kernel(
    total_ptr, total_row_ptr, states_ptr, out_ptr, ends_ptr, list_ptr, position_ptr, listed_position_ptr,
    count, capacity, SIZE: tl.constexpr, HEADS: tl.constexpr, STATE_HEADS: tl.constexpr, LISTS: tl.constexpr,
    TILE: tl.constexpr, TAKE: tl.constexpr, TOTAL: tl.constexpr, CAUSAL: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """TILE numbers of total - sum of listed states, of one block and head, TAKE at a time. Programs that run together
    take the same numbers of many blocks, which fit a cache."""
    # Lists of a head of the result; the states of a list's head.
    PER_HEAD: tl.constexpr = LISTS // HEADS
    tile, program = tl.program_id(0) // (count * HEADS), tl.program_id(0) % (count * HEADS)
    block, head = program // HEADS, program % HEADS
    element = tile * TILE + tl.arange(0, TILE)
    inside, place = element < SIZE, tl.arange(0, TAKE)
    out = tl.zeros([TILE], tl.float32)
    if TOTAL:
        row = tl.load(total_row_ptr + block).to(tl.int64)
        out += tl.load(total_ptr + (row * HEADS + head) * SIZE + element, mask=inside & (row >= 0), other=0.0)
    if CAUSAL:
        position = tl.load(position_ptr + block)
    for listed in range(head * PER_HEAD, (head + 1) * PER_HEAD):
        first = tl.full([], listed, tl.int64)
        ends, numbers = ends_ptr + first * (count + 1) + block, list_ptr + first * capacity
        stop = tl.load(ends + 1)
        for entry in range(tl.load(ends), stop, TAKE):
            there = entry + place < stop
            number = tl.load(numbers + entry + place, mask=there, other=0)
            if CAUSAL:
                other = tl.load(listed_position_ptr + number, mask=there, other=0)
                there = there & ((position < other) if TRANSPOSED else (other < position))
            at = (number.to(tl.int64) * STATE_HEADS + listed * STATE_HEADS // LISTS) * SIZE
            at, there = at[:, None] + element[None, :], there[:, None] & inside[None, :]
            out -= tl.sum(tl.load(states_ptr + at, mask=there, other=0.0).to(tl.float32), 0)
    at = out_ptr + program.to(tl.int64) * SIZE + element
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=inside)


@launched
@triton.jit
def key_gradients_kernel(
    k_ptr, v_ptr, states_ptr, rows_ptr, dk_ptr, dv_ptr, start_ptr, length_ptr,
    k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, MAP: tl.constexpr, ADD_K: tl.constexpr, ADD_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk [T, HEADS, K] and dv [T, HEADS, V] of a block and head, ROWS at once, from the gradient of the state that they
    are in. ADD_K, ADD_V: added to what is there."""
    block, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    _key_gradients(
        block, head, k_ptr, v_ptr, states_ptr, rows_ptr, dk_ptr, dv_ptr, start_ptr, length_ptr, k_stride_t, k_stride_h,
        v_stride_t, v_stride_h, HEADS, K, V, BLOCK_K, BLOCK_V, ROWS, MAP, ADD_K, ADD_V, PRECISION,
    )  # fmt: skip


@launched
@triton.jit(do_not_specialize=["count", "span"])
def lonely_key_gradients_kernel(
    k_ptr, v_ptr, states_ptr, rows_ptr, dk_ptr, dv_ptr, start_ptr, length_ptr, ends_ptr, count, span,
    k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    HEADS: tl.constexpr, LISTS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, ROWS: tl.constexpr, MAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds them for those of `span` key blocks that no query chose: ends_ptr, a plan's item_ptr."""
    begin, head = tl.program_id(0) // HEADS * span, tl.program_id(0) % HEADS
    ends_ptr += (head * LISTS // HEADS).to(tl.int64) * (count + 1)
    for block in range(begin, tl.minimum(begin + span, count)):
        if tl.load(ends_ptr + block) == tl.load(ends_ptr + block + 1):
            _key_gradients(
                block, head, k_ptr, v_ptr, states_ptr, rows_ptr, dk_ptr, dv_ptr, start_ptr, length_ptr, k_stride_t,
                k_stride_h, v_stride_t, v_stride_h, HEADS, K, V, BLOCK_K, BLOCK_V, ROWS, MAP, True, True, PRECISION,
            )  # fmt: skip


@triton.jit
def _key_gradients(
    block, head, k_ptr, v_ptr, states_ptr, rows_ptr, dk_ptr, dv_ptr, start_ptr, length_ptr,
    k_stride_t, k_stride_h, v_stride_t, v_stride_h,
    HEADS: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, MAP: tl.constexpr, ADD_K: tl.constexpr, ADD_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, count = tl.load(start_ptr + block).to(tl.int64), tl.load(length_ptr + block)
    k_ptr += first * k_stride_t + head * k_stride_h
    v_ptr += first * v_stride_t + head * v_stride_h
    dk_ptr += (first * HEADS + head) * K
    dv_ptr += (first * HEADS + head) * V
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    state, normalizer = load_state(states_ptr, tl.load(rows_ptr + block), head, dtype, HEADS, K, V, BLOCK_K, BLOCK_V)
    for turn in range(0, (count + ROWS - 1) // ROWS):
        row = turn * ROWS + tl.arange(0, ROWS)
        valid = row < count
        k = load_tile(k_ptr, row, k_stride_t, 0, valid, K, BLOCK_K)
        v = load_tile(v_ptr, row, v_stride_t, 0, valid, V, BLOCK_V)
        if ADD_K:  # on its way while products are made
            dk_before = load_tile(dk_ptr, row, HEADS * K, 0, valid, K, BLOCK_K)
        if ADD_V:
            dv_before = load_tile(dv_ptr, row, HEADS * V, 0, valid, V, BLOCK_V)
        phi = mapped(k, valid, MAP, K, BLOCK_K).to(dtype)
        d_phi = tl.dot(v, tl.trans(state), input_precision=PRECISION) + normalizer[None, :]
        dk = map_gradient(k, phi.to(tl.float32), d_phi, MAP)
        if ADD_K:
            dk += dk_before.to(tl.float32)
        store_tile(dk_ptr, row, HEADS * K, 0, valid, dk, K, BLOCK_K)
        dv = tl.dot(phi, state, input_precision=PRECISION)
        if ADD_V:
            dv += dv_before.to(tl.float32)
        store_tile(dv_ptr, row, HEADS * V, 0, valid, dv, V, BLOCK_V)


@launched
@triton.jit
def inside_key_gradients_kernel(
    k_ptr, v_ptr, states_ptr, rows_ptr, q_ptr, d_num_ptr, d_den_ptr, dk_ptr, dv_ptr, start_ptr, length_ptr,
    k_stride_t, k_stride_h, v_stride_t, v_stride_h, q_stride_t, q_stride_h,
    HEADS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, MAP: tl.constexpr,
    ADD_K: tl.constexpr, ADD_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk [T, HEADS, K] and dv [T, HEADS, V] of one of PARTS of a block, ROWS rows, and one head: from the gradient of
    the state that they are in and from queries of the same block. ADD_K, ADD_V: added to what is there."""
    block, head = tl.program_id(0) // (HEADS * PARTS), tl.program_id(0) % HEADS
    part = tl.program_id(0) // HEADS % PARTS
    first, count = tl.load(start_ptr + block).to(tl.int64), tl.load(length_ptr + block)
    row = part * ROWS + tl.arange(0, ROWS)
    valid = row < count
    k_ptr += first * k_stride_t + head * k_stride_h
    k = load_tile(k_ptr, row, k_stride_t, 0, valid, K, BLOCK_K)
    v = load_tile(v_ptr + first * v_stride_t + head * v_stride_h, row, v_stride_t, 0, valid, V, BLOCK_V)
    rounded = mapped(k, valid, MAP, K, BLOCK_K).to(k.dtype)
    state, normalizer = load_state(states_ptr, tl.load(rows_ptr + block), head, k.dtype, HEADS, K, V, BLOCK_K, BLOCK_V)
    dv = tl.dot(rounded, state, input_precision=PRECISION)
    d_phi = tl.zeros([ROWS, BLOCK_K], tl.float32) + normalizer[None, :]
    d_phi = tl.dot(v, tl.trans(state), d_phi, input_precision=PRECISION)
    for turn in range(part * GROUP, PARTS * GROUP):
        query, member = turn // GROUP * ROWS + tl.arange(0, ROWS), head * GROUP + turn % GROUP
        asks = query < count
        q = load_tile(q_ptr + first * q_stride_t + member * q_stride_h, query, q_stride_t, 0, asks, K, BLOCK_K)
        at = first * HEADS * GROUP + member
        d_num = load_tile(d_num_ptr + at * V, query, HEADS * GROUP * V, 0, asks, V, BLOCK_V)
        d_den = tl.load(d_den_ptr + at + query * HEADS * GROUP, mask=asks, other=0.0)
        phi_q = mapped(q, asks, MAP, K, BLOCK_K).to(k.dtype)
        seen = row[:, None] <= query[None, :]
        scores = tl.where(seen, tl.dot(rounded, tl.trans(phi_q), input_precision=PRECISION), 0.0)
        dv = tl.dot(scores.to(k.dtype), d_num, dv, input_precision=PRECISION)
        d_scores = tl.dot(v, tl.trans(d_num), input_precision=PRECISION) + d_den[None, :]
        d_scores = tl.where(seen, d_scores, 0.0)
        d_phi = tl.dot(d_scores.to(k.dtype), phi_q, d_phi, input_precision=PRECISION)
    at = first * HEADS + head
    if ADD_V:
        dv += load_tile(dv_ptr + at * V, row, HEADS * V, 0, valid, V, BLOCK_V).to(tl.float32)
    store_tile(dv_ptr + at * V, row, HEADS * V, 0, valid, dv, V, BLOCK_V)
    k = load_tile(k_ptr, row, k_stride_t, 0, valid, K, BLOCK_K)  # phi(k) did not stay in registers
    dk = map_gradient(k, mapped(k, valid, MAP, K, BLOCK_K), d_phi, MAP)
    if ADD_K:
        dk += load_tile(dk_ptr + at * K, row, HEADS * K, 0, valid, K, BLOCK_K).to(tl.float32)
    store_tile(dk_ptr + at * K, row, HEADS * K, 0, valid, dk, K, BLOCK_K)
