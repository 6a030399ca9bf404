"""The sums of `delta_backward` for Hopper GPUs, in Gluon, as `forward`: two warpgroups of 64 columns of dS each."""

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
    fetch_vectors,
    scratch_descriptor,
    synchronize,
    tokens_descriptor,
)
from longspan.kernels.sparse.hopper.tiles import async_load, make_barriers, product_layout, shared_layout

STAGES = 3


@gluon.jit
def _fetch(place, feed, tiles_of, H, K: gl.constexpr, V: gl.constexpr, GATE: gl.constexpr, STAGES: gl.constexpr):
    first, _, tile, head, begin, chunks = place
    q_desc, k_desc, d_out_desc, inverse_desc, scores_desc, rows_ptr = feed
    vectors, q_tiles, k_tiles, d_outs, inverses, scores, ready, free = tiles_of
    n = 0
    for passed in range(begin, chunks):
        chunk = chunks - 1 - passed
        stage, at, token = n % STAGES, tile + chunk * H, first + chunk * 64
        mbarrier.wait(free.index(stage), (n // STAGES & 1) ^ 1)
        fetch_vectors(rows_ptr, at, vectors, stage, GATE)
        mbarrier.expect(ready.index(stage), (2 * K + V + 2 * 64) * 64 * 2)
        async_load(k_desc, [token, head * K], ready.index(stage), k_tiles.index(stage))
        for part in gl.static_range(V // 64):
            async_load(
                d_out_desc, [token, head * V + part * 64], ready.index(stage), d_outs.index(stage * (V // 64) + part)
            )
        async_load(q_desc, [token, head * K], ready.index(stage), q_tiles.index(stage))
        async_load(scores_desc, [at * 64, 0], ready.index(stage), scores.index(stage))
        async_load(inverse_desc, [at * 64, 0], ready.index(stage), inverses.index(stage))
        n += 1


@gluon.jit
def step(
    state, leaving, d_out, q_tile, k_tile, inverse, scores, vectors, at_vectors, scale,
    K: gl.constexpr, GATE: gl.constexpr,
):  # fmt: skip
    """One chunk, for the 64 columns of V that d_out [64, 64] has. leaving: state rounded, as an operand. Gives dS^T
    before the chunk, which is under way, an operand of it, and E^T [64, 64]."""
    S: gl.constexpr = product_layout(64)
    OUT: gl.constexpr = product_layout(K)
    dtype: gl.constexpr = k_tile.dtype
    column: gl.constexpr = gl.SliceLayout(0, S)
    nothing = gl.full([64, 64], 0.0, gl.float32, S)
    weighted = d_out.permute((1, 0)).load(S).to(gl.float32) * scale
    if GATE:
        weighted = weighted * vectors.index(at_vectors + FROM_START).load(column)[None, :]
        state = state * vectors.index(at_vectors + FROM_START).slice(63, 1).load(gl.SliceLayout(1, OUT))[:, None]
    weighted = gl.convert_layout(weighted.to(dtype), gl.DotOperandLayout(0, OUT, 2))
    values_pending = warpgroup_mma(leaving, k_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
    state_pending = warpgroup_mma(weighted, q_tile, state, is_async=True)
    values = warpgroup_mma_wait(1, deps=[values_pending])
    if GATE:
        values = values * vectors.index(at_vectors + TO_END).load(column)[None, :]
    values_pending = warpgroup_mma(d_out.permute((1, 0)), scores, values, is_async=True)
    state, values, weighted = warpgroup_mma_wait(0, deps=[state_pending, values_pending, weighted])
    values = gl.convert_layout(values.to(dtype), gl.DotOperandLayout(0, S, 2))
    errors = warpgroup_mma(values, inverse, nothing, use_acc=False)
    read = vectors.index(at_vectors + BETA).load(column)
    if GATE:
        read = read * vectors.index(at_vectors + FROM_START).load(column)
    written = gl.convert_layout((errors * -read[None, :]).to(dtype), gl.DotOperandLayout(0, OUT, 2))
    return warpgroup_mma(written, k_tile, state, is_async=True), written, errors


@gluon.jit
def _pass(
    part: gl.constexpr, place, sum_ptr, tiles_of, cleared, scale, H, K: gl.constexpr, V: gl.constexpr,
    GATE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    first, length, tile, head, begin, chunks = place
    vectors, q_tiles, k_tiles, d_outs, inverses, scores, ready, free = tiles_of
    OUT: gl.constexpr = product_layout(K)
    column, key = gl.arange(0, 64, gl.SliceLayout(1, OUT)), gl.arange(0, K, gl.SliceLayout(0, OUT))
    state = gl.full([64, K], 0.0, gl.float32, OUT)
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
            fence_async_shared()
            synchronize()
            mbarrier.arrive(cleared.index(0))
            mbarrier.wait(cleared.index(0), 0)
        leaving = gl.convert_layout(state.to(k_tiles.dtype), gl.DotOperandLayout(0, product_layout(64), 2))
        state_pending, operand, _ = step(
            state, leaving, d_out, q_tiles.index(stage), k_tiles.index(stage), inverses.index(stage),
            scores.index(stage), vectors, stage * VECTORS, scale, K, GATE,
        )  # fmt: skip
        state, operand = warpgroup_mma_wait(0, deps=[state_pending, operand])
        synchronize()
        mbarrier.arrive(free.index(stage))
        n += 1
    gl.store(sum_ptr + part * 64 + column[:, None] + key[None, :] * V, state)


@launched
@gluon.jit(do_not_specialize=["scale"])
def backward_kernel(
    q_desc, k_desc, d_out_desc, inverse_desc, scores_desc, rows_ptr, sum_ptr, list_ptr, first_ptr, length_ptr,
    split_chunk_ptr, sum_row_ptr, scale,
    H: gl.constexpr, K: gl.constexpr, V: gl.constexpr, GATE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As kernels.linear.delta_backward.backward_kernel of MODE "sum", for K = V = 128. Grid: (splits * H)."""
    dtype: gl.constexpr = k_desc.dtype
    shared: gl.constexpr = shared_layout(16)
    split, head = gl.load(list_ptr + gl.program_id(0) // H), gl.program_id(0) % H
    sum_ptr += (gl.load(sum_row_ptr + split).to(gl.int64) * H + head) * K * V
    first, length = gl.load(first_ptr + split), gl.load(length_ptr + split)
    tile = gl.load(split_chunk_ptr + split) * H + head
    chunks = gl.cdiv(length, 64)
    begin = chunks * 0
    if GATE:  # what comes later cannot be felt where the split starts
        begin = gl.maximum(chunks - 1 - count_remembered(rows_ptr, tile, H, chunks), 0)
    tiles_of = (
        gl.allocate_shared_memory(gl.float32, [STAGES * VECTORS, 64], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        gl.allocate_shared_memory(dtype, [STAGES, 64, K], shared),
        gl.allocate_shared_memory(dtype, [STAGES, 64, K], shared),
        gl.allocate_shared_memory(dtype, [STAGES * (V // 64), 64, 64], shared),
        gl.allocate_shared_memory(dtype, [STAGES, 64, 64], shared),
        gl.allocate_shared_memory(dtype, [STAGES, 64, 64], shared),
        make_barriers(STAGES, 1), make_barriers(STAGES, 2),
    )  # fmt: skip
    cleared = make_barriers(1, 2)
    place = first, length, tile, head, begin, chunks
    feed = q_desc, k_desc, d_out_desc, inverse_desc, scores_desc, rows_ptr
    gl.warp_specialize(
        [
            (_pass, (0, place, sum_ptr, tiles_of, cleared, scale, H, K, V, GATE, STAGES)),
            (_pass, (1, place, sum_ptr, tiles_of, cleared, scale, H, K, V, GATE, STAGES)),
            (_fetch, (place, feed, tiles_of, H, K, V, GATE, STAGES)),
        ],
        [4, 1], [232, 40],
    )  # fmt: skip


def launch(call, prepared, d_out, num_splits, sums, split_list):
    """As `delta_backward._launch` of "sum"."""
    splits = call.splits
    backward_kernel[(num_splits * call.heads,)](
        tokens_descriptor(call.q), tokens_descriptor(call.k), tokens_descriptor(d_out, 64),
        scratch_descriptor(prepared.inverse), scratch_descriptor(prepared.scores), prepared.rows, sums, split_list,
        splits.first, splits.length, splits.split_chunk, splits.sum_row, call.scale,
        call.heads, call.k.shape[2], call.v.shape[2], call.log_decay is not None, STAGES, num_warps=4,
    )  # fmt: skip
