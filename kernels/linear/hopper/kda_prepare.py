"""`kda_prepare` for Hopper GPUs, in Gluon: a thread has four channels of 8 tokens in a row, so that sums along tokens
mostly stay in threads. Right where all channels are mild (`channel_decay`); other chunks are done again in Triton."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from longspan.kernels.launch import launched
from longspan.kernels.linear.hopper.prepare import add, fill_roots, store_inverse
from longspan.kernels.linear.hopper.tiles import store_scratch, synchronize
from longspan.kernels.sparse.hopper.tiles import LOG2E, product_layout, shared_layout

REGISTERS = 168  # per thread: four programs on a multiprocessor


@launched
@gluon.jit(do_not_specialize=["scale"])
def hopper_kda_prepare_kernel(
    q_ptr, k_ptr, g_ptr, beta_ptr, query_ptr, read_ptr, write_ptr, total_ptr, inverse_ptr, scores_ptr, rows_ptr,
    chunk_first_ptr, chunk_length_ptr, q_stride_t: gl.constexpr, q_stride_h, k_stride_t: gl.constexpr, k_stride_h,
    g_stride_t: gl.constexpr, g_stride_h, beta_stride_t, beta_stride_h, scale, H: gl.constexpr, K: gl.constexpr,
    SMALLEST: gl.constexpr,
):  # fmt: skip
    """As kernels.linear.kda_prepare.kda_prepare_kernel, for K = 128. Grid: (chunks * H)."""
    TOKENS: gl.constexpr = gl.BlockedLayout([8, 4], [2, 16], [4, 1], [1, 0])
    S: gl.constexpr = product_layout(64)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    COLUMN: gl.constexpr = gl.SliceLayout(0, S)
    dtype: gl.constexpr = query_ptr.dtype.element_ty
    tile = gl.program_id(0)
    chunk, head = tile // H, tile % H
    first, length = gl.load(chunk_first_ptr + chunk).to(gl.int64), gl.load(chunk_length_ptr + chunk)
    tile_at = gl.to_tensor(tile).to(gl.int64)
    vectors = gl.allocate_shared_memory(gl.float32, [3, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    queries = gl.allocate_shared_memory(dtype, [K // 64, 64, 64], shared_layout(16))
    risen = gl.allocate_shared_memory(dtype, [K // 64, 64, 64], shared_layout(16))
    fallen = gl.allocate_shared_memory(dtype, [K // 64, 64, 64], shared_layout(16))
    beta_ptr += first * beta_stride_t + head * beta_stride_h
    fill_roots(beta_ptr, beta_stride_t, rows_ptr, vectors, tile, length, SMALLEST)
    token, key = gl.arange(0, 64, gl.SliceLayout(1, TOKENS)), gl.arange(0, 64, gl.SliceLayout(0, TOKENS))
    inside = (token < length)[:, None]
    largest = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, TOKENS))
    for part in range(0, K // 64):
        g_at = g_ptr + first * g_stride_t + head * g_stride_h + part * 64
        k_at = k_ptr + first * k_stride_t + head * k_stride_h + part * 64
        q_at = q_ptr + first * q_stride_t + head * q_stride_h + part * 64
        start = (first * H + head) * K + part * 64
        at = token[:, None] * (H * K) + key[None, :]
        g = gl.load(g_at + (token[:, None] * g_stride_t + key[None, :]), mask=inside, other=0.0).to(gl.float32)
        k = gl.load(k_at + (token[:, None] * k_stride_t + key[None, :]), mask=inside, other=0.0)
        q = gl.load(q_at + (token[:, None] * q_stride_t + key[None, :]), mask=inside, other=0.0)
        largest = gl.maximum(largest, gl.max(g, 1))
        total = gl.sum(g, 0)
        gl.store(total_ptr + tile_at * K + part * 64 + key, total)
        half = total * (0.5 * LOG2E)
        rise = gl.associative_scan(g * LOG2E, 0, add) - half[None, :]
        edge = gl.exp2(half)[None, :]
        fall = gl.exp2(-rise) * k.to(gl.float32)
        fallen.index(part).store(fall.to(dtype))
        gl.store(write_ptr + start + at, (fall * edge).to(dtype), mask=inside)
        rise = gl.exp2(rise)
        read = rise * k.to(gl.float32)
        risen.index(part).store(read.to(dtype))
        gl.store(read_ptr + start + at, (read * edge).to(dtype), mask=inside)
        rise *= q.to(gl.float32) * scale
        queries.index(part).store(rise.to(dtype))
        gl.store(query_ptr + start + at, (rise * edge).to(dtype), mask=inside)
    gl.store(rows_ptr + tile_at * (8 * 64) + (8 * 64 - 3), gl.sum(largest, 0))
    fence_async_shared()
    synchronize()
    scores = gl.full([64, 64], 0.0, gl.float32, S)
    a = gl.full([64, 64], 0.0, gl.float32, S)
    for part in gl.static_range(K // 64):
        scores = warpgroup_mma(queries.index(part), fallen.index(part).permute((1, 0)), scores, is_async=True)
        a = warpgroup_mma(risen.index(part), fallen.index(part).permute((1, 0)), a, is_async=True)
    scores, a, queries, risen, fallen = warpgroup_mma_wait(0, deps=[scores, a, queries, risen, fallen])
    i, j = gl.arange(0, 64, ROW), gl.arange(0, 64, COLUMN)
    store_scratch(scores_ptr, tile, 0, gl.where(i[:, None] >= j[None, :], scores, 0.0).to(dtype), 64, 64)
    a *= vectors.index(1).load(ROW)[:, None] * vectors.index(0).load(COLUMN)[None, :]
    store_inverse(gl.where(i[:, None] > j[None, :], a, 0.0), vectors, inverse_ptr, tile, i, j, dtype)


def launch(call, query, read, write, total, prepared, smallest):
    """As the launch of `kda_prepare.prepare`."""
    q, k, g, beta = call.q, call.k, call.log_decay, call.beta
    hopper_kda_prepare_kernel[(call.num_tiles,)](
        q, k, g, beta, query, read, write, total, *prepared, *call.chunks, *q.stride()[:2], *k.stride()[:2],
        *call.decay_strides, *beta.stride(), call.scale, call.heads, k.shape[2], smallest,
        num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
