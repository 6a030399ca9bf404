"""Backward in three kernels: dq walks the lists of query blocks, dk and dv those of key blocks, a part of a long list
per program; parts are added in order, so that gradients repeat bit for bit.

With P = exp(scores - lse) and delta = rowsum(d_out . out) - d_lse:

    dS = P (d_out v^T - delta)      dq = scale dS k      dk = scale dS^T q      dv = P^T d_out
"""

from longspan.kernels.compiler import cdiv, tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.sparse.tiles import (
    LOG2E,
    add_share,
    chose,
    in_box,
    listed_keys,
    listed_query_rows,
    load_rule,
    load_tile,
    program_of,
    query_rows,
    store_tile,
)

UNDER_WAY = 1 << 14  # numbers of parts that a program loads before it adds them
SPANS, ADDING = 32, 4096  # most key blocks of a program that adds parts, and so many programs before they get more
SLICE, FEW_ADDING = 16, 512  # rows of a key block that a program adds where there are fewer programs than these


@launched
@triton.jit(do_not_specialize=["count", "M"])
def rows_kernel(
    d_out_ptr, out_ptr, lse_ptr, d_lse_ptr, rows_ptr, log_ptr, delta_ptr, q_start, q_length, d_out_stride_t,
    d_out_stride_h, count, M, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    D_LSE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """lse in base 2 and delta of every row and head -> [T, HEADS, 2]; count: T * HEADS. With SIZE of the rows of M
    blocks, and -> two of [HEADS, M, SIZE] as well: lse is infinite there where there is no query, or none that sees a
    key, whose weights are 0."""
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if SIZE:
        PARTS: tl.constexpr = (SIZE * HEADS + ROWS - 1) // ROWS
        block, inside = (tl.program_id(0) // PARTS).to(tl.int64), tl.program_id(0) % PARTS * ROWS + tl.arange(0, ROWS)
        index = tl.load(q_start + block).to(tl.int64) * HEADS + inside
        count = index - inside + tl.load(q_length + block) * HEADS
    row, head, valid = index // HEADS, index % HEADS, index < count
    d_out = load_tile(d_out_ptr, row, d_out_stride_t, head * d_out_stride_h, valid, D, BLOCK_D).to(tl.float32)
    out = load_tile(out_ptr, index, D, index * 0, valid, D, BLOCK_D).to(tl.float32)
    delta = tl.sum(d_out * out, 1)
    if D_LSE:
        delta -= tl.load(d_lse_ptr + index, mask=valid, other=0.0)
    log = tl.load(lse_ptr + index, mask=valid, other=float("-inf")) * LOG2E
    tl.store(rows_ptr + index * 2, log, mask=valid)
    tl.store(rows_ptr + index * 2 + 1, delta, mask=valid)
    if SIZE:
        to, there = (head * M + block) * SIZE + inside // HEADS, inside < SIZE * HEADS
        tl.store(log_ptr + to, tl.where(log == float("-inf"), float("inf"), log), mask=there)
        tl.store(delta_ptr + to, delta, mask=there)


@triton.jit
def _load_rows(rows_ptr, row, place, valid, HEADS: tl.constexpr):
    """(lse in base 2, delta) of a tile. One load of both: smaller ones would be repeated for every layout in which they
    are used, and copied ahead with an address each in registers."""
    at = ((row * HEADS + place) * 2)[:, None] + tl.arange(0, 2)[None, :]
    return tl.split(tl.load(rows_ptr + at, mask=valid[:, None], other=0.0))


@launched
@triton.jit(do_not_specialize=["M", "capacity", "scale", "guard"])
def queries_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, rows_ptr, dq_ptr, onto_dq,
    q_start, q_length, q_position, k_start, k_length, k_position, k_step, row_ptr, row_idx, weight_ptr,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, d_out_stride_t, d_out_stride_h,
    scale, M, capacity, rule_rows, rule_keys, guard,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, LISTS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PACK: tl.constexpr, GATHER: tl.constexpr, CAUSAL: tl.constexpr,
    WEIGHTED: tl.constexpr, RULE: tl.constexpr, RULE_HEADS: tl.constexpr, CHOICES: tl.constexpr,
    PADDED: tl.constexpr, ONTO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [T, HEADS, D] of one query block and pack of heads; ONTO: added to onto_dq, which may be dq itself."""
    block, first_head, key_head, listed = program_of(M, HEADS, KEY_HEADS, LISTS, PACK)
    first, row, place, position, valid = query_rows(block, 0, q_start, q_length, q_position, ROWS, PACK)
    q_ptr += first * q_stride_t + first_head * q_stride_h
    d_out_ptr += first * d_out_stride_t + first_head * d_out_stride_h
    rows_at = first * HEADS + first_head
    q = load_tile(q_ptr, row, q_stride_t, place * q_stride_h, valid, D, BLOCK_D)
    d_out = load_tile(d_out_ptr, row, d_out_stride_t, place * d_out_stride_h, valid, D, BLOCK_D)
    lse, delta = _load_rows(rows_ptr + rows_at * 2, row, place, valid, HEADS)
    k_ptr += key_head * k_stride_h
    v_ptr += key_head * v_stride_h
    row_ptr += listed * (M + 1) + block
    row_idx += listed * capacity
    low, high = load_rule(
        rule_rows, first + row, first_head + place, valid, RULE, HEADS, RULE_HEADS, CHOICES, PADDED
    )  # fmt: skip
    keys, tables = (k_ptr, k_stride_t, v_ptr, v_stride_t), (row_idx, k_start, k_length, k_position, k_step, weight_ptr)
    rule = low, high, rule_keys, guard

    dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
    stop = tl.load(row_ptr + 1)
    for entry in range(tl.load(row_ptr), stop, GATHER):
        k, v, scores, seen = listed_keys(
            q, position, scale, entry, stop, keys, tables, rule, D, BLOCK_D, KEYS, GATHER, CAUSAL, WEIGHTED, RULE,
            PRECISION,
        )  # fmt: skip
        weights = tl.where(seen, tl.exp2(scores - lse[:, None]), 0.0)
        d_weights = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        d_scores = (weights * (d_weights - delta[:, None])).to(k.dtype)
        dq = tl.dot(d_scores, k, dq, input_precision=PRECISION)
    dq *= scale
    if ONTO:
        dq += load_tile(onto_dq + rows_at * D, row, HEADS * D, place * D, valid, D, BLOCK_D).to(tl.float32)
    store_tile(dq_ptr + rows_at * D, row, HEADS * D, place * D, valid, dq, D, BLOCK_D)


@launched
@triton.jit(do_not_specialize=["M", "num_columns", "items", "room", "capacity", "scale", "guard"])
def keys_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, rows_ptr, parts_dk, parts_dv, dk_ptr, dv_ptr,
    q_start, q_length, q_position, k_start, k_length, k_position, k_step, col_ptr, col_idx, item_ptr, item_col,
    weight_ptr, q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, d_out_stride_t, d_out_stride_h,
    scale, num_columns, items, room, capacity, share_k, share_v, share_size, share_up, rule_rows, rule_keys, guard,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, LISTS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, GATHER: tl.constexpr, KEYS: tl.constexpr,
    PACK: tl.constexpr, CHUNK: tl.constexpr, COMPACT: tl.constexpr, CAUSAL: tl.constexpr, WEIGHTED: tl.constexpr,
    RULE: tl.constexpr, RULE_HEADS: tl.constexpr, CHOICES: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Part of dk and dv of one key block from CHUNK query blocks of its list, all query heads that share list and keys:
    fp32 [group, room, KEYS, D], group = one of max(LISTS, KEY_HEADS), see `part_of`; or all of it at once, where no
    other item has any, and where DEPTH is not 0 with its shares in gradients of means. Query blocks are taken GATHER at
    a time, or in PARTS."""
    GROUPS: tl.constexpr = LISTS if LISTS > KEY_HEADS else KEY_HEADS
    TURNS: tl.constexpr = HEADS // GROUPS // PACK * PARTS
    item, group = tl.program_id(0) % items, tl.program_id(0) // items
    key_head, listed = group // (GROUPS // KEY_HEADS), (group * LISTS // GROUPS).to(tl.int64)
    column = tl.load(item_col + listed * items + item)
    if column < num_columns:
        inside = tl.arange(0, KEYS)
        there = inside < tl.load(k_length + column)
        key_first = tl.load(k_start + column).to(tl.int64)
        key_position = tl.load(k_position + column) + inside * tl.load(k_step + column)
        k_ptr += key_first * k_stride_t + key_head * k_stride_h
        v_ptr += key_first * v_stride_t + key_head * v_stride_h
        k = load_tile(k_ptr, inside, k_stride_t, 0, there, D, BLOCK_D)
        v = load_tile(v_ptr, inside, v_stride_t, 0, there, D, BLOCK_D)
        weight = 0.0
        if WEIGHTED:
            weight = tl.load(weight_ptr + column).to(tl.float32) * LOG2E
        dk, dv = tl.zeros([KEYS, BLOCK_D], tl.float32), tl.zeros([KEYS, BLOCK_D], tl.float32)
        name, key_at = 0, inside
        if RULE == 1:
            name = tl.load(k_position + column) // KEYS
        if RULE == 2:
            key_at = tl.load(rule_keys + key_position, mask=there, other=0)
        ends = col_ptr + listed * (num_columns + 1) + column
        number = item - tl.load(item_ptr + listed * (num_columns + 1) + column)
        begin = tl.load(ends) + number * CHUNK
        stop = tl.minimum(begin + CHUNK, tl.load(ends + 1))
        col_idx += listed * capacity
        for turn in range(0, (stop - begin + (GATHER - 1)) // GATHER * TURNS):
            entry = begin + turn // TURNS * GATHER
            head = group * (HEADS // GROUPS) + turn % TURNS // PARTS * PACK
            if GATHER == 1:
                block, part = tl.load(col_idx + entry), turn % PARTS
                first, row, place, position, valid = query_rows(block, part, q_start, q_length, q_position, ROWS, PACK)
            else:
                first = tl.zeros([], tl.int64)
                row, place, position, valid = listed_query_rows(
                    col_idx, entry, stop, q_start, q_length, q_position, ROWS, PACK, GATHER
                )
            rows_at, q_at = first * HEADS + head, q_ptr + first * q_stride_t + head * q_stride_h
            d_out_at = d_out_ptr + first * d_out_stride_t + head * d_out_stride_h
            q = load_tile(q_at, row, q_stride_t, place * q_stride_h, valid, D, BLOCK_D)
            d_out = load_tile(d_out_at, row, d_out_stride_t, place * d_out_stride_h, valid, D, BLOCK_D)
            lse, delta = _load_rows(rows_ptr + rows_at * 2, row, place, valid, HEADS)
            scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E) + weight
            seen = there[:, None] & valid[None, :]
            if CAUSAL:
                seen = seen & (key_position[:, None] <= position[None, :])
            if RULE != 0:
                low, high = load_rule(
                    rule_rows, first + row, head + place, valid, RULE, HEADS, RULE_HEADS, CHOICES, PADDED
                )  # fmt: skip
                if RULE == 1:
                    seen = seen & chose(low, name)[None, :]
                else:
                    seen = seen & in_box(key_at[:, None], low[None, :], high[None, :], guard)
            weights = tl.where(seen, tl.exp2(scores - lse[None, :]), 0.0)
            dv = tl.dot(weights.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
            d_weights = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
            d_scores = (weights * (d_weights - delta[None, :])).to(q.dtype)
            dk = tl.dot(d_scores, q, dk, input_precision=PRECISION)
        dk *= scale
        if items_of(item_ptr + column, key_head, num_columns, KEY_HEADS, LISTS) == 1:
            if DEPTH:
                STRIDE: tl.constexpr = KEY_HEADS * D
                dk = add_share(dk, share_k, key_head * D, column, share_size, share_up, STRIDE, D, BLOCK_D, DEPTH)
                dv = add_share(dv, share_v, key_head * D, column, share_size, share_up, STRIDE, D, BLOCK_D, DEPTH)
            at = (key_first * KEY_HEADS + key_head) * D
            store_tile(dk_ptr + at, inside, KEY_HEADS * D, 0, there, dk, D, BLOCK_D)
            store_tile(dv_ptr + at, inside, KEY_HEADS * D, 0, there, dv, D, BLOCK_D)
        else:
            at = (group.to(tl.int64) * room + part_of(item, number, ends, CHUNK, COMPACT)) * KEYS * D
            store_tile(parts_dk + at, inside, D, 0, inside < KEYS, dk, D, BLOCK_D)
            store_tile(parts_dv + at, inside, D, 0, inside < KEYS, dv, D, BLOCK_D)


@triton.jit
def items_of(item_ptr, key_head, num_columns, KEY_HEADS: tl.constexpr, LISTS: tl.constexpr):
    """How many items make the gradients of key blocks, which item_ptr points to, in all lists of a key head."""
    EACH: tl.constexpr = LISTS // KEY_HEADS if LISTS > KEY_HEADS else 1
    at = item_ptr + (key_head * LISTS // KEY_HEADS).to(tl.int64) * (num_columns + 1)
    count = tl.load(at + 1) - tl.load(at)
    for _ in tl.static_range(1, EACH):
        at += num_columns + 1
        count += tl.load(at + 1) - tl.load(at)
    return count


@triton.jit
def part_of(item, number, begin_ptr, CHUNK: tl.constexpr, COMPACT: tl.constexpr):
    """Where the part of an item lies, the number-th of its key block, whose list begin_ptr points to. COMPACT: only
    blocks with more than CHUNK entries have parts. Between the first parts of two of them are at least twice their
    entries over CHUNK, which is as many as the first has or more."""
    if COMPACT:
        item = 2 * tl.load(begin_ptr) // CHUNK + number
    return item


@launched
@triton.jit(do_not_specialize=["num_columns", "room", "span"])
def add_kernel(
    parts_dk, parts_dv, dk_ptr, dv_ptr, k_start, k_length, col_ptr, item_ptr, share_k, share_v, share_size, share_up,
    num_columns, room, span, KEY_HEADS: tl.constexpr, LISTS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    DEPTH: tl.constexpr, CHUNK: tl.constexpr, COMPACT: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
    SPANS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """dk, dv [T, KEY_HEADS, D] of ROWS rows of `span` key blocks, at most SPANS, and a head: the parts of their lists,
    in order, so many under way, and shares; not of those with one part, which a program sees at a glance."""
    GROUPS: tl.constexpr = LISTS if LISTS > KEY_HEADS else KEY_HEADS
    STRIDE: tl.constexpr = KEY_HEADS * D
    SLICES: tl.constexpr = KEYS // ROWS
    begin, key_head = tl.program_id(0) // (KEY_HEADS * SLICES) * span, tl.program_id(0) // SLICES % KEY_HEADS
    stop = tl.minimum(begin + span, num_columns)
    index = tl.minimum(begin + tl.arange(0, SPANS), stop - 1)
    if tl.max((items_of(item_ptr + index, key_head, num_columns, KEY_HEADS, LISTS) != 1).to(tl.int32)) > 0:
        for column in range(begin, stop):
            if items_of(item_ptr + column, key_head, num_columns, KEY_HEADS, LISTS) != 1:
                inside = tl.program_id(0) % SLICES * ROWS + tl.arange(0, ROWS)
                there = inside < tl.load(k_length + column)
                dk, dv = tl.zeros([ROWS, BLOCK_D], tl.float32), tl.zeros([ROWS, BLOCK_D], tl.float32)
                for turn in range(0, GROUPS // KEY_HEADS):
                    group = key_head * (GROUPS // KEY_HEADS) + turn
                    at = (group * LISTS // GROUPS).to(tl.int64) * (num_columns + 1) + column
                    first, last = tl.load(item_ptr + at), tl.load(item_ptr + at + 1)
                    begin_part = tl.full([], group, tl.int64) * room + part_of(first, 0, col_ptr + at, CHUNK, COMPACT)
                    for turn_at in range(0, last - first, AHEAD):
                        for ahead in tl.static_range(AHEAD):
                            part = (begin_part + turn_at + ahead) * KEYS * D
                            some = there & (turn_at + ahead < last - first)
                            dk += load_tile(parts_dk + part, inside, D, 0, some, D, BLOCK_D)
                            dv += load_tile(parts_dv + part, inside, D, 0, some, D, BLOCK_D)
                if DEPTH:
                    dk = add_share(dk, share_k, key_head * D, column, share_size, share_up, STRIDE, D, BLOCK_D, DEPTH)
                    dv = add_share(dv, share_v, key_head * D, column, share_size, share_up, STRIDE, D, BLOCK_D, DEPTH)
                to = (tl.load(k_start + column).to(tl.int64) * KEY_HEADS + key_head) * D
                store_tile(dk_ptr + to, inside, STRIDE, 0, there, dk, D, BLOCK_D)
                store_tile(dv_ptr + to, inside, STRIDE, 0, there, dv, D, BLOCK_D)


def add_parts(parts, dk, dv, plan, shares, depth, block_d):
    """Launches add_kernel, with more key blocks to a program where there are many. shares: its arguments."""
    keys, of_columns, (_, heads, head_dim) = plan.keys, plan.columns, dk.shape
    columns, size = len(keys), keys.size
    span = min(SPANS, max(1, columns * heads // ADDING))
    programs = cdiv(columns, span) * heads
    rows = min(SLICE, size) if programs < FEW_ADDING else size
    add_kernel[(programs * (size // rows),)](
        *parts, dk, dv, keys.start, keys.length, of_columns.col_ptr, of_columns.item_ptr, *shares, columns,
        parts[0].shape[1], span, heads, plan.heads, head_dim, block_d, depth, plan.chunk, plan.compact(heads), size,
        rows, SPANS, max(1, min(4, UNDER_WAY // (rows * block_d))), num_warps=rows // 8,
    )  # fmt: skip
