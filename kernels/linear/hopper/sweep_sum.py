"""`sum_kernel` of kernels.linear.sweep for Hopper GPUs, in Gluon: one warp fetches chunks by TMA for two warpgroups.

A warpgroup owns 64 columns of z and of the sum, which it carries transposed in registers; while a product is under way
it weighs the next chunk. The warp that fetches weighs decays, too: whole chunks are added, never scaled. With a gate it
finds out as it goes how many are remembered.

Heads of a fixed decay remember unlike numbers of chunks, and a program for each would wait for the one that forgets
nothing. So one that remembers more than most is summed in parts, by the programs of heads that are further on.
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
from longspan.kernels.linear.hopper.chain import columns_of
from longspan.kernels.linear.hopper.decays import LEFT_OUT, gates_of, load_gates, log_decay_per_token, log_decays
from longspan.kernels.linear.hopper.tiles import clear_rows, synchronize, tokens_descriptor
from longspan.kernels.linear.splits import padded
from longspan.kernels.linear.sweep import LOG2E
from longspan.kernels.sparse.hopper.tiles import async_load, make_barriers, product_layout, shared_layout

STAGES = 6
PARTS = {"none": 1, "fixed": 4, "scalar": 1}  # of a sum, at most
MIN_PART = gl.constexpr(8)  # chunks
_power_of_two = gluon.constexpr_function(padded)


@gluon.jit
def _remembered(gamma, length, chunks):
    """Chunks of a split that are remembered at its end under a log2 decay `gamma` per token, or several."""
    forgets = gamma * length.to(gl.float32) < LEFT_OUT
    reach = (1.0 / gl.where(forgets, gamma, -1.0) * (LEFT_OUT / 64)).to(gl.int32) + 2
    return gl.where(forgets, gl.minimum(reach, chunks), chunks)


@gluon.jit
def _num_parts(kept, mean, PARTS: gl.constexpr):
    """Of a head that remembers `kept` chunks where the heads remember `mean`."""
    return gl.minimum(gl.maximum(kept // gl.maximum(mean, MIN_PART), 1), PARTS)


@gluon.jit
def _item(part, place, decay_ptr, H: gl.constexpr, DECAY: gl.constexpr, PARTS: gl.constexpr):
    """(head, its fixed decay, first chunk and end in the order of summing) of what this program sums as `part`. With a
    gate the end may come before."""
    _, length, _, head, chunks, mean = place
    if DECAY != "fixed":
        return head, 0.0, chunks * 0, chunks
    else:
        head = (head + part * max(H // PARTS, 1)) % H
        gamma = log_decay_per_token(decay_ptr, head, DECAY)
        kept = _remembered(gamma, length, chunks)
        parts = _num_parts(kept, mean, PARTS)
        begin = kept * part // parts
        return head, gamma, begin, gl.where(part < parts, kept * (part + 1) // parts, begin)


@gluon.jit
def _start_of(n, chunks, REVERSE: gl.constexpr):
    """The first token of the n-th chunk in the order of summing, or of the last."""
    n = gl.minimum(n, chunks - 1)
    return (n if REVERSE else chunks - 1 - n) * 64


@gluon.jit
def _send(place, head, n, number, feed, tiles_of, D: gl.constexpr, REVERSE: gl.constexpr, STAGES: gl.constexpr):
    first, _, _, _, chunks, _ = place
    y_desc, z_desc = feed[0], feed[1]
    y_tiles, z_tiles, ready, free = tiles_of[2], tiles_of[3], tiles_of[4], tiles_of[5]
    stage, token = number % STAGES, first + _start_of(n, chunks, REVERSE)
    if number > 0:  # the first is on its way, and may be done with by now
        mbarrier.wait(free.index(stage), (number // STAGES & 1) ^ 1)
        mbarrier.expect(ready.index(stage), 2 * 64 * D * 2)
        async_load(y_desc, [token, head * D], ready.index(stage), y_tiles.index(stage))
        async_load(z_desc, [token, head * D], ready.index(stage), z_tiles.index(stage))


@gluon.jit
def _fetch(
    place, feed, tiles_of, H: gl.constexpr, D: gl.constexpr, DECAY: gl.constexpr, REVERSE: gl.constexpr,
    PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    _, length, _, _, chunks, _ = place
    decay_ptr = feed[2]
    weights, ready = tiles_of[0], tiles_of[4]
    number = 0
    for part in range(0, PARTS):
        head, gamma, begin, stop = _item(part, place, decay_ptr, H, DECAY, PARTS)
        # log2 decay between a chunk and the end that weights count to.
        passed = gl.maximum(begin * 64 if REVERSE else length - (chunks - begin) * 64, 0).to(gl.float32) * gamma
        for n in range(begin, stop):
            _send(place, head, n, number, feed, tiles_of, D, REVERSE, STAGES)
            if DECAY == "fixed":
                left, stage = length - _start_of(n, chunks, REVERSE), number % STAGES
                from_start, to_end, total = log_decays(0.0, left, gamma, gl.BlockedLayout([2], [32], [1], [0]), DECAY)
                weights.index(stage).store(gl.exp2((from_start if REVERSE else to_end) + passed))
                synchronize()
                mbarrier.arrive(ready.index(stage))
                passed += total
            number += 1


@gluon.jit
def _fetch_gated(place, feed, tiles_of, total_ptr, D: gl.constexpr, REVERSE: gl.constexpr, STAGES: gl.constexpr):
    """Until nothing is remembered. Stores the decay of the split, or of as much of it as was looked at."""
    _, length, _, head, chunks, _ = place
    _, _, decay_ptr, stride_t = feed
    weights, more, ready = tiles_of[0], tiles_of[1], tiles_of[4]
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    # Gates of this chunk and of the next are there or on their way.
    at, following_at = _start_of(0, chunks, REVERSE), _start_of(1, chunks, REVERSE)
    gates = load_gates(decay_ptr, at, length - at, stride_t, layout, "scalar")
    following = load_gates(decay_ptr, following_at, length - following_at, stride_t, layout, "scalar")
    n, passed, going = chunks * 0, chunks.to(gl.float32) * 0.0, chunks > 0
    while going:
        stage, at = n % STAGES, _start_of(n + 2, chunks, REVERSE)
        later = load_gates(decay_ptr, at, length - at, stride_t, layout, "scalar")
        _send(place, head, n, n, feed, tiles_of, D, REVERSE, STAGES)
        from_start, to_end, total = log_decays(gates, 64, 0.0, layout, "scalar")
        weights.index(stage).store(gl.exp2((from_start if REVERSE else to_end) + passed))
        passed += total
        n += 1
        going = (n < chunks) & (passed >= LEFT_OUT)
        more.index(stage).store(gl.full([1], gl.where(going, 1, 0), gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
        synchronize()
        mbarrier.arrive(ready.index(stage))
        gates, following = following, later
    gl.store(total_ptr, passed / LOG2E)


@gluon.jit
def _operand(
    half: gl.constexpr, n, number, part, stop, place, tiles_of, D: gl.constexpr, DECAY: gl.constexpr,
    REVERSE: gl.constexpr, SHORT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The n-th chunk's 64 columns of z, weighed and transposed, once it is there, and whether another one follows.
    SHORT: it may be the last chunk of the split."""
    _, length, _, _, chunks, _ = place
    weights, more, y_tiles, z_tiles, ready, _, cleared = tiles_of
    S: gl.constexpr = product_layout(64)
    stage = number % STAGES
    mbarrier.wait(ready.index(stage), number // STAGES & 1)
    if SHORT:
        left = length - _start_of(n, chunks, REVERSE)
        if left < 64:  # TMA has brought tokens of the next span
            clear_rows(y_tiles.index(stage) if half == 0 else z_tiles.index(stage), left, D)
            fence_async_shared()
            synchronize()
            mbarrier.arrive(cleared.index(part))
            mbarrier.wait(cleared.index(part), 0)
    z = z_tiles.index(stage).slice(half * 64, 64, 1).permute((1, 0)).load(S)
    if DECAY != "none":
        z = (z.to(gl.float32) * weights.index(stage).load(gl.SliceLayout(0, S))[None, :]).to(z.dtype)
    z = gl.convert_layout(z, gl.DotOperandLayout(0, product_layout(D), 2))
    if DECAY == "scalar":
        return z, gl.max(more.index(stage).load(gl.BlockedLayout([1], [32], [4], [0])), 0) > 0
    else:
        return z, n + 1 < stop


@gluon.jit
def _pass(
    half: gl.constexpr, place, decay_ptr, sum_ptr, tiles_of, scale, H: gl.constexpr, D: gl.constexpr,
    DECAY: gl.constexpr, REVERSE: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr, CHAINED: gl.constexpr,
):  # fmt: skip
    row, y_tiles, ready, free = place[2], tiles_of[2], tiles_of[4], tiles_of[5]
    OUT: gl.constexpr = product_layout(D)
    number = 0
    for part in range(0, PARTS):
        head, gamma, n, stop = _item(part, place, decay_ptr, H, DECAY, PARTS)
        if n < stop:
            state = gl.full([64, D], 0.0, gl.float32, OUT)
            z, more = _operand(half, n, number, part, stop, place, tiles_of, D, DECAY, REVERSE, True, STAGES)
            while more:
                done = number % STAGES
                pending = warpgroup_mma(z, y_tiles.index(done), state, is_async=True)
                number += 1
                n += 1
                # Forward the last chunk is the first to be summed.
                following, more = _operand(
                    half, n, number, part, stop, place, tiles_of, D, DECAY, REVERSE, REVERSE, STAGES
                )  # fmt: skip
                # Passed already: keeps the next wait behind the arithmetic.
                mbarrier.wait(ready.index(number % STAGES), number // STAGES & 1)
                state, z = warpgroup_mma_wait(0, deps=[pending, z])
                synchronize()
                mbarrier.arrive(free.index(done))
                z = following
            state = warpgroup_mma(z, y_tiles.index(number % STAGES), state)
            synchronize()
            mbarrier.arrive(free.index(number % STAGES))
            number += 1
            sum_at = sum_ptr + ((row * PARTS + part) * H + head) * (D * D)
            gl.store(columns_of(sum_at, half, CHAINED, OUT, D), state * scale)


@gluon.jit
def sum_split(
    first, length, row, head, feed, sums, scale, H: gl.constexpr, D: gl.constexpr, DECAY: gl.constexpr,
    REVERSE: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr, CHAINED: gl.constexpr,
):  # fmt: skip
    """The sum of `length` tokens from `first` on of a head, and with parts of others. feed: descriptors of y and z,
    decays and their strides; sums: sums, log decays and parts. CHAINED: sums are transposed."""
    y_desc, z_desc, decay_ptr, stride_t, stride_h = feed
    sum_ptr, total_ptr, parts_ptr = sums
    dtype: gl.constexpr = y_desc.dtype
    shared: gl.constexpr = shared_layout(16)
    numbers: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    chunks = gl.cdiv(length, 64)
    tiles_of = (
        gl.allocate_shared_memory(gl.float32, [STAGES, 64], numbers),
        gl.allocate_shared_memory(gl.int32, [STAGES, 1], numbers),
        gl.allocate_shared_memory(dtype, [STAGES, 64, D], shared),
        gl.allocate_shared_memory(dtype, [STAGES, 64, D], shared),
        make_barriers(STAGES, 1 if DECAY == "none" else 2), make_barriers(STAGES, 2), make_barriers(PARTS, 2),
    )  # fmt: skip
    # The first chunk is remembered in any case, so that it comes before anything else is known.
    token, ready = first + _start_of(0, chunks, REVERSE), tiles_of[4].index(0)
    fence_async_shared()
    mbarrier.expect(ready, 2 * 64 * D * 2)
    synchronize()
    async_load(y_desc, [token, head * D], ready, tiles_of[2].index(0))
    async_load(z_desc, [token, head * D], ready, tiles_of[3].index(0))
    total_ptr += row * H + head
    mean = chunks
    if DECAY == "fixed":
        gamma = log_decay_per_token(decay_ptr, head, DECAY)
        gl.store(total_ptr, gamma * length.to(gl.float32) / LOG2E)
        if PARTS > 1:
            heads = gl.arange(0, _power_of_two(H), gl.BlockedLayout([1], [32], [4], [0]))
            gammas = log_decay_per_token(decay_ptr, gl.minimum(heads, H - 1), DECAY)
            mean = gl.sum(gl.where(heads < H, _remembered(gammas, length, chunks), 0), 0) // H
            gl.store(parts_ptr + row * H + head, _num_parts(_remembered(gamma, length, chunks), mean, PARTS))
    decay_ptr = gates_of(decay_ptr, first, head, stride_t, stride_h, DECAY)
    place, feed = (first, length, row, head, chunks, mean), (y_desc, z_desc, decay_ptr, stride_t)
    if DECAY == "scalar":
        gl.warp_specialize(
            [
                (_pass, (0, place, decay_ptr, sum_ptr, tiles_of, scale, H, D, DECAY, REVERSE, PARTS, STAGES, CHAINED)),
                (_pass, (1, place, decay_ptr, sum_ptr, tiles_of, scale, H, D, DECAY, REVERSE, PARTS, STAGES, CHAINED)),
                (_fetch_gated, (place, feed, tiles_of, total_ptr, D, REVERSE, STAGES)),
            ],
            [4, 1], [216, 56],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_pass, (0, place, decay_ptr, sum_ptr, tiles_of, scale, H, D, DECAY, REVERSE, PARTS, STAGES, CHAINED)),
                (_pass, (1, place, decay_ptr, sum_ptr, tiles_of, scale, H, D, DECAY, REVERSE, PARTS, STAGES, CHAINED)),
                (_fetch, (place, feed, tiles_of, H, D, DECAY, REVERSE, PARTS, STAGES)),
            ],
            [4, 1], [232, 40],
        )  # fmt: skip


@launched
@gluon.jit(do_not_specialize=["scale"])
def hopper_sum_kernel(
    y_desc, z_desc, decay_ptr, sum_ptr, total_ptr, parts_ptr, list_ptr, first_ptr, length_ptr, row_ptr,
    decay_stride_t, decay_stride_h, scale, H: gl.constexpr, D: gl.constexpr, DECAY: gl.constexpr,
    REVERSE: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As kernels.linear.sweep.sum_kernel, for K = V = D = 128; if PARTS > 1, sums [rows, PARTS, H, D, D] of which the
    first `parts` [rows, H] are to be added. Grid: (listed splits * H)."""
    split, head = gl.load(list_ptr + gl.program_id(0) // H), gl.program_id(0) % H
    first, length = gl.load(first_ptr + split), gl.load(length_ptr + split)
    row = gl.load(row_ptr + split).to(gl.int64)
    feed, sums = (y_desc, z_desc, decay_ptr, decay_stride_t, decay_stride_h), (sum_ptr, total_ptr, parts_ptr)
    sum_split(first, length, row, head, feed, sums, scale, H, D, DECAY, REVERSE, PARTS, STAGES, False)


def launch(call, y, z, scale, direction, states, totals, parts, *, reverse):
    """As the launch of `Fused._sum`; parts: int32 [num_sums, H], or None where `PARTS` of the decay is 1. Log decays of
    gated splits that forget count as far as they are remembered."""
    splits = call.splits
    hopper_sum_kernel[(len(direction.splits) * call.heads,)](
        tokens_descriptor(y), tokens_descriptor(z), call.decays, states, totals, totals if parts is None else parts,
        direction.splits, splits.first, splits.length, splits.sum_row, *call.decay_strides, scale,
        call.heads, call.key_size, call.decay, reverse, PARTS[call.decay], STAGES, num_warps=4,
    )  # fmt: skip
