"""`kda_prepare` for Hopper GPUs, in Gluon: a thread has four channels of 16 tokens, so that sums along tokens stay in
threads but for one exchange between warps. Only where all channels are mild (`channel_decay`)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from longspan.kernels.launch import launched
from longspan.kernels.linear.channel_decay import MILD
from longspan.kernels.linear.hopper.prepare import add, fill_roots, store_inverse
from longspan.kernels.linear.hopper.tiles import store_scratch, synchronize
from longspan.kernels.sparse.hopper.tiles import LOG2E, product_layout, shared_layout

REGISTERS = 168  # per thread: three programs on a multiprocessor


@launched
@gluon.jit(do_not_specialize=["scale"])
def hopper_kda_prepare_kernel(
    q_ptr, k_ptr, g_ptr, beta_ptr, query_ptr, read_ptr, write_ptr, total_ptr, inverse_ptr, scores_ptr, rows_ptr,
    chunk_first_ptr, chunk_length_ptr, q_stride_t, q_stride_h, k_stride_t, k_stride_h, g_stride_t, g_stride_h,
    beta_stride_t, beta_stride_h, scale, H: gl.constexpr, K: gl.constexpr, SMALLEST: gl.constexpr,
):  # fmt: skip
    """As kernels.linear.kda_prepare.kda_prepare_kernel, for K = 128; of chunks that are not mild only total.
    Grid: (chunks * H)."""
    TOKENS: gl.constexpr = gl.BlockedLayout([16, K // 32], [1, 32], [4, 1], [1, 0])
    S: gl.constexpr = product_layout(64)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    COLUMN: gl.constexpr = gl.SliceLayout(0, S)
    dtype: gl.constexpr = query_ptr.dtype.element_ty
    tile = gl.program_id(0)
    chunk, head = tile // H, tile % H
    first, length = gl.load(chunk_first_ptr + chunk).to(gl.int64), gl.load(chunk_length_ptr + chunk)
    token, key = gl.arange(0, 64, gl.SliceLayout(1, TOKENS)), gl.arange(0, K, gl.SliceLayout(0, TOKENS))
    inside = (token < length)[:, None]
    g_at = g_ptr + first * g_stride_t + head * g_stride_h + (token[:, None] * g_stride_t + key[None, :])
    k_at = k_ptr + first * k_stride_t + head * k_stride_h + (token[:, None] * k_stride_t + key[None, :])
    q_at = q_ptr + first * q_stride_t + head * q_stride_h + (token[:, None] * q_stride_t + key[None, :])
    g = gl.load(g_at, mask=inside, other=0.0).to(gl.float32)
    k = gl.load(k_at, mask=inside, other=0.0)
    q = gl.load(q_at, mask=inside, other=0.0)
    vectors = gl.allocate_shared_memory(gl.float32, [3, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    fill_roots(beta_ptr + first * beta_stride_t + head * beta_stride_h, beta_stride_t, rows_ptr, vectors, tile, length,
               SMALLEST)  # fmt: skip
    tile_at = gl.to_tensor(tile).to(gl.int64)
    total = gl.sum(g, 0)
    gl.store(total_ptr + tile_at * K + key, total)
    if gl.min(total, 0) < -MILD:
        return
    gl.store(rows_ptr + tile_at * (8 * 64) + (8 * 64 - 3), gl.sum(gl.max(g, 1), 0))
    half = total * (0.5 * LOG2E)
    rise = gl.associative_scan(g * LOG2E, 0, add) - half[None, :]
    edge = gl.exp2(half)[None, :]
    fall = gl.exp2(-rise)
    rise = gl.exp2(rise)
    at = (first * H + head) * K + (token[:, None] * (H * K) + key[None, :])
    queries = gl.allocate_shared_memory(dtype, [64, K], shared_layout(16))
    risen = gl.allocate_shared_memory(dtype, [64, K], shared_layout(16))
    fallen = gl.allocate_shared_memory(dtype, [64, K], shared_layout(16))
    fall *= k.to(gl.float32)
    fallen.store(fall.to(dtype))
    gl.store(write_ptr + at, (fall * edge).to(dtype), mask=inside)
    read = rise * k.to(gl.float32)
    risen.store(read.to(dtype))
    gl.store(read_ptr + at, (read * edge).to(dtype), mask=inside)
    rise *= q.to(gl.float32) * scale
    queries.store(rise.to(dtype))
    gl.store(query_ptr + at, (rise * edge).to(dtype), mask=inside)
    fence_async_shared()
    synchronize()
    nothing = gl.full([64, 64], 0.0, gl.float32, S)
    scores = warpgroup_mma(queries, fallen.permute((1, 0)), nothing, use_acc=False, is_async=True)
    a = warpgroup_mma(risen, fallen.permute((1, 0)), nothing, use_acc=False, is_async=True)
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
