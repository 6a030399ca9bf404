"""`sum_kernel` of kernels.linear.sweep for Hopper GPUs, in Gluon: one warp fetches chunks by TMA for two warpgroups.

A warpgroup owns 64 columns of z and of the sum, which it carries transposed in registers. The warp that fetches weighs
decays, too: whole chunks are added, never scaled.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma

from longspan.kernels.linear.hopper.decays import load_log_decays, log_decay_per_token
from longspan.kernels.linear.hopper.tiles import clear_rows, synchronize, tokens_descriptor
from longspan.kernels.linear.sweep import LEFT_OUT, LOG2E, SEARCHED
from longspan.kernels.sparse.hopper.tiles import async_load, make_barriers, product_layout, shared_layout

STAGES = 6


@gluon.jit
def _remembered(decay_ptr, length, chunks, gamma, DECAY: gl.constexpr, REVERSE: gl.constexpr):
    """As kernels.linear.sweep._remembered; decay_ptr: at the first token of the split."""
    kept, passed = chunks, 0.0
    if DECAY == "fixed":
        passed = gamma * length.to(gl.float32)
        if passed < LEFT_OUT:
            kept = gl.minimum(chunks, (1.0 / gamma * (LEFT_OUT / 64)).to(gl.int32) + 2)
    if DECAY == "scalar":
        layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
        i, j = gl.arange(0, SEARCHED, gl.SliceLayout(1, layout)), gl.arange(0, SEARCHED, gl.SliceLayout(0, layout))
        kept = chunks * 0
        for block in range(0, gl.cdiv(chunks, SEARCHED)):
            left = chunks - block * SEARCHED
            nth = block * SEARCHED + j
            chunk = nth if REVERSE else chunks - 1 - nth
            last = gl.minimum(chunk * 64 + 64, length) - 1
            total = gl.load(decay_ptr + last * 2, mask=j < left, other=0.0)
            before = passed + gl.sum(gl.where(j[None, :] < i[:, None], total[None, :], 0.0), 1)
            kept += gl.sum(gl.where((i < left) & (before >= LEFT_OUT), 1, 0), 0)
            passed += gl.sum(total, 0)
    return kept, passed


@gluon.jit
def _fetch(
    place, feed, tiles_of, D: gl.constexpr, DECAY: gl.constexpr, REVERSE: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    first, length, head, chunks, kept = place
    y_desc, z_desc, decay_ptr, gamma = feed
    weights, y_tiles, z_tiles, ready, free, _ = tiles_of
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    passed = 0.0  # log2 decay between this chunk and the end that weights count to
    for n in range(0, kept):
        stage, at = n % STAGES, (n if REVERSE else chunks - 1 - n) * 64
        mbarrier.wait(free.index(stage), (n // STAGES & 1) ^ 1)
        mbarrier.expect(ready.index(stage), 2 * 64 * D * 2)
        async_load(y_desc, [first + at, head * D], ready.index(stage), y_tiles.index(stage))
        async_load(z_desc, [first + at, head * D], ready.index(stage), z_tiles.index(stage))
        if DECAY != "none":
            count = gl.minimum(length - at, 64)
            from_start, to_end = load_log_decays(decay_ptr, at, length - at, gamma, layout, DECAY)
            weights.index(stage).store(gl.exp2((from_start if REVERSE else to_end) + passed))
            if DECAY == "fixed":
                passed += gamma * count.to(gl.float32)
            else:
                passed += gl.load(decay_ptr + (at + count - 1) * 2)
            synchronize()
            mbarrier.arrive(ready.index(stage))


@gluon.jit
def _pass(
    part: gl.constexpr, place, sum_ptr, tiles_of, scale, D: gl.constexpr, DECAY: gl.constexpr, REVERSE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    _, length, _, chunks, kept = place
    weights, y_tiles, z_tiles, ready, free, cleared = tiles_of
    S: gl.constexpr = product_layout(64)
    OUT: gl.constexpr = product_layout(D)
    dtype: gl.constexpr = y_tiles.dtype
    state = gl.full([64, D], 0.0, gl.float32, OUT)
    for n in range(0, kept):
        stage, left = n % STAGES, length - (n if REVERSE else chunks - 1 - n) * 64
        y = y_tiles.index(stage)
        mbarrier.wait(ready.index(stage), n // STAGES & 1)
        if left < 64:  # the last chunk: TMA has brought tokens of the next span
            clear_rows(y if part == 0 else z_tiles.index(stage), left, D)
            fence_async_shared()
            synchronize()
            mbarrier.arrive(cleared.index(0))
            mbarrier.wait(cleared.index(0), 0)
        z = z_tiles.index(stage).slice(part * 64, 64, 1).permute((1, 0)).load(S)
        if DECAY != "none":
            z = (z.to(gl.float32) * weights.index(stage).load(gl.SliceLayout(0, S))[None, :]).to(dtype)
        z = gl.convert_layout(z, gl.DotOperandLayout(0, OUT, 2))
        state = warpgroup_mma(z, y, state)
        synchronize()
        mbarrier.arrive(free.index(stage))
    column, key = gl.arange(0, 64, gl.SliceLayout(1, OUT)), gl.arange(0, D, gl.SliceLayout(0, OUT))
    gl.store(sum_ptr + part * 64 + column[:, None] + key[None, :] * D, state * scale)


@gluon.jit(do_not_specialize=["scale", "T"])
def hopper_sum_kernel(
    y_desc, z_desc, decay_ptr, sum_ptr, total_ptr, list_ptr, first_ptr, length_ptr, row_ptr, scale, T,
    H: gl.constexpr, D: gl.constexpr, DECAY: gl.constexpr, REVERSE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As kernels.linear.sweep.sum_kernel, for K = V = D = 128. Grid: (listed splits * H)."""
    dtype: gl.constexpr = y_desc.dtype
    shared: gl.constexpr = shared_layout(16)
    split, head = gl.load(list_ptr + gl.program_id(0) // H), gl.program_id(0) % H
    first, length = gl.load(first_ptr + split), gl.load(length_ptr + split)
    row = gl.load(row_ptr + split).to(gl.int64) * H + head
    gamma = log_decay_per_token(decay_ptr, head, DECAY)
    if DECAY == "scalar":
        decay_ptr += (gl.to_tensor(head).to(gl.int64) * T + first) * 2
    chunks = gl.cdiv(length, 64)
    kept, total = _remembered(decay_ptr, length, chunks, gamma, DECAY, REVERSE)
    if DECAY != "none":
        gl.store(total_ptr + row, total / LOG2E)
    tiles_of = (
        gl.allocate_shared_memory(gl.float32, [STAGES, 64], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        gl.allocate_shared_memory(dtype, [STAGES, 64, D], shared),
        gl.allocate_shared_memory(dtype, [STAGES, 64, D], shared),
        make_barriers(STAGES, 1 if DECAY == "none" else 2), make_barriers(STAGES, 2), make_barriers(1, 2),
    )  # fmt: skip
    place = first, length, head, chunks, kept
    sum_ptr += row * D * D
    gl.warp_specialize(
        [
            (_pass, (0, place, sum_ptr, tiles_of, scale, D, DECAY, REVERSE, STAGES)),
            (_pass, (1, place, sum_ptr, tiles_of, scale, D, DECAY, REVERSE, STAGES)),
            (_fetch, (place, (y_desc, z_desc, decay_ptr, gamma), tiles_of, D, DECAY, REVERSE, STAGES)),
        ],
        [4, 1], [232, 40],
    )  # fmt: skip


def launch(call, y, z, scale, direction, states, totals, *, reverse):
    """As the launch of `Fused._sum`."""
    splits = call.splits
    hopper_sum_kernel[(len(direction.splits) * call.heads,)](
        tokens_descriptor(y), tokens_descriptor(z), call.decays, states, totals, direction.splits, splits.first,
        splits.length, splits.sum_row, scale, call.num_tokens,
        call.heads, call.key_size, call.decay, reverse, STAGES, num_warps=4,
    )  # fmt: skip
