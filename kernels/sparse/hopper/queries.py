"""Gradients of queries: two warpgroups of 64 query rows walk the block's list; the product with keys of one step runs
while scores of the next are made."""

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
    add_weights,
    block_of,
    load_rows,
    make_barriers,
    must_mask,
    product_layout,
    seen_keys,
    send_keys,
    shared_layout,
    store_rows,
    turns_of,
)


@gluon.jit
def _attend(
    part: gl.constexpr, given, HEADS: gl.constexpr, D: gl.constexpr, KEYS: gl.constexpr, PACK: gl.constexpr,
    TILE: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WEIGHTED: gl.constexpr, ONTO: gl.constexpr,
):  # fmt: skip
    """dq of rows 64 * part on."""
    (
        q_tiles, d_out_tiles, k_tiles, v_tiles, k_ready, v_ready, k_free, v_free, q_ptr, d_out_ptr, lse_ptr, delta_ptr,
        dq_ptr, onto_ptr, row_idx, begin, stop, first, count, position, k_length, k_position, k_step, weight_ptr,
        q_stride_t, q_stride_h, d_out_stride_t, d_out_stride_h, row_stride, scale,
    ) = given  # fmt: skip
    S: gl.constexpr = product_layout(TILE)
    OUT: gl.constexpr = product_layout(D)
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    q_tile, d_out_tile = q_tiles.index(part), d_out_tiles.index(part)
    q_tile.store(load_rows(q_ptr, first, count, part, q_stride_t, q_stride_h, PACK, D))
    d_out_tile.store(load_rows(d_out_ptr, first, count, part, d_out_stride_t, d_out_stride_h, PACK, D))
    fence_async_shared()
    index = part * 64 + gl.arange(0, 64, gl.SliceLayout(1, S))
    token = index // PACK
    lse = gl.load(lse_ptr + index % PACK * row_stride + token)
    delta = gl.load(delta_ptr + index % PACK * row_stride + token)
    earliest = position + part * 64 // PACK
    position += token
    nothing = gl.full([64, TILE], 0.0, gl.float32, S)
    dq = gl.full([64, D], 0.0, gl.float32, OUT)
    if begin < stop:
        mbarrier.wait(k_ready.index(0), 0)
        pending = warpgroup_mma(q_tile, k_tiles.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(v_ready.index(0), 0)
        d_pending = warpgroup_mma(d_out_tile, v_tiles.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[pending])
        weights = _weights(
            scores, lse, 0, begin, stop, row_idx, k_length, k_position, k_step, earliest, position, weight_ptr, scale,
            KEYS, TILE, CAUSAL, WEIGHTED, S,
        )  # fmt: skip
        d_weights = warpgroup_mma_wait(0, deps=[d_pending])
        mbarrier.arrive(v_free.index(0))
        d_scores = gl.convert_layout((weights * (d_weights - delta[:, None])).to(k_tiles.dtype), P)
        turns = turns_of(begin, stop, KEYS, TILE)
        for turn in range(1, turns):
            stage, before, phase = turn % STAGES, (turn - 1) % STAGES, (turn // STAGES) & 1
            mbarrier.wait(k_ready.index(stage), phase)
            pending = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
            mbarrier.wait(v_ready.index(stage), phase)
            d_pending = warpgroup_mma(
                d_out_tile, v_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            dq_pending = warpgroup_mma(d_scores, k_tiles.index(before), dq, is_async=True)
            scores = warpgroup_mma_wait(2, deps=[pending])
            weights = _weights(
                scores, lse, turn, begin, stop, row_idx, k_length, k_position, k_step, earliest, position, weight_ptr,
                scale, KEYS, TILE, CAUSAL, WEIGHTED, S,
            )  # fmt: skip
            mbarrier.wait(v_ready.index(stage), phase)  # passed already: keeps the next wait behind the arithmetic
            d_weights, weights = warpgroup_mma_wait(1, deps=[d_pending, weights])
            mbarrier.arrive(v_free.index(stage))
            new = gl.convert_layout((weights * (d_weights - delta[:, None])).to(k_tiles.dtype), P)
            mbarrier.wait(k_ready.index(stage), phase)
            dq, d_scores, new = warpgroup_mma_wait(0, deps=[dq_pending, d_scores, new])
            mbarrier.arrive(k_free.index(before))
            d_scores = new
        dq = warpgroup_mma(d_scores, k_tiles.index((turns - 1) % STAGES), dq)
    dq = dq * scale
    if ONTO:
        dq += gl.convert_layout(load_rows(onto_ptr, first, count, part, HEADS * D, D, PACK, D).to(gl.float32), OUT)
    store_rows(dq_ptr, first, count, part, HEADS, PACK, D, dq)


@gluon.jit
def _weights(
    scores, lse, turn, begin, stop, row_idx, k_length, k_position, k_step, earliest, position, weight_ptr, scale,
    KEYS: gl.constexpr, TILE: gl.constexpr, CAUSAL: gl.constexpr, WEIGHTED: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    stretch = scale * LOG2E
    if WEIGHTED:
        scores = add_weights(scores * stretch, turn, begin, stop, row_idx, weight_ptr, KEYS, TILE, layout)
        weights = gl.exp2(scores - lse[:, None])
    else:
        weights = gl.exp2(gl.fma(scores, gl.full_like(scores, stretch), gl.zeros_like(scores) - lse[:, None]))
    if must_mask(turn, begin, stop, row_idx, k_length, k_position, k_step, earliest, KEYS, TILE, CAUSAL):
        seen = seen_keys(turn, begin, stop, row_idx, k_length, k_position, k_step, position, KEYS, TILE, CAUSAL, layout)
        weights = gl.where(seen, weights, 0.0)
    return weights


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
    q_tiles = gl.allocate_shared_memory(dtype, [2, 64, D], shared_layout(16))
    d_out_tiles = gl.allocate_shared_memory(dtype, [2, 64, D], shared_layout(16))
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], shared_layout(16))
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, TILE, D], shared_layout(16))
    k_ready, v_ready = make_barriers(STAGES, 1), make_barriers(STAGES, 1)
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
    feed = (
        k_desc, v_desc, k_tiles, v_tiles, k_ready, v_ready, k_free, v_free, row_idx, begin, stop, k_start, key_head * D,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_attend, (0, given, HEADS, D, KEYS, PACK, TILE, STAGES, CAUSAL, WEIGHTED, ONTO)),
            (_attend, (1, given, HEADS, D, KEYS, PACK, TILE, STAGES, CAUSAL, WEIGHTED, ONTO)),
            (send_keys, (feed, KEYS, TILE, STAGES)),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip
