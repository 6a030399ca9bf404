"""What the Hopper kernels share: layouts, the pipeline that feeds warpgroups, rows of tiles in registers."""

from functools import cache

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from longspan.kernels.launch import describe_again

LOG2E = gl.constexpr(1.4426950408889634)
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name until Triton 3.6
synchronize = getattr(gl, "thread_barrier", None) or gl.barrier  # its name until Triton 3.6


def descriptor(x, shape, strides, block, swizzle=128):
    """Of the numbers of x as an array of this shape and these strides, of which blocks are fetched by TMA."""
    fields = _alike(x.dtype, len(shape), *block, swizzle) | {"shape": shape, "strides": strides}
    return describe_again(TensorDescriptor, fields, x)


@cache  # Triton checks each anew, which takes longer than a launch: one of a kind is checked
def _alike(dtype, rank, *block_and_swizzle):
    *block, swizzle = block_and_swizzle
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=8 * dtype.itemsize, rank=rank)
    example = torch.empty(128, dtype=dtype, device="meta")
    return dict(vars(TensorDescriptor(example, [1] * rank, [16] * (rank - 1) + [1], block, layout)))


@gluon.constexpr_function
def row_layout(D, WARPS=4):
    """Of [rows, D] tiles as they come from memory: 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])


@gluon.constexpr_function
def product_layout(N, WARPS=4):
    """Of [rows, N] results, 16 rows a warp: 64 of one warpgroup."""
    return gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, N, 16])


@gluon.constexpr_function
def shared_layout(bits):
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=bits, rank=2)


def matrix_of(x, rows):
    """x [T, H, D] as a matrix of heads beside one another, fetched so many rows of one head at a time."""
    (tokens, heads, head_dim), (stride, beside, _) = x.shape, x.stride()
    if beside != head_dim or stride * x.element_size() % 16 or x.data_ptr() % 16:
        x, stride = x.contiguous(), heads * head_dim
    return descriptor(x, [tokens, heads * head_dim], [stride, 1], [rows, head_dim])


@gluon.jit
def scaled_map(x, MAP: gl.constexpr):
    """As kernels.block_states.tiles.scaled_map."""
    if MAP == "softmax":
        x = gl.exp2(gl.fma(x, gl.full_like(x, LOG2E), gl.zeros_like(x) - (gl.max(x, 1) * LOG2E)[:, None]))
    if MAP == "elu1":
        x = gl.where(x < 0, gl.exp2(gl.minimum(x, gl.zeros_like(x)) * LOG2E), x + 1)
    return x


@gluon.jit
def make_barriers(STAGES: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(barriers.index(stage), count=ARRIVALS)
    return barriers


@gluon.jit
def tile_of(tile, lists, HEADS: gl.constexpr, KEY_HEADS: gl.constexpr, LISTS: gl.constexpr, PACK: gl.constexpr):
    """(block, head, key head, beginning of its list's column numbers; begin and stop of its entries; first row, rows
    and position of the queries) of a tile, see kernels.sparse.tiles.program_of."""
    row_ptr, q_start, q_length, q_position, M, capacity, tiles = lists
    tile = gl.to_tensor(tile)
    block, head = tile % M, tile // M * PACK
    listed = (head * LISTS // HEADS).to(gl.int64)
    ends = row_ptr + listed * (M + 1) + block
    first, count = gl.load(q_start + block).to(gl.int64), gl.load(q_length + block)
    return (
        block, head, head // (HEADS // KEY_HEADS), listed * capacity, gl.load(ends), gl.load(ends + 1), first, count,
        gl.load(q_position + block),
    )  # fmt: skip


@gluon.jit
def load_rows(
    ptr, first, count, part, stride_t, stride_h, PACK: gl.constexpr, D: gl.constexpr, layout: gl.constexpr,
    ROWS: gl.constexpr = 64,
):  # fmt: skip
    """ROWS rows from row 64 * part of a tile [tokens x PACK heads, D] on, zero from token `count` on."""
    index = part * 64 + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    token, column = index // PACK, gl.arange(0, D, gl.SliceLayout(0, layout))
    at = (token * stride_t + index % PACK * stride_h)[:, None] + column[None, :]
    return gl.load(ptr + first * stride_t + at, mask=(token < count)[:, None], other=0.0)


@gluon.jit
def store_rows(
    ptr, first, count, part, HEADS: gl.constexpr, PACK: gl.constexpr, D: gl.constexpr, x, WARPS: gl.constexpr = 4
):
    """Writes x to the rows that load_rows reads, of [T, HEADS, D]."""
    layout: gl.constexpr = row_layout(D, WARPS)
    x = gl.convert_layout(x.to(ptr.dtype.element_ty), layout)
    index = part * 64 + gl.arange(0, 16 * WARPS, gl.SliceLayout(1, layout))
    token, column = index // PACK, gl.arange(0, D, gl.SliceLayout(0, layout))
    at = ((token * HEADS + index % PACK) * D)[:, None] + column[None, :]
    gl.store(ptr + first * HEADS * D + at, x, mask=(token < count)[:, None])


@gluon.jit
def turns_of(begin, stop, KEYS: gl.constexpr, TILE: gl.constexpr):
    """Tiles of TILE keys that entries begin:stop of a list take: some blocks each, or a part of one."""
    if TILE < KEYS:
        return (stop - begin) * (KEYS // TILE)
    else:
        return gl.cdiv(stop - begin, TILE // KEYS)


@gluon.jit
def place_of(turn, begin, index, KEYS: gl.constexpr, TILE: gl.constexpr):
    """(entry, row in its block) of key `index` of a tile."""
    if TILE < KEYS:
        return begin + turn // (KEYS // TILE), turn % (KEYS // TILE) * TILE + index
    else:
        return begin + turn * (TILE // KEYS) + index // KEYS, index % KEYS


@gluon.jit
def make_later(READERS: gl.constexpr):
    """Where take_tile tells so many warpgroups of the next tile."""
    numbers: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return gl.allocate_shared_memory(gl.int32, [2, 1], numbers), make_barriers(2, 1), make_barriers(2, READERS)


@gluon.jit
def take_tile(number, later, taken, SEVERAL: gl.constexpr):
    """The feeding warp's: the tile that the program takes after its number-th one, which it tells the others. The first
    has the program's number, the others, if it takes SEVERAL, are those that no program has taken yet (`taken` counts
    them): lists differ in length."""
    tiles, told, heard = later
    place, tile = number % 2, gl.num_programs(0)
    if SEVERAL:
        tile += gl.atomic_add(taken, 1)
    mbarrier.wait(heard.index(place), (number // 2) & 1 ^ 1)
    tiles.index(place).store(gl.full([1], tile, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    synchronize()
    mbarrier.arrive(told.index(place))
    return tile


@gluon.jit
def next_tile(number, later):
    """The same tile, as it is told."""
    tiles, told, heard = later
    place = number % 2
    mbarrier.wait(told.index(place), (number // 2) & 1)
    tile = gl.max(tiles.index(place).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    synchronize()
    mbarrier.arrive(heard.index(place))
    return tile


@gluon.jit
def send_keys(
    feed, HEADS: gl.constexpr, KEY_HEADS: gl.constexpr, LISTS: gl.constexpr, PACK: gl.constexpr, KEYS: gl.constexpr,
    TILE: gl.constexpr, STAGES: gl.constexpr, SEVERAL: gl.constexpr,
):  # fmt: skip
    """Feeds what walks the lists of tile after tile of queries, with tiles of some key blocks or of a part of one."""
    k_desc, v_desc, k_tiles, v_tiles, k_ready, v_ready, k_free, v_free, row_idx, k_start, lists, later, taken = feed
    D: gl.constexpr = k_tiles.shape[2]
    number, count, tile = 0, 0, gl.program_id(0)
    while tile < lists[6]:
        following = take_tile(count, later, taken, SEVERAL)
        count += 1
        _, _, key_head, at, begin, stop, _, _, _ = tile_of(tile, lists, HEADS, KEY_HEADS, LISTS, PACK)
        for turn in range(0, turns_of(begin, stop, KEYS, TILE)):
            stage, phase = number % STAGES, (number // STAGES) & 1
            rows = rows_of(turn, begin, stop, row_idx + at, k_start, KEYS, TILE)
            mbarrier.wait(k_free.index(stage), phase ^ 1)
            mbarrier.expect(k_ready.index(stage), TILE * D * 2)
            send_tile(k_desc, k_tiles.index(stage), k_ready.index(stage), rows, key_head * D, KEYS, TILE)
            mbarrier.wait(v_free.index(stage), phase ^ 1)
            mbarrier.expect(v_ready.index(stage), TILE * D * 2)
            send_tile(v_desc, v_tiles.index(stage), v_ready.index(stage), rows, key_head * D, KEYS, TILE)
            number += 1
        tile = following


@gluon.jit
def feed_of(
    k_desc, v_desc, k_tiles, v_tiles, k_ready, v_ready, row_idx, k_start, lists, HEADS: gl.constexpr,
    KEY_HEADS: gl.constexpr, LISTS: gl.constexpr, PACK: gl.constexpr,
):  # fmt: skip
    """What a program that feeds itself, for one tile, does that with."""
    _, _, key_head, at, begin, stop, _, _, _ = tile_of(gl.program_id(0), lists, HEADS, KEY_HEADS, LISTS, PACK)
    return (
        k_desc, v_desc, k_tiles, v_tiles, k_ready, v_ready, row_idx + at, begin, stop, k_start,
        key_head * k_tiles.shape[2],
    )  # fmt: skip


@gluon.jit
def rows_of(turn, begin, stop, row_idx, k_start, KEYS: gl.constexpr, TILE: gl.constexpr):
    """First rows of the blocks in a tile of a list, or of the part of one; the list's last stands for any after it."""
    ROWS: gl.constexpr = KEYS if KEYS < TILE else TILE
    columns, rows = (), ()
    for part in gl.static_range(TILE // ROWS):
        entry, _ = place_of(turn, begin, part * ROWS, KEYS, TILE)
        columns += (gl.load(row_idx + gl.minimum(entry, stop - 1)),)
    for part in gl.static_range(TILE // ROWS):
        _, row = place_of(turn, begin, part * ROWS, KEYS, TILE)
        rows += (gl.load(k_start + columns[part]) + row,)
    return rows


@gluon.jit
def send_tile(desc, tile, ready, rows, at, KEYS: gl.constexpr, TILE: gl.constexpr):
    """Starts the transfer of a tile with these `rows_of`, which is expected already."""
    ROWS: gl.constexpr = KEYS if KEYS < TILE else TILE
    for part in gl.static_range(TILE // ROWS):
        async_load(desc, [rows[part], at], ready, tile.slice(part * ROWS, ROWS))


@gluon.jit
def expect_tiles(feed, turn, KEYS: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr):
    """For programs that feed themselves: keys and values of a turn, if there is such, are to come. All threads must
    meet before they are sent: what was there before is free then, and no barrier is complete until all has come."""
    k_desc, v_desc, k_tiles, v_tiles, k_ready, v_ready, row_idx, begin, stop, k_start, at = feed
    there = turn < turns_of(begin, stop, KEYS, TILE)
    mbarrier.expect(k_ready.index(turn % STAGES), TILE * k_tiles.shape[2] * 2, pred=there)
    mbarrier.expect(v_ready.index(turn % STAGES), TILE * k_tiles.shape[2] * 2, pred=there)


@gluon.jit
def send_tiles(feed, turn, KEYS: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr):
    """Sends them."""
    k_desc, v_desc, k_tiles, v_tiles, k_ready, v_ready, row_idx, begin, stop, k_start, at = feed
    if turn < turns_of(begin, stop, KEYS, TILE):
        stage = turn % STAGES
        rows = rows_of(turn, begin, stop, row_idx, k_start, KEYS, TILE)
        send_tile(k_desc, k_tiles.index(stage), k_ready.index(stage), rows, at, KEYS, TILE)
        send_tile(v_desc, v_tiles.index(stage), v_ready.index(stage), rows, at, KEYS, TILE)


@gluon.jit
def start_feeding(feed, KEYS: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr):
    """The first STAGES turns of a program that feeds itself."""
    fence_async_shared()
    for turn in gl.static_range(STAGES):
        expect_tiles(feed, turn, KEYS, TILE, STAGES)
    synchronize()
    for turn in gl.static_range(STAGES):
        send_tiles(feed, turn, KEYS, TILE, STAGES)


@gluon.jit
def feed_on(feed, turn, KEYS: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr):
    """Sends what comes in the place of a turn that this thread has done with."""
    expect_tiles(feed, turn + STAGES, KEYS, TILE, STAGES)
    synchronize()
    send_tiles(feed, turn + STAGES, KEYS, TILE, STAGES)


@gluon.jit
def facts_of(
    turn, keys, earliest, KEYS: gl.constexpr, TILE: gl.constexpr, CAUSAL: gl.constexpr, WEIGHTED: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """(whether not all queries of a tile, the first at position `earliest`, see all of its keys; the weight of its one
    block in base 2, or with several blocks those of its keys)."""
    row_idx, begin, stop, k_length, k_position, k_step, weight_ptr = keys
    ROWS: gl.constexpr = KEYS if KEYS < TILE else TILE
    masked, weight = False, 0.0
    if WEIGHTED and ROWS < TILE:
        weight = gl.full([TILE], 0.0, gl.float32, gl.SliceLayout(0, layout))
    for part in gl.static_range(TILE // ROWS):
        entry, row = place_of(turn, begin, part * ROWS + ROWS - 1, KEYS, TILE)
        column = gl.load(row_idx + gl.minimum(entry, stop - 1))
        masked = masked | (row >= gl.load(k_length + column)) | (entry >= stop)
        if CAUSAL:
            masked = masked | (gl.load(k_position + column) + row * gl.load(k_step + column) > earliest)
        if WEIGHTED:
            of_part = gl.load(weight_ptr + column).to(gl.float32) * LOG2E
            if ROWS < TILE:
                index = gl.arange(0, TILE, gl.SliceLayout(0, layout))
                weight = gl.where(index // ROWS == part, of_part, weight)
            else:
                weight = of_part
    return masked, weight


@gluon.jit
def only_seen(
    x, otherwise: gl.constexpr, turn, keys, position, KEYS: gl.constexpr, TILE: gl.constexpr, CAUSAL: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """x [queries, keys of a tile] where a query sees the key, else `otherwise`; position: of the queries."""
    row_idx, begin, stop, k_length, k_position, k_step, _ = keys
    index = gl.arange(0, TILE, gl.SliceLayout(0, layout))
    entry, row = place_of(turn, begin, index, KEYS, TILE)
    column = gl.load(row_idx + gl.minimum(entry, stop - 1))
    seen = ((entry < stop) & (row < gl.load(k_length + column)))[None, :]
    if CAUSAL:
        key_position = gl.load(k_position + column) + row * gl.load(k_step + column)
        seen = seen & (key_position[None, :] <= position[:, None])
    return gl.where(seen, x, otherwise)
