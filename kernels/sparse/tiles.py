"""What the kernels share: the rows of a tile of queries or keys, and the scores between them."""

from longspan.kernels.compiler import tl, triton

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def program_of(M, HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, LISTS: tl.constexpr, PACK: tl.constexpr):
    """What a program that walks the list of a query block works on: (block, first of PACK heads, key head, list). One
    key head and list after the other, whose keys the cache then holds."""
    PACKS: tl.constexpr = HEADS // (LISTS if LISTS > KEY_HEADS else KEY_HEADS) // PACK  # of a key head and list
    number = tl.program_id(0) // PACKS
    block, head = number % M, (number // M * PACKS + tl.program_id(0) % PACKS) * PACK
    return block, head, head // (HEADS // KEY_HEADS), (head * LISTS // HEADS).to(tl.int64)


@triton.jit
def listed_keys(
    q, position, scale, entry, stop, keys, tables, rule,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, GATHER: tl.constexpr, CAUSAL: tl.constexpr,
    WEIGHTED: tl.constexpr, RULE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of the key blocks of GATHER successive entries of a list: keys, values, [queries, keys] scores in base 2, weights
    added, and which of them are seen. rule: what load_rule gives of the queries, rule_keys, guard."""
    k_ptr, k_stride_t, v_ptr, v_stride_t = keys
    list_ptr, start_ptr, length_ptr, position_ptr, step_ptr, weight_ptr = tables
    low, high, rule_keys, guard = rule
    first, row, key_position, weight, there = key_rows(
        list_ptr, entry, stop, start_ptr, length_ptr, position_ptr, step_ptr, weight_ptr, KEYS, GATHER, CAUSAL,
        WEIGHTED, RULE,
    )  # fmt: skip
    k = load_tile(k_ptr + first * k_stride_t, row, k_stride_t, 0, there, D, BLOCK_D)
    v = load_tile(v_ptr + first * v_stride_t, row, v_stride_t, 0, there, D, BLOCK_D)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
    seen = there[None, :]
    if WEIGHTED:
        scores += weight if GATHER == 1 else weight[None, :]
    if CAUSAL:
        seen = seen & (key_position[None, :] <= position[:, None])
    seen = rule_of_list(
        seen, low, high, list_ptr, entry, stop, position_ptr, key_position, there, rule_keys, guard, KEYS, GATHER, RULE
    )  # fmt: skip
    return k, v, scores, seen


@triton.jit
def query_rows(block, part, start_ptr, length_ptr, position_ptr, SIZE: tl.constexpr, PACK: tl.constexpr):
    """The part-th SIZE rows of a query block's tokens, each PACK heads beside one another: first row of the block, row
    in the block, head of the pack, position, valid. What varies in a tile stays below 2^31: addresses take half the
    registers."""
    index = part * SIZE + tl.arange(0, SIZE)
    token, head = index // PACK, index % PACK
    first, count = tl.load(start_ptr + block).to(tl.int64), tl.load(length_ptr + block)
    return first, token, head, tl.load(position_ptr + block) + token, token < count


@triton.jit
def listed_query_rows(
    list_ptr, entry, stop, start_ptr, length_ptr, position_ptr,
    SIZE: tl.constexpr, PACK: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """query_rows of the blocks of GATHER successive entries of a list, one below the other; rows are of the buffer."""
    index = tl.arange(0, SIZE * GATHER)
    listed = entry + index // SIZE < stop
    block = tl.load(list_ptr + entry + index // SIZE, mask=listed, other=0)
    token, head = index % SIZE // PACK, index % PACK
    row = tl.load(start_ptr + block).to(tl.int64) + token
    return row, head, tl.load(position_ptr + block) + token, listed & (token < tl.load(length_ptr + block))


@triton.jit
def key_rows(
    list_ptr, entry, stop, start_ptr, length_ptr, position_ptr, step_ptr, weight_ptr,
    BLOCK: tl.constexpr, GATHER: tl.constexpr, CAUSAL: tl.constexpr, WEIGHTED: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Tile of the key blocks of GATHER successive entries of a list: (first row, row after it, position, log2 weight,
    valid)."""
    index = tl.arange(0, BLOCK * GATHER)
    position, weight = index, 0.0
    if GATHER == 1:
        inside, column = index, tl.load(list_ptr + entry)
        valid = inside < tl.load(length_ptr + column)
        first, row = tl.load(start_ptr + column).to(tl.int64), inside
    else:
        inside, listed = index % BLOCK, entry + index // BLOCK < stop
        column = tl.load(list_ptr + entry + index // BLOCK, mask=listed, other=0)
        valid = listed & (inside < tl.load(length_ptr + column))
        first, row = tl.zeros([], tl.int64), tl.load(start_ptr + column).to(tl.int64) + inside
    if CAUSAL or RULE == 2:
        position = tl.load(position_ptr + column) + inside * tl.load(step_ptr + column)
    if WEIGHTED:
        weight = tl.load(weight_ptr + column).to(tl.float32) * LOG2E
    return first, row, position, weight, valid


@triton.jit
def load_tile(ptr, row, stride, head_at, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D], zero where not valid and past D."""
    column = tl.arange(0, BLOCK_D)
    at = ptr + ((row * stride + head_at)[:, None] + column[None, :])
    if D == BLOCK_D:
        return tl.load(at, mask=valid[:, None], other=0.0)
    return tl.load(at, mask=valid[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def store_tile(ptr, row, stride, head_at, valid, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    at = ptr + ((row * stride + head_at)[:, None] + column[None, :])
    tl.store(at, x.to(ptr.dtype.element_ty), mask=valid[:, None] & (column < D)[None, :])


@triton.jit
def add_share(
    x, grad_ptr, head_at, row, size_ptr, up_ptr,
    STRIDE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x [rows, BLOCK_D] of key block `row` and its shares in the gradients of means, see shares.Shares."""
    column = tl.arange(0, BLOCK_D)
    for level in tl.static_range(DEPTH):
        at = tl.full([], row, tl.int64) * STRIDE + head_at
        share = tl.load(grad_ptr + at + column, mask=column < D, other=0.0).to(tl.float32)
        x += (share / tl.load(size_ptr + row).to(tl.float32))[None, :]
        if level + 1 < DEPTH:
            row = tl.load(up_ptr + row)
    return x


@triton.jit
def load_rule(
    rule_rows, row, head, valid,
    RULE: tl.constexpr, HEADS: tl.constexpr, RULE_HEADS: tl.constexpr, CHOICES: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Of rows int64 [rows] and their heads: what they chose [rows, PADDED] twice, or their lowest and highest
    coordinates [rows]."""
    low, high = row, row
    if RULE == 1:
        choice = tl.arange(0, PADDED)[None, :]
        at = ((row * RULE_HEADS + head * RULE_HEADS // HEADS) * CHOICES)[:, None] + choice
        low = tl.load(rule_rows + at, mask=valid[:, None] & (choice < CHOICES), other=-1)
        high = low
    if RULE == 2:
        low = tl.load(rule_rows + row * 2, mask=valid, other=0)
        high = tl.load(rule_rows + row * 2 + 1, mask=valid, other=0)
    return low, high


@triton.jit
def chose(choices, name):
    """[rows]: which rows have block `name` among their choices [rows, PADDED]."""
    return tl.max((choices == name).to(tl.int32), 1) > 0


@triton.jit
def in_box(at, low, high, guard):
    """Whether no coordinate is less than the lowest or more than the highest (see rules.Boxes)."""
    return (((at | guard) - low) & ((high | guard) - at) & guard) == guard


@triton.jit
def rule_of_list(
    seen, low, high, list_ptr, entry, stop, position_ptr, key_position, there, rule_keys, guard,
    KEYS: tl.constexpr, GATHER: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """`seen` [rows, keys of GATHER entries of a list] with the rule applied."""
    if RULE == 1:
        part = tl.arange(0, KEYS * GATHER) // KEYS
        for turn in tl.static_range(GATHER):
            column = tl.load(list_ptr + entry + turn, mask=entry + turn < stop, other=0)
            chosen = chose(low, tl.load(position_ptr + column) // KEYS)[:, None]
            if GATHER > 1:
                chosen = chosen | (part != turn)[None, :]
            seen = seen & chosen
    if RULE == 2:
        at = tl.load(rule_keys + key_position, mask=there, other=0)
        seen = seen & in_box(at[None, :], low[:, None], high[:, None], guard)
    return seen
