"""`sum_kernel` of kernels.linear.sweep for Hopper GPUs, in Gluon: one warp fetches chunks by TMA for two warpgroups.

A warpgroup owns 64 columns of z and of the sum, which it carries transposed in registers; while a product is under way
it weighs the next chunk. The warp that fetches weighs decays, too: whole chunks are added, never scaled.

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
from longspan.kernels.linear.hopper.decays import load_log_decays, log_decay_per_token
from longspan.kernels.linear.hopper.tiles import clear_rows, synchronize, tokens_descriptor
from longspan.kernels.linear.splits import LEFT_OUT_LOG2_SHORT, padded
from longspan.kernels.linear.sweep import LOG2E, SEARCHED
from longspan.kernels.sparse.hopper.tiles import async_load, make_barriers, product_layout, shared_layout

STAGES = 6
PARTS = {"none": 1, "fixed": 4, "scalar": 1}  # of a sum, at most
LEFT_OUT = gl.constexpr(LEFT_OUT_LOG2_SHORT)
MIN_PART = gl.constexpr(8)  # chunks
_power_of_two = gluon.constexpr_function(padded)


@gluon.jit
def _remembered_fixed(gamma, length, chunks):
    """Chunks of a split that are remembered at its end under a log2 decay `gamma` per token, or several."""
    forgets = gamma * length.to(gl.float32) < LEFT_OUT
    reach = (1.0 / gl.where(forgets, gamma, -1.0) * (LEFT_OUT / 64)).to(gl.int32) + 2
    return gl.where(forgets, gl.minimum(reach, chunks), chunks)


@gluon.jit
def _remembered_scalar(decay_ptr, length, chunks, REVERSE: gl.constexpr):
    """As kernels.linear.sweep._remembered; decay_ptr: at the first token of the split."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    i, j = gl.arange(0, SEARCHED, gl.SliceLayout(1, layout)), gl.arange(0, SEARCHED, gl.SliceLayout(0, layout))
    kept, passed = chunks * 0, 0.0
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
def _num_parts(kept, mean, PARTS: gl.constexpr):
    """Of a head that remembers `kept` chunks where the heads remember `mean`."""
    return gl.minimum(gl.maximum(kept // gl.maximum(mean, MIN_PART), 1), PARTS)


@gluon.jit
def _item(part, place, decay_ptr, H: gl.constexpr, DECAY: gl.constexpr, PARTS: gl.constexpr):
    """(head, its fixed decay, first chunk and end in the order of summing) of what this program sums as `part`."""
    _, length, _, head, chunks, kept, mean = place
    if PARTS == 1:
        return head, log_decay_per_token(decay_ptr, head, DECAY), chunks * 0, kept
    else:
        head = (head + part * (max(H // PARTS, 1))) % H
        gamma = log_decay_per_token(decay_ptr, head, DECAY)
        kept = _remembered_fixed(gamma, length, chunks)
        parts = _num_parts(kept, mean, PARTS)
        begin = kept * part // parts
        return head, gamma, begin, gl.where(part < parts, kept * (part + 1) // parts, begin)


@gluon.jit
def _fetch(
    place, feed, tiles_of, H: gl.constexpr, D: gl.constexpr, DECAY: gl.constexpr, REVERSE: gl.constexpr,
    PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    first, length, _, _, chunks, _, _ = place
    y_desc, z_desc, decay_ptr = feed
    weights, y_tiles, z_tiles, ready, free, _ = tiles_of
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    number = 0
    for part in range(0, PARTS):
        head, gamma, begin, stop = _item(part, place, decay_ptr, H, DECAY, PARTS)
        # log2 decay between a chunk and the end that weights count to.
        passed = gl.maximum(begin * 64 if REVERSE else length - (chunks - begin) * 64, 0).to(gl.float32) * gamma
        at = (begin if REVERSE else chunks - 1 - begin) * 64
        from_start, to_end = load_log_decays(decay_ptr, at, length - at, gamma, layout, DECAY)
        total = _chunk_decay(decay_ptr, at, length, gamma, DECAY)
        for n in range(begin, stop):
            stage = number % STAGES
            if number > 0:  # the first is on its way, and may be done with by now
                mbarrier.wait(free.index(stage), (number // STAGES & 1) ^ 1)
                mbarrier.expect(ready.index(stage), 2 * 64 * D * 2)
                async_load(y_desc, [first + at, head * D], ready.index(stage), y_tiles.index(stage))
                async_load(z_desc, [first + at, head * D], ready.index(stage), z_tiles.index(stage))
            if DECAY != "none":
                weights.index(stage).store(gl.exp2((from_start if REVERSE else to_end) + passed))
                passed += total
                synchronize()
                mbarrier.arrive(ready.index(stage))
            following = gl.minimum(n + 1, stop - 1)
            at = (following if REVERSE else chunks - 1 - following) * 64
            from_start, to_end = load_log_decays(decay_ptr, at, length - at, gamma, layout, DECAY)
            total = _chunk_decay(decay_ptr, at, length, gamma, DECAY)
            number += 1


@gluon.jit
def _chunk_decay(decay_ptr, at, length, gamma, DECAY: gl.constexpr):
    count = gl.minimum(length - at, 64)
    if DECAY == "scalar":
        return gl.load(decay_ptr + (at + count - 1) * 2)
    else:
        return gamma * count.to(gl.float32)


@gluon.jit
def _operand(
    half: gl.constexpr, n, number, part, place, tiles_of, D: gl.constexpr, DECAY: gl.constexpr, REVERSE: gl.constexpr,
    SHORT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The n-th chunk's 64 columns of z, weighed and transposed, once it is there. SHORT: it may be the last chunk."""
    _, length, _, _, chunks, _, _ = place
    weights, y_tiles, z_tiles, ready, _, cleared = tiles_of
    S: gl.constexpr = product_layout(64)
    stage = number % STAGES
    mbarrier.wait(ready.index(stage), number // STAGES & 1)
    if SHORT:
        left = length - (n if REVERSE else chunks - 1 - n) * 64
        if left < 64:  # TMA has brought tokens of the next span
            clear_rows(y_tiles.index(stage) if half == 0 else z_tiles.index(stage), left, D)
            fence_async_shared()
            synchronize()
            mbarrier.arrive(cleared.index(part))
            mbarrier.wait(cleared.index(part), 0)
    z = z_tiles.index(stage).slice(half * 64, 64, 1).permute((1, 0)).load(S)
    if DECAY != "none":
        z = (z.to(gl.float32) * weights.index(stage).load(gl.SliceLayout(0, S))[None, :]).to(z.dtype)
    return gl.convert_layout(z, gl.DotOperandLayout(0, product_layout(D), 2))


@gluon.jit
def _pass(
    half: gl.constexpr, place, decay_ptr, sum_ptr, tiles_of, scale, H: gl.constexpr, D: gl.constexpr,
    DECAY: gl.constexpr, REVERSE: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    row = place[2]
    y_tiles, ready, free = tiles_of[1], tiles_of[3], tiles_of[4]
    OUT: gl.constexpr = product_layout(D)
    column, key = gl.arange(0, 64, gl.SliceLayout(1, OUT)), gl.arange(0, D, gl.SliceLayout(0, OUT))
    number = 0
    for part in range(0, PARTS):
        head, gamma, begin, stop = _item(part, place, decay_ptr, H, DECAY, PARTS)
        if begin < stop:
            state = gl.full([64, D], 0.0, gl.float32, OUT)
            z = _operand(half, begin, number, part, place, tiles_of, D, DECAY, REVERSE, True, STAGES)
            for n in range(begin + 1, stop):
                pending = warpgroup_mma(z, y_tiles.index(number % STAGES), state, is_async=True)
                # Forward the last chunk is the first to be summed.
                following = _operand(half, n, number + 1, part, place, tiles_of, D, DECAY, REVERSE, REVERSE, STAGES)
                done = number % STAGES
                number += 1
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
            gl.store(sum_at + half * 64 + column[:, None] + key[None, :] * D, state * scale)


@launched
@gluon.jit(do_not_specialize=["scale", "T"])
def hopper_sum_kernel(
    y_desc, z_desc, decay_ptr, sum_ptr, total_ptr, parts_ptr, list_ptr, first_ptr, length_ptr, row_ptr, scale, T,
    H: gl.constexpr, D: gl.constexpr, DECAY: gl.constexpr, REVERSE: gl.constexpr, PARTS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """As kernels.linear.sweep.sum_kernel, for K = V = D = 128; if PARTS > 1, sums [rows, PARTS, H, D, D] of which the
    first `parts` [rows, H] are to be added. Grid: (listed splits * H)."""
    dtype: gl.constexpr = y_desc.dtype
    shared: gl.constexpr = shared_layout(16)
    split, head = gl.load(list_ptr + gl.program_id(0) // H), gl.program_id(0) % H
    first, length = gl.load(first_ptr + split), gl.load(length_ptr + split)
    row = gl.load(row_ptr + split).to(gl.int64)
    chunks = gl.cdiv(length, 64)
    tiles_of = (
        gl.allocate_shared_memory(gl.float32, [STAGES, 64], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        gl.allocate_shared_memory(dtype, [STAGES, 64, D], shared),
        gl.allocate_shared_memory(dtype, [STAGES, 64, D], shared),
        make_barriers(STAGES, 1 if DECAY == "none" else 2), make_barriers(STAGES, 2), make_barriers(PARTS, 2),
    )  # fmt: skip
    # The first chunk is remembered in any case, so that it can come while the others are counted.
    at = first + (chunks * 0 if REVERSE else (chunks - 1) * 64)
    fence_async_shared()
    mbarrier.expect(tiles_of[3].index(0), 2 * 64 * D * 2)
    synchronize()
    async_load(y_desc, [at, head * D], tiles_of[3].index(0), tiles_of[1].index(0))
    async_load(z_desc, [at, head * D], tiles_of[3].index(0), tiles_of[2].index(0))
    kept, mean = chunks, chunks
    if DECAY == "fixed":
        gamma = log_decay_per_token(decay_ptr, head, DECAY)
        kept = _remembered_fixed(gamma, length, chunks)
        gl.store(total_ptr + row * H + head, gamma * length.to(gl.float32) / LOG2E)
        if PARTS > 1:
            heads = gl.arange(0, _power_of_two(H), gl.BlockedLayout([1], [32], [4], [0]))
            gammas = log_decay_per_token(decay_ptr, gl.minimum(heads, H - 1), DECAY)
            mean = gl.sum(gl.where(heads < H, _remembered_fixed(gammas, length, chunks), 0), 0) // H
            gl.store(parts_ptr + row * H + head, _num_parts(kept, mean, PARTS))
    if DECAY == "scalar":
        decay_ptr += (gl.to_tensor(head).to(gl.int64) * T + first) * 2
        kept, total = _remembered_scalar(decay_ptr, length, chunks, REVERSE)
        gl.store(total_ptr + row * H + head, total / LOG2E)
    place = first, length, row, head, chunks, kept, mean
    gl.warp_specialize(
        [
            (_pass, (0, place, decay_ptr, sum_ptr, tiles_of, scale, H, D, DECAY, REVERSE, PARTS, STAGES)),
            (_pass, (1, place, decay_ptr, sum_ptr, tiles_of, scale, H, D, DECAY, REVERSE, PARTS, STAGES)),
            (_fetch, (place, (y_desc, z_desc, decay_ptr), tiles_of, H, D, DECAY, REVERSE, PARTS, STAGES)),
        ],
        [4, 1], [232, 40],
    )  # fmt: skip


def launch(call, y, z, scale, direction, states, totals, parts, *, reverse):
    """As the launch of `Fused._sum`; parts: int32 [num_sums, H], or None where `PARTS` of the decay is 1."""
    splits = call.splits
    hopper_sum_kernel[(len(direction.splits) * call.heads,)](
        tokens_descriptor(y), tokens_descriptor(z), call.decays, states, totals, totals if parts is None else parts,
        direction.splits, splits.first, splits.length, splits.sum_row, scale, call.num_tokens,
        call.heads, call.key_size, call.decay, reverse, PARTS[call.decay], STAGES, num_warps=4,
    )  # fmt: skip
