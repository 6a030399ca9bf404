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
    WEIGHTED: gl.constexpr, ONTO: gl.constexpr, GIVEN: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """dq of the rows of WARPS warps from 64 * part on, of tile after tile. feed: as in attend.py. GIVEN: lse
    and delta, which are made here otherwise."""
    tile, lists, done, number = gl.program_id(0), given[-2], 0, 0  # tiles, and turns, since the program began
    here = _load(part, given, tile, HEADS, KEY_HEADS, LISTS, D, PACK, GIVEN, WARPS)
    if WARPS == 8:
        start_feeding(feed, KEYS, TILE, STAGES)
        _one(
            part, given, feed, here, done, number, HEADS, KEY_HEADS, LISTS, D, KEYS, PACK, TILE, STAGES, CAUSAL,
            WEIGHTED, ONTO, GIVEN, WARPS,
        )  # fmt: skip
    else:
        while tile < lists[6]:
            tile, number, here = _one(
                part, given, feed, here, done, number, HEADS, KEY_HEADS, LISTS, D, KEYS, PACK, TILE, STAGES, CAUSAL,
                WEIGHTED, ONTO, GIVEN, WARPS,
            )  # fmt: skip
            done += 1


@gluon.jit
def _load(
    part: gl.constexpr, given, tile, HEADS: gl.constexpr, KEY_HEADS: gl.constexpr, LISTS: gl.constexpr,
    D: gl.constexpr, PACK: gl.constexpr, GIVEN: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """What tile_of says of a tile, and its rows of q, d_out and, where it is needed, out."""
    q_ptr, d_out_ptr, out_ptr, lists = given[8], given[9], given[10], given[-2]
    q_stride_t, q_stride_h, d_out_stride_t, d_out_stride_h = given[-7], given[-6], given[-5], given[-4]
    block, head, key_head, listed, begin, stop, first, count, position = tile_of(
        tile, lists, HEADS, KEY_HEADS, LISTS, PACK
    )
    ROWS: gl.constexpr = 16 * WARPS
    layout: gl.constexpr = row_layout(D, WARPS)
    q = load_rows(q_ptr + head * q_stride_h, first, count, part, q_stride_t, q_stride_h, PACK, D, layout, ROWS)
    d_out_at = d_out_ptr + head * d_out_stride_h
    d_out = load_rows(d_out_at, first, count, part, d_out_stride_t, d_out_stride_h, PACK, D, layout, ROWS)
    out = q
    if not GIVEN:
        out = load_rows(out_ptr + head * D, first, count, part, HEADS * D, D, PACK, D, layout, ROWS)
    return block, head, key_head, listed, begin, stop, first, count, position, q, d_out, out


@gluon.jit
def _one(
    part: gl.constexpr, given, feed, here, done, number, HEADS: gl.constexpr, KEY_HEADS: gl.constexpr,
    LISTS: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr, PACK: gl.constexpr, TILE: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, WEIGHTED: gl.constexpr, ONTO: gl.constexpr, GIVEN: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """One tile, as in attend.py."""
    (
        q_tiles, d_out_tiles, k_tiles, v_tiles, k_ready, v_ready, k_free, v_free, q_ptr, d_out_ptr, out_ptr,
        logs_ptr, lse_ptr, delta_ptr, dq_ptr, onto_ptr, row_idx, k_length, k_position, k_step, weight_ptr, q_stride_t,
        q_stride_h, d_out_stride_t, d_out_stride_h, scale, lists, later,
    ) = given  # fmt: skip
    ROWS: gl.constexpr = 16 * WARPS
    SIZE: gl.constexpr = 128 // PACK
    S: gl.constexpr = product_layout(TILE, WARPS)
    OUT: gl.constexpr = product_layout(D, WARPS)
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    q_tile, d_out_tile = q_tiles.index(part), d_out_tiles.index(part)
    index = part * 64 + gl.arange(0, ROWS, gl.SliceLayout(1, S))
    token, M = index // PACK, lists[4]
    nothing = gl.full([ROWS, TILE], 0.0, gl.float32, S)
    tiles = lists[6]
    tile = tiles
    block, head, _, listed, begin, stop, first, count, position, q, d_out, out = here
    q_tile.store(q)
    d_out_tile.store(d_out)
    fence_async_shared()
    at = (head.to(gl.int64) * M + block) * SIZE
    rows_at = at + (index % PACK * (M * SIZE) + token)
    if GIVEN:
        lse, delta = gl.load(lse_ptr + rows_at), gl.load(delta_ptr + rows_at)
    else:
        log_at = first * HEADS + head + (token * HEADS + index % PACK)
        lse = gl.load(logs_ptr + log_at, mask=token < count, other=float("-inf")) * LOG2E
        lse = gl.where(lse == float("-inf"), float("inf"), lse)  # sees no key: its weights are 0
        delta = gl.convert_layout(gl.sum(d_out.to(gl.float32) * out.to(gl.float32), 1), gl.SliceLayout(1, S))
        gl.store(lse_ptr + rows_at, lse)
        gl.store(delta_ptr + rows_at, delta)
    keys = row_idx + listed, begin, stop, k_length, k_position, k_step, weight_ptr
    queries = lse, scale, position + part * 64 // PACK, position + token
    dq = gl.full([ROWS, D], 0.0, gl.float32, OUT)
    turns, tiles_of = turns_of(begin, stop, KEYS, TILE), (q_tile, d_out_tile, k_tiles, v_tiles, k_ready, v_ready)
    if WARPS == 8:
        for turn in range(0, turns):
            stage, phase = turn % STAGES, (turn // STAGES) & 1
            pending, d_pending = _start(tiles_of, stage, phase, nothing)
            weights = _weights(pending, 1, turn, keys, queries, KEYS, TILE, CAUSAL, WEIGHTED, S)
            mbarrier.wait(v_ready.index(stage), phase)  # passed already: keeps the next wait behind the arithmetic
            d_weights, weights = warpgroup_mma_wait(0, deps=[d_pending, weights])
            d_scores = gl.convert_layout((weights * (d_weights - delta[:, None])).to(k_tiles.dtype), P)
            dq = warpgroup_mma(d_scores, k_tiles.index(stage), dq)
            feed_on(feed, turn, KEYS, TILE, STAGES)
    elif turns > 0:
        stage, phase = number % STAGES, (number // STAGES) & 1
        pending, d_pending = _start(tiles_of, stage, phase, nothing)
        weights = _weights(pending, 1, 0, keys, queries, KEYS, TILE, CAUSAL, WEIGHTED, S)
        d_weights = warpgroup_mma_wait(0, deps=[d_pending])
        mbarrier.arrive(v_free.index(stage))
        d_scores = gl.convert_layout((weights * (d_weights - delta[:, None])).to(k_tiles.dtype), P)
        for turn in range(1, turns):
            before = stage
            number += 1
            stage, phase = number % STAGES, (number // STAGES) & 1
            pending, d_pending = _start(tiles_of, stage, phase, nothing)
            dq_pending = warpgroup_mma(d_scores, k_tiles.index(before), dq, is_async=True)
            weights = _weights(pending, 2, turn, keys, queries, KEYS, TILE, CAUSAL, WEIGHTED, S)
            mbarrier.wait(v_ready.index(stage), phase)  # passed already: keeps the next wait behind the arithmetic
            d_weights, weights = warpgroup_mma_wait(1, deps=[d_pending, weights])
            mbarrier.arrive(v_free.index(stage))
            new = gl.convert_layout((weights * (d_weights - delta[:, None])).to(k_tiles.dtype), P)
            mbarrier.wait(k_ready.index(stage), phase)
            dq, d_scores, new = warpgroup_mma_wait(0, deps=[dq_pending, d_scores, new])
            mbarrier.arrive(k_free.index(before))
            d_scores = new
        number += 1
        dq = warpgroup_mma(d_scores, k_tiles.index(stage), dq)
        mbarrier.arrive(k_free.index(stage))
    to = dq_ptr + head * D, first, count
    onto = dq
    if ONTO:
        onto = load_rows(onto_ptr + head * D, first, count, part, HEADS * D, D, PACK, D, OUT, ROWS)
    if WARPS == 4:  # the next tile's queries, on their way while this one is written
        tile = next_tile(done, later)
        here = _load(part, given, gl.minimum(tile, tiles - 1), HEADS, KEY_HEADS, LISTS, D, PACK, GIVEN, WARPS)
    dq = dq * scale
    if ONTO:
        dq += onto.to(gl.float32)
    store_rows(*to, part, HEADS, PACK, D, dq, WARPS)
    return tile, number, here


@gluon.jit
def _start(tiles_of, stage, phase, nothing):
    """Products of a turn's keys with queries and of its values with d_out, as they arrive."""
    q_tile, d_out_tile, k_tiles, v_tiles, k_ready, v_ready = tiles_of
    mbarrier.wait(k_ready.index(stage), phase)
    pending = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(stage), phase)
    values = v_tiles.index(stage).permute((1, 0))
    return pending, warpgroup_mma(d_out_tile, values, nothing, use_acc=False, is_async=True)


@gluon.jit
def _weights(
    pending, LATER: gl.constexpr, turn, keys, queries, KEYS: gl.constexpr, TILE: gl.constexpr, CAUSAL: gl.constexpr,
    WEIGHTED: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """exp(scores - lse) of a tile of keys, 0 where a query does not see one. pending: the scores' product, with LATER
    ones behind it; queries: lse, scale, the first one's position, all positions."""
    lse, scale, earliest, positions = queries
    masked, weight = facts_of(turn, keys, earliest, KEYS, TILE, CAUSAL, WEIGHTED, layout)
    scores = warpgroup_mma_wait(LATER, deps=[pending])
    stretch = gl.full_like(scores, scale * LOG2E)
    if WEIGHTED and KEYS < TILE:
        weights = gl.exp2(gl.fma(scores, stretch, weight[None, :] - lse[:, None]))
    else:
        weights = gl.exp2(gl.fma(scores, stretch, gl.zeros_like(scores) + (weight - lse)[:, None]))
    if masked:
        weights = only_seen(weights, 0.0, turn, keys, positions, KEYS, TILE, CAUSAL, layout)
    return weights


@launched
@gluon.jit(do_not_specialize=["M", "capacity", "tiles", "scale"])
def queries_kernel(
    q_ptr, k_desc, v_desc, d_out_ptr, out_ptr, logs_ptr, lse_ptr, delta_ptr, dq_ptr, onto_ptr,
    q_start, q_length, q_position, k_start, k_length, k_position, k_step,
    row_ptr, row_idx, weight_ptr, taken_ptr, q_stride_t, q_stride_h, d_out_stride_t, d_out_stride_h, scale,
    M, capacity, tiles, HEADS: gl.constexpr, KEY_HEADS: gl.constexpr, LISTS: gl.constexpr, D: gl.constexpr,
    KEYS: gl.constexpr, PACK: gl.constexpr, TILE: gl.constexpr, CAUSAL: gl.constexpr, WEIGHTED: gl.constexpr,
    ONTO: gl.constexpr, GIVEN: gl.constexpr, STAGES: gl.constexpr, SEVERAL: gl.constexpr,
):  # fmt: skip
    """As kernels.sparse.backward.queries_kernel, for tiles of 128 rows, which go to programs as those of attend.py; lse
    (base 2) and delta [HEADS, M, SIZE] as rows_kernel makes them if they are GIVEN, else as they are made here of out
    [T, HEADS, D] and logs, lse [T, HEADS]."""
    dtype: gl.constexpr = k_desc.dtype
    WARPS: gl.constexpr = gl.num_warps()
    q_tiles = gl.allocate_shared_memory(dtype, [8 // WARPS, 16 * WARPS, D], shared_layout(16))
    d_out_tiles = gl.allocate_shared_memory(dtype, [8 // WARPS, 16 * WARPS, D], shared_layout(16))
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], shared_layout(16))
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], shared_layout(16))
    k_ready, v_ready = make_barriers(STAGES, 1), make_barriers(STAGES, 1)
    k_free, v_free, later = k_ready, v_ready, (q_tiles, k_ready, k_ready)
    if WARPS == 4:
        k_free, v_free, later = make_barriers(STAGES, 2), make_barriers(STAGES, 2), make_later(2)
    lists = row_ptr, q_start, q_length, q_position, M, capacity, tiles
    given = (
        q_tiles, d_out_tiles, k_tiles, v_tiles, k_ready, v_ready, k_free, v_free, q_ptr, d_out_ptr, out_ptr,
        logs_ptr, lse_ptr, delta_ptr, dq_ptr, onto_ptr, row_idx, k_length, k_position, k_step, weight_ptr, q_stride_t,
        q_stride_h, d_out_stride_t, d_out_stride_h, scale, lists, later,
    )  # fmt: skip
    if WARPS == 8:
        feed = feed_of(
            k_desc, v_desc, k_tiles, v_tiles, k_ready, v_ready, row_idx, k_start, lists, HEADS, KEY_HEADS, LISTS, PACK
        )
        _attend(
            0, given, feed, HEADS, KEY_HEADS, LISTS, D, KEYS, PACK, TILE, STAGES, CAUSAL, WEIGHTED, ONTO, GIVEN, WARPS
        )
    else:
        feed = (
            k_desc, v_desc, k_tiles, v_tiles, k_ready, v_ready, k_free, v_free, row_idx, k_start, lists, later,
            taken_ptr,
        )  # fmt: skip
        gl.warp_specialize(
            [
                (_attend, (0, given, 0, HEADS, KEY_HEADS, LISTS, D, KEYS, PACK, TILE, STAGES, CAUSAL, WEIGHTED, ONTO,
                           GIVEN, WARPS)),
                (_attend, (1, given, 0, HEADS, KEY_HEADS, LISTS, D, KEYS, PACK, TILE, STAGES, CAUSAL, WEIGHTED, ONTO,
                           GIVEN, WARPS)),
                (send_keys, (feed, HEADS, KEY_HEADS, LISTS, PACK, KEYS, TILE, STAGES, SEVERAL)),
            ],
            [4, 1], [240, 24],
        )  # fmt: skip
