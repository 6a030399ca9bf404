"""`delta_backward` for Hopper GPUs, in Gluon, as `forward`: two warpgroups of 64 columns of dS each."""

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

STAGES = 3, 2  # without and with a decay per key channel


@gluon.jit
def _fetch(
    place, feed, tiles_of, H, K: gl.constexpr, V: gl.constexpr, GATE: gl.constexpr, CHANNEL: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    first, _, tile, head, begin, chunks = place
    q_desc, k_desc, write_desc, d_out_desc, inverse_desc, scores_desc, rows_ptr, total_ptr = feed
    vectors, totals, q_tiles, k_tiles, writes, d_outs, inverses, scores, ready, free, _ = tiles_of
    n = 0
    for passed in range(begin, chunks):
        chunk = chunks - 1 - passed
        stage, at, token = n % STAGES, tile + chunk * H, first + chunk * 64
        mbarrier.wait(free.index(stage), (n // STAGES & 1) ^ 1)
        mbarrier.expect(ready.index(stage), ((3 if CHANNEL else 2) * K + V + 2 * 64) * 64 * 2)
        if CHANNEL:
            async_load(write_desc, [token, head * K], ready.index(stage), writes.index(stage))
        async_load(k_desc, [token, head * K], ready.index(stage), k_tiles.index(stage))
        for part in gl.static_range(V // 64):
            async_load(
                d_out_desc, [token, head * V + part * 64], ready.index(stage), d_outs.index(stage * (V // 64) + part)
            )
        async_load(q_desc, [token, head * K], ready.index(stage), q_tiles.index(stage))
        async_load(scores_desc, [at * 64, 0], ready.index(stage), scores.index(stage))
        async_load(inverse_desc, [at * 64, 0], ready.index(stage), inverses.index(stage))
        if CHANNEL:
            fetch_channel_decays(total_ptr, at, totals, stage, K)
        fetch_vectors(rows_ptr, at, vectors, stage, GATE and not CHANNEL)
        mbarrier.arrive(ready.index(stage))
        n += 1


@gluon.jit
def step(
    state, leaving, d_out, q_tile, k_tile, write, inverse, scores, vectors, at_vectors, total, scale,
    K: gl.constexpr, GATE: gl.constexpr, CHANNEL: gl.constexpr,
):  # fmt: skip
    """One chunk, for the 64 columns of V that d_out [64, 64] has. leaving: state rounded, as an operand; total: the
    decay of the whole chunk; write: k_tile unless CHANNEL. Gives dS^T before the chunk, which is under way, an operand
    of it, and beta E^T [64, 64]."""
    S: gl.constexpr = product_layout(64)
    OUT: gl.constexpr = product_layout(K)
    SCALAR: gl.constexpr = GATE and not CHANNEL
    dtype: gl.constexpr = k_tile.dtype
    column: gl.constexpr = gl.SliceLayout(0, S)
    nothing = gl.full([64, 64], 0.0, gl.float32, S)
    if GATE:
        state = state * total
    if CHANNEL:
        weighted = d_out.permute((1, 0))
    else:
        weighted = d_out.permute((1, 0)).load(S).to(gl.float32) * scale
        if GATE:
            weighted = weighted * vectors.index(at_vectors + FROM_START).load(column)[None, :]
        weighted = gl.convert_layout(weighted.to(dtype), gl.DotOperandLayout(0, OUT, 2))
    values_pending = warpgroup_mma(leaving, write.permute((1, 0)), nothing, use_acc=False, is_async=True)
    state_pending = warpgroup_mma(weighted, q_tile, state, is_async=True)
    values = warpgroup_mma_wait(1, deps=[values_pending])
    if SCALAR:
        values = values * vectors.index(at_vectors + TO_END).load(column)[None, :]
    values_pending = warpgroup_mma(d_out.permute((1, 0)), scores, values, is_async=True)
    state, values, weighted = warpgroup_mma_wait(0, deps=[state_pending, values_pending, weighted])
    values = gl.convert_layout(values.to(dtype), gl.DotOperandLayout(0, S, 2))
    errors = warpgroup_mma(values, inverse, nothing, use_acc=False)
    errors = errors * vectors.index(at_vectors + BETA).load(column)[None, :]
    written = -errors
    if SCALAR:
        written = written * vectors.index(at_vectors + FROM_START).load(column)[None, :]
    written = gl.convert_layout(written.to(dtype), gl.DotOperandLayout(0, OUT, 2))
    return warpgroup_mma(written, k_tile, state, is_async=True), written, errors


@gluon.jit
def total_decay(vectors, at_vectors, K: gl.constexpr):
    """exp(G_C) of a decay per head."""
    layout: gl.constexpr = gl.SliceLayout(1, product_layout(K))
    return vectors.index(at_vectors + FROM_START).slice(63, 1).load(layout)[:, None]


@gluon.jit
def _pass(
    part: gl.constexpr, place, leaves, out, tiles_of, cleared, MODE: gl.constexpr, scale, H, K: gl.constexpr,
    V: gl.constexpr, GATE: gl.constexpr, CHANNEL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    first, length, tile, head, begin, chunks = place
    vectors, totals, q_tiles, k_tiles, writes, d_outs, inverses, scores, ready, free, staged = tiles_of
    exit_row, exit_at = leaves
    sum_ptr, d_states_ptr, d_v_ptr = out
    OUT: gl.constexpr = product_layout(K)
    column, key = gl.arange(0, 64, gl.SliceLayout(1, OUT)), gl.arange(0, K, gl.SliceLayout(0, OUT))
    at_state = part * 64 + column[:, None] + key[None, :] * V
    if MODE == "sum":
        state = gl.full([64, K], 0.0, gl.float32, OUT)
    else:
        state = gl.load(exit_at + at_state, mask=exit_row >= 0, other=0.0)
    n = 0
    for passed in range(begin, chunks):
        chunk = chunks - 1 - passed
        stage, left = n % STAGES, length - chunk * 64
        d_out = d_outs.index(stage * 2 + part)
        mbarrier.wait(ready.index(stage), n // STAGES & 1)
        if left < 64:  # the last chunk, which comes first
            clear_rows(d_out, left, 64)
            if part == 0:
                clear_rows(k_tiles.index(stage), left, K)
            else:
                clear_rows(q_tiles.index(stage), left, K)
                if CHANNEL:
                    clear_rows(writes.index(stage), left, K)
            fence_async_shared()
            synchronize()
            mbarrier.arrive(cleared.index(0))
            mbarrier.wait(cleared.index(0), 0)
        k_tile, at = k_tiles.index(stage), tile + chunk * H
        write = k_tile
        total = 1.0
        if CHANNEL:
            write = writes.index(stage)
            total = totals.index(stage).load(gl.SliceLayout(0, OUT))[None, :]
        elif GATE:
            total = total_decay(vectors, stage * VECTORS, K)
        leaving = state.to(k_tiles.dtype)
        operand = gl.convert_layout(leaving, gl.DotOperandLayout(0, product_layout(64), 2))
        state_pending, operand, errors = step(
            state, operand, d_out, q_tiles.index(stage), k_tile, write, inverses.index(stage), scores.index(stage),
            vectors, stage * VECTORS, total, scale, K, GATE, CHANNEL,
        )  # fmt: skip
        if MODE == "states":
            store_scratch(d_states_ptr, at, part * 64, leaving, V, K)
            half = staged.index(part)
            half.permute((1, 0)).store(errors.to(half.dtype))
            synchronize()
            store_columns(d_v_ptr, first + chunk * 64, left, head, part * 64, half, H, V)
        state, operand = warpgroup_mma_wait(0, deps=[state_pending, operand])
        synchronize()
        mbarrier.arrive(free.index(stage))
        n += 1
    if MODE == "sum":
        gl.store(sum_ptr + at_state, state)


@launched
@gluon.jit(do_not_specialize=["scale"])
def backward_kernel(
    q_desc, k_desc, write_desc, d_out_desc, inverse_desc, scores_desc, rows_ptr, total_ptr, exit_ptr, sum_ptr,
    d_states_ptr, d_v_ptr, list_ptr, first_ptr, length_ptr, split_chunk_ptr, exit_row_ptr, sum_row_ptr, scale,
    H: gl.constexpr, K: gl.constexpr, V: gl.constexpr, MODE: gl.constexpr, GATE: gl.constexpr, CHANNEL: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """As kernels.linear.delta_backward.backward_kernel, for K = V = 128. Grid: (splits * H)."""
    dtype: gl.constexpr = k_desc.dtype
    shared: gl.constexpr = shared_layout(16)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    split, head = gl.program_id(0) // H, gl.program_id(0) % H
    leaves = 0, rows_ptr
    if MODE == "sum":
        split = gl.load(list_ptr + split)
        sum_ptr += (gl.load(sum_row_ptr + split).to(gl.int64) * H + head) * K * V
    else:
        exit_row = gl.load(exit_row_ptr + split)
        leaves = exit_row, exit_ptr + (gl.maximum(exit_row, 0).to(gl.int64) * H + head) * K * V
    first, length = gl.load(first_ptr + split), gl.load(length_ptr + split)
    tile = gl.load(split_chunk_ptr + split) * H + head
    chunks = gl.cdiv(length, 64)
    begin = chunks * 0
    if GATE and MODE == "sum":  # what comes later cannot be felt where the split starts
        begin = gl.maximum(chunks - 1 - count_remembered(rows_ptr, tile, H, chunks), 0)
    WRITES: gl.constexpr = STAGES if CHANNEL else 1
    WIDTH: gl.constexpr = K if CHANNEL else 64
    STAGED: gl.constexpr = 2 if MODE == "states" else 1
    tiles_of = (
        gl.allocate_shared_memory(gl.float32, [STAGES * VECTORS, 64], plain),
        gl.allocate_shared_memory(gl.float32, [WRITES, K], plain),
        gl.allocate_shared_memory(dtype, [STAGES, 64, K], shared),
        gl.allocate_shared_memory(dtype, [STAGES, 64, K], shared),
        gl.allocate_shared_memory(dtype, [WRITES, 64, WIDTH], shared),
        gl.allocate_shared_memory(dtype, [STAGES * (V // 64), 64, 64], shared),
        gl.allocate_shared_memory(dtype, [STAGES, 64, 64], shared),
        gl.allocate_shared_memory(dtype, [STAGES, 64, 64], shared),
        make_barriers(STAGES, 2), make_barriers(STAGES, 2),
        gl.allocate_shared_memory(dtype, [STAGED, 64, 64], shared),
    )  # fmt: skip
    cleared = make_barriers(1, 2)
    place = first, length, tile, head, begin, chunks
    feed = q_desc, k_desc, write_desc, d_out_desc, inverse_desc, scores_desc, rows_ptr, total_ptr
    out = sum_ptr, d_states_ptr, d_v_ptr
    gl.warp_specialize(
        [
            (_pass, (0, place, leaves, out, tiles_of, cleared, MODE, scale, H, K, V, GATE, CHANNEL, STAGES)),
            (_pass, (1, place, leaves, out, tiles_of, cleared, MODE, scale, H, K, V, GATE, CHANNEL, STAGES)),
            (_fetch, (place, feed, tiles_of, H, K, V, GATE, CHANNEL, STAGES)),
        ],
        [4, 1], [232, 40],
    )  # fmt: skip


def launch(mode, call, prepared, d_out, num_splits, exits, states, sums, split_list):
    """As `delta_backward._launch`."""
    splits, channel = call.splits, call.write is not None
    backward_kernel[(num_splits * call.heads,)](
        tokens_descriptor(call.q), tokens_descriptor(call.k), tokens_descriptor(call.write) if channel else None,
        tokens_descriptor(d_out, 64), scratch_descriptor(prepared.inverse), scratch_descriptor(prepared.scores),
        prepared.rows, call.total, exits, sums, *states, split_list, splits.first, splits.length, splits.split_chunk,
        splits.backward.row, splits.sum_row, call.scale, call.heads, call.k.shape[2], call.v.shape[2], mode,
        call.log_decay is not None, channel, STAGES[channel], num_warps=4,
    )  # fmt: skip
