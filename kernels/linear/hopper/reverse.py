"""The sweep of `delta_backward` that writes dS of every chunk, and `delta_gradients`, in one for Hopper GPUs, in Gluon.

A program passes through the chunks of a split from the last one down. One warp fetches them by TMA. One warpgroup
carries dS^T in registers, and leaves dS and beta E of each chunk in shared memory, where another takes them for all
gradients of that chunk: neither goes to memory. V is cut into two halves, of which every tile has its own.
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
from longspan.kernels.linear.hopper.backward import step, total_decay
from longspan.kernels.linear.hopper.tiles import (
    BETA,
    FROM_START,
    TO_END,
    VECTORS,
    clear_rows,
    decay_between,
    fetch_vectors,
    scratch_descriptor,
    store_half,
    store_tokens,
    synchronize,
    tokens_descriptor,
)
from longspan.kernels.sparse.hopper.tiles import async_load, product_layout, row_layout, shared_layout


@gluon.jit
def _fetch(place, feed, tiles_of, H, K: gl.constexpr, V: gl.constexpr, GATE: gl.constexpr):
    first, _, tile, head, chunks = place
    q_desc, k_desc, d_out_desc, inverse_desc, scores_desc, states_desc, values_desc, rows_ptr = feed
    vectors, q_tiles, k_tiles, d_outs, squares, states, values, _, _, _, ready, free = tiles_of
    for n in range(0, chunks):
        chunk = chunks - 1 - n
        stage, at, token = n % 2, tile + chunk * H, first + chunk * 64
        mbarrier.wait(free.index(stage), (n // 2 & 1) ^ 1)
        fetch_vectors(rows_ptr, at, vectors, stage, GATE)
        mbarrier.expect(ready.index(stage), (2 * K + V) * 64 * 2)
        async_load(k_desc, [token, head * K], ready.index(stage), k_tiles.index(stage))
        async_load(q_desc, [token, head * K], ready.index(stage), q_tiles.index(stage))
        async_load(d_out_desc, [token, head * V], ready.index(stage), d_outs.index(stage * 2))
        async_load(d_out_desc, [token, head * V + 64], ready.index(stage), d_outs.index(stage * 2 + 1))
        mbarrier.wait(free.index(2), (n & 1) ^ 1)
        mbarrier.expect(ready.index(2), 2 * 64 * 64 * 2)
        async_load(inverse_desc, [at * 64, 0], ready.index(2), squares.index(0))
        async_load(scores_desc, [at * 64, 0], ready.index(2), squares.index(1))
        mbarrier.wait(free.index(3), (n & 1) ^ 1)
        mbarrier.expect(ready.index(3), (K + 64) * V * 2)
        for part in gl.static_range(2):
            async_load(values_desc, [at * V + part * 64, 0], ready.index(3), values.index(part))
            async_load(states_desc, [at * V + part * 64, 0], ready.index(3), states.index(part))


@gluon.jit
def _carry(
    place, exit_row, exit_at, dv_ptr, tiles_of, scale, H, K: gl.constexpr, V: gl.constexpr, GATE: gl.constexpr,
    D_GATE: gl.constexpr,
):  # fmt: skip
    """dS and E of every chunk, dv and, if D_GATE, <S, dS>."""
    first, length, _, head, chunks = place
    (
        vectors, q_tiles, k_tiles, d_outs, squares, states, _, d_states, errors_t, sums, ready, free,
    ) = tiles_of  # fmt: skip
    OUT: gl.constexpr = product_layout(K)
    S: gl.constexpr = product_layout(64)
    COLUMN: gl.constexpr = gl.SliceLayout(0, S)
    dtype: gl.constexpr = k_tiles.dtype
    column, key = gl.arange(0, 64, gl.SliceLayout(1, OUT)), gl.arange(0, K, gl.SliceLayout(0, OUT))
    at_state = column[:, None] + key[None, :] * V
    state = gl.load(exit_at + at_state, mask=exit_row >= 0, other=0.0)
    second = gl.load(exit_at + 64 + at_state, mask=exit_row >= 0, other=0.0)
    for n in range(0, chunks):
        stage, left, turn = n % 2, length - (chunks - 1 - n) * 64, n & 1
        q_tile, k_tile = q_tiles.index(stage), k_tiles.index(stage)
        mbarrier.wait(free.index(4), turn ^ 1)
        d_states.index(0).store(state.to(dtype))
        d_states.index(1).store(second.to(dtype))
        mbarrier.wait(ready.index(stage), n // 2 & 1)
        if left < 64:  # the last chunk, which comes first
            clear_rows(k_tile, left, K)
            clear_rows(q_tile, left, K)
            clear_rows(d_outs.index(stage * 2), left, 64)
            clear_rows(d_outs.index(stage * 2 + 1), left, 64)
        fence_async_shared()
        synchronize()
        mbarrier.arrive(ready.index(4))
        mbarrier.wait(ready.index(2), turn)
        total = 1.0
        if GATE:
            total = total_decay(vectors, stage * VECTORS, K)
        pending, operand, errors = step(
            state, d_states.index(0), d_outs.index(stage * 2), q_tile, k_tile, k_tile, squares.index(0),
            squares.index(1), vectors, stage * VECTORS, total, scale, K, GATE, False,
        )  # fmt: skip
        mbarrier.wait(free.index(5), turn ^ 1)
        errors_t.index(0).store(errors.to(dtype))
        state, operand = warpgroup_mma_wait(0, deps=[pending, operand])
        pending, operand, errors = step(
            second, d_states.index(1), d_outs.index(stage * 2 + 1), q_tile, k_tile, k_tile, squares.index(0),
            squares.index(1), vectors, stage * VECTORS, total, scale, K, GATE, False,
        )  # fmt: skip
        errors_t.index(1).store(errors.to(dtype))
        fence_async_shared()
        synchronize()
        mbarrier.arrive(ready.index(5))
        second, operand = warpgroup_mma_wait(0, deps=[pending, operand])
        token = first + (chunks - 1 - n) * 64
        for part in gl.static_range(2):
            d_v = errors_t.index(part).permute((1, 0)).load(S)
            store_half(dv_ptr, token, head, left, H, part * 64, d_v, V)
        synchronize()
        mbarrier.arrive(free.index(stage))
        mbarrier.arrive(free.index(2))
        if D_GATE:
            mbarrier.wait(ready.index(3), turn)
            sums.index(0).store(gl.full([64], 0.0, gl.float32, COLUMN) + product_of(states, d_states, K, V))
            synchronize()
            mbarrier.arrive(ready.index(6))
            mbarrier.arrive(free.index(3))


@gluon.jit
def product_of(states, d_states, K: gl.constexpr, V: gl.constexpr):
    """<S, dS>."""
    PART: gl.constexpr = row_layout(K)
    product = gl.full([16, K], 0.0, gl.float32, PART)
    for part in gl.static_range(V // 16):
        s = states.index(part // 4).slice(part % 4 * 16, 16).load(PART)
        d_s = d_states.index(part // 4).slice(part % 4 * 16, 16).load(PART)
        product += s.to(gl.float32) * d_s.to(gl.float32)
    return gl.sum(gl.sum(product, 1), 0)


@gluon.jit
def _gradients(
    place, out, tiles_of, scale, H, K: gl.constexpr, V: gl.constexpr, GATE: gl.constexpr, D_GATE: gl.constexpr,
):  # fmt: skip
    """All other gradients."""
    first, length, tile, head, chunks = place
    dq_ptr, dk_ptr, d_beta_ptr, d_decay_ptr = out
    (
        vectors, q_tiles, k_tiles, d_outs, squares, states, values, d_states, errors_t, sums, ready, free,
    ) = tiles_of  # fmt: skip
    S: gl.constexpr = product_layout(64)
    OUT: gl.constexpr = product_layout(K)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    WIDE: gl.constexpr = gl.SliceLayout(1, OUT)
    COLUMN: gl.constexpr = gl.SliceLayout(0, S)
    dtype: gl.constexpr = k_tiles.dtype
    i, j = gl.arange(0, 64, ROW), gl.arange(0, 64, COLUMN)
    nothing = gl.full([64, 64], 0.0, gl.float32, S)
    nothing_wide = gl.full([64, K], 0.0, gl.float32, OUT)
    for n in range(0, chunks):
        chunk = chunks - 1 - n
        stage, left, turn, token = n % 2, length - chunk * 64, n & 1, first + chunk * 64
        q_tile, k_tile, d_out, d_out_2 = (
            q_tiles.index(stage), k_tiles.index(stage), d_outs.index(stage * 2), d_outs.index(stage * 2 + 1),
        )  # fmt: skip
        values_t, values_t_2 = values.index(0).permute((1, 0)), values.index(1).permute((1, 0))
        errors, errors_2 = errors_t.index(0).permute((1, 0)), errors_t.index(1).permute((1, 0))
        mbarrier.wait(ready.index(stage), n // 2 & 1)
        mbarrier.wait(ready.index(3), turn)
        mbarrier.wait(ready.index(4), turn)  # dS is there, and what is beyond the last token is cleared
        d_scores = warpgroup_mma(d_out, values.index(0), nothing, use_acc=False, is_async=True)
        d_scores = warpgroup_mma(d_out_2, values.index(1), d_scores, is_async=True)
        d_scores_t = warpgroup_mma(values_t, d_out.permute((1, 0)), nothing, use_acc=False, is_async=True)
        d_scores_t = warpgroup_mma(values_t_2, d_out_2.permute((1, 0)), d_scores_t, is_async=True)
        beta = vectors.index(stage * VECTORS + BETA).load(ROW)
        between = decay_between(vectors, stage, S, GATE)
        mbarrier.wait(ready.index(2), turn)  # also keeps the next wait behind the arithmetic
        d_scores, d_scores_t = warpgroup_mma_wait(0, deps=[d_scores, d_scores_t])
        dq = warpgroup_mma(d_out, states.index(0), nothing_wide, use_acc=False, is_async=True)
        dq = warpgroup_mma(d_out_2, states.index(1), dq, is_async=True)
        if D_GATE:  # P is zero above its diagonal, and on it, sums over rows and columns are the same
            pairs = d_scores * squares.index(1).load(S).to(gl.float32)
            pairs -= d_scores_t * squares.index(1).permute((1, 0)).load(S).to(gl.float32)
            from_queries = gl.sum(pairs, 1)
        weights = between * scale
        d_scores = gl.where(i[:, None] >= j[None, :], d_scores * weights, 0.0)
        d_scores = gl.convert_layout(d_scores.to(dtype), OPERAND)
        d_scores_t = gl.where(i[:, None] <= j[None, :], d_scores_t * weights, 0.0).to(dtype)
        synchronize()
        mbarrier.arrive(free.index(2))
        weight = gl.full([64], 1.0, gl.float32, WIDE) * scale
        if GATE:
            from_start = vectors.index(stage * VECTORS + FROM_START).load(WIDE)
            weight *= from_start
        mbarrier.wait(ready.index(4), turn)  # passed already: keeps the next wait behind the arithmetic
        dq = warpgroup_mma_wait(0, deps=[dq]) * weight[:, None]
        dk = warpgroup_mma(values_t, d_states.index(0), nothing_wide, use_acc=False, is_async=True)
        dk = warpgroup_mma(values_t_2, d_states.index(1), dk, is_async=True)
        if D_GATE:
            from_queries += gl.convert_layout(gl.sum(q_tile.load(OUT).to(gl.float32) * dq, 1), ROW)
        dq = warpgroup_mma(d_scores, k_tile, dq, is_async=True)
        dq, dk, d_scores = warpgroup_mma_wait(0, deps=[dq, dk, d_scores])
        d_scores_t = gl.convert_layout(d_scores_t, OPERAND)
        synchronize()
        mbarrier.arrive(free.index(4))
        store_tokens(dq_ptr, token, head, left, H, dq, K)
        if GATE:
            dk = dk * vectors.index(stage * VECTORS + TO_END).load(WIDE)[:, None]
        if D_GATE:
            from_keys = gl.convert_layout(gl.sum(k_tile.load(OUT).to(gl.float32) * dk, 1), ROW)
        dk = warpgroup_mma(d_scores_t, q_tile, dk, is_async=True)
        mbarrier.wait(ready.index(5), turn)
        x = warpgroup_mma(errors, values.index(0), nothing, use_acc=False, is_async=True)
        x = warpgroup_mma(errors_2, values.index(1), x, is_async=True)
        x_t = warpgroup_mma(values_t, errors_t.index(0), nothing, use_acc=False, is_async=True)
        x_t = warpgroup_mma(values_t_2, errors_t.index(1), x_t, is_async=True)
        between = decay_between(vectors, stage, S, GATE)
        mbarrier.wait(ready.index(5), turn)  # passed already, as above
        dk, d_scores_t, x, x_t = warpgroup_mma_wait(0, deps=[dk, d_scores_t, x, x_t])
        kk = warpgroup_mma(k_tile, k_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
        x = gl.where(i[:, None] >= j[None, :], x * between, 0.0)
        x_t = gl.where(i[:, None] < j[None, :], x_t * between, 0.0)
        # d_beta = <E, V'> / beta, with what T has of it. beta is not zero: `SMALLEST_BETA`
        d_beta = gl.sum(gl.where(i[:, None] == j[None, :], x, 0.0), 1) / (beta * beta)
        x = gl.where(i[:, None] == j[None, :], 0.0, x)
        y = gl.convert_layout(-(x + x_t).to(dtype), OPERAND)
        mbarrier.wait(ready.index(5), turn)  # passed already, as above
        kk = warpgroup_mma_wait(0, deps=[kk])
        dkw = warpgroup_mma(errors, states.index(0), nothing_wide, use_acc=False, is_async=True)
        dkw = warpgroup_mma(errors_2, states.index(1), dkw, is_async=True)
        if D_GATE:  # K K^T is its own transpose
            from_queries += gl.sum(kk * (x_t - x), 1)
        mbarrier.wait(ready.index(5), turn)  # passed already, as above
        dkw = warpgroup_mma_wait(0, deps=[dkw])
        if D_GATE:
            mbarrier.wait(ready.index(6), turn)
            through = sums.index(0).load(ROW)
        synchronize()
        mbarrier.arrive(free.index(3))
        mbarrier.arrive(free.index(5))
        if GATE:
            dkw = dkw * from_start[:, None]
        if D_GATE:
            from_queries -= gl.convert_layout(gl.sum(k_tile.load(OUT).to(gl.float32) * dkw, 1), ROW)
        dk = warpgroup_mma(y, k_tile, dk - dkw, is_async=True)
        at = token.to(gl.int64) * H + head
        gl.store(d_beta_ptr + at + i * H, d_beta, mask=i < left)
        if D_GATE:
            if GATE:
                through *= gl.convert_layout(from_start, ROW)
            sums.index(1).store(from_queries + gl.where(i == 63, through, 0.0))
            sums.index(2).store(from_keys)
            synchronize()
            later, earlier = sums.index(1).load(COLUMN), sums.index(2).load(COLUMN)
            d_decay = gl.sum(gl.where(i[:, None] <= j[None, :], later[None, :], earlier[None, :]), 1)
            gl.store(d_decay_ptr + at + i * H, d_decay, mask=i < left)
        mbarrier.wait(ready.index(stage), n // 2 & 1)  # as above; E may be that of the next chunk by now
        dk, y = warpgroup_mma_wait(0, deps=[dk, y])
        synchronize()
        mbarrier.arrive(free.index(stage))
        store_tokens(dk_ptr, token, head, left, H, dk, K)


@launched
@gluon.jit(do_not_specialize=["scale"])
def delta_reverse_kernel(
    q_desc, k_desc, d_out_desc, inverse_desc, scores_desc, states_desc, values_desc, rows_ptr, exit_ptr,
    dq_ptr, dk_ptr, dv_ptr, d_beta_ptr, d_decay_ptr, first_ptr, length_ptr, split_chunk_ptr, exit_row_ptr,
    scale, H: gl.constexpr, K: gl.constexpr, V: gl.constexpr, GATE: gl.constexpr, D_GATE: gl.constexpr,
):  # fmt: skip
    """Grid: (splits * H). Pointers and tables as in `delta_backward` and `delta_gradients`."""
    dtype: gl.constexpr = k_desc.dtype
    shared: gl.constexpr = shared_layout(16)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    split, head = gl.program_id(0) // H, gl.program_id(0) % H
    exit_row = gl.load(exit_row_ptr + split)
    exit_at = exit_ptr + (gl.maximum(exit_row, 0).to(gl.int64) * H + head) * K * V
    first, length = gl.load(first_ptr + split), gl.load(length_ptr + split)
    tile = gl.load(split_chunk_ptr + split) * H + head
    # Barriers: 0, 1 tokens and decays of a chunk; 2 T and P; 3 S and V'; 4 dS; 5 E; 6 sums.
    ready = gl.allocate_shared_memory(gl.int64, [7, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [6, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(7):
        mbarrier.init(ready.index(n), count=1)
    for n in gl.static_range(6):
        mbarrier.init(free.index(n), count=2 if n < 3 or (n == 3 and D_GATE) else 1)
    tiles_of = (
        gl.allocate_shared_memory(gl.float32, [2 * VECTORS, 64], plain),
        gl.allocate_shared_memory(dtype, [2, 64, K], shared),  # Q
        gl.allocate_shared_memory(dtype, [2, 64, K], shared),  # K
        gl.allocate_shared_memory(dtype, [4, 64, 64], shared),  # dO
        gl.allocate_shared_memory(dtype, [2, 64, 64], shared),  # T and P
        gl.allocate_shared_memory(dtype, [2, 64, K], shared),  # S^T
        gl.allocate_shared_memory(dtype, [2, 64, 64], shared),  # V'^T
        gl.allocate_shared_memory(dtype, [2, 64, K], shared),  # dS^T
        gl.allocate_shared_memory(dtype, [2, 64, 64], shared),  # beta E^T, which is dv^T
        gl.allocate_shared_memory(gl.float32, [3, 64], plain),  # <S, dS>; what decays have of queries and keys
        ready, free,
    )  # fmt: skip
    place = first, length, tile, head, gl.cdiv(length, 64)
    out = dq_ptr, dk_ptr, d_beta_ptr, d_decay_ptr
    feed = q_desc, k_desc, d_out_desc, inverse_desc, scores_desc, states_desc, values_desc, rows_ptr
    gl.warp_specialize(
        [
            (_gradients, (place, out, tiles_of, scale, H, K, V, GATE, D_GATE)),
            (_carry, (place, exit_row, exit_at, dv_ptr, tiles_of, scale, H, K, V, GATE, D_GATE)),
            (_fetch, (place, feed, tiles_of, H, K, V, GATE)),
        ],
        [4, 1], [232, 24],
    )  # fmt: skip


def launch(call, prepared, d_out, entering, exits, dq, dk, dv, d_beta, d_decay):
    """entering: S^T and V'^T of every chunk; exits: gradients of the states leaving the splits [N, H, K, V]."""
    splits = call.splits
    delta_reverse_kernel[(splits.num_splits * call.heads,)](
        tokens_descriptor(call.q), tokens_descriptor(call.k), tokens_descriptor(d_out, 64),
        *(scratch_descriptor(x) for x in (prepared.inverse, prepared.scores)),
        *(scratch_descriptor(x, 64) for x in entering), prepared.rows, exits, dq, dk, dv, d_beta, d_decay,
        splits.first, splits.length, splits.split_chunk, splits.backward.row, call.scale,
        call.heads, call.k.shape[2], call.v.shape[2], call.log_decay is not None, d_decay is not None, num_warps=4,
    )  # fmt: skip
