"""Launches of the Hopper kernels."""

import torch

from longspan.kernels.sparse import hopper
from longspan.kernels.sparse.backward import add_parts
from longspan.kernels.sparse.hopper.attend import forward_kernel
from longspan.kernels.sparse.hopper.keys import keys_kernel
from longspan.kernels.sparse.hopper.queries import queries_kernel
from longspan.kernels.sparse.hopper.tiles import descriptor, matrix_of

# By width of heads: keys in a tile, how many tiles are under way, warps (twice four that another one feeds, or eight
# that feed themselves) and the most registers of a thread: with 128 two programs share a processor.
FORWARD = {64: (64, 2, 8, 128), 128: (128, 2, 4, None)}
QUERIES = {64: (64, 2, 8, 128), 128: (64, 4, 4, None)}
KEY_GRADIENTS = 2, 2  # tiles of queries and of their gradients that are under way
PERSISTENT = True  # whether programs that are fed take tile after tile, one on a processor
IN_TURN = True  # whether warpgroups start their products one after the other, forward


def forward(q, k, v, out, lse, plan, scale, shape, onto):
    """Writes out and lse, see kernels.sparse.fused.forward; shape: numbers of heads and lists that tensors have, and
    PACK, heads side by side in a tile of queries."""
    tile, stages, warps, registers = FORWARD[q.shape[2]]
    tiles, programs, taken = _programs(q, plan, shape["PACK"], warps)
    rows = min(tile, plan.keys.size)
    forward_kernel[(programs,)](
        q, matrix_of(k, rows), matrix_of(v, rows), out, lse, *(onto or (out, lse)), *_tables(plan),
        *_lists(plan), taken, *q.stride()[:2], scale, len(plan.queries), plan.row_idx.shape[1], tiles, shape["HEADS"],
        shape["KEY_HEADS"], shape["LISTS"], shape["D"], plan.keys.size, shape["PACK"], tile, plan.causal,
        plan.log_weight is not None, onto is not None, stages, IN_TURN, PERSISTENT, num_warps=warps, **_most(registers),
    )  # fmt: skip


def query_gradients(d_out, q, k, v, out, lse, makes_rows, log, delta, dq, plan, scale, pack, onto):
    """Writes dq, see kernels.sparse.fused.backward, and with makes_rows log and delta, which are given otherwise."""
    tile, stages, warps, registers = QUERIES[q.shape[2]]
    tiles, programs, taken = _programs(q, plan, pack, warps)
    rows = min(tile, plan.keys.size)
    queries_kernel[(programs,)](
        q, matrix_of(k, rows), matrix_of(v, rows), d_out, out, lse, log, delta, dq,
        dq if onto is None else onto, *_tables(plan), *_lists(plan), taken, *q.stride()[:2], *d_out.stride()[:2], scale,
        len(plan.queries), plan.row_idx.shape[1], tiles, *_heads(q, k, plan), plan.keys.size, pack, tile, plan.causal,
        plan.log_weight is not None, onto is not None, not makes_rows, stages, PERSISTENT,
        num_warps=warps, **_most(registers),
    )  # fmt: skip


def key_gradients(d_out, q, k, v, log, delta, dk, dv, plan, scale, states=None):
    """Writes dk and dv, see kernels.sparse.fused.backward. states: KeyStates that the keys are part of, or None."""
    head_dim, size, columns = q.shape[2], plan.keys.size, plan.columns
    groups, items, room = max(plan.heads, k.shape[1]), plan.most_items, plan.most_parts(k.shape[1])
    parts = log.new_empty(2, groups, room, size, head_dim).unbind()
    rows, feature_map = matrix_of(q, 64), ""
    of_states = rows, log, plan.keys.start
    if states is not None:
        matrices, normalizers = states.states[:, :, 0].split_with_sizes([head_dim**2, head_dim], 2)
        matrices = matrices.to(q.dtype).reshape(-1, 1, head_dim)
        of_states, feature_map = (matrix_of(matrices, 64), normalizers.contiguous(), states.rows), states.feature_map
    keys_kernel[(items * groups,)](
        rows, matrix_of(d_out, 64), *(_flat(x, 64) for x in (log, delta)), k, v, dk, dv, *parts,
        plan.queries.start, plan.queries.position, *_tables(plan)[3:],
        columns.col_ptr, columns.col_idx, columns.item_ptr, columns.item_col, _weight(plan),
        *of_states, *k.stride()[:2], *v.stride()[:2], scale, len(plan.queries), len(plan.keys), items, room,
        columns.col_idx.shape[1], *_heads(q, k, plan), size, plan.queries.size, plan.chunk, plan.compact(k.shape[1]),
        plan.causal, plan.log_weight is not None, *KEY_GRADIENTS, feature_map,
        num_warps=4, **_most(128 if size == 64 else None),  # two programs on a processor
    )  # fmt: skip
    add_parts(parts, dk, dv, plan, (dk,) * 4, 0, head_dim)


def _programs(q, plan, pack, warps):
    """(number of tiles of queries, of programs that take them, and a counter of those taken, where it is used)."""
    tiles = len(plan.queries) * q.shape[1] // pack
    if PERSISTENT and warps == 4:
        return tiles, min(tiles, hopper.processors(q.device)), q.new_zeros(1, dtype=torch.int32)
    return tiles, tiles, plan.queries.start


def _most(registers):
    return {} if registers is None else {"maxnreg": registers}


def _flat(x, count):
    return descriptor(x, [x.numel()], [1], [count], swizzle=0)


def _tables(plan):
    queries, keys = plan.queries, plan.keys
    return queries.start, queries.length, queries.position, keys.start, keys.length, keys.position, keys.step


def _lists(plan):
    return plan.row_ptr, plan.row_idx, _weight(plan)


def _weight(plan):
    return plan.queries.start if plan.log_weight is None else plan.log_weight


def _heads(q, k, plan):
    return q.shape[1], k.shape[1], plan.heads, q.shape[2]
