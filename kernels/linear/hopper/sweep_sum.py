"""`sum_kernel` of kernels.linear.sweep for Hopper GPUs, in Gluon: one warp fetches chunks by TMA for two warpgroups.

A warpgroup owns 64 columns of z and of the sum, which it carries transposed in registers. The warp that fetches weighs
decays, too: whole chunks are added, never scaled. It fetches the first chunks while a warpgroup finds how many are
remembered.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma

from longspan.kernels.linear.hopper.decays import load_log_decays, log_decay_per_token
from longspan.kernels.linear.hopper.tiles import clear_rows, synchronize, tokens_descriptor
from longspan.kernels.linear.sweep import CLOSED, LEFT_OUT, LOG2E, SEARCHED
from longspan.kernels.sparse.hopper.tiles import async_load, make_barriers, product_layout, shared_layout

STAGES = 6
MADE = gl.constexpr(32)  # chunks whose decays are made at once


@gluon.jit
def _add(x, y):
    return x + y


@gluon.jit
def _make_decays(gate_ptr, gate_stride_t, decay_ptr, nth, chunks, length, layout: gl.constexpr):
    """What `decay_kernel` of kernels.linear.sweep makes, of the chunks nth [N] from the end of a split, at whose first
    token pointers stand. Gives their log2 decays [N]."""
    token = (chunks - 1 - nth)[:, None] * 64 + gl.arange(0, 64, gl.SliceLayout(0, layout))[None, :]
    inside = (nth < chunks)[:, None] & (token < length)
    g = gl.load(gate_ptr + token * gate_stride_t, mask=inside, other=0.0)
    g = gl.where(g < CLOSED, CLOSED, g).to(gl.float64) * LOG2E
    gl.store(decay_ptr + token * 2, gl.associative_scan(g, 1, _add).to(gl.float32), mask=inside)
    to_end = gl.associative_scan(g, 1, _add, reverse=True) - g
    gl.store(decay_ptr + (token * 2 + 1), to_end.to(gl.float32), mask=inside)
    return gl.sum(g, 1).to(gl.float32)


@gluon.jit
def _remembered(decays_of, length, chunks, DECAY: gl.constexpr, REVERSE: gl.constexpr, MAKE: gl.constexpr):
    """As kernels.linear.sweep._remembered; pointers stand at the first token of the split. MAKE: also makes what is at
    decay_ptr."""
    decay_ptr, gamma, gate_ptr, gate_stride_t = decays_of
    kept, passed = chunks, 0.0
    if DECAY == "fixed":
        passed = gamma * length.to(gl.float32)
        if passed < LEFT_OUT:
            kept = gl.minimum(chunks, (1.0 / gamma * (LEFT_OUT / 64)).to(gl.int32) + 2)
    if DECAY == "scalar":
        BLOCK: gl.constexpr = MADE if MAKE else SEARCHED
        layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
        tokens: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
        i, j = gl.arange(0, BLOCK, gl.SliceLayout(1, layout)), gl.arange(0, BLOCK, gl.SliceLayout(0, layout))
        kept = chunks * 0
        for block in range(0, gl.cdiv(chunks, BLOCK)):
            left = chunks - block * BLOCK
            if MAKE:
                nth = block * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, tokens))
                total = _make_decays(gate_ptr, gate_stride_t, decay_ptr, nth, chunks, length, tokens)
                total = gl.convert_layout(total, gl.SliceLayout(0, layout))
            else:
                nth = block * BLOCK + j
                chunk = nth if REVERSE else chunks - 1 - nth
                last = gl.minimum(chunk * 64 + 64, length) - 1
                total = gl.load(decay_ptr + last * 2, mask=j < left, other=0.0)
            before = passed + gl.sum(gl.where(j[None, :] < i[:, None], total[None, :], 0.0), 1)
            kept += gl.sum(gl.where((i < left) & (before >= LEFT_OUT), 1, 0), 0)
            passed += gl.sum(total, 0)
    return kept, passed


@gluon.jit
def _decays(decay_ptr, n, chunks, length, gamma, DECAY: gl.constexpr, REVERSE: gl.constexpr):
    """log2 decays of chunk n that is added: of its tokens to the end that weights count to, and in all."""
    n = gl.minimum(n, chunks - 1)
    at = (n if REVERSE else chunks - 1 - n) * 64
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    from_start, to_end = load_log_decays(decay_ptr, at, length - at, gamma, layout, DECAY)
    count = gl.minimum(length - at, 64)
    if DECAY == "fixed":
        total = gamma * count.to(gl.float32)
    else:
        total = gl.load(decay_ptr + (at + count - 1) * 2)
    return (from_start if REVERSE else to_end), total


@gluon.jit
def _load_chunk(place, feed, tiles_of, n, D: gl.constexpr, REVERSE: gl.constexpr, STAGES: gl.constexpr):
    first, length, row, head, chunks = place
    y_desc, z_desc, _, _ = feed
    _, y_tiles, z_tiles, ready, _, _, _, _ = tiles_of
    stage, token = n % STAGES, first + (n if REVERSE else chunks - 1 - n) * 64
    mbarrier.expect(ready.index(stage), 2 * 64 * D * 2)
    async_load(y_desc, [token, head * D], ready.index(stage), y_tiles.index(stage))
    async_load(z_desc, [token, head * D], ready.index(stage), z_tiles.index(stage))


@gluon.jit
def _fetch(
    place, feed, tiles_of, D: gl.constexpr, DECAY: gl.constexpr, REVERSE: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    first, length, row, head, chunks = place
    _, _, decay_ptr, gamma = feed
    weights, _, _, ready, free, _, kept_tile, known = tiles_of
    early = gl.where(row >= 0, gl.minimum(chunks, STAGES), 0)  # before it is known how many are needed
    for n in range(0, early):
        _load_chunk(place, feed, tiles_of, n, D, REVERSE, STAGES)
    mbarrier.wait(known.index(0), 0)
    kept = gl.sum(kept_tile.load(gl.BlockedLayout([1], [32], [1], [0])), 0)
    passed = 0.0  # log2 decay between this chunk and the end that weights count to
    if DECAY != "none":
        decays, total = _decays(decay_ptr, 0, chunks, length, gamma, DECAY, REVERSE)
    for n in range(0, kept):
        stage = n % STAGES
        if n >= early:
            mbarrier.wait(free.index(stage), (n // STAGES & 1) ^ 1)
            _load_chunk(place, feed, tiles_of, n, D, REVERSE, STAGES)
        if DECAY != "none":  # those of the next chunk are on their way meanwhile
            next_decays, next_total = _decays(decay_ptr, n + 1, chunks, length, gamma, DECAY, REVERSE)
            weights.index(stage).store(gl.exp2(decays + passed))
            passed += total
            decays, total = next_decays, next_total
            synchronize()
            mbarrier.arrive(ready.index(stage))
    for n in range(kept, early):  # nobody else waits for what was fetched in vain
        if DECAY != "none":
            mbarrier.arrive(ready.index(n))
        mbarrier.wait(ready.index(n), 0)


@gluon.jit
def _pass(
    part: gl.constexpr, place, to, decays_of, tiles_of, scale, D: gl.constexpr, DECAY: gl.constexpr,
    REVERSE: gl.constexpr, MAKE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    first, length, row, head, chunks = place
    sum_ptr, total_ptr = to
    weights, y_tiles, z_tiles, ready, free, cleared, kept_tile, known = tiles_of
    if part == 0:
        kept, total = _remembered(decays_of, length, chunks, DECAY, REVERSE, MAKE)
        if DECAY != "none":
            gl.store(total_ptr, total / LOG2E, mask=row >= 0)
        kept = gl.where(row >= 0, kept, 0)
        kept_tile.store(gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [4], [0])) + kept)
        synchronize()
        mbarrier.arrive(known.index(0))
    else:
        mbarrier.wait(known.index(0), 0)
        kept = gl.sum(kept_tile.load(gl.BlockedLayout([1], [32], [4], [0])), 0)
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
    gl.store(sum_ptr + part * 64 + column[:, None] + key[None, :] * D, state * scale, mask=row >= 0)


@gluon.jit(do_not_specialize=["scale", "T"])
def hopper_sum_kernel(
    y_desc, z_desc, decay_ptr, gate_ptr, sum_ptr, total_ptr, list_ptr, first_ptr, length_ptr, row_ptr,
    gate_stride_t, gate_stride_h, scale, T,
    H: gl.constexpr, D: gl.constexpr, DECAY: gl.constexpr, REVERSE: gl.constexpr, MAKE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """As kernels.linear.sweep.sum_kernel, for K = V = D = 128. Grid: (listed splits * H). MAKE: also makes decays, of
    the gate [T, H] and of all splits: row is -1 for those whose sum nobody wants. Grid: (splits * H)."""
    dtype: gl.constexpr = y_desc.dtype
    shared: gl.constexpr = shared_layout(16)
    split, head = gl.program_id(0) // H, gl.program_id(0) % H
    if not MAKE:
        split = gl.load(list_ptr + split)
    first, length, row = gl.load(first_ptr + split), gl.load(length_ptr + split), gl.load(row_ptr + split)
    gamma = log_decay_per_token(decay_ptr, head, DECAY)
    if DECAY == "scalar":
        decay_ptr += (gl.to_tensor(head).to(gl.int64) * T + first) * 2
        gate_ptr += gl.to_tensor(first).to(gl.int64) * gate_stride_t + head * gate_stride_h
    chunks = gl.cdiv(length, 64)
    at = gl.maximum(row, 0).to(gl.int64) * H + head
    tiles_of = (
        gl.allocate_shared_memory(gl.float32, [STAGES, 64], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        gl.allocate_shared_memory(dtype, [STAGES, 64, D], shared),
        gl.allocate_shared_memory(dtype, [STAGES, 64, D], shared),
        make_barriers(STAGES, 1 if DECAY == "none" else 2), make_barriers(STAGES, 2), make_barriers(1, 2),
        gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0])), make_barriers(1, 1),
    )  # fmt: skip
    place, to = (first, length, row, head, chunks), (sum_ptr + at * D * D, total_ptr + at)
    decays_of = decay_ptr, gamma, gate_ptr, gate_stride_t
    gl.warp_specialize(
        [
            (_pass, (0, place, to, decays_of, tiles_of, scale, D, DECAY, REVERSE, MAKE, STAGES)),
            (_pass, (1, place, to, decays_of, tiles_of, scale, D, DECAY, REVERSE, MAKE, STAGES)),
            (_fetch, (place, (y_desc, z_desc, decay_ptr, gamma), tiles_of, D, DECAY, REVERSE, STAGES)),
        ],
        [4, 1], [232, 40],
    )  # fmt: skip


def launch(call, y, z, scale, direction, states, totals, *, reverse, gate=None):
    """As the launch of `Fused._sum`; with a gate [T, H] it fills `call.decays`, too."""
    splits = call.splits
    hopper_sum_kernel[((len(direction.splits) if gate is None else splits.num_splits) * call.heads,)](
        tokens_descriptor(y), tokens_descriptor(z), call.decays, call.decays if gate is None else gate, states, totals,
        direction.splits, splits.first, splits.length, direction.sum_row,
        *((0, 0) if gate is None else gate.stride()), scale, call.num_tokens,
        call.heads, call.key_size, call.decay, reverse, gate is not None, STAGES, num_warps=4,
    )  # fmt: skip
