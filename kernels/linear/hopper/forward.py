"""`delta_forward` for Hopper GPUs, in Gluon: one warp fetches chunks by TMA while two warpgroups pass states through
them. A warpgroup owns 64 columns of S (in "sum" 128, the second those of M), whose rows K it carries in registers;
warpgroups wait for tiles and never for each other."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from longspan.kernels.launch import launched
from longspan.kernels.linear.hopper.tiles import (
    BETA,
    FROM_START,
    TO_END,
    VECTORS,
    clear_rows,
    count_remembered,
    fetch_channel_decays,
    fetch_vectors,
    scratch_descriptor,
    store_columns,
    store_scratch,
    synchronize,
    tokens_descriptor,
)
from longspan.kernels.sparse.hopper.tiles import async_load, make_barriers, product_layout, shared_layout

# Without and with a decay per key channel.
STAGES = {"sum": (4, 3), "states": (4, 3), "output": (3, 2)}


@gluon.jit
def _fetch(
    place, feed, tiles_of, MODE: gl.constexpr, H, K: gl.constexpr, V: gl.constexpr, GATE: gl.constexpr,
    CHANNEL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    first, _, tile, head, begin, chunks = place
    q_desc, k_desc, v_desc, write_desc, inverse_desc, scores_desc, rows_ptr, total_ptr = feed
    vectors, totals, k_tiles, v_tiles, writes, inverses, q_tiles, scores, ready, free, _ = tiles_of
    n = 0
    for chunk in range(begin, chunks):
        stage, at = n % STAGES, tile + chunk * H
        mbarrier.wait(free.index(stage), (n // STAGES & 1) ^ 1)
        token = first + chunk * 64
        KEYS: gl.constexpr = 2 * K if CHANNEL else K
        if MODE == "output":
            mbarrier.expect(ready.index(stage), (KEYS + K + V + 2 * 64) * 64 * 2)
        else:
            mbarrier.expect(ready.index(stage), (KEYS + V + 64) * 64 * 2)
        async_load(k_desc, [token, head * K], ready.index(stage), k_tiles.index(stage))
        async_load(inverse_desc, [at * 64, 0], ready.index(stage), inverses.index(stage))
        for part in gl.static_range(V // 64):
            async_load(
                v_desc, [token, head * V + part * 64], ready.index(stage), v_tiles.index(stage * (V // 64) + part)
            )
        if MODE == "output":
            async_load(q_desc, [token, head * K], ready.index(stage), q_tiles.index(stage))
            async_load(scores_desc, [at * 64, 0], ready.index(stage), scores.index(stage))
        if CHANNEL:
            async_load(write_desc, [token, head * K], ready.index(stage), writes.index(stage))
            fetch_channel_decays(total_ptr, at, totals, stage, K)
        fetch_vectors(rows_ptr, at, vectors, stage, GATE and not CHANNEL)
        mbarrier.arrive(ready.index(stage))
        n += 1


@gluon.jit
def _step(
    state, v_tile, stage, total, tiles_of, out, at, token, left, head, staged, COLUMN: gl.constexpr,
    WITH_V: gl.constexpr, MODE: gl.constexpr, scale, H, K: gl.constexpr, V: gl.constexpr, GATE: gl.constexpr,
    CHANNEL: gl.constexpr,
):  # fmt: skip
    """One chunk, for 64 columns from COLUMN on; gives the state after it."""
    vectors, totals, k_tiles, _, writes, inverses, q_tiles, scores, _, _, _ = tiles_of
    SCALAR: gl.constexpr = GATE and not CHANNEL
    out_ptr, states_ptr, values_ptr = out
    S: gl.constexpr = product_layout(64)
    OUT: gl.constexpr = product_layout(K)
    dtype: gl.constexpr = k_tiles.dtype
    column: gl.constexpr = gl.SliceLayout(0, S)
    nothing = gl.full([64, 64], 0.0, gl.float32, S)
    entering = state.to(dtype)
    operand = gl.convert_layout(entering, gl.DotOperandLayout(0, S, 2))
    read = warpgroup_mma(operand, k_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
    if MODE == "output":
        q_t = q_tiles.index(stage).permute((1, 0))
        out_pending = warpgroup_mma(operand, q_t, nothing, use_acc=False, is_async=True)
        read = warpgroup_mma_wait(1, deps=[read])
    else:
        read = warpgroup_mma_wait(0, deps=[read])
    if SCALAR:
        read = read * vectors.index(stage * VECTORS + FROM_START).load(column)[None, :]
    if WITH_V:
        right = v_tile.permute((1, 0)).load(S).to(gl.float32) - read
    else:
        right = -read
    right = (right * vectors.index(stage * VECTORS + BETA).load(column)[None, :]).to(dtype)
    right = gl.convert_layout(right, gl.DotOperandLayout(0, S, 2))
    values = warpgroup_mma(right, inverses.index(stage).permute((1, 0)), nothing, use_acc=False)
    if MODE == "states":
        store_scratch(states_ptr, at, COLUMN, entering, V, K)
        store_scratch(values_ptr, at, COLUMN, values.to(dtype), V, 64)
    if MODE == "output":
        result = warpgroup_mma_wait(0, deps=[out_pending])
        if not CHANNEL:
            result = result * scale
        if SCALAR:
            result = result * vectors.index(stage * VECTORS + FROM_START).load(column)[None, :]
        written = gl.convert_layout(values.to(dtype), gl.DotOperandLayout(0, S, 2))
        out_pending = warpgroup_mma(written, scores.index(stage).permute((1, 0)), result, is_async=True)
    if SCALAR:
        values = values * vectors.index(stage * VECTORS + TO_END).load(column)[None, :]
    if CHANNEL:
        state = state * totals.index(stage).load(gl.SliceLayout(0, OUT))[None, :]
    elif GATE:
        state = state * total
    written = gl.convert_layout(values.to(dtype), gl.DotOperandLayout(0, OUT, 2))
    if CHANNEL:
        state = warpgroup_mma(written, writes.index(stage), state, is_async=True)
    else:
        state = warpgroup_mma(written, k_tiles.index(stage), state, is_async=True)
    if MODE == "output":
        result = warpgroup_mma_wait(1, deps=[out_pending])
        staged.permute((1, 0)).store(result.to(staged.dtype))
        synchronize()
        store_columns(out_ptr, token, left, head, COLUMN, staged, H, V)
    return warpgroup_mma_wait(0, deps=[state])


@gluon.jit
def _pass(
    part: gl.constexpr, entering, out, sums, tiles_of, cleared, MODE: gl.constexpr, scale,
    H, K: gl.constexpr, V: gl.constexpr, GATE: gl.constexpr, CHANNEL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    place, needed, entry_at = entering
    first, length, tile, head, begin, chunks = place
    vectors, _, k_tiles, v_tiles, writes, _, q_tiles, _, ready, free, staged = tiles_of
    sum_ptr, transition_ptr = sums
    OUT: gl.constexpr = product_layout(K)
    column, key = gl.arange(0, 64, gl.SliceLayout(1, OUT)), gl.arange(0, K, gl.SliceLayout(0, OUT))
    at_state = column[:, None] + key[None, :] * V
    WITH_V: gl.constexpr = part == 0 or MODE != "sum"
    if MODE == "sum":  # the second half of what the warpgroup owns
        start = gl.where(needed > 1, 1.0, 0.0)
        if part == 0:
            start = 0.0
        state = gl.where(column[:, None] == key[None, :], start, 0.0)
        second = gl.where(column[:, None] + 64 == key[None, :], start, 0.0)
    else:
        state = gl.load(entry_at + part * 64 + at_state, mask=needed > 0, other=0.0)
        second = state
    n = 0
    for chunk in range(begin, chunks):
        stage, left, at, token = n % STAGES, length - chunk * 64, tile + chunk * H, first + chunk * 64
        mbarrier.wait(ready.index(stage), n // STAGES & 1)
        if left < 64:  # the last
            if WITH_V:
                if MODE == "sum":
                    clear_rows(v_tiles.index(stage * 2), left, 64)
                    clear_rows(v_tiles.index(stage * 2 + 1), left, 64)
                else:
                    clear_rows(v_tiles.index(stage * 2 + part), left, 64)
            if part == 0:
                clear_rows(k_tiles.index(stage), left, K)
                if CHANNEL:
                    clear_rows(writes.index(stage), left, K)
                if MODE == "output":
                    clear_rows(q_tiles.index(stage), left, K)
                fence_async_shared()
                synchronize()
                mbarrier.arrive(cleared.index(0))
            else:
                synchronize()
                mbarrier.wait(cleared.index(0), 0)
        if (MODE != "sum") | (part == 0) | (needed > 1):
            total = 1.0
            if GATE and not CHANNEL:
                total = vectors.index(stage * VECTORS + FROM_START).slice(63, 1).load(gl.SliceLayout(1, OUT))[:, None]
            if MODE == "sum":
                state = _step(
                    state, v_tiles.index(stage * 2), stage, total, tiles_of, out, at, token, left, head,
                    v_tiles.index(0), 0, WITH_V, MODE, scale, H, K, V, GATE, CHANNEL,
                )  # fmt: skip
                second = _step(
                    second, v_tiles.index(stage * 2 + 1), stage, total, tiles_of, out, at, token, left, head,
                    v_tiles.index(0), 64, WITH_V, MODE, scale, H, K, V, GATE, CHANNEL,
                )  # fmt: skip
            else:
                state = _step(
                    state, v_tiles.index(stage * 2 + part), stage, total, tiles_of, out, at, token, left, head,
                    staged.index(part), part * 64, WITH_V, MODE, scale, H, K, V, GATE, CHANNEL,
                )  # fmt: skip
        synchronize()
        mbarrier.arrive(free.index(stage))
        n += 1
    if MODE == "sum":
        if part == 0:
            gl.store(sum_ptr + at_state, state)
            gl.store(sum_ptr + 64 + at_state, second)
        else:
            gl.store(transition_ptr + at_state, state)
            gl.store(transition_ptr + 64 + at_state, second)


@launched
@gluon.jit(do_not_specialize=["scale"])
def forward_kernel(
    q_desc, k_desc, v_desc, write_desc, inverse_desc, scores_desc, rows_ptr, total_ptr, entry_ptr, out_ptr,
    states_ptr, values_ptr, sum_ptr, transition_ptr,
    summed_ptr, needed_ptr, first_ptr, length_ptr, split_chunk_ptr, entry_row_ptr, sum_row_ptr, scale,
    H: gl.constexpr, K: gl.constexpr, V: gl.constexpr, MODE: gl.constexpr, GATE: gl.constexpr, CHANNEL: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """As kernels.linear.delta_forward.forward_kernel, for K = V = 128. Grid: (splits * H)."""
    dtype: gl.constexpr = k_desc.dtype
    shared: gl.constexpr = shared_layout(16)
    split, head = gl.program_id(0) // H, gl.program_id(0) % H
    sums = sum_ptr, transition_ptr
    if MODE == "sum":
        split = gl.load(summed_ptr + split)
        row = gl.load(sum_row_ptr + split).to(gl.int64) * H + head
        sums = sum_ptr + row * K * V, transition_ptr + row * K * K
    first, length = gl.load(first_ptr + split), gl.load(length_ptr + split)
    tile = gl.load(split_chunk_ptr + split) * H + head
    chunks = gl.cdiv(length, 64)
    begin = chunks * 0
    if MODE == "sum":
        needed = gl.load(needed_ptr + split)
        entry_at = rows_ptr
        if GATE:
            remembered = count_remembered(rows_ptr, tile + (chunks - 1) * H, -H, chunks)
            needed = gl.minimum(needed, gl.where(remembered == chunks, 2, 1))
            begin = gl.maximum(chunks - 1 - remembered, 0)
        chunks = gl.where(needed > 0, chunks, 0)
    else:
        needed = gl.load(entry_row_ptr + split) + 1  # whether anything enters
        entry_at = entry_ptr + (gl.maximum(needed - 1, 0).to(gl.int64) * H + head) * K * V
    PARTS: gl.constexpr = STAGES if MODE == "output" else 1
    WRITES: gl.constexpr = STAGES if CHANNEL else 1
    tiles_of = (
        gl.allocate_shared_memory(gl.float32, [STAGES * VECTORS, 64], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        gl.allocate_shared_memory(gl.float32, [WRITES, K], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        gl.allocate_shared_memory(dtype, [STAGES, 64, K], shared),
        gl.allocate_shared_memory(dtype, [STAGES * (V // 64), 64, 64], shared),
        gl.allocate_shared_memory(dtype, [WRITES, 64, K if CHANNEL else 64], shared),
        gl.allocate_shared_memory(dtype, [STAGES, 64, 64], shared),
        gl.allocate_shared_memory(dtype, [PARTS, 64, K], shared),
        gl.allocate_shared_memory(dtype, [PARTS, 64, 64], shared),
        make_barriers(STAGES, 2), make_barriers(STAGES, 2),
        gl.allocate_shared_memory(dtype, [2, 64, 64], shared),
    )  # fmt: skip
    cleared = make_barriers(1, 1)
    place = first, length, tile, head, begin, chunks
    entering = place, needed, entry_at
    out = out_ptr, states_ptr, values_ptr
    feed = q_desc, k_desc, v_desc, write_desc, inverse_desc, scores_desc, rows_ptr, total_ptr
    gl.warp_specialize(
        [
            (_pass, (0, entering, out, sums, tiles_of, cleared, MODE, scale, H, K, V, GATE, CHANNEL, STAGES)),
            (_pass, (1, entering, out, sums, tiles_of, cleared, MODE, scale, H, K, V, GATE, CHANNEL, STAGES)),
            (_fetch, (place, feed, tiles_of, MODE, H, K, V, GATE, CHANNEL, STAGES)),
        ],
        [4, 1], [232, 40],
    )  # fmt: skip


def launch(mode, call, prepared, num_splits, tables, entries, out, states, sums):
    """As `delta_forward._launch`."""
    splits, channel = call.splits, call.write is not None
    forward_kernel[(num_splits * call.heads,)](
        tokens_descriptor(call.q), tokens_descriptor(call.k), tokens_descriptor(call.v, 64),
        tokens_descriptor(call.write) if channel else None, scratch_descriptor(prepared.inverse),
        scratch_descriptor(prepared.scores), prepared.rows, call.total, entries, out, *states, *sums,
        *((tables.summed, tables.needed) if tables else (None, None)),
        splits.first, splits.length, splits.split_chunk, splits.forward.row, splits.sum_row, call.scale, call.heads,
        call.k.shape[2], call.v.shape[2], mode, call.log_decay is not None, channel, STAGES[mode][channel], num_warps=4,
    )  # fmt: skip
