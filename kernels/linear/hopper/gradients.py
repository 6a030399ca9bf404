"""`delta_gradients` for Hopper GPUs, in Gluon, with the fetching apart from the arithmetic.

A program per multiprocessor walks the chunks of all heads. One warp fetches by TMA, as soon as a place is free: decays,
dO, V'^T and E of the next chunk while this one is worked on, its states and the rest when this one's have been read.
Two warpgroups multiply: one all that has a row per query i (dq, and dv, d_beta, d_log_decay), the other all that has a
row per key j (dk); the sums over rows of dk that the first needs go through shared memory.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from longspan.kernels.launch import launched
from longspan.kernels.linear.hopper.tiles import (
    BETA,
    FROM_START,
    TO_END,
    VECTORS,
    clear_rows,
    decay_between,
    fetch_vectors,
    scratch_descriptor,
    store_tokens,
    synchronize,
    tokens_descriptor,
)
from longspan.kernels.sparse.hopper.tiles import async_load, make_barriers, product_layout, row_layout, shared_layout


@gluon.jit
def _fetch(tables, feed, tiles_of, H, K: gl.constexpr, V: gl.constexpr, GATE: gl.constexpr):
    chunk_first, chunk_length, rows_ptr, num_tiles = tables
    (
        q_desc, k_desc, v_desc, d_out_desc, scores_desc, states_desc, values_desc, d_states_desc, errors_desc,
    ) = feed  # fmt: skip
    (
        vectors, d_outs, values, errors, state, d_state, q_tile, k_tile, v_tile, scores, _,
        first_ready, first_free, states_ready, states_free, last_ready, last_free, _, _, _,
    ) = tiles_of  # fmt: skip
    n = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        first, head, stage = gl.load(chunk_first + tile // H), tile % H, n % 2
        mbarrier.wait(first_free.index(stage), (n // 2 & 1) ^ 1)
        fetch_vectors(rows_ptr, tile, vectors, stage, GATE)
        ready = first_ready.index(stage)
        mbarrier.expect(ready, 3 * 64 * V * 2)
        async_load(d_out_desc, [first, head * V], ready, d_outs.index(stage))
        async_load(values_desc, [tile * V, 0], ready, values.index(stage))
        async_load(errors_desc, [tile * 64, 0], ready, errors.index(stage))
        mbarrier.wait(states_free.index(0), (n & 1) ^ 1)
        ready = states_ready.index(0)
        mbarrier.expect(ready, 2 * V * K * 2)
        async_load(states_desc, [tile * V, 0], ready, state)
        async_load(d_states_desc, [tile * V, 0], ready, d_state)
        mbarrier.wait(last_free.index(0), (n & 1) ^ 1)
        ready = last_ready.index(0)
        mbarrier.expect(ready, (2 * K + V + 64) * 64 * 2)
        async_load(k_desc, [first, head * K], ready, k_tile)
        async_load(q_desc, [first, head * K], ready, q_tile)
        async_load(v_desc, [first, head * V], ready, v_tile)
        async_load(scores_desc, [tile * 64, 0], ready, scores)
        n += 1


@gluon.jit
def _store_part(ptr, first, head, length, H, start: gl.constexpr, x, D: gl.constexpr):
    """As store_tokens, of 16 rows from `start` on as they come from memory."""
    layout: gl.constexpr = row_layout(D)
    token, column = start + gl.arange(0, 16, gl.SliceLayout(1, layout)), gl.arange(0, D, gl.SliceLayout(0, layout))
    ptr += (first.to(gl.int64) * H + head) * D
    at = ptr + (token[:, None] * (H * D) + column[None, :])
    gl.store(at, x.to(ptr.dtype.element_ty), mask=(token < length)[:, None])


@gluon.jit
def _queries(
    tables, out, tiles_of, scale, H, K: gl.constexpr, V: gl.constexpr, GATE: gl.constexpr, D_GATE: gl.constexpr
):
    """dq, dv, d_beta, d_decay."""
    chunk_first, chunk_length, _, num_tiles = tables
    dq_ptr, _, dv_ptr, d_beta_ptr, d_decay_ptr = out
    (
        vectors, d_outs, values, errors, state, _, q_tile, k_tile, v_tile, scores_tile, sums,
        first_ready, first_free, states_ready, states_free, last_ready, last_free, sums_ready, sums_free, cleared,
    ) = tiles_of  # fmt: skip
    S: gl.constexpr = product_layout(64)
    OUT: gl.constexpr = product_layout(K)
    ROW: gl.constexpr = row_layout(V)
    i, j = gl.arange(0, 64, gl.SliceLayout(1, S)), gl.arange(0, 64, gl.SliceLayout(0, S))
    nothing = gl.full([64, 64], 0.0, gl.float32, S)
    nothing_wide = gl.full([64, K], 0.0, gl.float32, OUT)
    n = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        first, length = gl.load(chunk_first + tile // H), gl.load(chunk_length + tile // H)
        head, stage, turn = tile % H, n % 2, n & 1
        d_out, errors_now = d_outs.index(stage), errors.index(stage)
        mbarrier.wait(first_ready.index(stage), n // 2 & 1)
        if length < 64:
            clear_rows(d_out, length, V)
            fence_async_shared()
            synchronize()
            mbarrier.arrive(cleared.index(0))
        d_scores_pending = warpgroup_mma(d_out, values.index(stage), nothing, use_acc=False, is_async=True)
        x_pending = warpgroup_mma(errors_now, values.index(stage), nothing, use_acc=False, is_async=True)
        mbarrier.wait(states_ready.index(0), turn)
        dq_pending = warpgroup_mma(d_out, state, nothing_wide, use_acc=False, is_async=True)
        beta = vectors.index(stage * VECTORS + BETA).load(gl.SliceLayout(1, S))
        between = decay_between(vectors, stage, S, GATE)
        weight = gl.full([64], 1.0, gl.float32, gl.SliceLayout(1, OUT)) * scale
        if GATE:
            weight *= vectors.index(stage * VECTORS + FROM_START).load(gl.SliceLayout(1, OUT))
        mbarrier.wait(last_ready.index(0), turn)  # also keeps the next wait behind the arithmetic
        d_scores, x = warpgroup_mma_wait(1, deps=[d_scores_pending, x_pending])
        if length < 64:
            clear_rows(k_tile, length, K)
            clear_rows(q_tile, length, K)
            clear_rows(v_tile, length, V)
            fence_async_shared()
            synchronize()
            mbarrier.arrive(cleared.index(1))
        kk_pending = warpgroup_mma(k_tile, k_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
        pairs = d_scores
        if D_GATE:  # P is zero above its diagonal, and on it, sums over rows and columns are the same
            pairs = pairs * scores_tile.load(S).to(gl.float32)
        d_scores = gl.where(i[:, None] >= j[None, :], d_scores * (between * scale), 0.0)
        d_scores = gl.convert_layout(d_scores.to(d_outs.dtype), gl.DotOperandLayout(0, OUT, 2))
        x = gl.where(i[:, None] > j[None, :], x * between, 0.0)
        for part in gl.static_range(4):
            error = errors_now.slice(part * 16, 16).load(ROW).to(gl.float32)
            v = v_tile.slice(part * 16, 16).load(ROW).to(gl.float32)
            sums.index(3).slice(part * 16, 16).store(gl.sum(error * v, 1))
            beta_part = vectors.index(stage * VECTORS + BETA).slice(part * 16, 16).load(gl.SliceLayout(1, ROW))
            _store_part(dv_ptr, first, head, length, H, part * 16, error * beta_part[:, None], V)
        mbarrier.wait(last_ready.index(0), turn)  # passed already, as above
        dq, kk = warpgroup_mma_wait(0, deps=[dq_pending, kk_pending])
        synchronize()
        mbarrier.arrive(first_free.index(stage))
        mbarrier.arrive(states_free.index(0))
        d_beta = sums.index(3).load(gl.SliceLayout(1, S))
        kk = kk * x
        d_beta -= gl.sum(kk, 1)
        dq = dq * weight[:, None]
        if D_GATE:
            pairs -= beta[:, None] * kk
            from_queries = gl.sum(pairs, 1) - gl.convert_layout(gl.sum(pairs, 0), gl.SliceLayout(1, S))
            from_queries += gl.convert_layout(gl.sum(q_tile.load(OUT).to(gl.float32) * dq, 1), gl.SliceLayout(1, S))
        dq = warpgroup_mma(d_scores, k_tile, dq)
        synchronize()
        mbarrier.arrive(last_free.index(0))
        store_tokens(dq_ptr, first, head, length, H, dq, K)
        mbarrier.wait(sums_ready.index(0), turn)
        d_beta -= sums.index(0).load(gl.SliceLayout(1, S))
        if D_GATE:
            from_queries += sums.index(1).load(gl.SliceLayout(1, S))
            from_keys = sums.index(2).load(gl.SliceLayout(1, S))
        synchronize()
        mbarrier.arrive(sums_free.index(0))
        at = first.to(gl.int64) * H + head
        gl.store(d_beta_ptr + at + i * H, d_beta, mask=i < length)
        if D_GATE:
            d_decay = gl.sum(gl.where(i[:, None] >= j[None, :], from_queries[:, None], from_keys[:, None]), 0)
            gl.store(d_decay_ptr + at + j * H, d_decay, mask=j < length)
        n += 1


@gluon.jit
def _keys(tables, out, tiles_of, scale, H, K: gl.constexpr, V: gl.constexpr, GATE: gl.constexpr, D_GATE: gl.constexpr):
    """dk, and for each of its rows what d_beta and d_decay have of it -> sums [3, 64]."""
    chunk_first, chunk_length, _, num_tiles = tables
    _, dk_ptr, _, _, _ = out
    (
        vectors, d_outs, values, errors, state, d_state, q_tile, k_tile, _, _, sums,
        first_ready, first_free, states_ready, states_free, last_ready, last_free, sums_ready, sums_free, cleared,
    ) = tiles_of  # fmt: skip
    S: gl.constexpr = product_layout(64)
    OUT: gl.constexpr = product_layout(K)
    PART: gl.constexpr = row_layout(K)
    j, i = gl.arange(0, 64, gl.SliceLayout(1, S)), gl.arange(0, 64, gl.SliceLayout(0, S))
    nothing = gl.full([64, 64], 0.0, gl.float32, S)
    nothing_wide = gl.full([64, K], 0.0, gl.float32, OUT)
    n, short = 0, 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        first, length = gl.load(chunk_first + tile // H), gl.load(chunk_length + tile // H)
        head, stage, turn = tile % H, n % 2, n & 1
        d_out, errors_now, values_t = d_outs.index(stage), errors.index(stage), values.index(stage).permute((1, 0))
        mbarrier.wait(first_ready.index(stage), n // 2 & 1)
        if length < 64:
            mbarrier.wait(cleared.index(0), short & 1)
        d_scores_pending = warpgroup_mma(values_t, d_out.permute((1, 0)), nothing, use_acc=False, is_async=True)
        x_pending = warpgroup_mma(errors_now, values.index(stage), nothing, use_acc=False, is_async=True)
        x_t_pending = warpgroup_mma(values_t, errors_now.permute((1, 0)), nothing, use_acc=False, is_async=True)
        between = decay_between(vectors, stage, S, GATE)
        mbarrier.wait(states_ready.index(0), turn)  # also keeps the next wait behind the arithmetic
        d_scores, x, x_t = warpgroup_mma_wait(0, deps=[d_scores_pending, x_pending, x_t_pending])
        dk_pending = warpgroup_mma(values_t, d_state, nothing_wide, use_acc=False, is_async=True)
        beta = vectors.index(stage * VECTORS + BETA).load(gl.SliceLayout(1, S))
        beta_column = vectors.index(stage * VECTORS + BETA).load(gl.SliceLayout(0, S))
        d_scores = gl.where(j[:, None] <= i[None, :], d_scores * (between * scale), 0.0)
        d_scores = gl.convert_layout(d_scores.to(d_outs.dtype), gl.DotOperandLayout(0, OUT, 2))
        y = gl.where(j[:, None] > i[None, :], x * beta[:, None], x_t * beta_column[None, :])
        y = gl.where(j[:, None] == i[None, :], 0.0, y * -between)
        y = gl.convert_layout(y.to(d_outs.dtype), gl.DotOperandLayout(0, OUT, 2))
        dkw_pending = warpgroup_mma(errors_now, state, nothing_wide, use_acc=False, is_async=True)
        if D_GATE:
            product = gl.full([16, K], 0.0, gl.float32, PART)
            for part in gl.static_range(V // 16):
                s, d_s = state.slice(part * 16, 16).load(PART), d_state.slice(part * 16, 16).load(PART)
                product += s.to(gl.float32) * d_s.to(gl.float32)
            through = gl.sum(gl.sum(product, 1), 0)  # <S, dS>
        if GATE:
            from_start = vectors.index(stage * VECTORS + FROM_START).load(gl.SliceLayout(1, OUT))
            to_end = vectors.index(stage * VECTORS + TO_END).load(gl.SliceLayout(1, OUT))
        mbarrier.wait(last_ready.index(0), turn)  # also keeps the next wait behind the arithmetic
        if length < 64:
            mbarrier.wait(cleared.index(1), short & 1)
            short += 1
        dk, dkw = warpgroup_mma_wait(0, deps=[dk_pending, dkw_pending])
        synchronize()
        mbarrier.arrive(first_free.index(stage))
        mbarrier.arrive(states_free.index(0))
        if GATE:
            dk = dk * to_end[:, None]
            dkw = dkw * from_start[:, None]
        k = k_tile.load(OUT).to(gl.float32)
        k_dkw = gl.convert_layout(gl.sum(k * dkw, 1), gl.SliceLayout(1, S))
        mbarrier.wait(sums_free.index(0), turn ^ 1)
        sums.index(0).store(k_dkw)
        if D_GATE:
            if GATE:
                through *= gl.convert_layout(from_start, gl.SliceLayout(1, S))
            sums.index(1).store(gl.where(j == 63, through, 0.0) - beta * k_dkw)
            sums.index(2).store(gl.convert_layout(gl.sum(k * dk, 1), gl.SliceLayout(1, S)))
        synchronize()
        mbarrier.arrive(sums_ready.index(0))
        dk = dk - gl.convert_layout(beta, gl.SliceLayout(1, OUT))[:, None] * dkw
        dk = warpgroup_mma(d_scores, q_tile, dk, is_async=True)
        dk = warpgroup_mma(y, k_tile, dk)
        synchronize()
        mbarrier.arrive(last_free.index(0))
        store_tokens(dk_ptr, first, head, length, H, dk, K)
        n += 1


@launched
@gluon.jit(do_not_specialize=["num_tiles", "scale"])
def inputs_kernel(
    q_desc, k_desc, v_desc, d_out_desc, scores_desc, states_desc, values_desc, d_states_desc, errors_desc,
    rows_ptr, dq_ptr, dk_ptr, dv_ptr, d_beta_ptr, d_decay_ptr, chunk_first, chunk_length, scale, num_tiles,
    H: gl.constexpr, K: gl.constexpr, V: gl.constexpr, GATE: gl.constexpr, D_GATE: gl.constexpr,
):  # fmt: skip
    """As kernels.linear.delta_gradients.inputs_kernel. Heads lie side by side: strides are those of tokens."""
    dtype: gl.constexpr = q_desc.dtype
    shared: gl.constexpr = shared_layout(16)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tiles_of = (
        gl.allocate_shared_memory(gl.float32, [2 * VECTORS, 64], plain),
        gl.allocate_shared_memory(dtype, [2, 64, V], shared),  # dO
        gl.allocate_shared_memory(dtype, [2, V, 64], shared),  # V'^T
        gl.allocate_shared_memory(dtype, [2, 64, V], shared),  # E
        gl.allocate_shared_memory(dtype, [V, K], shared),  # S^T
        gl.allocate_shared_memory(dtype, [V, K], shared),  # dS^T
        gl.allocate_shared_memory(dtype, [64, K], shared),
        gl.allocate_shared_memory(dtype, [64, K], shared),
        gl.allocate_shared_memory(dtype, [64, V], shared),
        gl.allocate_shared_memory(dtype, [64, 64], shared),  # P
        gl.allocate_shared_memory(gl.float32, [4, 64], plain),  # sums over rows
        make_barriers(2, 1), make_barriers(2, 2), make_barriers(1, 1), make_barriers(1, 2),
        make_barriers(1, 1), make_barriers(1, 2), make_barriers(1, 1), make_barriers(1, 1),
        make_barriers(2, 1),
    )  # fmt: skip
    tables = chunk_first, chunk_length, rows_ptr, num_tiles
    out = dq_ptr, dk_ptr, dv_ptr, d_beta_ptr, d_decay_ptr
    feed = (
        q_desc, k_desc, v_desc, d_out_desc, scores_desc, states_desc, values_desc, d_states_desc, errors_desc,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_queries, (tables, out, tiles_of, scale, H, K, V, GATE, D_GATE)),
            (_keys, (tables, out, tiles_of, scale, H, K, V, GATE, D_GATE)),
            (_fetch, (tables, feed, tiles_of, H, K, V, GATE)),
        ],
        [4, 1], [240, 40],
    )  # fmt: skip


def launch(call, prepared, d_out, entering, leaving, dq, dk, dv, d_beta, d_decay):
    descriptors = [tokens_descriptor(x) for x in (call.q, call.k, call.v, d_out)]
    descriptors += [scratch_descriptor(x) for x in (prepared.scores, *entering, *leaving)]
    programs = min(call.num_tiles, _processors(call.q.device))
    inputs_kernel[(programs,)](
        *descriptors, prepared.rows, dq, dk, dv, d_beta, d_decay, *call.chunks, call.scale, call.num_tiles, call.heads,
        call.k.shape[2], call.v.shape[2], call.log_decay is not None, d_decay is not None, num_warps=4,
    )  # fmt: skip


def _processors(device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
