"""`delta_prepare` for Hopper GPUs, in Gluon: tokens come by TMA, blocks of 16 are inverted a column per thread."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from longspan.kernels.launch import launched
from longspan.kernels.linear.delta_tiles import SMALLEST_BETA
from longspan.kernels.linear.form import CLOSED_FP32
from longspan.kernels.linear.hopper.tiles import clear_rows, store_scratch, synchronize, tokens_descriptor
from longspan.kernels.sparse.hopper.tiles import LOG2E, async_load, make_barriers, product_layout, shared_layout

CLOSED, SMALLEST = gl.constexpr(CLOSED_FP32), gl.constexpr(SMALLEST_BETA)
REGISTERS = 128  # per thread: four programs on a multiprocessor


@gluon.constexpr_function
def repeated_layout():
    """Of [4, 16, 64]: as `product_layout(64)` has the rows of a tile, 16 to a warp."""
    registers = [[0, 0, 1], [0, 8, 0], [0, 0, 8], [0, 0, 16], [0, 0, 32]]
    lanes = [[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[1, 0, 0], [2, 0, 0]], [], [4, 16, 64])


@gluon.jit
def add(x, y):
    return x + y


@gluon.jit
def fill_roots(beta_ptr, beta_stride_t, rows_ptr, vectors, tile, length, SMALLEST: gl.constexpr):
    """Row 0 of `delta_tiles.load_row`. To `vectors`: the root of |beta|, beta over it, 1 over it."""
    token = gl.arange(0, 64, gl.BlockedLayout([2], [32], [4], [0]))
    beta = gl.load(beta_ptr + token * beta_stride_t, mask=token < length, other=0.0).to(gl.float32)
    beta = gl.where(gl.abs(beta) < SMALLEST, SMALLEST, beta)
    root = gl.sqrt(gl.abs(beta))
    vectors.index(0).store(root)
    vectors.index(1).store(beta / root)
    vectors.index(2).store(1 / root)
    gl.store(rows_ptr + gl.to_tensor(tile).to(gl.int64) * (8 * 64) + token * 4, beta)


@gluon.jit
def fill_rows(
    g_ptr, beta_ptr, rows_ptr, vectors, first, head, tile, length, g_stride_t, g_stride_h, beta_stride_t,
    beta_stride_h, GATE: gl.constexpr,
):  # fmt: skip
    """Rows 0, 1, 4 and 5 of `delta_tiles.load_row`, which are all that the Hopper kernels read. To `vectors`: those of
    `fill_roots`, log2 of the decay from the start of the chunk."""
    token = gl.arange(0, 64, gl.BlockedLayout([2], [32], [4], [0]))
    at = rows_ptr + tile.to(gl.int64) * (8 * 64) + token * 4
    beta_ptr += first.to(gl.int64) * beta_stride_t + head * beta_stride_h
    fill_roots(beta_ptr, beta_stride_t, rows_ptr, vectors, tile, length, SMALLEST)
    if GATE:
        g_ptr += first.to(gl.int64) * g_stride_t + head * g_stride_h
        g = gl.load(g_ptr + token * g_stride_t, mask=token < length, other=0.0).to(gl.float32)
        g = gl.where(g < CLOSED, CLOSED, g).to(gl.float64)  # NaN stays
        cumulative = gl.associative_scan(g, 0, add)
        vectors.index(3).store((cumulative * LOG2E).to(gl.float32))
        gl.store(at + 1, gl.exp(cumulative.to(gl.float32)))
        gl.store(at + 4 * 64, gl.exp((gl.sum(g, 0) - cumulative).to(gl.float32)))
        gl.store(at + 4 * 64 + 1, cumulative.to(gl.float32))


@gluon.jit
def invert_blocks(a, i, j):
    """(I + a)^-1 of the 16 x 16 blocks on the diagonal of a [64, 64], strictly lower triangular, by substitution: a
    thread has a column, and all read the numbers of a from shared memory. fp32, zero outside the blocks."""
    columns: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [4, 1], [1, 0])
    REPEATED: gl.constexpr = repeated_layout()
    numbers = gl.allocate_shared_memory(gl.float32, [4, 256], gl.SwizzledSharedLayout(1, 1, 1, [0, 1]))
    solved = gl.allocate_shared_memory(gl.float32, [16, 64], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    inside = i[:, None] // 16 == j[None, :] // 16
    numbers.store(gl.sum(gl.where(inside, a, 0.0).reshape([4, 16, 4, 16]), 2).reshape([4, 256]))
    synchronize()
    column = gl.arange(0, 16, gl.SliceLayout(0, columns))
    rows = ()
    for row in gl.static_range(16):
        x = gl.full([4, 16], 0.0, gl.float32, columns) + gl.where(column == row, 1.0, 0.0)[None, :]
        for earlier in gl.static_range(row):
            x -= numbers.slice(row * 16 + earlier, 1, 1).load(columns) * rows[earlier]
        rows += (x,)
    for level in gl.static_range(4):  # to [4, 16, 2, 2, 2, 2], the highest bit of the row first
        joined = ()
        for row in gl.static_range(8 >> level):
            joined += (gl.join(rows[row], rows[row + (8 >> level)]),)
        rows = joined
    solved.store(rows[0].reshape([64, 16]).permute([1, 0]))
    synchronize()
    x = gl.full([4, 16, 64], 0.0, gl.float32, REPEATED) + solved.load(gl.SliceLayout(0, REPEATED))[None, :, :]
    return gl.where(inside, gl.convert_layout(x.reshape([64, 64]), product_layout(64)), 0.0)


@gluon.jit
def store_inverse(a, vectors, inverse_ptr, tile, i, j, dtype: gl.constexpr):
    """T of a chunk, from D^-1 A D [64, 64] with D the roots of |beta|."""
    S: gl.constexpr = product_layout(64)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, S, 2)
    nothing = gl.full([64, 64], 0.0, gl.float32, S)
    inverse = invert_blocks(a, i, j)
    # Neighbours are merged as in `delta_prepare.invert_unit_lower`, in fp16, which keeps T within bf16's rounding.
    below = gl.allocate_shared_memory(gl.float16, [2, 64, 64], shared_layout(16))
    diagonal = gl.allocate_shared_memory(gl.float16, [2, 64, 64], shared_layout(16))
    differ = i[:, None] ^ j[None, :]
    below.index(0).store(gl.where(differ // 16 == 1, a, 0.0).to(gl.float16))
    below.index(1).store(gl.where(differ // 32 == 1, a, 0.0).to(gl.float16))
    for level in gl.static_range(2):
        rounded = inverse.to(gl.float16)
        diagonal.index(level).store(rounded)
        fence_async_shared()
        synchronize()
        rounded = gl.convert_layout(rounded, OPERAND)
        product = warpgroup_mma(rounded, below.index(level), nothing, use_acc=False)
        product = gl.convert_layout((-product).to(gl.float16), OPERAND)
        inverse = warpgroup_mma(product, diagonal.index(level), inverse)
    inverse *= vectors.index(0).load(gl.SliceLayout(1, S))[:, None]
    inverse *= vectors.index(2).load(gl.SliceLayout(0, S))[None, :]
    store_scratch(inverse_ptr, tile, 0, inverse.to(dtype), 64, 64)


@launched
@gluon.jit(do_not_specialize=["scale"])
def delta_prepare_kernel(
    q_desc, k_desc, g_ptr, beta_ptr, inverse_ptr, scores_ptr, rows_ptr, chunk_first_ptr, chunk_length_ptr,
    g_stride_t, g_stride_h, beta_stride_t, beta_stride_h, scale, H: gl.constexpr, K: gl.constexpr,
    GATE: gl.constexpr,
):  # fmt: skip
    """As kernels.linear.delta_prepare.prepare_kernel. Grid: (chunks * H)."""
    S: gl.constexpr = product_layout(64)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    COLUMN: gl.constexpr = gl.SliceLayout(0, S)
    dtype: gl.constexpr = q_desc.dtype
    tile = gl.program_id(0)
    chunk, head = tile // H, tile % H
    first, length = gl.load(chunk_first_ptr + chunk), gl.load(chunk_length_ptr + chunk)
    ready = make_barriers(1, 1)
    q_tile = gl.allocate_shared_memory(dtype, [64, K], shared_layout(16))
    k_tile = gl.allocate_shared_memory(dtype, [64, K], shared_layout(16))
    vectors = gl.allocate_shared_memory(gl.float32, [4, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    fence_async_shared()
    mbarrier.expect(ready.index(0), 2 * K * 64 * 2)
    synchronize()
    async_load(k_desc, [first, head * K], ready.index(0), k_tile)
    async_load(q_desc, [first, head * K], ready.index(0), q_tile)
    fill_rows(
        g_ptr, beta_ptr, rows_ptr, vectors, first, head, tile, length, g_stride_t, g_stride_h, beta_stride_t,
        beta_stride_h, GATE,
    )  # fmt: skip
    synchronize()
    i, j = gl.arange(0, 64, ROW), gl.arange(0, 64, COLUMN)
    nothing = gl.full([64, 64], 0.0, gl.float32, S)
    mbarrier.wait(ready.index(0), 0)
    if length < 64:
        clear_rows(q_tile, length, K)
        clear_rows(k_tile, length, K)
        fence_async_shared()
    synchronize()
    scores = warpgroup_mma(q_tile, k_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
    a = warpgroup_mma(k_tile, k_tile.permute((1, 0)), nothing, use_acc=False, is_async=True)
    if GATE:
        between = vectors.index(3).load(ROW)[:, None] - vectors.index(3).load(COLUMN)[None, :]
        decay = gl.exp2(gl.where(i[:, None] >= j[None, :], between, float("-inf")))
    else:
        decay = gl.where(i[:, None] >= j[None, :], gl.full([64, 64], 1.0, gl.float32, S), 0.0)
    scores = warpgroup_mma_wait(1, deps=[scores])
    store_scratch(scores_ptr, tile, 0, (scores * decay * scale).to(dtype), 64, 64)
    a, q_tile, k_tile = warpgroup_mma_wait(0, deps=[a, q_tile, k_tile])
    # With D the roots of |beta|, D^-1 A D, whose rows and columns of small beta keep their digits in fp16.
    a *= vectors.index(1).load(ROW)[:, None] * vectors.index(0).load(COLUMN)[None, :]
    a = gl.where(i[:, None] > j[None, :], a * decay, 0.0)
    store_inverse(a, vectors, inverse_ptr, tile, i, j, dtype)


def launch(call, prepared):
    q, k, g, beta = call.q, call.k, call.log_decay, call.beta
    delta_prepare_kernel[(call.num_tiles,)](
        tokens_descriptor(q), tokens_descriptor(k), g, beta, *prepared, *call.chunks, *call.decay_strides,
        *beta.stride(), call.scale, call.heads, k.shape[2], g is not None, num_warps=4, maxnreg=REGISTERS,
    )  # fmt: skip
