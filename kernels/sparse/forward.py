"""Forward: one program per query block and pack of heads walks the block's list with an online softmax in base 2."""

from longspan.kernels.compiler import tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.sparse.tiles import (
    LOG2E,
    listed_keys,
    load_rule,
    load_tile,
    program_of,
    query_rows,
    store_tile,
)


@launched
@triton.jit(
    do_not_specialize=["M", "capacity", "scale", "guard"], do_not_specialize_on_alignment=["row_ptr", "row_idx"]
)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, onto_out, onto_lse,
    q_start, q_length, q_position, k_start, k_length, k_position, k_step, row_ptr, row_idx, weight_ptr,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t, v_stride_h, scale, M, capacity,
    rule_rows, rule_keys, guard,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, LISTS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PACK: tl.constexpr, GATHER: tl.constexpr, CAUSAL: tl.constexpr,
    WEIGHTED: tl.constexpr, RULE: tl.constexpr, RULE_HEADS: tl.constexpr, CHOICES: tl.constexpr,
    PADDED: tl.constexpr, ONTO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes out [T, HEADS, D] and lse [T, HEADS], natural logarithm; 0 and -inf for a query that sees nothing.
    ONTO: other keys are already in onto_out and onto_lse, which may be the same tensors."""
    block, first_head, key_head, listed = program_of(M, HEADS, KEY_HEADS, LISTS, PACK)
    first, row, place, position, valid = query_rows(block, 0, q_start, q_length, q_position, ROWS, PACK)
    q_ptr += first * q_stride_t + first_head * q_stride_h
    q = load_tile(q_ptr, row, q_stride_t, place * q_stride_h, valid, D, BLOCK_D)
    k_ptr += key_head * k_stride_h
    v_ptr += key_head * v_stride_h
    row_ptr += listed * (M + 1) + block
    row_idx += listed * capacity
    low, high = load_rule(
        rule_rows, first + row, first_head + place, valid, RULE, HEADS, RULE_HEADS, CHOICES, PADDED
    )  # fmt: skip
    keys, tables = (k_ptr, k_stride_t, v_ptr, v_stride_t), (row_idx, k_start, k_length, k_position, k_step, weight_ptr)
    rule = low, high, rule_keys, guard

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, BLOCK_D], tl.float32)
    rows_at = first * HEADS + first_head
    if ONTO:
        highest = tl.load(onto_lse + rows_at + row * HEADS + place, mask=valid, other=float("-inf")) * LOG2E
        total = tl.where(highest == float("-inf"), 0.0, 1.0)
        out = load_tile(onto_out + rows_at * D, row, HEADS * D, place * D, valid, D, BLOCK_D).to(tl.float32)
    stop = tl.load(row_ptr + 1)
    for entry in range(tl.load(row_ptr), stop, GATHER):
        k, v, scores, seen = listed_keys(
            q, position, scale, entry, stop, keys, tables, rule, D, BLOCK_D, KEYS, GATHER, CAUSAL, WEIGHTED, RULE,
            PRECISION,
        )  # fmt: skip
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weights, rescale = tl.exp2(scores - shift[:, None]), tl.exp2(highest - shift)
        total = total * rescale + tl.sum(weights, 1)
        out = tl.dot(weights.to(v.dtype), v, out * rescale[:, None], input_precision=PRECISION)
        highest = higher
    empty = total == 0.0
    out = out / tl.where(empty, 1.0, total)[:, None]
    store_tile(out_ptr + rows_at * D, row, HEADS * D, place * D, valid, out, D, BLOCK_D)
    lse = tl.where(empty, float("-inf"), (highest + tl.log2(tl.where(empty, 1.0, total))) / LOG2E)
    tl.store(lse_ptr + rows_at + row * HEADS + place, lse, mask=valid)
