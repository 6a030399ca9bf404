"""Gradients of queries: two warpgroups of 64 query rows walk the block's list. Fed by a warp of their own, the product
with keys of one step runs while scores of the next are made; or they feed themselves in fewer registers, step after
step: then two programs of narrow heads share a processor, and one's products run beside the other's exponentials."""

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
    block_of,
    facts_of,
    feed_on,
    load_rows,
    make_barriers,
    product_layout,
    row_layout,
    seen_keys,
    send_keys,
    shared_layout,
    start_feeding,
    store_rows,
    turns_of,
)


@gluon.jit
def _attend(
    part: gl.constexpr, given, feed, HEADS: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr, PACK: gl.constexpr,
    TILE: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WEIGHTED: gl.constexpr, ONTO: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """dq of the rows of WARPS warps from 64 * part on. feed: what eight warps feed themselves with."""
    (
        q_tiles, d_out_tiles, k_tiles, v_tiles, k_ready, v_ready, k_free, v_free, q_ptr, d_out_ptr, lse_ptr, delta_ptr,
        dq_ptr, onto_ptr, row_idx, begin, stop, first, count, position, k_length, k_position, k_step, weight_ptr,
        q_stride_t, q_stride_h, d_out_stride_t, d_out_stride_h, row_stride, scale,
    ) = given  # fmt: skip
    ROWS: gl.constexpr = 16 * WARPS
    S: gl.constexpr = product_layout(TILE, WARPS)
    OUT: gl.constexpr = product_layout(D, WARPS)
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    layout: gl.constexpr = row_layout(D, WARPS)
    q_tile, d_out_tile = q_tiles.index(part), d_out_tiles.index(part)
    q = load_rows(q_ptr, first, count, part, q_stride_t, q_stride_h, PACK, D, layout, ROWS)
    d_out = load_rows(d_out_ptr, first, count, part, d_out_stride_t, d_out_stride_h, PACK, D, layout, ROWS)
    if WARPS == 8:
        start_feeding(feed, KEYS, TILE, STAGES)
    q_tile.store(q)
    d_out_tile.store(d_out)
    fence_async_shared()
    index = part * 64 + gl.arange(0, ROWS, gl.SliceLayout(1, S))
    token = index // PACK
    lse = gl.load(lse_ptr + index % PACK * row_stride + token)
    delta = gl.load(delta_ptr + index % PACK * row_stride + token)
    earliest = position + part * 64 // PACK
    position += token
    nothing = gl.full([ROWS, TILE], 0.0, gl.float32, S)
    if ONTO:
        dq = load_rows(onto_ptr, first, count, part, HEADS * D, D, PACK, D, OUT, ROWS).to(gl.float32) * (1 / scale)
    else:
        dq = gl.full([ROWS, D], 0.0, gl.float32, OUT)
    turns = turns_of(begin, stop, KEYS, TILE)
    if WARPS == 8:
        for turn in range(0, turns):
            stage, phase = turn % STAGES, (turn // STAGES) & 1
            mbarrier.wait(k_ready.index(stage), phase)
            pending = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
            mbarrier.wait(v_ready.index(stage), phase)
            d_pending = warpgroup_mma(
                d_out_tile, v_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            masked, weight = facts_of(
                turn, begin, stop, row_idx, k_length, k_position, k_step, weight_ptr, earliest, KEYS, TILE, CAUSAL,
                WEIGHTED, S,
            )  # fmt: skip
            scores = warpgroup_mma_wait(1, deps=[pending])
            weights = _weights(scores, lse, weight, scale, WEIGHTED and KEYS < TILE)
            if masked:
                seen = seen_keys(
                    turn, begin, stop, row_idx, k_length, k_position, k_step, position, KEYS, TILE, CAUSAL, S
                )
                weights = gl.where(seen, weights, 0.0)
            mbarrier.wait(v_ready.index(stage), phase)  # passed already: keeps the next wait behind the arithmetic
            d_weights, weights = warpgroup_mma_wait(0, deps=[d_pending, weights])
            d_scores = gl.convert_layout((weights * (d_weights - delta[:, None])).to(k_tiles.dtype), P)
            dq = warpgroup_mma(d_scores, k_tiles.index(stage), dq)
            feed_on(feed, turn, KEYS, TILE, STAGES)
    elif begin < stop:
        masked, weight = facts_of(
            0, begin, stop, row_idx, k_length, k_position, k_step, weight_ptr, earliest, KEYS, TILE, CAUSAL, WEIGHTED, S
        )
        mbarrier.wait(k_ready.index(0), 0)
        pending = warpgroup_mma(q_tile, k_tiles.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(v_ready.index(0), 0)
        d_pending = warpgroup_mma(d_out_tile, v_tiles.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[pending])
        weights = _weights(scores, lse, weight, scale, WEIGHTED and KEYS < TILE)
        if masked:
            seen = seen_keys(0, begin, stop, row_idx, k_length, k_position, k_step, position, KEYS, TILE, CAUSAL, S)
            weights = gl.where(seen, weights, 0.0)
        d_weights = warpgroup_mma_wait(0, deps=[d_pending])
        mbarrier.arrive(v_free.index(0))
        d_scores = gl.convert_layout((weights * (d_weights - delta[:, None])).to(k_tiles.dtype), P)
        for turn in range(1, turns):
            stage, before, phase = turn % STAGES, (turn - 1) % STAGES, (turn // STAGES) & 1
            mbarrier.wait(k_ready.index(stage), phase)
            pending = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
            mbarrier.wait(v_ready.index(stage), phase)
            d_pending = warpgroup_mma(
                d_out_tile, v_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            dq_pending = warpgroup_mma(d_scores, k_tiles.index(before), dq, is_async=True)
            masked, weight = facts_of(
                turn, begin, stop, row_idx, k_length, k_position, k_step, weight_ptr, earliest, KEYS, TILE, CAUSAL,
                WEIGHTED, S,
            )  # fmt: skip
            scores = warpgroup_mma_wait(2, deps=[pending])
            weights = _weights(scores, lse, weight, scale, WEIGHTED and KEYS < TILE)
            if masked:
                seen = seen_keys(
                    turn, begin, stop, row_idx, k_length, k_position, k_step, position, KEYS, TILE, CAUSAL, S
                )
                weights = gl.where(seen, weights, 0.0)
            mbarrier.wait(v_ready.index(stage), phase)  # passed already: keeps the next wait behind the arithmetic
            d_weights, weights = warpgroup_mma_wait(1, deps=[d_pending, weights])
            mbarrier.arrive(v_free.index(stage))
            new = gl.convert_layout((weights * (d_weights - delta[:, None])).to(k_tiles.dtype), P)
            mbarrier.wait(k_ready.index(stage), phase)
            dq, d_scores, new = warpgroup_mma_wait(0, deps=[dq_pending, d_scores, new])
            mbarrier.arrive(k_free.index(before))
            d_scores = new
        dq = warpgroup_mma(d_scores, k_tiles.index((turns - 1) % STAGES), dq)
    store_rows(dq_ptr, first, count, part, HEADS, PACK, D, dq * scale, WARPS)


@gluon.jit
def _weights(scores, lse, weight, scale, OF_KEYS: gl.constexpr):
    """weight: of all keys of the tile, or OF_KEYS."""
    stretch = gl.full_like(scores, scale * LOG2E)
    if OF_KEYS:
        return gl.exp2(gl.fma(scores, stretch, weight[None, :] - lse[:, None]))
    else:
        return gl.exp2(gl.fma(scores, stretch, gl.zeros_like(scores) + (weight - lse)[:, None]))


@launched
@gluon.jit(do_not_specialize=["M", "capacity", "scale"])
def queries_kernel(
    q_ptr, k_desc, v_desc, d_out_ptr, lse_ptr, delta_ptr, dq_ptr, onto_ptr,
    q_start, q_length, q_position, k_start, k_length, k_position, k_step,
    row_ptr, row_idx, weight_ptr, q_stride_t, q_stride_h, d_out_stride_t, d_out_stride_h, scale,
    M, capacity, HEADS: gl.constexpr, KEY_HEADS: gl.constexpr, LISTS: gl.constexpr, D: gl.constexpr,
    KEYS: gl.constexpr, PACK: gl.constexpr, TILE: gl.constexpr, CAUSAL: gl.constexpr, WEIGHTED: gl.constexpr,
    ONTO: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As kernels.sparse.backward.queries_kernel, for tiles of 128 rows; lse (base 2) and delta as rows_kernel
    makes them."""
    block, head, key_head, listed = block_of(M, HEADS, KEY_HEADS, LISTS, PACK)
    dtype: gl.constexpr = k_desc.dtype
    WARPS: gl.constexpr = gl.num_warps()
    q_tiles = gl.allocate_shared_memory(dtype, [8 // WARPS, 16 * WARPS, D], shared_layout(16))
    d_out_tiles = gl.allocate_shared_memory(dtype, [8 // WARPS, 16 * WARPS, D], shared_layout(16))
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], shared_layout(16))
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], shared_layout(16))
    k_ready, v_ready = make_barriers(STAGES, 1), make_barriers(STAGES, 1)
    k_free, v_free = k_ready, v_ready
    if WARPS == 4:
        k_free, v_free = make_barriers(STAGES, 2), make_barriers(STAGES, 2)
    row_idx += listed * capacity
    begin, stop = gl.load(row_ptr + listed * (M + 1) + block), gl.load(row_ptr + listed * (M + 1) + block + 1)
    first, count = gl.load(q_start + block).to(gl.int64), gl.load(q_length + block)
    position = gl.load(q_position + block)
    q_ptr += head * q_stride_h
    d_out_ptr += head * d_out_stride_h
    dq_ptr += head * D
    onto_ptr += head * D
    size = 128 // PACK
    lse_ptr += (gl.to_tensor(head).to(gl.int64) * M + block) * size
    delta_ptr += (gl.to_tensor(head).to(gl.int64) * M + block) * size
    given = (
        q_tiles, d_out_tiles, k_tiles, v_tiles, k_ready, v_ready, k_free, v_free, q_ptr, d_out_ptr, lse_ptr,
        delta_ptr, dq_ptr, onto_ptr, row_idx, begin, stop, first, count, position, k_length, k_position, k_step,
        weight_ptr, q_stride_t, q_stride_h, d_out_stride_t, d_out_stride_h, M * size, scale,
    )  # fmt: skip
    if WARPS == 8:
        feed = k_desc, v_desc, k_tiles, v_tiles, k_ready, v_ready, row_idx, begin, stop, k_start, key_head * D
        _attend(0, given, feed, HEADS, D, KEYS, PACK, TILE, STAGES, CAUSAL, WEIGHTED, ONTO, WARPS)
    else:
        feed = (
            k_desc, v_desc, k_tiles, v_tiles, k_ready, v_ready, k_free, v_free, row_idx, begin, stop, k_start,
            key_head * D,
        )  # fmt: skip
        gl.warp_specialize(
            [
                (_attend, (0, given, 0, HEADS, D, KEYS, PACK, TILE, STAGES, CAUSAL, WEIGHTED, ONTO, WARPS)),
                (_attend, (1, given, 0, HEADS, D, KEYS, PACK, TILE, STAGES, CAUSAL, WEIGHTED, ONTO, WARPS)),
                (send_keys, (feed, KEYS, TILE, STAGES)),
            ],
            [4, 1], [240, 24],
        )  # fmt: skip
