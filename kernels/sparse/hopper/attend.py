"""Forward: two warpgroups of 64 query rows each walk the block's list; scores of the next keys are under way while the
softmax of the last ones is taken (after FlashAttention-3, Shah et al. 2024, arXiv 2407.08608). A warp of its own feeds
them or, with eight warps to a program, they do: then two programs of narrow heads share a processor."""

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
    """out and lse of the rows of WARPS warps from 64 * part on. feed: what eight warps feed themselves with."""
    (
        q_tiles, k_tiles, v_tiles, k_ready, v_ready, k_free, v_free, q_ptr, out_ptr, lse_ptr,
        onto_out_ptr, onto_lse_ptr, row_idx, begin, stop, first, count, position, k_length, k_position, k_step,
        weight_ptr, q_stride_t, q_stride_h, scale,
    ) = given  # fmt: skip
    ROWS: gl.constexpr = 16 * WARPS
    S: gl.constexpr = product_layout(TILE, WARPS)
    OUT: gl.constexpr = product_layout(D, WARPS)
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    rows: gl.constexpr = gl.SliceLayout(1, S)
    q_tile = q_tiles.index(part)
    q = load_rows(q_ptr, first, count, part, q_stride_t, q_stride_h, PACK, D, row_layout(D, WARPS), ROWS)
    if WARPS == 8:
        start_feeding(feed, KEYS, TILE, STAGES)
    q_tile.store(q)
    fence_async_shared()
    earliest = position + part * 64 // PACK
    position += (part * 64 + gl.arange(0, ROWS, rows)) // PACK
    index = part * 64 + gl.arange(0, ROWS, rows)
    at = first * HEADS + (index // PACK * HEADS + index % PACK)
    if ONTO:
        out = load_rows(onto_out_ptr, first, count, part, HEADS * D, D, PACK, D, OUT, ROWS).to(gl.float32)
        highest = gl.load(onto_lse_ptr + at, mask=index // PACK < count, other=float("-inf")) * LOG2E
        total = gl.where(highest == float("-inf"), 0.0, 1.0)
    else:
        out = gl.full([ROWS, D], 0.0, gl.float32, OUT)
        highest = gl.full([ROWS], float("-inf"), gl.float32, rows)
        total = gl.full([ROWS], 0.0, gl.float32, rows)
    nothing = gl.full([ROWS, TILE], 0.0, gl.float32, S)
    if begin < stop:
        masked, weight = facts_of(
            0, begin, stop, row_idx, k_length, k_position, k_step, weight_ptr, earliest, KEYS, TILE, CAUSAL, WEIGHTED, S
        )
        mbarrier.wait(k_ready.index(0), 0)
        scores = warpgroup_mma(q_tile, k_tiles.index(0).permute((1, 0)), nothing, use_acc=False)
        if WARPS == 4:
            mbarrier.arrive(k_free.index(0))
        if masked:
            seen = seen_keys(0, begin, stop, row_idx, k_length, k_position, k_step, position, KEYS, TILE, CAUSAL, S)
            scores = gl.where(seen, scores, float("-inf"))
        weights, rescale, highest, total = _softmax(scores, highest, total, weight, scale, WEIGHTED and KEYS < TILE)
        if ONTO:
            out = out * gl.convert_layout(rescale, gl.SliceLayout(1, OUT))[:, None]
        weights = gl.convert_layout(weights.to(k_tiles.dtype), P)
        mbarrier.wait(v_ready.index(0), 0)
        turns = turns_of(begin, stop, KEYS, TILE)
        for turn in range(1, turns):
            stage, before = turn % STAGES, (turn - 1) % STAGES
            mbarrier.wait(k_ready.index(stage), (turn // STAGES) & 1)
            pending = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
            out_pending = warpgroup_mma(weights, v_tiles.index(before), out, is_async=True)
            masked, weight = facts_of(
                turn, begin, stop, row_idx, k_length, k_position, k_step, weight_ptr, earliest, KEYS, TILE, CAUSAL,
                WEIGHTED, S,
            )  # fmt: skip
            scores = warpgroup_mma_wait(1, deps=[pending])
            if WARPS == 4:
                mbarrier.arrive(k_free.index(stage))
            if masked:
                seen = seen_keys(
                    turn, begin, stop, row_idx, k_length, k_position, k_step, position, KEYS, TILE, CAUSAL, S
                )
                scores = gl.where(seen, scores, float("-inf"))
            new_weights, rescale, highest, total = _softmax(
                scores, highest, total, weight, scale, WEIGHTED and KEYS < TILE
            )
            new_weights = gl.convert_layout(new_weights.to(k_tiles.dtype), P)
            mbarrier.wait(v_ready.index(stage), (turn // STAGES) & 1)  # also keeps the next wait behind the softmax
            out, weights, new_weights = warpgroup_mma_wait(0, deps=[out_pending, weights, new_weights])
            if WARPS == 4:
                mbarrier.arrive(v_free.index(before))
            else:
                feed_on(feed, turn - 1, KEYS, TILE, STAGES)
            out = out * gl.convert_layout(rescale, gl.SliceLayout(1, OUT))[:, None]
            weights = new_weights
        last = (turns - 1) % STAGES
        out = warpgroup_mma(weights, v_tiles.index(last), out)
    empty = total == 0.0
    total = gl.where(empty, 1.0, total)
    store_rows(
        out_ptr, first, count, part, HEADS, PACK, D, out / gl.convert_layout(total, gl.SliceLayout(1, OUT))[:, None],
        WARPS,
    )  # fmt: skip
    lse = gl.where(empty, float("-inf"), (highest + gl.log2(total)) / LOG2E)
    gl.store(lse_ptr + at, lse, mask=index // PACK < count)


@gluon.jit
def _softmax(scores, highest, total, weight, scale, OF_KEYS: gl.constexpr):
    """(weights, what older ones shrink by, highest, total), in base 2; weight: of all keys of the tile, or OF_KEYS."""
    stretch = scale * LOG2E
    if OF_KEYS:
        scores = gl.fma(scores, gl.full_like(scores, stretch), gl.zeros_like(scores) + weight[None, :])
        higher = gl.maximum(highest, gl.max(scores, 1))
        shift = gl.where(higher == float("-inf"), 0.0, higher)
        weights = gl.exp2(scores - shift[:, None])
    else:
        higher = gl.maximum(highest, gl.max(scores, 1) * stretch + weight)
        shift = gl.where(higher == float("-inf"), 0.0, higher)
        added = gl.zeros_like(scores) + (weight - shift)[:, None]
        weights = gl.exp2(gl.fma(scores, gl.full_like(scores, stretch), added))
    rescale = gl.exp2(highest - shift)
    return weights, rescale, higher, total * rescale + gl.sum(weights, 1)


@launched
@gluon.jit(do_not_specialize=["M", "capacity", "scale"])
def forward_kernel(
    q_ptr, k_desc, v_desc, out_ptr, lse_ptr, onto_out_ptr, onto_lse_ptr,
    q_start, q_length, q_position, k_start, k_length, k_position, k_step,
    row_ptr, row_idx, weight_ptr, q_stride_t, q_stride_h, scale, M, capacity, HEADS: gl.constexpr,
    KEY_HEADS: gl.constexpr, LISTS: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr, PACK: gl.constexpr,
    TILE: gl.constexpr, CAUSAL: gl.constexpr, WEIGHTED: gl.constexpr, ONTO: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As kernels.sparse.forward.forward_kernel, for tiles of 128 rows."""
    block, head, key_head, listed = block_of(M, HEADS, KEY_HEADS, LISTS, PACK)
    dtype: gl.constexpr = k_desc.dtype
    WARPS: gl.constexpr = gl.num_warps()
    q_tiles = gl.allocate_shared_memory(dtype, [8 // WARPS, 16 * WARPS, D], shared_layout(16))
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
    out_ptr += head * D
    lse_ptr += head
    onto_out_ptr += head * D
    onto_lse_ptr += head
    given = (
        q_tiles, k_tiles, v_tiles, k_ready, v_ready, k_free, v_free, q_ptr, out_ptr, lse_ptr,
        onto_out_ptr, onto_lse_ptr, row_idx, begin, stop, first, count, position, k_length, k_position, k_step,
        weight_ptr, q_stride_t, q_stride_h, scale,
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
