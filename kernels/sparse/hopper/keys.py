"""Gradients of keys and values: a warpgroup for every 64 rows of a key block walks a part of the block's list, in tiles
of 64 queries that come by TMA. Where keys are also part of states of linear attention (states.py), the gradients that
these have for them are added before any is written: keys and values are here, and dk and dv are not read again."""

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
    LOG2E,
    async_load,
    load_rows,
    make_barriers,
    product_layout,
    row_layout,
    scaled_map,
    shared_layout,
    store_rows,
)


@gluon.jit
def _send(
    feed, TURNS: gl.constexpr, PARTS: gl.constexpr, Q_STAGES: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr,
    MAP: gl.constexpr,
):  # fmt: skip
    (
        q_desc, d_out_desc, lse_desc, delta_desc, q_tiles, d_out_tiles, lse_tiles, delta_tiles, q_ready,
        d_out_ready, q_free, d_out_free, col_idx, begin, stop, q_start, head, M,
        state_desc, state_at, adds_states,
    ) = feed  # fmt: skip
    turn = 0
    for step in range(begin * TURNS, stop * TURNS):
        block, part, at = gl.load(col_idx + step // TURNS), step % PARTS, head + step % TURNS // PARTS
        first, row = gl.load(q_start + block) + part * 64, ((at * M + block) * PARTS + part) * 64
        stage = turn % Q_STAGES
        mbarrier.wait(q_free.index(stage), (turn // Q_STAGES) & 1 ^ 1)
        mbarrier.expect(q_ready.index(stage), 64 * D * 2 + 64 * 4)
        async_load(q_desc, [first, at * D], q_ready.index(stage), q_tiles.index(stage))
        async_load(lse_desc, [row], q_ready.index(stage), lse_tiles.index(stage))
        stage = turn % STAGES
        mbarrier.wait(d_out_free.index(stage), (turn // STAGES) & 1 ^ 1)
        mbarrier.expect(d_out_ready.index(stage), 64 * D * 2 + 64 * 4)
        async_load(d_out_desc, [first, at * D], d_out_ready.index(stage), d_out_tiles.index(stage))
        async_load(delta_desc, [row], d_out_ready.index(stage), delta_tiles.index(stage))
        turn += 1
    if MAP != "":
        if adds_states:  # the state's matrix in the place of gradients of outputs, 64 rows in that of a tile
            for half in gl.static_range(D // 64):
                stage = (turn + half) % STAGES
                mbarrier.wait(d_out_free.index(stage), ((turn + half) // STAGES) & 1 ^ 1)
                mbarrier.expect(d_out_ready.index(stage), 64 * D * 2)
                async_load(state_desc, [state_at + half * 64, 0], d_out_ready.index(stage), d_out_tiles.index(stage))


@gluon.jit
def _attend(
    half: gl.constexpr, given, KEY_HEADS: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr, SIZE: gl.constexpr,
    TURNS: gl.constexpr, PARTS: gl.constexpr, Q_STAGES: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, WEIGHTED: gl.constexpr, MAP: gl.constexpr,
):  # fmt: skip
    """dk and dv of the key block's rows 64 * half on; alone: the block has no other part."""
    (
        k_tiles, v_tiles, q_tiles, d_out_tiles, lse_tiles, delta_tiles, q_ready, d_out_ready, q_free, d_out_free, k_ptr,
        v_ptr, dk_ptr, dv_ptr, parts_dk, parts_dv, col_idx, begin, stop, q_position, first, count, key_position,
        key_step, weight, k_stride_t, v_stride_t, alone, scale, normalizer_ptr, adds_states,
    ) = given  # fmt: skip
    S: gl.constexpr = product_layout(64)
    OUT: gl.constexpr = product_layout(D)
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    k_tile, v_tile = k_tiles.index(half), v_tiles.index(half)
    k_tile.store(load_rows(k_ptr, first, count, half, k_stride_t, 0, 1, D, row_layout(D)))
    v_tile.store(load_rows(v_ptr, first, count, half, v_stride_t, 0, 1, D, row_layout(D)))
    fence_async_shared()
    inside = half * 64 + gl.arange(0, 64, gl.SliceLayout(1, S))
    last = key_position + (count - 1) * key_step
    key_position += inside * key_step
    stretch = scale * LOG2E
    nothing = gl.full([64, 64], 0.0, gl.float32, S)
    dk, dv = gl.full([64, D], 0.0, gl.float32, OUT), gl.full([64, D], 0.0, gl.float32, OUT)
    turn = 0
    for step in range(begin * TURNS, stop * TURNS):
        stage, q_stage = turn % STAGES, turn % Q_STAGES
        phase, q_phase = (turn // STAGES) & 1, (turn // Q_STAGES) & 1
        q_tile, d_out_tile = q_tiles.index(q_stage), d_out_tiles.index(stage)
        mbarrier.wait(q_ready.index(q_stage), q_phase)
        pending = warpgroup_mma(k_tile, q_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(d_out_ready.index(stage), phase)
        d_pending = warpgroup_mma(v_tile, d_out_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
        lse = lse_tiles.index(q_stage).load(gl.SliceLayout(0, S))
        scores = warpgroup_mma_wait(1, deps=[pending])
        if WEIGHTED:
            scores = scores * stretch + (weight - lse)[None, :]
        else:
            scores = gl.fma(scores, gl.full_like(scores, stretch), gl.zeros_like(scores) - lse[None, :])
        weights = gl.exp2(scores)
        if CAUSAL:
            position = gl.load(q_position + gl.load(col_idx + step // TURNS)) + step % PARTS * 64
            if last > position:
                index = gl.arange(0, 64, gl.SliceLayout(0, S))
                weights = gl.where(key_position[:, None] <= (position + index)[None, :], weights, 0.0)
        operand = gl.convert_layout(weights.to(k_tiles.dtype), P)
        dv_pending = warpgroup_mma(operand, d_out_tile, dv, is_async=True)
        d_weights = warpgroup_mma_wait(1, deps=[d_pending])
        delta = delta_tiles.index(stage).load(gl.SliceLayout(0, S))
        new = gl.convert_layout((weights * (d_weights - delta[None, :])).to(k_tiles.dtype), P)
        mbarrier.wait(q_ready.index(q_stage), q_phase)  # passed already: keeps the next wait behind the arithmetic
        dv, operand, new = warpgroup_mma_wait(0, deps=[dv_pending, operand, new])
        mbarrier.arrive(d_out_free.index(stage))
        dk = warpgroup_mma(new, q_tile, dk)
        mbarrier.arrive(q_free.index(q_stage))
        turn += 1
    dk = dk * scale
    if MAP != "":
        if adds_states:
            phi = scaled_map(k_tile.load(OUT).to(gl.float32), MAP)
            if MAP == "softmax":
                phi = phi * (1.0 / gl.sum(phi, 1))[:, None]
            k_tile.store(phi.to(k_tiles.dtype))
            fence_async_shared()
            for part in gl.static_range(D // 64):
                stage = (turn + part) % STAGES
                mbarrier.wait(d_out_ready.index(stage), ((turn + part) // STAGES) & 1)
                dv = warpgroup_mma(k_tile.slice(part * 64, 64, 1), d_out_tiles.index(stage), dv)
    _write(dv, dv_ptr, parts_dv, alone, first, count, half, KEY_HEADS, D, KEYS)
    if MAP != "":
        if adds_states:
            d_phi = warpgroup_mma(v_tile, d_out_tiles.index(turn % STAGES).permute((1, 0)), nothing, use_acc=False)
            if D == 128:
                other = d_out_tiles.index((turn + 1) % STAGES).permute((1, 0))
                other = warpgroup_mma(v_tile, other, nothing, use_acc=False)
                d_phi = gl.reshape(gl.permute(gl.join(d_phi, other), (0, 2, 1)), (64, D))
            normalizer = gl.load(normalizer_ptr + gl.arange(0, D, gl.SliceLayout(0, OUT)))
            d_phi = gl.convert_layout(d_phi, OUT) + normalizer[None, :]
            phi = k_tile.load(OUT).to(gl.float32)
            if MAP == "softmax":
                dk += phi * (d_phi - gl.sum(phi * d_phi, 1)[:, None])
            else:  # where k is below 0, phi is below 1 and its own gradient
                dk += d_phi * gl.minimum(phi, gl.full_like(phi, 1.0))
    _write(dk, dk_ptr, parts_dk, alone, first, count, half, KEY_HEADS, D, KEYS)


@gluon.jit
def _write(
    x, ptr, parts_ptr, alone, first, count, half: gl.constexpr, KEY_HEADS: gl.constexpr, D: gl.constexpr,
    KEYS: gl.constexpr,
):  # fmt: skip
    """A gradient, or this part of it."""
    if alone:
        store_rows(ptr, first, count, half, KEY_HEADS, 1, D, x)
    else:
        store_rows(parts_ptr, 0, KEYS, half, 1, 1, D, x)


@launched
@gluon.jit(do_not_specialize=["num_columns", "items", "room", "capacity", "scale", "M"])
def keys_kernel(
    q_desc, d_out_desc, lse_desc, delta_desc, k_ptr, v_ptr, dk_ptr, dv_ptr, parts_dk, parts_dv, q_start, q_position,
    k_start, k_length, k_position, k_step, col_ptr, col_idx, item_ptr, item_col, weight_ptr, state_desc,
    normalizers_ptr, state_rows, k_stride_t, k_stride_h, v_stride_t, v_stride_h, scale, M, num_columns, items, room,
    capacity, HEADS: gl.constexpr, KEY_HEADS: gl.constexpr, LISTS: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr,
    SIZE: gl.constexpr, CHUNK: gl.constexpr, COMPACT: gl.constexpr, CAUSAL: gl.constexpr, WEIGHTED: gl.constexpr,
    Q_STAGES: gl.constexpr, STAGES: gl.constexpr, MAP: gl.constexpr,
):  # fmt: skip
    """As kernels.sparse.backward.keys_kernel, for query blocks of SIZE rows, a multiple of 64; what has one part goes
    to dk and dv at once. MAP: of keys that are part of states, each of a block's first part, or ""; state_desc [n *
    KEY_HEADS * D, D], normalizers [n, KEY_HEADS, D] and state_rows: of KeyStates."""
    GROUPS: gl.constexpr = LISTS if LISTS > KEY_HEADS else KEY_HEADS
    PARTS: gl.constexpr = SIZE // 64
    TURNS: gl.constexpr = HEADS // GROUPS * PARTS
    item, group = gl.program_id(0) % items, gl.program_id(0) // items
    key_head, listed = group // (GROUPS // KEY_HEADS), (group * LISTS // GROUPS).to(gl.int64)
    column = gl.load(item_col + listed * items + item)
    if column < num_columns:
        dtype: gl.constexpr = q_desc.dtype
        flat: gl.constexpr = lse_desc.layout
        k_tiles = gl.allocate_shared_memory(dtype, [KEYS // 64, 64, D], shared_layout(16))
        v_tiles = gl.allocate_shared_memory(dtype, [KEYS // 64, 64, D], shared_layout(16))
        q_tiles = gl.allocate_shared_memory(dtype, [Q_STAGES, 64, D], shared_layout(16))
        d_out_tiles = gl.allocate_shared_memory(dtype, [STAGES, 64, D], shared_layout(16))
        lse_tiles = gl.allocate_shared_memory(gl.float32, [Q_STAGES, 64], flat)
        delta_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 64], flat)
        q_ready, d_out_ready = make_barriers(Q_STAGES, 1), make_barriers(STAGES, 1)
        q_free, d_out_free = make_barriers(Q_STAGES, KEYS // 64), make_barriers(STAGES, KEYS // 64)
        first, count = gl.load(k_start + column).to(gl.int64), gl.load(k_length + column)
        position, step = gl.load(k_position + column), gl.load(k_step + column)
        weight = 0.0
        if WEIGHTED:
            weight = gl.load(weight_ptr + column).to(gl.float32) * LOG2E
        ends, parts = col_ptr + listed * (num_columns + 1) + column, item_ptr + listed * (num_columns + 1) + column
        number = item - gl.load(parts)
        begin = gl.load(ends) + number * CHUNK
        stop = gl.minimum(begin + CHUNK, gl.load(ends + 1))
        num_parts = 0  # in all lists of the key head
        for turn in gl.static_range(GROUPS // KEY_HEADS):
            at = item_ptr + (key_head * LISTS // KEY_HEADS + turn).to(gl.int64) * (num_columns + 1) + column
            num_parts += gl.load(at + 1) - gl.load(at)
        alone = num_parts == 1
        col_idx += listed * capacity
        k_ptr += key_head * k_stride_h
        v_ptr += key_head * v_stride_h
        dk_ptr += key_head * D
        dv_ptr += key_head * D
        part = 2 * gl.load(ends) // CHUNK + number if COMPACT else item  # see part_of
        at = (group.to(gl.int64) * room + part) * KEYS * D
        parts_dk += at
        parts_dv += at
        head = group * (HEADS // GROUPS)
        normalizer_ptr, state_at, adds_states = normalizers_ptr, 0, False
        if MAP != "":
            adds_states = (number == 0) & (group % (GROUPS // KEY_HEADS) == 0)
            state_at = (gl.load(state_rows + column) * KEY_HEADS + key_head) * D
            normalizer_ptr += state_at
        given = (
            k_tiles, v_tiles, q_tiles, d_out_tiles, lse_tiles, delta_tiles, q_ready, d_out_ready, q_free, d_out_free,
            k_ptr, v_ptr, dk_ptr, dv_ptr, parts_dk, parts_dv, col_idx, begin, stop, q_position, first, count,
            position, step, weight, k_stride_t, v_stride_t, alone, scale, normalizer_ptr, adds_states,
        )  # fmt: skip
        feed = (
            q_desc, d_out_desc, lse_desc, delta_desc, q_tiles, d_out_tiles, lse_tiles, delta_tiles, q_ready,
            d_out_ready, q_free, d_out_free, col_idx, begin, stop, q_start, head, M, state_desc, state_at,
            adds_states,
        )  # fmt: skip
        if KEYS == 128:
            gl.warp_specialize(
                [
                    (_attend, (0, given, KEY_HEADS, D, KEYS, SIZE, TURNS, PARTS, Q_STAGES, STAGES, CAUSAL,
                               WEIGHTED, MAP)),
                    (_attend, (1, given, KEY_HEADS, D, KEYS, SIZE, TURNS, PARTS, Q_STAGES, STAGES, CAUSAL,
                               WEIGHTED, MAP)),
                    (_send, (feed, TURNS, PARTS, Q_STAGES, STAGES, D, MAP)),
                ],
                [4, 1], [240, 24],
            )  # fmt: skip
        else:
            gl.warp_specialize(
                [
                    (_attend, (0, given, KEY_HEADS, D, KEYS, SIZE, TURNS, PARTS, Q_STAGES, STAGES, CAUSAL,
                               WEIGHTED, MAP)),
                    (_send, (feed, TURNS, PARTS, Q_STAGES, STAGES, D, MAP)),
                ],
                [1], [24],
            )  # fmt: skip
