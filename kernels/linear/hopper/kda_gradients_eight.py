"""`kda_gradients` for Hopper GPUs, in Gluon: half the channels of a chunk per program, which fetches all it needs at
once by TMA, for two warpgroups. Only where all channels are mild (`channel_decay`); sums along tokens are products with
ones."""

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
    synchronize,
    tokens_descriptor,
)
from longspan.kernels.sparse.hopper.tiles import LOG2E, async_load, make_barriers, shared_layout

REGISTERS = 128  # per thread: two programs on a multiprocessor


@gluon.constexpr_function
def two_halves():
    """Of [64, 64] results: 32 columns to each of two warpgroups."""
    return gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16])


@gluon.constexpr_function
def stored_halves():
    """As `tiles.stored_layout`, from `two_halves`."""
    registers, lanes = [[0, 1], [0, 2], [0, 4], [8, 0]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0], [0, 32]], [], [64, 64])


@gluon.jit
def store_halves(ptr, length, x, STRIDE: gl.constexpr):
    """x [64, 64] to the first `length` rows at ptr."""
    layout: gl.constexpr = stored_halves()
    row, column = gl.arange(0, 64, gl.SliceLayout(1, layout)), gl.arange(0, 64, gl.SliceLayout(0, layout))
    x = gl.convert_layout(x.to(ptr.dtype.element_ty), layout)
    gl.store(ptr + (row[:, None] * STRIDE + column[None, :]), x, mask=(row < length)[:, None])


@gluon.jit
def is_mild(total_ptr, tile, K: gl.constexpr):
    """As `channel_decay.is_mild`, of all channels of a chunk."""
    key = gl.arange(0, K, gl.BlockedLayout([K // 32], [32], [8], [0]))
    return gl.min(gl.load(total_ptr + gl.to_tensor(tile).to(gl.int64) * K + key), 0) >= -MILD


@gluon.jit
def store_parts(x, high, low):
    """x as a sum of two 16-bit numbers."""
    large = x.to(high.dtype)
    high.store(large)
    low.store((x - large.to(gl.float32)).to(high.dtype))


@launched
@gluon.jit(do_not_specialize=["scale"])
def eight_kda_gradients_kernel(
    q_desc, k_desc, d_out_desc, dv_desc, states_desc, d_states_desc, values_desc, g_ptr, total_ptr, rows_ptr,
    dq_ptr, dk_ptr, dg_ptr, d_beta_ptr, chunk_first_ptr, chunk_length_ptr, g_stride_t: gl.constexpr,
    g_stride_h, scale, H: gl.constexpr, K: gl.constexpr, V: gl.constexpr, D_GATE: gl.constexpr,
):  # fmt: skip
    """As kernels.linear.kda_gradients.kda_gradients_kernel, for K = V = 128. Grid: (chunks * H * 2)."""
    S: gl.constexpr = two_halves()
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, S, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    COLUMN: gl.constexpr = gl.SliceLayout(0, S)
    LOADED: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [8, 1], [1, 0])
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
        clear_rows(d_out, length, V, 8)
        clear_rows(dv, length, V, 8)
        mbarrier.wait(ready.index(1), 0)
        clear_rows(q_tile, length, 64, 8)
        clear_rows(k_tile, length, 64, 8)
        fence_async_shared()
    synchronize()

    nothing = gl.full([64, 64], 0.0, gl.float32, S)
    a_row, a_column = gl.arange(0, 64, gl.SliceLayout(1, OPERAND)), gl.arange(0, 64, gl.SliceLayout(0, OPERAND))
    zeros = gl.full([64, 64], 0.0, gl.float32, OPERAND)
    # True, but no constant: constant parts of an operand are set only after its product, by ptxas 12.9.
    always = a_row[:, None] + a_column[None, :] > -length
    ones = gl.where((a_row[:, None] >= a_column[None, :]) & always, 1.0, zeros).to(dtype)
    rise = warpgroup_mma(ones, first_part, nothing, use_acc=False, is_async=True)
    rise = warpgroup_mma(ones, second_part, rise, is_async=True)
    mbarrier.wait(ready.index(1), 0)
    rise, ones = warpgroup_mma_wait(0, deps=[rise, ones])
    # D and X below the diagonal, their transposes above: a result must not be transposed.
    d_lower = warpgroup_mma(d_out, values_t, nothing, use_acc=False, is_async=True)
    rise -= (total * (0.5 * LOG2E))[None, :]
    synchronize()  # all have read first_part and second_part
    k = k_tile.load(S).to(gl.float32)
    k_tile.store((k * gl.exp2(-rise)).to(dtype))
    rise = gl.exp2(rise)
    first_part.store((-k * rise).to(dtype))
    q_tile.store((q_tile.load(S).to(gl.float32) * (rise * scale)).to(dtype))
    d_lower = warpgroup_mma_wait(0, deps=[d_lower])
    x_lower = warpgroup_mma(dv, values_t, nothing, use_acc=False, is_async=True)
    d_upper = warpgroup_mma(values_t.permute((1, 0)), d_out.permute((1, 0)), nothing, use_acc=False, is_async=True)
    second_part.store(gl.where(i[:, None] >= j[None, :], d_lower, 0.0).to(dtype))
    x_lower, d_upper = warpgroup_mma_wait(0, deps=[x_lower, d_upper])
    d_beta_at = d_beta_ptr + first.to(gl.int64) * H + head + (i * H)[:, None] + (j * 0)[None, :]
    d_beta = x_lower * (1 / (beta * beta))[:, None]
    gl.store(d_beta_at, d_beta, mask=(i[:, None] == j[None, :]) & ((i < length) & (half == 0))[:, None])
    x_upper = warpgroup_mma(values_t.permute((1, 0)), dv.permute((1, 0)), nothing, use_acc=False, is_async=True)
    dr = warpgroup_mma(dv, state, nothing, use_acc=False, is_async=True)
    x_lower = gl.where(i[:, None] > j[None, :], x_lower, 0.0).to(dtype)
    d_upper = gl.where(i[:, None] <= j[None, :], d_upper, 0.0).to(dtype)
    x_upper, dr = warpgroup_mma_wait(0, deps=[x_upper, dr])
    dq = warpgroup_mma(d_out, state, nothing, use_acc=False, is_async=True)
    x_upper = gl.where(i[:, None] < j[None, :], x_upper, 0.0).to(dtype)
    synchronize()  # now there is place in dv
    dv.slice(0, 64, 1).store(x_lower)
    dv.slice(64, 64, 1).store(x_upper)
    dq = warpgroup_mma_wait(0, deps=[dq])
    synchronize()  # and in dO
    d_out.slice(0, 64, 1).store(d_upper)
    fence_async_shared()
    edge = gl.exp2(total * (0.5 * LOG2E))[None, :]
    synchronize()

    dr = warpgroup_mma(dv.slice(0, 64, 1), k_tile, dr * edge, is_async=True)
    dq = warpgroup_mma(second_part, k_tile, dq * edge, is_async=True)
    dk = warpgroup_mma(values_t.permute((1, 0)), d_state, nothing, use_acc=False, is_async=True)
    dr, dq, dk = warpgroup_mma_wait(0, deps=[dr, dq, dk])
    dk *= edge
    if D_GATE:  # what every token's decay has of the chunk's, in place of V'
        product = state.slice(0, 64).load(S).to(gl.float32) * d_state.slice(0, 64).load(S).to(gl.float32)
        product += state.slice(64, 64).load(S).to(gl.float32) * d_state.slice(64, 64).load(S).to(gl.float32)
        product = product * (edge * edge) + k_tile.load(S).to(gl.float32) * dk
        synchronize()
        store_parts(product, values_t.slice(0, 64), values_t.slice(64, 64))
    dk = warpgroup_mma(d_out.slice(0, 64, 1), q_tile, dk, is_async=True)
    dk = warpgroup_mma(dv.slice(64, 64, 1), first_part, dk, is_async=True)
    if D_GATE:
        gate = first_part.load(S).to(gl.float32) * dr + q_tile.load(S).to(gl.float32) * dq
    start = (first.to(gl.int64) * H + head) * K + half * 64
    store_halves(dq_ptr + start, length, dq * (rise * scale), H * K)
    dr *= rise
    dk = warpgroup_mma_wait(0, deps=[dk])
    if D_GATE:
        gate -= k_tile.load(S).to(gl.float32) * dk
        synchronize()
        store_parts(gate, first_part, second_part)
        fence_async_shared()
        synchronize()
        ones = gl.where((a_row[:, None] <= a_column[None, :]) & always, 1.0, zeros).to(dtype)
        all_ones = gl.where(always, 1.0, zeros).to(dtype)
        gate = warpgroup_mma(ones, second_part, nothing, use_acc=False, is_async=True)
        gate = warpgroup_mma(all_ones, values_t.slice(64, 64), gate, is_async=True)
        gate = warpgroup_mma(ones, first_part, gate, is_async=True)
        gate = warpgroup_mma(all_ones, values_t.slice(0, 64), gate, is_async=True)
    fall = gl.rsqrt(rise)  # of which the square is cheaper than a division
    store_halves(dk_ptr + start, length, dk * fall * fall - dr, H * K)
    if D_GATE:
        gate, ones, all_ones = warpgroup_mma_wait(0, deps=[gate, ones, all_ones])
        gl.store(dg_ptr + start + (i[:, None] * (H * K) + j[None, :]), gate, mask=(i < length)[:, None])


def launch(call, swept, prepared, d_out, entering, d_states, dv, dq, dk, dg, d_beta):
    """As the launch of `kda_gradients.input_gradients`."""
    states, values = entering
    key_size = call.k.shape[2]
    eight_kda_gradients_kernel[(call.num_tiles * 2,)](
        tokens_descriptor(call.q, 64), tokens_descriptor(call.k, 64), tokens_descriptor(d_out), tokens_descriptor(dv),
        *(scratch_descriptor(x, columns=64) for x in (states, d_states, values)), call.log_decay, swept.total,
        prepared.rows, dq, dk, dg, d_beta, *call.chunks, *call.decay_strides, call.scale, call.heads, key_size,
        call.v.shape[2], dg is not None, num_warps=8, maxnreg=REGISTERS,
    )  # fmt: skip
