"""`kda_gradients` for Hopper GPUs, in Gluon: half the channels of a chunk per program, which fetches all it needs at
once by TMA. Only where all channels are mild (`channel_decay`); sums along tokens are products with ones."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from longspan.kernels.launch import launched
from longspan.kernels.linear.channel_decay import MILD
from longspan.kernels.linear.hopper.tiles import (
    clear_rows,
    scratch_descriptor,
    store_half,
    synchronize,
    tokens_descriptor,
)
from longspan.kernels.sparse.hopper.tiles import LOG2E, async_load, make_barriers, product_layout, shared_layout


@gluon.jit
def is_mild(total_ptr, tile, K: gl.constexpr):
    """As `channel_decay.is_mild`, of all channels of a chunk."""
    key = gl.arange(0, K, gl.BlockedLayout([K // 32], [32], [4], [0]))
    return gl.min(gl.load(total_ptr + gl.to_tensor(tile).to(gl.int64) * K + key), 0) >= -MILD


@gluon.jit
def store_parts(x, high, low):
    """x as a sum of two 16-bit numbers."""
    large = x.to(high.dtype)
    high.store(large)
    low.store((x - large.to(gl.float32)).to(high.dtype))


@launched
@gluon.jit(do_not_specialize=["scale"])
def hopper_kda_gradients_kernel(
    q_desc, k_desc, d_out_desc, dv_desc, states_desc, d_states_desc, values_desc, g_ptr, total_ptr, rows_ptr,
    dq_ptr, dk_ptr, dg_ptr, d_beta_ptr, chunk_first_ptr, chunk_length_ptr, g_stride_t: gl.constexpr,
    g_stride_h, scale, H: gl.constexpr, K: gl.constexpr, V: gl.constexpr, D_GATE: gl.constexpr,
):  # fmt: skip
    """As kernels.linear.kda_gradients.kda_gradients_kernel, for K = V = 128. Grid: (chunks * H * 2)."""
    S: gl.constexpr = product_layout(64)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, S, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    COLUMN: gl.constexpr = gl.SliceLayout(0, S)
    LOADED: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    dtype: gl.constexpr = k_desc.dtype
    shared: gl.constexpr = shared_layout(16)
    tile, half = gl.program_id(0) // 2, gl.program_id(0) % 2
    chunk, head = tile // H, tile % H
    first, length = gl.load(chunk_first_ptr + chunk), gl.load(chunk_length_ptr + chunk)
    q_tile = gl.allocate_shared_memory(dtype, [64, 64], shared)
    k_tile = gl.allocate_shared_memory(dtype, [64, 64], shared)
    first_part = gl.allocate_shared_memory(dtype, [64, 64], shared)
    second_part = gl.allocate_shared_memory(dtype, [64, 64], shared)
    d_out = gl.allocate_shared_memory(dtype, [64, V], shared)
    dv = gl.allocate_shared_memory(dtype, [64, V], shared)
    values_t = gl.allocate_shared_memory(dtype, [V, 64], shared)
    state = gl.allocate_shared_memory(dtype, [V, 64], shared)
    d_state = gl.allocate_shared_memory(dtype, [V, 64], shared)
    ready = make_barriers(2, 1)
    fence_async_shared()
    mbarrier.expect(ready.index(0), 3 * 64 * V * 2)
    mbarrier.expect(ready.index(1), 2 * 64 * (64 + V) * 2)
    synchronize()
    async_load(d_out_desc, [first, head * V], ready.index(0), d_out)
    async_load(values_desc, [tile * V, 0], ready.index(0), values_t)
    async_load(dv_desc, [first, head * V], ready.index(0), dv)
    async_load(k_desc, [first, head * K + half * 64], ready.index(1), k_tile)
    async_load(states_desc, [tile * V, half * 64], ready.index(1), state)
    async_load(q_desc, [first, head * K + half * 64], ready.index(1), q_tile)
    async_load(d_states_desc, [tile * V, half * 64], ready.index(1), d_state)

    row, channel = gl.arange(0, 64, gl.SliceLayout(1, LOADED)), gl.arange(0, 64, gl.SliceLayout(0, LOADED))
    g_ptr += first.to(gl.int64) * g_stride_t + head * g_stride_h + half * 64
    g_at = g_ptr + (row[:, None] * g_stride_t + channel[None, :])
    g = gl.load(g_at, mask=(row < length)[:, None], other=0.0).to(gl.float32)
    i, j = gl.arange(0, 64, ROW), gl.arange(0, 64, COLUMN)
    total = gl.load(total_ptr + gl.to_tensor(tile).to(gl.int64) * K + half * 64 + j)
    beta = gl.load(rows_ptr + gl.to_tensor(tile).to(gl.int64) * (8 * 64) + i * 4)
    if not is_mild(total_ptr, tile, K):
        mbarrier.wait(ready.index(0), 0)
        mbarrier.wait(ready.index(1), 0)
        return
    store_parts(g * LOG2E, first_part, second_part)
    fence_async_shared()
    mbarrier.wait(ready.index(0), 0)
    if length < 64:
        clear_rows(d_out, length, V)
        clear_rows(dv, length, V)
        mbarrier.wait(ready.index(1), 0)
        clear_rows(q_tile, length, 64)
        clear_rows(k_tile, length, 64)
        fence_async_shared()
    synchronize()

    # In an order in which little has to be kept in registers.
    nothing = gl.full([64, 64], 0.0, gl.float32, S)
    one = gl.where(length > 0, nothing + 1.0, nothing)  # ptxas 12.9 sets constant operands only after their product
    ones = gl.convert_layout(gl.where(i[:, None] >= j[None, :], one, nothing).to(dtype), OPERAND)
    rise = warpgroup_mma(ones, first_part, nothing, use_acc=False, is_async=True)
    rise = warpgroup_mma(ones, second_part, rise, is_async=True)
    d_pairs = warpgroup_mma(d_out, values_t, nothing, use_acc=False, is_async=True)
    mbarrier.wait(ready.index(1), 0)
    rise, d_pairs, ones = warpgroup_mma_wait(0, deps=[rise, d_pairs, ones])
    x_pairs = warpgroup_mma(dv, values_t, nothing, use_acc=False, is_async=True)
    d_pairs = gl.convert_layout(gl.where(i[:, None] >= j[None, :], d_pairs, 0.0).to(dtype), OPERAND)
    rise -= (total * (0.5 * LOG2E))[None, :]
    synchronize()  # all have read first_part
    k = k_tile.load(S).to(gl.float32)
    k_tile.store((k * gl.exp2(-rise)).to(dtype))
    rise = gl.exp2(rise)
    first_part.store((-k * rise).to(dtype))
    q_tile.store((q_tile.load(S).to(gl.float32) * (rise * scale)).to(dtype))
    fence_async_shared()
    x_pairs = warpgroup_mma_wait(0, deps=[x_pairs])
    dr = warpgroup_mma(dv, state, nothing, use_acc=False, is_async=True)
    d_beta = gl.sum(gl.where(i[:, None] == j[None, :], x_pairs, 0.0), 1) / (beta * beta)
    if half == 0:
        gl.store(d_beta_ptr + first.to(gl.int64) * H + head + i * H, d_beta, mask=i < length)
    x_pairs = gl.convert_layout(gl.where(i[:, None] > j[None, :], x_pairs, 0.0).to(dtype), OPERAND)
    edge = gl.exp2(total * (0.5 * LOG2E))[None, :]
    synchronize()

    dr = warpgroup_mma_wait(0, deps=[dr])
    dr = warpgroup_mma(x_pairs, k_tile, dr * edge, is_async=True)
    dq = warpgroup_mma(d_out, state, nothing, use_acc=False, is_async=True)
    dr, dq, x_pairs = warpgroup_mma_wait(0, deps=[dr, dq, x_pairs])
    dq = warpgroup_mma(d_pairs, k_tile, dq * edge, is_async=True)
    # The transposes of D and X: a result must not be transposed.
    d_upper = warpgroup_mma(values_t.permute((1, 0)), d_out.permute((1, 0)), nothing, use_acc=False, is_async=True)
    if D_GATE:
        gate = first_part.load(S).to(gl.float32) * dr
    dr *= rise
    dq, d_upper, d_pairs = warpgroup_mma_wait(0, deps=[dq, d_upper, d_pairs])
    x_upper = warpgroup_mma(values_t.permute((1, 0)), dv.permute((1, 0)), nothing, use_acc=False, is_async=True)
    dk = warpgroup_mma(values_t.permute((1, 0)), d_state, nothing, use_acc=False, is_async=True)
    if D_GATE:
        gate += q_tile.load(S).to(gl.float32) * dq
    store_half(dq_ptr + half * 64, first, head, length, H, 0, dq * (rise * scale), K)
    d_upper = gl.convert_layout(gl.where(i[:, None] <= j[None, :], d_upper, 0.0).to(dtype), OPERAND)
    x_upper, dk, values_t, d_state = warpgroup_mma_wait(0, deps=[x_upper, dk, values_t, d_state])
    x_upper = gl.convert_layout(gl.where(i[:, None] < j[None, :], x_upper, 0.0).to(dtype), OPERAND)
    dk *= edge
    if D_GATE:  # what every token's decay has of the chunk's, in the place of dv
        product = state.slice(0, 64).load(S).to(gl.float32) * d_state.slice(0, 64).load(S).to(gl.float32)
        product += state.slice(64, 64).load(S).to(gl.float32) * d_state.slice(64, 64).load(S).to(gl.float32)
        product = product * (edge * edge) + k_tile.load(S).to(gl.float32) * dk
        synchronize()
        store_parts(product, dv.slice(0, 64, 1), dv.slice(64, 64, 1))
    dk = warpgroup_mma(d_upper, q_tile, dk, is_async=True)
    dk = warpgroup_mma(x_upper, first_part, dk, is_async=True)
    dk, d_upper, x_upper = warpgroup_mma_wait(0, deps=[dk, d_upper, x_upper])
    if D_GATE:
        gate -= k_tile.load(S).to(gl.float32) * dk
        store_parts(gate, d_out.slice(0, 64, 1), d_out.slice(64, 64, 1))
        fence_async_shared()
        synchronize()
        ones = gl.convert_layout(gl.where(i[:, None] <= j[None, :], one, nothing).to(dtype), OPERAND)
        all_ones = gl.convert_layout(one.to(dtype), OPERAND)
        gate = warpgroup_mma(ones, d_out.slice(64, 64, 1), nothing, use_acc=False, is_async=True)
        gate = warpgroup_mma(all_ones, dv.slice(64, 64, 1), gate, is_async=True)
        gate = warpgroup_mma(ones, d_out.slice(0, 64, 1), gate, is_async=True)
        gate = warpgroup_mma(all_ones, dv.slice(0, 64, 1), gate, is_async=True)
    fall = gl.rsqrt(rise)  # of which the square is cheaper than a division
    store_half(dk_ptr + half * 64, first, head, length, H, 0, dk * fall * fall - dr, K)
    if D_GATE:
        gate, ones, all_ones = warpgroup_mma_wait(0, deps=[gate, ones, all_ones])
        dg_ptr += (first.to(gl.int64) * H + head) * K + half * 64
        gl.store(dg_ptr + (i[:, None] * (H * K) + j[None, :]), gate, mask=(i < length)[:, None])


def launch(call, swept, prepared, d_out, entering, d_states, dv, dq, dk, dg, d_beta):
    """As the launch of `kda_gradients.input_gradients`."""
    states, values = entering
    key_size = call.k.shape[2]
    hopper_kda_gradients_kernel[(call.num_tiles * 2,)](
        tokens_descriptor(call.q, 64), tokens_descriptor(call.k, 64), tokens_descriptor(d_out), tokens_descriptor(dv),
        *(scratch_descriptor(x, columns=64) for x in (states, d_states, values)), call.log_decay, swept.total,
        prepared.rows, dq, dk, dg, d_beta, *call.chunks, *call.decay_strides, call.scale, call.heads, key_size,
        call.v.shape[2], dg is not None, num_warps=4,
    )  # fmt: skip
