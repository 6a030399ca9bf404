"""What the Hopper kernels share: short chunks, descriptors, storing results; of the delta rule, decays of a chunk."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from longspan.kernels.linear.delta_tiles import CHUNK, LEFT_OUT, SEARCHED
from longspan.kernels.sparse.hopper.tiles import LOG2E, descriptor, row_layout, synchronize

# Rows 0, 1, 4 and, in base 2, 5 of `delta_tiles.load_row`.
BETA, FROM_START, TO_END, G = (gl.constexpr(n) for n in range(4))
VECTORS = gl.constexpr(4)


@gluon.constexpr_function
def stored_layout(D):
    """Of [64, D] results to be stored: 64 bytes of a row in four threads, by exchanges inside such fours."""
    registers, column = [[0, 1], [0, 2], [0, 4], [8, 0]], 32
    while column < D:
        registers.append([0, column])
        column *= 2
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, D])


@gluon.jit
def clear_rows(tile, length, D: gl.constexpr, WARPS: gl.constexpr = 4):
    """Zeros from row `length` on of a tile [64, D], where TMA has brought tokens of the next span."""
    layout: gl.constexpr = row_layout(D, WARPS)
    row = gl.arange(0, 16, gl.SliceLayout(1, layout))
    for part in gl.static_range(4):
        rows = tile.slice(part * 16, 16)
        x = rows.load(layout)
        rows.store(gl.where((row + part * 16 < length)[:, None], x, gl.zeros_like(x)))


@gluon.jit
def fetch_vectors(rows_ptr, tile, vectors, stage, GATE: gl.constexpr):
    """The rows of a chunk's decays, by one warp."""
    token = gl.arange(0, 64, gl.BlockedLayout([2], [32], [1], [0]))
    at = rows_ptr + gl.to_tensor(tile).to(gl.int64) * (8 * 64) + token * 4
    vectors.index(stage * VECTORS + BETA).store(gl.load(at))
    if GATE:
        vectors.index(stage * VECTORS + FROM_START).store(gl.load(at + 1))
        vectors.index(stage * VECTORS + TO_END).store(gl.load(at + 4 * 64))
        vectors.index(stage * VECTORS + G).store(gl.load(at + 4 * 64 + 1) * LOG2E)
    synchronize()


@gluon.jit
def fetch_channel_decays(total_ptr, tile, totals, stage, K: gl.constexpr):
    """exp(G_C) of every key channel, by one warp; `fetch_vectors` is to follow."""
    key = gl.arange(0, K, gl.BlockedLayout([K // 32], [32], [1], [0]))
    total = gl.load(total_ptr + gl.to_tensor(tile).to(gl.int64) * K + key)
    totals.index(stage).store(gl.exp2(total * LOG2E))


@gluon.jit
def decay_between(vectors, stage, layout: gl.constexpr, GATE: gl.constexpr):
    """exp(-|G_r - G_c|): Lambda where its row is the later token, transposed where its column is."""
    if GATE:
        row = vectors.index(stage * VECTORS + G).load(gl.SliceLayout(1, layout))
        column = vectors.index(stage * VECTORS + G).load(gl.SliceLayout(0, layout))
        return gl.exp2(-gl.abs(row[:, None] - column[None, :]))
    else:
        return gl.full([64, 64], 1.0, gl.float32, layout)


@gluon.jit
def store_tokens(ptr, first, head, length, H, x, D: gl.constexpr):
    """x [64, D] to the tokens from `first` on of [T, H, D]."""
    layout: gl.constexpr = stored_layout(D)
    x = gl.convert_layout(x.to(ptr.dtype.element_ty), layout)
    token, column = gl.arange(0, 64, gl.SliceLayout(1, layout)), gl.arange(0, D, gl.SliceLayout(0, layout))
    ptr += (first.to(gl.int64) * H + head) * D
    gl.store(ptr + (token[:, None] * (H * D) + column[None, :]), x, mask=(token < length)[:, None])


@gluon.jit
def count_remembered(rows_ptr, tile, step, chunks):
    """As `delta_tiles.count_remembered`."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    i, j = gl.arange(0, SEARCHED, gl.SliceLayout(1, layout)), gl.arange(0, SEARCHED, gl.SliceLayout(0, layout))
    remembered, log_decay, going = 0, 0.0, True
    for block in range(0, gl.cdiv(chunks, SEARCHED)):
        left = chunks - block * SEARCHED
        at = rows_ptr + (gl.to_tensor(tile).to(gl.int64) + (block * SEARCHED + j) * step) * (8 * 64) + (8 * 64 - 3)
        log = gl.load(at, mask=j < left, other=0.0)
        through = log_decay + gl.sum(gl.where(j[None, :] <= i[:, None], log[None, :], 0.0), 1)
        ends = gl.min(gl.where((i < left) & (through < LEFT_OUT), i, SEARCHED), 0)
        passed = gl.minimum(left, SEARCHED)
        remembered += gl.where(going, gl.minimum(ends, passed), 0)
        going = going & (ends == SEARCHED)
        log_decay += gl.sum(log, 0)
    return remembered


@gluon.jit
def store_scratch(ptr, at, COLUMN: gl.constexpr, x, V: gl.constexpr, WIDTH: gl.constexpr):
    """x [64, WIDTH] to the rows from COLUMN on of the tile at [V, WIDTH]."""
    layout: gl.constexpr = stored_layout(WIDTH)
    row, column = gl.arange(0, 64, gl.SliceLayout(1, layout)), gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    ptr += (gl.to_tensor(at).to(gl.int64) * V + COLUMN) * WIDTH
    gl.store(ptr + (row[:, None] * WIDTH + column[None, :]), gl.convert_layout(x, layout))


@gluon.jit
def store_columns(ptr, first, left, head, COLUMN: gl.constexpr, staged, H, V: gl.constexpr, WIDTH: gl.constexpr = 64):
    """The tile [64, WIDTH] in shared memory to columns of the tokens from `first` on of [T, H, V]."""
    layout: gl.constexpr = row_layout(WIDTH)
    token, column = gl.arange(0, 64, gl.SliceLayout(1, layout)), gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    ptr += (first.to(gl.int64) * H + head) * V + COLUMN
    at = ptr + (token[:, None] * (H * V) + column[None, :])
    gl.store(at, staged.load(layout).to(ptr.dtype.element_ty), mask=(token < left)[:, None])


@gluon.jit
def store_half(ptr, first, head, left, H, COLUMN: gl.constexpr, x, V: gl.constexpr):
    """x [64, 64] to 64 columns of the tokens from `first` on of [T, H, V]."""
    layout: gl.constexpr = stored_layout(64)
    x = gl.convert_layout(x.to(ptr.dtype.element_ty), layout)
    token, column = gl.arange(0, 64, gl.SliceLayout(1, layout)), gl.arange(0, 64, gl.SliceLayout(0, layout))
    ptr += (first.to(gl.int64) * H + head) * V + COLUMN
    gl.store(ptr + (token[:, None] * (H * V) + column[None, :]), x, mask=(token < left)[:, None])


def tokens_descriptor(x, columns=None):
    """Of x [T, H, D]: a chunk's tokens of one head, or so many columns of it."""
    if x.stride(1) != x.shape[2] or x.stride(0) * x.element_size() % 16 or x.data_ptr() % 16:
        x = x.contiguous()
    return _descriptor(x.flatten(1), CHUNK, columns or x.shape[2])


def scratch_descriptor(x, rows=None, columns=None):
    """Of x [chunks, H, rows, columns]: one tile, or so many rows and columns of it."""
    return _descriptor(x.view(-1, x.shape[3]), rows or x.shape[2], columns or x.shape[3])


def _descriptor(x, rows, columns):
    return descriptor(x, list(x.shape), [x.stride(0), 1], [rows, columns])
