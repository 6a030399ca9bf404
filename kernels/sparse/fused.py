"""The Triton kernels over a plan: forward, and backward in two passes over the lists."""

from dataclasses import replace
from functools import cache

import torch

from longspan.kernels.compiler import cdiv, next_power_of_2
from longspan.kernels.linear.splits import padded, unit_stride
from longspan.kernels.sparse import hopper
from longspan.kernels.sparse.backward import add_parts, keys_kernel, queries_kernel, rows_kernel
from longspan.kernels.sparse.forward import forward_kernel
from longspan.kernels.sparse.packing_triton import add_shares_triton
from longspan.kernels.sparse.plan import BlockPlan, Blocks
from longspan.kernels.sparse.rules import arguments, constants
from longspan.kernels.sparse.shares import arguments as shares_arguments

ROWS = 128  # queries in a tile where heads that share keys and lists can fill it
KEYS = 64  # keys in a tile where a list's blocks are smaller
ROW_TILE = 64  # rows of all heads of a program that makes their sums
TURN = 64  # queries in a tile that the gradients of keys take at once: with more, registers spill
ONE_WARP = 16, 128  # rows, and bytes of each, of a tile that one warp has: no warp waits for what another one adds up
# What such a warp takes at once in place of KEYS or TURN, and the most registers of a thread: a processor has 65,536,
# and the more warps share them, the less it waits for any. With fewer they spill.
NARROW = {"forward": (32, 128), "queries": (16, 96), "keys": (16, 128)}
OWN_ROWS = True  # sums of rows where gradients of queries are made, where nothing else takes them
FUSES = True  # gradients from states with those of attention, where that can be
STAGES = {2: (3, 2), 4: (1, 1)}  # by bytes of an element: over lists of query blocks, of key blocks


def refusal(dtype: torch.dtype, head_dim: int, query_block: int, key_block: int) -> str | None:
    """Why these kernels do not take a case, or None."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"takes bfloat16, float16 and float32, not {dtype}"
    widest = 64 if dtype == torch.float32 else 128  # by the shared memory of a Hopper GPU
    if head_dim > widest:
        return f"takes {dtype} heads up to {widest} wide, not {head_dim}"
    for name, size in (("query", query_block), ("key", key_block)):
        if size not in (16, 32, 64, 128):
            return f"takes blocks of 16, 32, 64 or 128 rows, the {name} blocks have {size}"
    return None


def forward(q, k, v, plan: BlockPlan, scale: float, onto=None, dtype=None, turns=None):
    """q: [Tq, Hq, D]; k, v: [Tk, Hkv, D] -> (out [Tq, Hq, D] in `dtype` or that of q, lse fp32 [Tq, Hq]). onto: (out,
    lse) of other keys, to which those of the plan come; they may be overwritten. turns: (number, iterator): so many
    equal groups of lists, of keys of one head, are taken one after the other, each after a step of the iterator."""
    q, k, v, dtype = unit_stride(q), unit_stride(k), unit_stride(v), dtype or q.dtype
    given = (q, q.new_empty(q.shape[:2], dtype=torch.float32)) if onto is None else onto
    out = given[0] if onto is not None and given[0].dtype == dtype else q.new_empty(q.shape, dtype=dtype)
    lse, tile = given[1], _tile(q, k, plan)
    if turns is None:
        _attend(q, k, v, out, lse, given, plan, scale, onto is not None, tile)
        return out, lse
    heads, lists = q.shape[1] // turns[0], plan.heads // turns[0]
    for number, _ in enumerate(turns[1]):  # the kernels start at the first head and list that they are given
        mine, listed = slice(number * heads, (number + 1) * heads), slice(number * lists, (number + 1) * lists)
        part = replace(plan, row_ptr=plan.row_ptr[listed], row_idx=plan.row_idx[listed])
        some, *others = (x[:, mine] for x in (q, out, lse, *given))
        _attend(some, k, v, *others[:2], others[2:], part, scale, onto is not None, tile)
    return out, lse


def _attend(q, k, v, out, lse, given, plan, scale, onto, tile):
    """Of the heads of q, the first of those that tensors have by `tile`."""
    if hopper.takes(q, plan, tile["ROWS"], scale):
        hopper.kernels().forward(q, k, v, out, lse, plan, scale, tile, given if onto else None)
    elif len(plan.queries):
        forward_kernel[(len(plan.queries) * q.shape[1] // tile["PACK"],)](
            q, k, v, out, lse, *given, *_tables(plan), *_strides(q, k, v), scale, len(plan.queries),
            plan.row_idx.shape[1], *arguments(plan), **tile, ONTO=onto, **_of_lists("forward", q, tile),
        )  # fmt: skip


class RowSums:
    """lse in base 2, and delta, made when they are first asked for: `sums` fp32 [Tq, Hq, 2], and `of` blocks of queries
    as Hopper kernels take them, [Hq, blocks, size] each. also: Blocks of which the latter will be wanted, which are
    made with whatever comes first, or None."""

    def __init__(self, d_out, d_lse, out, lse, also=None):
        self._given, self._sums, self._of, self._also = (d_out, d_lse, out, lse), None, [], also

    @property
    def sums(self):
        if self._sums is None and self._also is not None:
            self.of(self._also)
        if self._sums is None:
            self._sums = self._make(None, ())
        return self._sums

    def of(self, queries: Blocks):
        for blocks, made in self._of:
            if blocks is queries:
                return made
        made = empty_rows(self._given[3], queries)
        self._sums = self._make(queries, made)
        self._of.append((queries, made))
        return made

    def _make(self, queries, made):
        d_out, d_lse, out, lse = self._given
        sums, (rows, heads), head_dim = lse.new_empty(*lse.shape, 2), lse.shape, out.shape[2]
        programs, blocks, size, start = cdiv(rows * heads, ROW_TILE), 0, 0, (lse, lse)
        if queries is not None:
            blocks, size, start = len(queries), queries.size, (queries.start, queries.length)
            programs = blocks * cdiv(size * heads, ROW_TILE)
        if programs and lse.numel():
            rows_kernel[(programs,)](
                d_out, out, lse, lse if d_lse is None else d_lse, sums, *(made or (sums, sums)), *start,
                *d_out.stride()[:2], lse.numel(), blocks, heads, head_dim, padded(head_dim), ROW_TILE,
                d_lse is not None, size,
            )  # fmt: skip
        return sums


def row_sums(d_out, d_lse, out, lse, also=None) -> RowSums:
    """d_lse: [Tq, Hq] or None; also: see RowSums."""
    d_lse = None if d_lse is None else d_lse.float().contiguous()
    return RowSums(unit_stride(d_out), d_lse, out.contiguous(), lse.contiguous(), also)


def empty_rows(like, queries: Blocks):
    """lse and delta of every row of the blocks."""
    return like.new_empty(2, like.shape[1], len(queries), queries.size).unbind()


def backward(
    d_out, d_lse, q, k, v, out, lse, plan: BlockPlan, scale: float, rows=None, onto=None, dtype=None,
    shares=None, states=None, send=None, later=None,
):  # fmt: skip
    """(dq in `dtype` or that of q, dk, dv in those of k and v); d_lse: [Tq, Hq] or None. out and lse: of all keys that
    the queries see, also where the plan lists some of them. rows: their row_sums, if known; onto: dq of other keys, to
    which that of the plan is added; it may be overwritten. shares: Shares of the keys and values in gradients
    of their means, to be added to dk and dv. states: KeyStates that the keys are part of; what keys get from these is
    added for blocks that some query chose, where `takes_states`. send: called with dk and dv once they are queued, and
    before dq is, or None. later: a list that gets a function which queues dq, to be called in turn, or None."""
    d_out, q, k, v = unit_stride(d_out), unit_stride(q), unit_stride(k), unit_stride(v)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    dtype = dtype or q.dtype
    dq = onto if onto is not None and onto.dtype == dtype else q.new_empty(q.shape, dtype=dtype)
    tile, heads, by_key = _tile(q, k, plan), q.shape[1], plan.by_key or (plan,)
    here = hopper.takes(q, plan, tile["ROWS"], scale)
    on_hopper = [hopper.takes_keys(x) and hopper.takes(q, x, tile["ROWS"], scale) for x in by_key]
    # Rows are made where dq is, if that comes first.
    alone = OWN_ROWS and here and all(on_hopper) and d_lse is None and send is None and later is None
    if rows is None and not alone:
        rows = row_sums(d_out, d_lse, out, lse)
    of_rows = None
    if here or any(on_hopper):
        of_rows = empty_rows(lse, plan.queries) if rows is None else rows.of(plan.queries)

    def make_queries():
        if here:
            given = d_out, q, k, v, out.contiguous(), lse.contiguous(), rows is None, *of_rows
            hopper.kernels().query_gradients(*given, dq, plan, scale, tile["PACK"], onto)
        elif lse.numel():
            queries_kernel[(len(plan.queries) * heads // tile["PACK"],)](
                q, k, v, d_out, rows.sums, dq, dq if onto is None else onto, *_tables(plan), *_strides(q, k, v, d_out),
                scale, len(plan.queries), plan.row_idx.shape[1], *arguments(plan), **tile, ONTO=onto is not None,
                **_of_lists("queries", q, tile),
            )  # fmt: skip

    def make_keys():
        if not all(x.most_items for x in by_key):
            dk.zero_(), dv.zero_()
        for part, takes in zip(by_key, on_hopper):
            if part.most_items and not takes:
                _key_gradients(d_out, q, k, v, rows, dk, dv, part, scale, shares)
                continue
            if part.most_items:
                hopper.kernels().key_gradients(d_out, q, k, v, *of_rows, dk, dv, part, scale, states)
            if shares is not None:
                add_shares_triton((dk, dv), part.keys, shares)

    if send is None and later is None:
        make_queries()
        make_keys()
        return dq, dk, dv
    make_keys()
    if send is not None:
        send(dk, dv)
    make_queries() if later is None else later.append(make_queries)
    return dq, dk, dv


def _key_gradients(d_out, q, k, v, rows, dk, dv, plan, scale, shares):
    """Writes dk and dv."""
    columns, groups, num_columns = plan.columns, max(plan.heads, k.shape[1]), len(plan.keys)
    items, tile, compact = plan.most_items, _tile(q, k, plan), plan.compact(k.shape[1])
    room = plan.most_parts(k.shape[1])
    parts = q.new_empty(2, groups, room, plan.keys.size, q.shape[2], dtype=torch.float32).unbind()
    tables = _tables(plan)
    given, depth = shares_arguments(shares, dk)
    keys_kernel[(items * groups,)](
        q, k, v, d_out, rows.sums, *parts, dk, dv, *tables[:7], columns.col_ptr, columns.col_idx, columns.item_ptr,
        columns.item_col, tables[-1], *_strides(q, k, v, d_out), scale, num_columns, items, room,
        columns.col_idx.shape[1], *given, *arguments(plan), DEPTH=depth, CHUNK=plan.chunk, COMPACT=compact,
        **(tile | _of_keys(q.dtype, q.shape[2], tile["ROWS"], tile["KEYS"])),
    )  # fmt: skip
    add_parts(parts, dk, dv, plan, given, depth, tile["BLOCK_D"])


def takes_states(q, k, plan: BlockPlan, scale: float) -> bool:
    """Whether `backward` takes states."""
    return FUSES and hopper.takes(q, plan, _tile(q, k, plan)["ROWS"], scale) and hopper.takes_keys(plan)


def _tile(q, k, plan):
    """Shapes of the kernels' tiles, and the plan's rule. PACK: query heads that share a list and keys, side by side in
    a tile."""
    sizes = *q.shape[1:], k.shape[1], plan.heads, plan.queries.size, plan.keys.size
    return _shapes(*sizes, plan.causal, plan.log_weight is not None, constants(plan))


@cache  # what follows from few numbers is made once, as at every launch the host would take longer than for the launch
def _shapes(heads, head_dim, key_heads, lists, rows, keys, causal, weighted, rule):
    (rule, rule_heads, choices), shared, pack = rule, heads // max(key_heads, lists), 1
    while shared % (2 * pack) == 0 and 2 * pack * rows <= ROWS:
        pack *= 2
    return {
        "HEADS": heads, "KEY_HEADS": key_heads, "LISTS": lists, "D": head_dim,
        "BLOCK_D": padded(head_dim), "ROWS": rows * pack, "KEYS": keys,
        "PACK": pack, "CAUSAL": causal, "WEIGHTED": weighted,
        "RULE": rule, "RULE_HEADS": rule_heads, "CHOICES": choices, "PADDED": next_power_of_2(choices),
    }  # fmt: skip


def _of_lists(kernel, q, tile):
    """What a kernel that walks lists of query blocks is compiled with."""
    return _over_keys(kernel, q.dtype, q.shape[2], tile["ROWS"], tile["KEYS"])


@cache
def _over_keys(kernel, dtype, head_dim, rows, keys):
    gather = max(1, _beside(kernel, dtype, head_dim, rows, KEYS) // keys)  # key blocks taken at once
    return {"GATHER": gather} | _options(kernel, dtype, head_dim, rows)


@cache
def _of_keys(dtype, head_dim, rows, keys):
    """What the kernel that walks lists of key blocks is compiled with, where tiles have so many rows elsewhere."""
    turn = _beside("keys", dtype, head_dim, keys, TURN)
    at_once = min(rows, turn)
    parts = {"ROWS": at_once, "PARTS": rows // at_once, "GATHER": turn // at_once}
    return parts | _options("keys", dtype, head_dim, keys)


def _one_warp(dtype, head_dim, rows):
    return rows <= ONE_WARP[0] and padded(head_dim) * dtype.itemsize <= ONE_WARP[1]


def _beside(kernel, dtype, head_dim, rows, most):
    """Rows taken at once beside a tile of so many."""
    return NARROW[kernel][0] if _one_warp(dtype, head_dim, rows) else most


def _options(kernel, dtype, head_dim, rows):
    options = {"PRECISION": "tf32x3" if dtype == torch.float32 else "tf32"}
    options |= {"num_warps": 8 if rows >= 128 else 4, "num_stages": STAGES[dtype.itemsize][kernel == "keys"]}
    if _one_warp(dtype, head_dim, rows):
        options |= {"num_warps": 1, "maxnreg": NARROW[kernel][1]}
    return options


def _tables(plan):
    queries, keys = plan.queries, plan.keys
    weight = queries.start if plan.log_weight is None else plan.log_weight
    return (
        queries.start, queries.length, queries.position, keys.start, keys.length, keys.position, keys.step,
        plan.row_ptr, plan.row_idx, weight,
    )  # fmt: skip


def _strides(*tensors):
    found = ()
    for x in tensors:
        found += x.stride()[:2]
    return found
