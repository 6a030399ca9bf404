"""Sums of long blocks and gradients of the queries' side of whole.py on Hopper GPUs: a warpgroup goes through the rows,
another one adds up the state that follows from them, and a warp fetches what they take by TMA."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from longspan.kernels.launch import launched
from longspan.kernels.sparse.hopper.tiles import (
    async_load,
    load_rows,
    make_barriers,
    matrix_of,
    product_layout,
    row_layout,
    scaled_map,
    shared_layout,
    store_rows,
)

STAGES = 3


@gluon.jit
def _send(x_desc, y_desc, tiles, walk, GROUP: gl.constexpr, STAGES: gl.constexpr):
    x_tiles, y_tiles, ready, free = tiles
    first, count, head = walk
    K: gl.constexpr = x_tiles.shape[2]
    V: gl.constexpr = y_tiles.shape[2]
    for turn in range(0, gl.cdiv(count, 64) * GROUP):
        stage, phase = turn % STAGES, (turn // STAGES) & 1
        row, at = first + turn // GROUP * 64, head + turn % GROUP
        mbarrier.wait(free.index(stage), phase ^ 1)
        mbarrier.expect(ready.index(stage), 64 * (K + V) * 2)
        async_load(x_desc, [row, at * K], ready.index(stage), x_tiles.index(stage))
        async_load(y_desc, [row, at * V], ready.index(stage), y_tiles.index(stage))


@gluon.jit
def _rows(
    tiles, between, walk, given, GROUP: gl.constexpr, HEADS: gl.constexpr, MAP: gl.constexpr, STAGES: gl.constexpr
):
    """dq; u and rowsum(u * D) for the other warpgroup; the sum of d_out over rows that weigh nothing, which u lacks."""
    q_tiles, d_out_tiles, ready, free = tiles
    units, alongs, units_ready, units_free, projected = between
    first, count, head = walk
    first = first.to(gl.int64)
    q_ptr, d_out_ptr, states_ptr, dq_ptr, d_bias_ptr, there, q_stride_t, q_stride_h, d_out_stride_t, d_out_stride_h = (
        given
    )
    dtype: gl.constexpr = q_tiles.dtype
    K: gl.constexpr = q_tiles.shape[2]
    V: gl.constexpr = d_out_tiles.shape[2]
    L: gl.constexpr = product_layout(K)
    WIDE: gl.constexpr = row_layout(V)
    for half in gl.static_range(K // 64):
        row = half * 64 + gl.arange(0, 64, gl.SliceLayout(1, WIDE))
        at = row[:, None] * V + gl.arange(0, V, gl.SliceLayout(0, WIDE))[None, :]
        matrix = gl.load(states_ptr + at, mask=there & (row < K)[:, None], other=0.0)
        projected.slice(half * 64, 64).store(matrix.to(dtype))
    fence_async_shared()
    normalizer_ptr = states_ptr + K * V
    normalizer = gl.load(normalizer_ptr + gl.arange(0, K, gl.SliceLayout(0, L)))
    normalizer = gl.where(there, normalizer, gl.zeros_like(normalizer))
    nothing = gl.full([64, K], 0.0, gl.float32, L)
    missing = gl.full([64], 0, gl.int32, gl.SliceLayout(1, L))
    turns = gl.cdiv(count, 64) * GROUP
    for turn in range(0, turns):
        stage, phase, place = turn % STAGES, (turn // STAGES) & 1, turn % 2
        mbarrier.wait(ready.index(stage), phase)
        pending = warpgroup_mma(
            d_out_tiles.index(stage), projected.permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        x = q_tiles.index(stage).load(L).to(gl.float32)
        phi = scaled_map(x, MAP)
        weight = gl.sum(phi * normalizer[None, :], 1)
        valid = turn // GROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, L)) < count
        weighs = valid & (weight > 0)
        missing = missing | (valid & (weight <= 0)).to(gl.int32)
        inverse = gl.where(weighs, 1.0 / gl.where(weighs, weight, 1.0), 0.0)
        rounded = (phi * inverse[:, None]).to(dtype)
        unit = rounded.to(gl.float32)
        if MAP == "softmax":
            factor = unit
        elif MAP == "elu1":
            factor = gl.where(x < 0, unit, gl.zeros_like(unit) + inverse[:, None])
        else:
            factor = gl.zeros_like(unit) + inverse[:, None]
        mbarrier.wait(units_free.index(place), (turn // 2) & 1 ^ 1)
        units.index(place).store(rounded)
        d_phi = warpgroup_mma_wait(0, deps=[pending])
        along = gl.sum(unit * d_phi, 1)
        alongs.index(place).store(along)
        fence_async_shared()
        mbarrier.arrive(units_ready.index(place))
        mbarrier.arrive(free.index(stage))
        dq = (d_phi - along[:, None] * normalizer[None, :]) * factor
        store_rows(dq_ptr + (head + turn % GROUP) * K, first, count, turn // GROUP, HEADS, 1, K, dq)
    d_bias = gl.full([V], 0.0, gl.float32, gl.SliceLayout(0, WIDE))
    if gl.max(missing, 0) > 0:
        once_more = gl.load(normalizer_ptr + gl.arange(0, K, gl.SliceLayout(0, row_layout(K))))
        once_more = gl.where(there, once_more, gl.zeros_like(once_more))
        for turn in range(0, turns):
            member, part = head + turn % GROUP, turn // GROUP
            q = load_rows(q_ptr + member * q_stride_h, first, count, part, q_stride_t, 0, 1, K, row_layout(K))
            lost = gl.sum(scaled_map(q.to(gl.float32), MAP) * once_more[None, :], 1) <= 0
            lost = gl.convert_layout(lost.to(gl.float32), gl.SliceLayout(1, WIDE))
            d_out = load_rows(d_out_ptr + member * d_out_stride_h, first, count, part, d_out_stride_t, 0, 1, V, WIDE)
            d_bias += gl.sum(d_out.to(gl.float32) * lost[:, None], 0)
    gl.store(d_bias_ptr + gl.arange(0, V, gl.SliceLayout(0, WIDE)), d_bias)


@gluon.jit
def _features(tiles, between, walk, GROUP: gl.constexpr, MAP: gl.constexpr, STAGES: gl.constexpr):
    """phi(x) for the other warpgroup."""
    x_tiles, y_tiles, ready, free = tiles
    units, alongs, units_ready, units_free, projected = between
    first, count, head = walk
    L: gl.constexpr = product_layout(x_tiles.shape[2])
    for turn in range(0, gl.cdiv(count, 64) * GROUP):
        stage, place = turn % STAGES, turn % 2
        mbarrier.wait(ready.index(stage), (turn // STAGES) & 1)
        phi = scaled_map(x_tiles.index(stage).load(L).to(gl.float32), MAP)
        valid = turn // GROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, L)) < count
        if MAP == "softmax":
            phi = phi * gl.where(valid, 1.0 / gl.sum(phi, 1), 0.0)[:, None]
        else:
            phi = gl.where(valid[:, None], phi, gl.zeros_like(phi))
        mbarrier.wait(units_free.index(place), (turn // 2) & 1 ^ 1)
        units.index(place).store(phi.to(x_tiles.dtype))
        fence_async_shared()
        mbarrier.arrive(units_ready.index(place))
        mbarrier.arrive(free.index(stage))


@gluon.jit
def _sums(
    tiles, between, turns, states_ptr, there, sums_ptr, d_bias_ptr, GRADIENTS: gl.constexpr, STAGES: gl.constexpr
):
    """G = sum u^T d_out, dz = -sum u^T rowsum(u * D) and G^T z; or without GRADIENTS sums of phi(x) y^T and phi(x)."""
    x_tiles, y_tiles, ready, free = tiles
    units, alongs, units_ready, units_free, projected = between
    K: gl.constexpr = x_tiles.shape[2]
    V: gl.constexpr = y_tiles.shape[2]
    L: gl.constexpr = product_layout(K)
    SUMS: gl.constexpr = product_layout(V)
    sums = gl.full([K, V], 0.0, gl.float32, SUMS)
    normalizer = gl.full([64, K], 0.0, gl.float32, L)
    for turn in range(0, turns):
        stage, phase, place = turn % STAGES, (turn // STAGES) & 1, turn % 2
        mbarrier.wait(ready.index(stage), phase)
        mbarrier.wait(units_ready.index(place), (turn // 2) & 1)
        pending = warpgroup_mma(units.index(place).permute((1, 0)), y_tiles.index(stage), sums, is_async=True)
        unit = units.index(place).load(L).to(gl.float32)
        if GRADIENTS:
            normalizer -= unit * alongs.index(place).load(gl.SliceLayout(1, L))[:, None]
        else:
            normalizer += unit
        mbarrier.wait(ready.index(stage), phase)  # passed already: keeps the next wait behind the arithmetic
        sums = warpgroup_mma_wait(0, deps=[pending])
        mbarrier.arrive(units_free.index(place))
        mbarrier.arrive(free.index(stage))
    key, value = gl.arange(0, K, gl.SliceLayout(1, SUMS)), gl.arange(0, V, gl.SliceLayout(0, SUMS))
    if GRADIENTS:
        of_state = gl.load(states_ptr + K * V + key)
        of_state = gl.where(there, of_state, gl.zeros_like(of_state))
        gl.store(d_bias_ptr + value, gl.sum(sums * of_state[:, None], 0))
    gl.store(sums_ptr + key[:, None] * V + value[None, :], sums.to(sums_ptr.dtype.element_ty))
    normalizer = gl.sum(normalizer, 0).to(sums_ptr.dtype.element_ty)
    gl.store(sums_ptr + K * V + gl.arange(0, K, gl.SliceLayout(0, L)), normalizer)


@launched
@gluon.jit
def sums_kernel(
    x_desc, y_desc, sums_ptr, start_ptr, length_ptr, HEADS: gl.constexpr, GROUP: gl.constexpr, K: gl.constexpr,
    V: gl.constexpr, MAP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As kernels.block_states.keys.sums_kernel, without weights."""
    block, head = gl.program_id(0) // HEADS, gl.program_id(0) % HEADS * GROUP
    dtype: gl.constexpr = x_desc.dtype
    x_tiles = gl.allocate_shared_memory(dtype, [STAGES, 64, K], shared_layout(16))
    y_tiles = gl.allocate_shared_memory(dtype, [STAGES, 64, V], shared_layout(16))
    units = gl.allocate_shared_memory(dtype, [2, 64, K], shared_layout(16))
    first, count = gl.load(start_ptr + block), gl.load(length_ptr + block)
    sums_ptr += gl.program_id(0).to(gl.int64) * (K * V + K)
    tiles = x_tiles, y_tiles, make_barriers(STAGES, 1), make_barriers(STAGES, 2)
    between = units, 0, make_barriers(2, 1), make_barriers(2, 1), 0
    walk, turns = (first, count, head), gl.cdiv(count, 64) * GROUP
    gl.warp_specialize(
        [
            (_features, (tiles, between, walk, GROUP, MAP, STAGES)),
            (_sums, (tiles, between, turns, 0, 0, sums_ptr, 0, False, STAGES)),
            (_send, (x_desc, y_desc, tiles, walk, GROUP, STAGES)),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip


@launched
@gluon.jit
def whole_query_gradients_kernel(
    q_desc, d_out_desc, d_out_ptr, q_ptr, states_ptr, rows_ptr, dq_ptr, sums_ptr, d_bias_ptr, start_ptr, length_ptr,
    d_out_stride_t, d_out_stride_h, q_stride_t, q_stride_h, HEADS: gl.constexpr, KEY_HEADS: gl.constexpr,
    K: gl.constexpr, V: gl.constexpr, MAP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As kernels.block_states.whole.whole_query_gradients_kernel; d_bias [blocks, KEY_HEADS, 2, V] in two parts."""
    block, key_head = gl.program_id(0) // KEY_HEADS, gl.program_id(0) % KEY_HEADS
    GROUP: gl.constexpr = HEADS // KEY_HEADS
    dtype: gl.constexpr = q_desc.dtype
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, 64, K], shared_layout(16))
    d_out_tiles = gl.allocate_shared_memory(dtype, [STAGES, 64, V], shared_layout(16))
    units = gl.allocate_shared_memory(dtype, [2, 64, K], shared_layout(16))
    projected = gl.allocate_shared_memory(dtype, [K, V], shared_layout(16))
    alongs = gl.allocate_shared_memory(gl.float32, [2, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    first, count, head = gl.load(start_ptr + block), gl.load(length_ptr + block), key_head * GROUP
    state = gl.load(rows_ptr + block)
    there = state >= 0
    states_ptr += (gl.maximum(state, 0).to(gl.int64) * KEY_HEADS + key_head) * (K * V + K)
    sums_ptr += gl.program_id(0).to(gl.int64) * (K * V + K)
    d_bias_ptr += gl.program_id(0) * (2 * V)
    tiles = q_tiles, d_out_tiles, make_barriers(STAGES, 1), make_barriers(STAGES, 2)
    between = units, alongs, make_barriers(2, 1), make_barriers(2, 1), projected
    walk = first, count, head
    given = (
        q_ptr, d_out_ptr, states_ptr, dq_ptr, d_bias_ptr, there, q_stride_t, q_stride_h, d_out_stride_t, d_out_stride_h
    )  # fmt: skip
    turns = gl.cdiv(count, 64) * GROUP
    gl.warp_specialize(
        [
            (_rows, (tiles, between, walk, given, GROUP, HEADS, MAP, STAGES)),
            (_sums, (tiles, between, turns, states_ptr, there, sums_ptr, d_bias_ptr + V, True, STAGES)),
            (_send, (q_desc, d_out_desc, tiles, walk, GROUP, STAGES)),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip


def whole_query_gradients(d_out, q, states, rows, dq, sums, d_bias, blocks, feature_map):
    """Writes dq, sums and d_bias."""
    whole_query_gradients_kernel[(len(blocks) * states.shape[1],)](
        matrix_of(q, 64), matrix_of(d_out, 64), d_out, q, states, rows, dq, sums, d_bias, blocks.start, blocks.length,
        *d_out.stride()[:2], *q.stride()[:2], q.shape[1], states.shape[1], q.shape[2], d_out.shape[2], feature_map,
        STAGES, num_warps=4,
    )  # fmt: skip


def sums(x, y, out, blocks, feature_map):
    """Writes out."""
    heads = out.shape[1]
    sums_kernel[(len(blocks) * heads,)](
        matrix_of(x, 64), matrix_of(y, 64), out, blocks.start, blocks.length, heads, x.shape[1] // heads, x.shape[2],
        y.shape[2], feature_map, STAGES, num_warps=4,
    )  # fmt: skip
