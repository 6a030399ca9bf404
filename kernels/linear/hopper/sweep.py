"""`sweep_kernel` of kernels.linear.sweep for Hopper GPUs, in Gluon: one warp fetches chunks by TMA for two warpgroups.

A warpgroup owns 64 columns of z, of the result and of the state S, which it carries transposed in registers and leaves,
rounded, in shared memory as an operand of the next chunk. Both form all scores, which is cheaper than to share them:
warpgroups wait for tiles and never for each other.
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
from longspan.kernels.sparse.hopper.tiles import async_load, make_barriers, product_layout, shared_layout

STAGES = 3


@gluon.jit
def _fetch(
    place, feed, tiles_of, D: gl.constexpr, DECAY: gl.constexpr, GATE: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    first, length, head, chunks = place
    x_desc, y_desc, z_desc, extra_desc, decay_ptr, stride_t, gamma = feed
    vectors, x_tiles, y_tiles, z_tiles, extras, _, ready, free, _ = tiles_of
    for n in range(0, chunks):
        stage, token, left = n % STAGES, first + n * 64, length - n * 64
        gates = load_gates(decay_ptr, n * 64, left, stride_t, gl.BlockedLayout([2], [32], [1], [0]), DECAY)
        mbarrier.wait(free.index(stage), (n // STAGES & 1) ^ 1)
        mbarrier.expect(ready.index(stage), (4 if GATE else 3) * 64 * D * 2)
        async_load(y_desc, [token, head * D], ready.index(stage), y_tiles.index(stage))
        async_load(x_desc, [token, head * D], ready.index(stage), x_tiles.index(stage))
        async_load(z_desc, [token, head * D], ready.index(stage), z_tiles.index(stage))
        if GATE:
            async_load(extra_desc, [token, head * D], ready.index(stage), extras.index(stage))
        if DECAY != "none":
            store_decays(gates, left, gamma, vectors, stage, DECAY)
            mbarrier.arrive(ready.index(stage))


@gluon.jit
def _pass(
    part: gl.constexpr, place, given, to, tiles_of, scale, H, D: gl.constexpr, TRANSPOSED: gl.constexpr,
    DECAY: gl.constexpr, GATE: gl.constexpr, STAGES: gl.constexpr, CHAINED: gl.constexpr,
):  # fmt: skip
    first, length, head, chunks = place
    out_ptr, rows_ptr, T = to
    vectors, x_tiles, y_tiles, z_tiles, extras, states, ready, free, cleared = tiles_of
    S: gl.constexpr = product_layout(64)
    OUT: gl.constexpr = product_layout(D)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    dtype: gl.constexpr = x_tiles.dtype
    nothing = gl.full([64, 64], 0.0, gl.float32, S)
    state = entry_state(part, head, given, OUT, H, D, TRANSPOSED, False, CHAINED)
    entering = states.index(part)
    entering.store(state.to(dtype))
    fence_async_shared()
    synchronize()
    if GATE:
        rows_ptr += gl.to_tensor(part * H + head).to(gl.int64) * T
    for n in range(0, chunks):
        stage, left, token = n % STAGES, length - n * 64, first + n * 64
        x, y = x_tiles.index(stage), y_tiles.index(stage)
        z = z_tiles.index(stage).slice(part * 64, 64, 1)
        mbarrier.wait(ready.index(stage), n // STAGES & 1)
        if left < 64:  # the last chunk: TMA has brought tokens of the next span
            clear_rows(y if part == 0 else z_tiles.index(stage), left, D)
            fence_async_shared()
            synchronize()
            mbarrier.arrive(cleared.index(0))
            mbarrier.wait(cleared.index(0), 0)
        weighted = z.permute((1, 0)).load(S)
        if DECAY != "none":
            to_end = vectors.index(stage * ROWS + TO_END).load(gl.SliceLayout(0, S))
            weighted = (weighted.to(gl.float32) * to_end[None, :]).to(dtype)
        weighted = gl.convert_layout(weighted, gl.DotOperandLayout(0, OUT, 2))
        if DECAY != "none":
            state = state * total_decay(vectors, stage, FROM_START, gl.SliceLayout(1, OUT))[:, None]
        scores_pending = warpgroup_mma(x, y.permute((1, 0)), nothing, use_acc=False, is_async=True)
        out_pending = warpgroup_mma(x, entering.permute((1, 0)), nothing, use_acc=False, is_async=True)
        state_pending = warpgroup_mma(weighted, y, state, is_async=True)
        pairs = pair_weights(vectors, stage, False, S, DECAY)
        mbarrier.wait(ready.index(stage), n // STAGES & 1)  # passed already: keeps the next wait behind the arithmetic
        scores = warpgroup_mma_wait(2, deps=[scores_pending])
        scores = gl.convert_layout((scores * pairs).to(dtype), gl.DotOperandLayout(0, S, 2))
        mbarrier.wait(ready.index(stage), n // STAGES & 1)  # passed already, as above
        out = warpgroup_mma_wait(1, deps=[out_pending])
        if DECAY != "none":
            out = out * vectors.index(stage * ROWS + FROM_START).load(ROW)[:, None]
        out_pending = warpgroup_mma(scores, z, out, is_async=True)
        state, weighted = warpgroup_mma_wait(1, deps=[state_pending, weighted])
        synchronize()  # other warps may have waited less for what read this
        entering.store(state.to(dtype))
        out, scores = warpgroup_mma_wait(0, deps=[out_pending, scores])
        out = out * scale
        if GATE:
            extra = extras.index(stage).slice(part * 64, 64, 1).load(S).to(gl.float32)
            token_of = gl.arange(0, 64, ROW)
            gl.store(rows_ptr + token + token_of, gl.sum(out * extra, 1), mask=token_of < left)
        synchronize()
        z.store(out.to(dtype))  # nobody reads these columns any more
        fence_async_shared()
        synchronize()
        store_columns(out_ptr, token, left, head, part * 64, z, H, D)
        synchronize()
        mbarrier.arrive(free.index(stage))


@gluon.jit
def sweep_split(
    first, length, head, feed, given, to, scale, H: gl.constexpr, D: gl.constexpr, TRANSPOSED: gl.constexpr,
    DECAY: gl.constexpr, GATE: gl.constexpr, STAGES: gl.constexpr, CHAINED: gl.constexpr,
):  # fmt: skip
    """The sweep through `length` tokens from `first` on of a head. feed: descriptors of x, y, z and extra, decays and
    their strides; given, CHAINED: see `entry_state`; to: out, rows and T."""
    x_desc, y_desc, z_desc, extra_desc, decay_ptr, stride_t, stride_h = feed
    dtype: gl.constexpr = x_desc.dtype
    shared: gl.constexpr = shared_layout(16)
    gamma = log_decay_per_token(decay_ptr, head, DECAY)
    decay_ptr = gates_of(decay_ptr, first, head, stride_t, stride_h, DECAY)
    tiles_of = (
        gl.allocate_shared_memory(gl.float32, [STAGES * ROWS, 64], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        gl.allocate_shared_memory(dtype, [STAGES, 64, D], shared),
        gl.allocate_shared_memory(dtype, [STAGES, 64, D], shared),
        gl.allocate_shared_memory(dtype, [STAGES, 64, D], shared),
        gl.allocate_shared_memory(dtype, [STAGES if GATE else 1, 64, D], shared),
        gl.allocate_shared_memory(dtype, [2, 64, D], shared),
        make_barriers(STAGES, 1 if DECAY == "none" else 2), make_barriers(STAGES, 2), make_barriers(1, 2),
    )  # fmt: skip
    place = first, length, head, gl.cdiv(length, 64)
    feed = x_desc, y_desc, z_desc, extra_desc, decay_ptr, stride_t, gamma
    gl.warp_specialize(
        [
            (_pass, (0, place, given, to, tiles_of, scale, H, D, TRANSPOSED, DECAY, GATE, STAGES, CHAINED)),
            (_pass, (1, place, given, to, tiles_of, scale, H, D, TRANSPOSED, DECAY, GATE, STAGES, CHAINED)),
            (_fetch, (place, feed, tiles_of, D, DECAY, GATE, STAGES)),
        ],
        [4, 1], [232, 40],
    )  # fmt: skip


@launched
@gluon.jit(do_not_specialize=["scale", "T"])
def hopper_sweep_kernel(
    x_desc, y_desc, z_desc, extra_desc, decay_ptr, out_ptr, state_ptr, rows_ptr, first_ptr, length_ptr, row_ptr,
    decay_stride_t, decay_stride_h, scale, T, H: gl.constexpr, D: gl.constexpr, TRANSPOSED: gl.constexpr,
    DECAY: gl.constexpr, GATE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As kernels.linear.sweep.sweep_kernel, for K = V = D = 128; rows [2, H, T]. TRANSPOSED: the state has rows of z.
    Grid: (splits * H)."""
    split, head = gl.program_id(0) // H, gl.program_id(0) % H
    feed = x_desc, y_desc, z_desc, extra_desc, decay_ptr, decay_stride_t, decay_stride_h
    first, length, row = gl.load(first_ptr + split), gl.load(length_ptr + split), gl.load(row_ptr + split)
    given, to = (state_ptr, row), (out_ptr, rows_ptr, T)
    sweep_split(first, length, head, feed, given, to, scale, H, D, TRANSPOSED, DECAY, GATE, STAGES, False)


def launch(call, x, y, z, out, entries, reads, *, transposed):
    """As `Fused._sweep`; reads: row sums [2, H, T] for a gate, or anything else."""
    splits, gate = call.splits, transposed and call.gate
    hopper_sweep_kernel[(splits.num_splits * call.heads,)](
        *(tokens_descriptor(t) for t in (x, y, z, call.q)), call.decays, out, entries, reads,
        splits.first, splits.length, splits.forward.row, *call.decay_strides, call.scale, call.num_tokens,
        call.heads, call.key_size, transposed, call.decay, gate, STAGES, num_warps=4,
    )  # fmt: skip
