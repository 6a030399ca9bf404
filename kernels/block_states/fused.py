"""The Triton kernels; functions as in plain.py, where they are described."""

import torch

from longspan.kernels.block_states.keys import (
    inside_key_gradients_kernel,
    key_gradients_kernel,
    listed_kernel,
    lonely_key_gradients_kernel,
    sums_kernel,
)
from longspan.kernels.block_states.queries import output_kernel, query_gradients_kernel
from longspan.kernels.block_states.whole import whole_output_kernel, whole_query_gradients_kernel
from longspan.kernels.linear.splits import padded, unit_stride
from longspan.kernels.sparse import hopper

STEP = 64  # rows that gradients of keys that queries of their block see take at once: with more, registers spill
# Kernels that go through a block: (rows at once, warps, tiles under way and at work, registers), the fastest of
# those measured on an H200 with heads of 128. Two programs run at once where warps times registers leave room.
LOOPS = {
    "sums": (64, 8, 3, 128),
    "output": (64, 4, 2, 255),
    "query_gradients": (128, 8, 2, 255),
    "key_gradients": (64, 4, 2, 255),
}
LONELY = 512  # programs that look for key blocks that no query chose
HOPPER, HOPPER_SUMS = True, True  # gradients of queries of whole documents, and sums of LONG blocks, by hopper.py
LONG = 512
TILE, TAKE = 1024, 8  # numbers of a state, and states of a list, that are added at once


def refusal(dtype: torch.dtype, key_size: int, value_size: int, sizes) -> str | None:
    """Why these kernels do not take a case, or None."""
    if dtype not in (torch.bfloat16, torch.float32):
        return f"takes bfloat16 and float32, not {dtype}"
    widest = 64 if dtype == torch.float32 else 128  # by the shared memory of a Hopper GPU
    if max(key_size, value_size) > widest:
        return f"takes {dtype} heads up to {widest} wide, not {max(key_size, value_size)}"
    for size in sizes:
        if size not in (16, 32, 64, 128):
            return f"takes blocks of 16, 32, 64 or 128 rows, not {size}"
    return None


def sums(x, y, weight, blocks, feature_map, heads, dtype):
    x, y = unit_stride(x), unit_stride(y)
    key_size, value_size = x.shape[2], y.shape[2]
    out = x.new_empty(len(blocks), heads, 1, key_size * value_size + key_size, dtype=dtype)
    if weight is None and blocks.size >= LONG and HOPPER_SUMS and _on_hopper(x, y):
        if out.numel():
            from longspan.kernels.block_states import hopper as by_tma

            by_tma.sums(x, y, out, blocks, feature_map)
    elif out.numel():
        sums_kernel[(len(blocks) * heads,)](
            x, y, out if weight is None else weight, out, blocks.start, blocks.length, *_strides(x, y), heads,
            x.shape[1] // heads, *_sizes(x, y), MAP=feature_map, WEIGHTED=weight is not None,
            **_loop("sums", x, blocks),
        )  # fmt: skip
    return out


def listed(total, total_row, states, plan, *, transposed, heads, dtype):
    mine, theirs = (plan.keys, plan.queries) if transposed else (plan.queries, plan.keys)
    ends, numbers = (plan.col_ptr, plan.col_idx) if transposed else (plan.row_ptr, plan.row_idx)
    size = states.shape[-1]
    out = states.new_empty(len(mine), heads, 1, size, dtype=dtype)
    if out.numel():
        listed_kernel[(-(-size // TILE) * len(mine) * heads,)](
            out if total is None else total, ends if total is None else total_row, states, out, ends, numbers,
            mine.position, theirs.position, len(mine), numbers.shape[1], size, heads, states.shape[1], plan.heads,
            TILE, TAKE, total is not None, plan.causal, transposed, num_warps=4,
        )  # fmt: skip
    return out


def output(sparse, q, k, v, states, totals, rows, queries, weight, bias, feature_map, inside, lost):
    q, k, v, sparse = (unit_stride(x) for x in (q, k, v, sparse.contiguous()))
    out = torch.empty_like(sparse)
    if len(queries):
        output_kernel[(len(queries) * q.shape[1],)](
            sparse, q, k, v, states, totals, rows, weight.to(q.dtype).contiguous(), bias.float(), out, queries.start,
            queries.length, *_strides(q, k, v), lost, q.shape[1], k.shape[1], *_sizes(q, v), queries.size, feature_map,
            inside, **_options(q, queries.size),
        )  # fmt: skip
    return out


def query_gradients(d_out, q, k, v, states, totals, rows, queries, weight, feature_map, inside, lost):
    d_out, q, k, v = (unit_stride(x) for x in (d_out, q, k, v))
    dq, d_num, value = q.new_empty(q.shape), d_out.new_empty(d_out.shape), d_out.new_empty(d_out.shape)
    d_den = q.new_empty(q.shape[:2], dtype=torch.float32)
    if len(queries):
        query_gradients_kernel[(len(queries) * q.shape[1],)](
            d_out, q, k, v, states, totals, rows, weight.to(q.dtype).contiguous(), dq, d_num, d_den, value,
            queries.start, queries.length, *_strides(d_out, q, k, v), lost, q.shape[1], k.shape[1], *_sizes(q, v),
            queries.size, feature_map, inside, **_options(q, queries.size),
        )  # fmt: skip
    return dq, d_num, d_den, value


def whole_output(sparse, q, states, rows, blocks, bias, feature_map):
    q, sparse = unit_stride(q), sparse.contiguous()
    out = torch.empty_like(sparse)
    if len(blocks):
        whole_output_kernel[(len(blocks) * q.shape[1],)](
            sparse, q, states, rows, bias.float(), out, blocks.start, blocks.length, *_strides(q), q.shape[1],
            states.shape[1], *_sizes(q, out), MAP=feature_map, STAGES=LOOPS["output"][2], **_loop("output", q, blocks),
        )  # fmt: skip
    return out


def whole_query_gradients(d_out, q, states, rows, blocks, feature_map, dtype):
    d_out, q = unit_stride(d_out), unit_stride(q)
    dq, heads = q.new_empty(q.shape), states.shape[1]
    sums = states.new_empty(len(blocks), *states.shape[1:], dtype=dtype)
    if len(blocks) and HOPPER and _on_hopper(q, d_out):
        from longspan.kernels.block_states import hopper as by_tma

        d_bias = states.new_empty(len(blocks), heads, 2, d_out.shape[2])
        by_tma.whole_query_gradients(d_out, q, states, rows, dq, sums, d_bias, blocks, feature_map)
        return dq, sums, d_bias.sum((0, 1, 2))
    d_bias = states.new_empty(len(blocks), heads, d_out.shape[2])
    if len(blocks):
        whole_query_gradients_kernel[(len(blocks) * heads,)](
            d_out, q, states, rows, dq, sums, d_bias, blocks.start, blocks.length, *_strides(d_out, q), q.shape[1],
            heads, *_sizes(q, d_out), MAP=feature_map, **_loop("query_gradients", q, blocks),
        )  # fmt: skip
    return dq, sums, d_bias.sum((0, 1))


def key_gradients(k, v, states, rows, blocks, feature_map, inside=None, onto=(None, None)):
    k, v = unit_stride(k), unit_stride(v)
    dk, dv = (x.new_empty(x.shape) if total is None else total.contiguous() for x, total in zip((k, v), onto))
    added = {name: x is not None for name, x in zip(("ADD_K", "ADD_V"), onto)}
    if not len(blocks):
        return dk, dv
    if inside is None:
        key_gradients_kernel[(len(blocks) * k.shape[1],)](
            k, v, states, rows, dk, dv, blocks.start, blocks.length, *_strides(k, v), k.shape[1], *_sizes(k, v),
            MAP=feature_map, **added, **_loop("key_gradients", k, blocks),
        )  # fmt: skip
        return dk, dv
    q, d_num, d_den = unit_stride(inside[0]), *inside[1:]
    at_once = min(STEP, blocks.size)
    parts = blocks.size // at_once
    inside_key_gradients_kernel[(len(blocks) * parts * k.shape[1],)](
        k, v, states, rows, q, d_num, d_den, dk, dv, blocks.start, blocks.length, *_strides(k, v, q), k.shape[1],
        q.shape[1] // k.shape[1], *_sizes(k, v), at_once, parts, feature_map, **added,
        **_options(k, at_once) | {"num_stages": 1},  # the loop is short
    )  # fmt: skip
    return dk, dv


def lonely_key_gradients(k, v, states, plan, onto):
    """Adds to dk and dv in `onto`, contiguous, what kernels.sparse.fused.backward leaves out of `states`, KeyStates."""
    k, v = unit_stride(k), unit_stride(v)
    columns, heads = len(plan.keys), k.shape[1]
    span = max(1, columns * heads // LONELY)
    lonely_key_gradients_kernel[(-(-columns // span) * heads,)](
        k, v, states.states, states.rows, *onto, plan.keys.start, plan.keys.length, plan.item_ptr, columns, span,
        *_strides(k, v), heads, plan.heads, *_sizes(k, v), MAP=states.feature_map,
        **_loop("key_gradients", k, plan.keys),
    )  # fmt: skip


def _on_hopper(*tensors):
    return hopper.on_hopper(tensors[0]) and all(x.dtype == torch.bfloat16 and x.shape[2] in (64, 128) for x in tensors)


def _loop(name, x, blocks):
    rows, warps, stages, registers = LOOPS[name]
    launch = {"num_warps": warps, "num_stages": stages, "maxnreg": registers}
    return _options(x, rows) | launch | {"ROWS": min(rows, padded(blocks.size))}


def _sizes(x, y):
    return x.shape[2], y.shape[2], padded(x.shape[2]), padded(y.shape[2])


def _options(x, rows):
    precision = "tf32x3" if x.dtype == torch.float32 else "tf32"
    return {"PRECISION": precision, "num_warps": 8 if rows >= 128 else 4, "num_stages": 2}


def _strides(*tensors):
    return [stride for x in tensors for stride in x.stride()[:2]]
