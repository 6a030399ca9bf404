"""`reverse_kernel` of kernels.linear.sweep for Hopper GPUs, in Gluon: dk and dv in one pass over a split.

One warp fetches chunks by TMA, from the last one down, for two warpgroups. One makes dk, the other dv: with rows x, y
and z as there, each keeps the scores of its own in registers. dS is shared: each carries half of it, transposed, in
registers and leaves it, rounded, in shared memory, where both take all of it as an operand.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from longspan.kernels.launch import launched
from longspan.kernels.linear.hopper.chain import entry_state
from longspan.kernels.linear.hopper.decays import (
    FROM_START,
    LOG,
    ROWS,
    TO_END,
    gates_of,
    load_gates,
    log_decay_per_token,
    pair_weights,
    store_decays,
    total_decay,
)
from longspan.kernels.linear.hopper.tiles import clear_rows, store_columns, synchronize, tokens_descriptor
from longspan.kernels.linear.sweep import FORGOTTEN
from longspan.kernels.sparse.hopper.tiles import async_load, make_barriers, product_layout, shared_layout

STAGES = 3


@gluon.jit
def _fetch(place, feed, tiles_of, D: gl.constexpr, DECAY: gl.constexpr, STAGES: gl.constexpr):
    first, length, head, chunks = place
    v_desc, d_out_desc, q_desc, k_desc, decay_ptr, stride_t, gamma = feed
    vectors, v_tiles, d_outs, q_tiles, k_tiles, _, ready, free, _, _, _ = tiles_of
    for n in range(0, chunks):
        stage, at = n % STAGES, (chunks - 1 - n) * 64
        token = first + at
        gates = load_gates(decay_ptr, at, length - at, stride_t, gl.BlockedLayout([2], [32], [1], [0]), DECAY)
        mbarrier.wait(free.index(stage), (n // STAGES & 1) ^ 1)
        mbarrier.expect(ready.index(stage), 4 * 64 * D * 2)
        async_load(d_out_desc, [token, head * D], ready.index(stage), d_outs.index(stage))
        async_load(q_desc, [token, head * D], ready.index(stage), q_tiles.index(stage))
        async_load(v_desc, [token, head * D], ready.index(stage), v_tiles.index(stage))
        async_load(k_desc, [token, head * D], ready.index(stage), k_tiles.index(stage))
        if DECAY != "none":
            store_decays(gates, length - at, gamma, vectors, stage, DECAY)
            mbarrier.arrive(ready.index(stage))


@gluon.jit
def _pass(
    WHICH: gl.constexpr, place, given, out_ptr, gate, tiles_of, scale, H, D: gl.constexpr, DECAY: gl.constexpr,
    GATE: gl.constexpr, STAGES: gl.constexpr, CHAINED: gl.constexpr,
):  # fmt: skip
    """WHICH: 0, of dk, which reads v and what d_out and q make, with the first half of dS; 1, of dv, which reads k and
    what q and d_out make."""
    first, length, head, chunks = place
    given, inverse_scale = given
    rows_ptr, through_ptr, total_ptr = gate
    vectors, v_tiles, d_outs, q_tiles, k_tiles, d_state, ready, free, states_ready, states_free, cleared = tiles_of
    S: gl.constexpr = product_layout(64)
    OUT: gl.constexpr = product_layout(D)
    ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    dtype: gl.constexpr = q_tiles.dtype
    nothing = gl.full([64, 64], 0.0, gl.float32, S)
    nothing_wide = gl.full([64, D], 0.0, gl.float32, OUT)
    column = gl.arange(0, 64, ROW)
    state = entry_state(WHICH, head, given, OUT, H, D, False, True, CHAINED) * inverse_scale
    d_state.slice(WHICH * 64, 64).store(state.to(dtype))
    fence_async_shared()
    synchronize()
    mbarrier.arrive(states_ready.index(0))
    for n in range(0, chunks):
        stage, chunk = n % STAGES, chunks - 1 - n
        left, token = length - chunk * 64, first + chunk * 64
        q, d_out = q_tiles.index(stage), d_outs.index(stage)
        mbarrier.wait(ready.index(stage), n // STAGES & 1)
        if left < 64:  # the last chunk, which comes first: TMA has brought tokens of the next span
            clear_rows(q if WHICH == 0 else d_out, left, D)
            fence_async_shared()
            synchronize()
            mbarrier.arrive(cleared.index(0))
            mbarrier.wait(cleared.index(0), 0)
        if WHICH == 0:
            x, y, z, operand = v_tiles.index(stage), d_out, q, d_state
        else:
            x, y, z, operand = k_tiles.index(stage), q, d_out, d_state.permute((1, 0))
        weighted = d_out.slice(WHICH * 64, 64, 1).permute((1, 0)).load(S)
        if DECAY != "none":
            from_start = vectors.index(stage * ROWS + FROM_START).load(gl.SliceLayout(0, S))
            weighted = (weighted.to(gl.float32) * from_start[None, :]).to(dtype)
            state = state * total_decay(vectors, stage, FROM_START, ROW)[:, None]
        weighted = gl.convert_layout(weighted, gl.DotOperandLayout(0, OUT, 2))
        scores_pending = warpgroup_mma(x, y.permute((1, 0)), nothing, use_acc=False, is_async=True)
        state_pending = warpgroup_mma(weighted, q, state, is_async=True)
        mbarrier.wait(states_ready.index(0), n & 1)
        out_pending = warpgroup_mma(x, operand, nothing_wide, use_acc=False, is_async=True)
        pairs = pair_weights(vectors, stage, True, S, DECAY)
        mbarrier.wait(ready.index(stage), n // STAGES & 1)  # passed already: keeps the next wait behind the arithmetic
        scores = warpgroup_mma_wait(2, deps=[scores_pending])
        scores = gl.convert_layout((scores * pairs).to(dtype), gl.DotOperandLayout(0, OUT, 2))
        mbarrier.wait(ready.index(stage), n // STAGES & 1)  # passed already, as above
        state, weighted = warpgroup_mma_wait(1, deps=[state_pending, weighted])
        out = warpgroup_mma_wait(0, deps=[out_pending])
        synchronize()
        mbarrier.arrive(states_free.index(0))
        if DECAY != "none":
            out = out * vectors.index(stage * ROWS + TO_END).load(ROW)[:, None]
        if GATE and WHICH == 0:
            total = gl.sum(total_decay(vectors, stage, LOG, ROW), 0)
            gl.store(total_ptr + chunk * H, total)
            if total < FORGOTTEN:
                passed = gl.where(column < left, gl.sum(out * k_tiles.index(stage).load(OUT).to(gl.float32), 1), 0.0)
                gl.store(through_ptr + chunk * H, gl.sum(passed, 0) * scale)
        out_pending = warpgroup_mma(scores, z, out, is_async=True)
        # What the next chunk reads, once the other has no more use of what lay there.
        mbarrier.wait(states_free.index(0), n & 1)
        d_state.slice(WHICH * 64, 64).store(state.to(dtype))
        fence_async_shared()
        synchronize()
        mbarrier.arrive(states_ready.index(0))
        out, scores = warpgroup_mma_wait(0, deps=[out_pending, scores])
        out = out * scale
        if GATE and WHICH == 0:
            sums = gl.sum(out * k_tiles.index(stage).load(OUT).to(gl.float32), 1)
            gl.store(rows_ptr + token + column, sums, mask=column < left)
        # The other has no more use of this tile: of v never, of d_out since it freed dS of this chunk.
        staged = v_tiles.index(stage) if WHICH == 0 else d_out
        synchronize()
        staged.store(out.to(dtype))
        fence_async_shared()
        synchronize()
        store_columns(out_ptr, token, left, head, 0, staged, H, D, D)
        synchronize()
        mbarrier.arrive(free.index(stage))


@gluon.jit
def reverse_split(
    first, length, head, feed, given, to, gate, scale, inverse_scale, H: gl.constexpr, D: gl.constexpr,
    DECAY: gl.constexpr, GATE: gl.constexpr, STAGES: gl.constexpr, CHAINED: gl.constexpr,
):  # fmt: skip
    """The sweep back through `length` tokens from `first` on of a head. feed: descriptors of v, d_out, q and k, decays
    and their strides; given, CHAINED: see `entry_state`; to: dk and dv; gate: rows, through, T, the first chunk
    and the number of all."""
    v_desc, d_out_desc, q_desc, k_desc, decay_ptr, stride_t, stride_h = feed
    dk_ptr, dv_ptr = to
    rows_ptr, through_ptr, T, chunk, num_chunks = gate
    dtype: gl.constexpr = q_desc.dtype
    shared: gl.constexpr = shared_layout(16)
    gamma = log_decay_per_token(decay_ptr, head, DECAY)
    if GATE:
        rows_ptr += gl.to_tensor(head).to(gl.int64) * T
        through_ptr += chunk.to(gl.int64) * H + head
    tiles_of = (
        gl.allocate_shared_memory(gl.float32, [STAGES * ROWS, 64], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        gl.allocate_shared_memory(dtype, [STAGES, 64, D], shared),
        gl.allocate_shared_memory(dtype, [STAGES, 64, D], shared),
        gl.allocate_shared_memory(dtype, [STAGES, 64, D], shared),
        gl.allocate_shared_memory(dtype, [STAGES, 64, D], shared),
        gl.allocate_shared_memory(dtype, [D, D], shared),
        make_barriers(STAGES, 1 if DECAY == "none" else 2), make_barriers(STAGES, 2),
        make_barriers(1, 2), make_barriers(1, 2), make_barriers(1, 2),
    )  # fmt: skip
    place = first, length, head, gl.cdiv(length, 64)
    decay_ptr = gates_of(decay_ptr, first, head, stride_t, stride_h, DECAY)
    feed, given = (v_desc, d_out_desc, q_desc, k_desc, decay_ptr, stride_t, gamma), (given, inverse_scale)
    gate = rows_ptr, through_ptr, through_ptr + gl.to_tensor(num_chunks).to(gl.int64) * H
    gl.warp_specialize(
        [
            (_pass, (0, place, given, dk_ptr, gate, tiles_of, scale, H, D, DECAY, GATE, STAGES, CHAINED)),
            (_pass, (1, place, given, dv_ptr, gate, tiles_of, scale, H, D, DECAY, GATE, STAGES, CHAINED)),
            (_fetch, (place, feed, tiles_of, D, DECAY, STAGES)),
        ],
        [4, 1], [232, 40],
    )  # fmt: skip


@launched
@gluon.jit(do_not_specialize=["scale", "inverse_scale", "T", "num_chunks"])
def hopper_reverse_kernel(
    v_desc, d_out_desc, q_desc, k_desc, decay_ptr, dk_ptr, dv_ptr, state_ptr, rows_ptr, through_ptr,
    first_ptr, length_ptr, row_ptr, split_chunk_ptr, decay_stride_t, decay_stride_h, scale, inverse_scale, T,
    num_chunks, H: gl.constexpr, D: gl.constexpr, DECAY: gl.constexpr, GATE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As kernels.linear.sweep.reverse_kernel for "both", for K = V = D = 128; with a GATE rows [1, H, T] and through
    [2, chunks, H] too, the second of which gets the log2 decays of the chunks. Grid: (splits * H)."""
    split, head = gl.program_id(0) // H, gl.program_id(0) % H
    feed = v_desc, d_out_desc, q_desc, k_desc, decay_ptr, decay_stride_t, decay_stride_h
    first, length, row = gl.load(first_ptr + split), gl.load(length_ptr + split), gl.load(row_ptr + split)
    gate = rows_ptr, through_ptr, T, gl.load(split_chunk_ptr + split), num_chunks
    reverse_split(
        first, length, head, feed, (state_ptr, row), (dk_ptr, dv_ptr), gate, scale, inverse_scale, H, D, DECAY, GATE,
        STAGES, False,
    )  # fmt: skip


def launch(call, dk, dv, exits, writes, through):
    """As the launches of `Fused.gradients`; exits: gradients of the states leaving the splits."""
    splits = call.splits
    hopper_reverse_kernel[(splits.num_splits * call.heads,)](
        *(tokens_descriptor(t) for t in (call.v, call.d_out, call.q, call.k)), call.decays, dk, dv, exits, writes,
        through, splits.first, splits.length, splits.backward.row, splits.split_chunk, *call.decay_strides,
        call.scale, 1.0 / call.scale if call.scale else 0.0, call.num_tokens, splits.num_chunks,
        call.heads, call.key_size, call.decay, call.gate, STAGES, num_warps=4,
    )  # fmt: skip
