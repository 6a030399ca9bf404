"""Forward: two warpgroups of 64 query rows each walk the block's list; scores of the next keys are under way while the
softmax of the last ones is taken (after FlashAttention-3, Shah et al. 2024, arXiv 2407.08608). A warp of its own feeds
them, also ahead with what the next list names, while they end one. Or, with eight warps to a program, they do: then two
programs of narrow heads share a processor."""

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
    facts_of,
    feed_of,
    feed_on,
    load_rows,
    make_barriers,
    make_later,
    next_tile,
    only_seen,
    product_layout,
    row_layout,
    send_keys,
    shared_layout,
    start_feeding,
    store_rows,
    tile_of,
    turns_of,
)


@gluon.jit
def _attend(
    part: gl.constexpr, given, feed, HEADS: gl.constexpr, KEY_HEADS: gl.constexpr, LISTS: gl.constexpr, D: gl.constexpr,
    KEYS: gl.constexpr, PACK: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    WEIGHTED: gl.constexpr, ONTO: gl.constexpr, IN_TURN: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """out and lse of the rows of WARPS warps from 64 * part on, of tile after tile. feed: what eight warps feed
    themselves with, for one tile. IN_TURN: warpgroups start products one after the other, so that those of one run
    beside the softmax of the other."""
    tile, lists, done, number = gl.program_id(0), given[-2], 0, 0  # tiles, and turns, since the program began
    here = _load(part, given, tile, HEADS, KEY_HEADS, LISTS, D, PACK, WARPS)
    if WARPS == 8:
        start_feeding(feed, KEYS, TILE, STAGES)
        _one(
            part, given, feed, here, done, number, HEADS, KEY_HEADS, LISTS, D, KEYS, PACK, TILE, STAGES, CAUSAL,
            WEIGHTED, ONTO, IN_TURN, WARPS,
        )  # fmt: skip
    else:
        while tile < lists[6]:
            tile, number, here = _one(
                part, given, feed, here, done, number, HEADS, KEY_HEADS, LISTS, D, KEYS, PACK, TILE, STAGES, CAUSAL,
                WEIGHTED, ONTO, IN_TURN, WARPS,
            )  # fmt: skip
            done += 1


@gluon.jit
def _load(
    part: gl.constexpr, given, tile, HEADS: gl.constexpr, KEY_HEADS: gl.constexpr, LISTS: gl.constexpr,
    D: gl.constexpr, PACK: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """What tile_of says of a tile, and its rows of q."""
    q_ptr, q_stride_t, q_stride_h, lists = given[8], given[18], given[19], given[-2]
    block, head, key_head, listed, begin, stop, first, count, position = tile_of(
        tile, lists, HEADS, KEY_HEADS, LISTS, PACK
    )
    layout: gl.constexpr = row_layout(D, WARPS)
    q = load_rows(q_ptr + head * q_stride_h, first, count, part, q_stride_t, q_stride_h, PACK, D, layout, 16 * WARPS)
    return block, head, key_head, listed, begin, stop, first, count, position, q


@gluon.jit
def _one(
    part: gl.constexpr, given, feed, here, done, number, HEADS: gl.constexpr, KEY_HEADS: gl.constexpr,
    LISTS: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr, PACK: gl.constexpr, TILE: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, WEIGHTED: gl.constexpr, ONTO: gl.constexpr, IN_TURN: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """One tile, of which `here` is loaded, the one after `done` others and `number` turns. Gives the next tile, the
    number of turns then, and what is loaded of it."""
    (
        q_tiles, k_tiles, v_tiles, k_ready, v_ready, k_free, v_free, in_turn, q_ptr, out_ptr, lse_ptr, onto_out_ptr,
        onto_lse_ptr, row_idx, k_length, k_position, k_step, weight_ptr, q_stride_t, q_stride_h, scale, lists, later,
    ) = given  # fmt: skip
    ROWS: gl.constexpr = 16 * WARPS
    S: gl.constexpr = product_layout(TILE, WARPS)
    OUT: gl.constexpr = product_layout(D, WARPS)
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    BY_KEY: gl.constexpr = WEIGHTED and KEYS < TILE
    rows: gl.constexpr = gl.SliceLayout(1, S)
    q_tile = q_tiles.index(part)
    index = part * 64 + gl.arange(0, ROWS, rows)
    nothing = gl.full([ROWS, TILE], 0.0, gl.float32, S)
    tiles = lists[6]
    tile = tiles
    _, head, _, listed, begin, stop, first, count, position, q = here
    q_tile.store(q)
    fence_async_shared()
    keys = row_idx + listed, begin, stop, k_length, k_position, k_step, weight_ptr
    earliest, positions = position + part * 64 // PACK, position + index // PACK
    at, there = first * HEADS + head + (index // PACK * HEADS + index % PACK), index // PACK < count
    if ONTO:
        out = load_rows(onto_out_ptr + head * D, first, count, part, HEADS * D, D, PACK, D, OUT, ROWS)
        out = out.to(gl.float32)
        highest = gl.load(onto_lse_ptr + at, mask=there, other=float("-inf")) * LOG2E
        total = gl.where(highest == float("-inf"), 0.0, 1.0)
    else:
        out = gl.full([ROWS, D], 0.0, gl.float32, OUT)
        highest = gl.full([ROWS], float("-inf"), gl.float32, rows)
        total = gl.full([ROWS], 0.0, gl.float32, rows)
    turns = turns_of(begin, stop, KEYS, TILE)
    if turns > 0:
        stage, phase = number % STAGES, (number // STAGES) & 1
        masked, weight = facts_of(0, keys, earliest, KEYS, TILE, CAUSAL, WEIGHTED, S)
        mbarrier.wait(k_ready.index(stage), phase)
        if IN_TURN:
            mbarrier.wait(in_turn.index(part), (number & 1) ^ (1 - part))
        pending = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        if IN_TURN:
            mbarrier.arrive(in_turn.index(1 - part))
        scores = warpgroup_mma_wait(0, deps=[pending])
        if WARPS == 4:
            mbarrier.arrive(k_free.index(stage))
        if masked:
            scores = only_seen(scores, float("-inf"), 0, keys, positions, KEYS, TILE, CAUSAL, S)
        weights, rescale, highest, total = _softmax(scores, highest, total, weight, scale, BY_KEY)
        if ONTO:
            out = out * gl.convert_layout(rescale, gl.SliceLayout(1, OUT))[:, None]
        weights = gl.convert_layout(weights.to(k_tiles.dtype), P)
        mbarrier.wait(v_ready.index(stage), phase)
        for turn in range(1, turns):
            before = stage
            number += 1
            stage, phase = number % STAGES, (number // STAGES) & 1
            mbarrier.wait(k_ready.index(stage), phase)
            if IN_TURN:
                mbarrier.wait(in_turn.index(part), (number & 1) ^ (1 - part))
            pending = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
            out_pending = warpgroup_mma(weights, v_tiles.index(before), out, is_async=True)
            if IN_TURN:
                mbarrier.arrive(in_turn.index(1 - part))
            masked, weight = facts_of(turn, keys, earliest, KEYS, TILE, CAUSAL, WEIGHTED, S)
            scores = warpgroup_mma_wait(1, deps=[pending])
            if WARPS == 4:
                mbarrier.arrive(k_free.index(stage))
            if masked:
                scores = only_seen(scores, float("-inf"), turn, keys, positions, KEYS, TILE, CAUSAL, S)
            new_weights, rescale, highest, total = _softmax(scores, highest, total, weight, scale, BY_KEY)
            new_weights = gl.convert_layout(new_weights.to(k_tiles.dtype), P)
            mbarrier.wait(v_ready.index(stage), phase)  # also keeps the next wait behind the softmax
            out, weights, new_weights = warpgroup_mma_wait(0, deps=[out_pending, weights, new_weights])
            if WARPS == 4:
                mbarrier.arrive(v_free.index(before))
            else:
                feed_on(feed, turn - 1, KEYS, TILE, STAGES)
            out = out * gl.convert_layout(rescale, gl.SliceLayout(1, OUT))[:, None]
            weights = new_weights
        number += 1
        out = warpgroup_mma(weights, v_tiles.index(stage), out)
        if WARPS == 4:
            mbarrier.arrive(v_free.index(stage))
    to = out_ptr + head * D, first, count
    if WARPS == 4:  # the next tile's queries, on their way while this one is written
        tile = next_tile(done, later)
        here = _load(part, given, gl.minimum(tile, tiles - 1), HEADS, KEY_HEADS, LISTS, D, PACK, WARPS)
    empty = total == 0.0
    total = gl.where(empty, 1.0, total)
    out = out / gl.convert_layout(total, gl.SliceLayout(1, OUT))[:, None]
    store_rows(*to, part, HEADS, PACK, D, out, WARPS)
    gl.store(lse_ptr + at, gl.where(empty, float("-inf"), (highest + gl.log2(total)) / LOG2E), mask=there)
    return tile, number, here


@gluon.jit
def _softmax(scores, highest, total, weight, scale, BY_KEY: gl.constexpr):
    """(weights, what older ones shrink by, highest, total), in base 2; weight: of all keys of the tile, or BY_KEY."""
    stretch = scale * LOG2E
    if BY_KEY:
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
@gluon.jit(do_not_specialize=["M", "capacity", "tiles", "scale"], do_not_specialize_on_alignment=["row_ptr", "row_idx"])
def forward_kernel(
    q_ptr, k_desc, v_desc, out_ptr, lse_ptr, onto_out_ptr, onto_lse_ptr,
    q_start, q_length, q_position, k_start, k_length, k_position, k_step,
    row_ptr, row_idx, weight_ptr, taken_ptr, q_stride_t, q_stride_h, scale, M, capacity, tiles, HEADS: gl.constexpr,
    KEY_HEADS: gl.constexpr, LISTS: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr, PACK: gl.constexpr,
    TILE: gl.constexpr, CAUSAL: gl.constexpr, WEIGHTED: gl.constexpr, ONTO: gl.constexpr, STAGES: gl.constexpr,
    IN_TURN: gl.constexpr, SEVERAL: gl.constexpr,
):  # fmt: skip
    """As kernels.sparse.forward.forward_kernel, for tiles of 128 rows. SEVERAL: programs that are fed take more than
    one, as they become free."""
    dtype: gl.constexpr = k_desc.dtype
    WARPS: gl.constexpr = gl.num_warps()
    q_tiles = gl.allocate_shared_memory(dtype, [8 // WARPS, 16 * WARPS, D], shared_layout(16))
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], shared_layout(16))
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], shared_layout(16))
    k_ready, v_ready = make_barriers(STAGES, 1), make_barriers(STAGES, 1)
    k_free, v_free, in_turn, later = k_ready, v_ready, k_ready, (q_tiles, k_ready, k_ready)
    if WARPS == 4:
        k_free, v_free, in_turn = make_barriers(STAGES, 2), make_barriers(STAGES, 2), make_barriers(2, 1)
        later = make_later(2)
    lists = row_ptr, q_start, q_length, q_position, M, capacity, tiles
    given = (
        q_tiles, k_tiles, v_tiles, k_ready, v_ready, k_free, v_free, in_turn, q_ptr, out_ptr, lse_ptr, onto_out_ptr,
        onto_lse_ptr, row_idx, k_length, k_position, k_step, weight_ptr, q_stride_t, q_stride_h, scale, lists, later,
    )  # fmt: skip
    if WARPS == 8:
        feed = feed_of(
            k_desc, v_desc, k_tiles, v_tiles, k_ready, v_ready, row_idx, k_start, lists, HEADS, KEY_HEADS, LISTS, PACK
        )
        _attend(
            0, given, feed, HEADS, KEY_HEADS, LISTS, D, KEYS, PACK, TILE, STAGES, CAUSAL, WEIGHTED, ONTO, False, WARPS
        )
    else:
        feed = (
            k_desc, v_desc, k_tiles, v_tiles, k_ready, v_ready, k_free, v_free, row_idx, k_start, lists, later,
            taken_ptr,
        )  # fmt: skip
        gl.warp_specialize(
            [
                (_attend, (0, given, 0, HEADS, KEY_HEADS, LISTS, D, KEYS, PACK, TILE, STAGES, CAUSAL, WEIGHTED, ONTO,
                           IN_TURN, WARPS)),
                (_attend, (1, given, 0, HEADS, KEY_HEADS, LISTS, D, KEYS, PACK, TILE, STAGES, CAUSAL, WEIGHTED, ONTO,
                           IN_TURN, WARPS)),
                (send_keys, (feed, HEADS, KEY_HEADS, LISTS, PACK, KEYS, TILE, STAGES, SEVERAL)),
            ],
            [4, 1], [240, 24],
        )  # fmt: skip
