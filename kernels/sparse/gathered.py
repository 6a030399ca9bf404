"""In plain PyTorch, for any device, dtype and block size: the listed keys of query blocks gathered side by side."""

from functools import partial

import torch

from longspan.kernels.merge import merge
from longspan.kernels.sparse.plan import BlockPlan
from longspan.kernels.wide import wide_dtype

BATCH_ELEMENTS = 1 << 24  # scores of the query blocks taken at once


def forward(q, k, v, plan: BlockPlan, scale: float, onto=None, dtype=None, turns=None):
    """q: [Tq, Hq, D]; k, v: [Tk, Hkv, D] -> (out [Tq, Hq, D] in `dtype` or that of q, lse [Tq, Hq] in at least fp32).
    onto: (out, lse) of other keys, to which those of the plan come; they may be overwritten. turns: see fused.forward;
    here all are taken at once."""
    for _ in () if turns is None else turns[1]:
        pass
    dtype = dtype or q.dtype
    out, lse = torch.zeros_like(q, dtype=dtype), q.new_full(q.shape[:2], -torch.inf, dtype=wide_dtype(q.dtype))
    for batch in _batches(plan, q.shape[1], k.shape[1]):
        scores = batch.scores(q, k, scale)
        found = scores.logsumexp(-1, keepdim=True)
        weights = (scores - found.nan_to_num(neginf=0.0)).exp()
        batch.put(out, weights @ batch.keys(v))
        batch.put(lse[..., None], found)
    if onto is not None:
        merge(*onto, out, lse)
        out, lse = onto
    return out.to(dtype), lse


def row_sums(d_out, d_lse, out, lse, also=None):
    """Nothing that backward would not make by itself."""


def takes_states(q, k, plan: BlockPlan, scale: float) -> bool:
    """Whether `backward` takes states of linear attention, see kernels.sparse.fused."""
    return False


def backward(
    d_out, d_lse, q, k, v, out, lse, plan: BlockPlan, scale: float, rows=None, onto=None, dtype=None,
    shares=None, send=None, later=None,
):  # fmt: skip
    """(dq in `dtype` or that of q, dk, dv); d_lse: [Tq, Hq] or None. out and lse: of all keys that the queries see,
    also where the plan lists some of them. onto: dq of other keys, to which that of the plan is added. shares:
    Shares of the keys and values in gradients of their means, to be added to dk and dv. send: called with dk and dv
    when they are there, or None. later: gets a function that fills dq, to be called once `onto` is there, or None."""
    wide = wide_dtype(q.dtype)
    dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
    delta = (d_out.to(wide) * out.to(wide)).sum(-1)
    delta = (delta if d_lse is None else delta - d_lse.to(wide))[..., None]
    lse = lse.to(wide)[..., None].nan_to_num(neginf=0.0)
    for batch in _batches(plan, q.shape[1], k.shape[1]):
        weights = (batch.scores(q, k, scale) - batch.queries(lse)).exp()
        d_rows = batch.queries(d_out)
        d_scores = weights * (d_rows @ batch.keys(v).mT - batch.queries(delta)) * scale
        batch.put(dq, d_scores @ batch.keys(k))
        batch.add(dk, d_scores.mT @ batch.queries(q))
        batch.add(dv, weights.mT @ d_rows)
    if shares is not None:
        shares.add(dk, dv, plan.keys)
    dk, dv = dk.to(k.dtype), dv.to(v.dtype)
    if send is not None:
        send(dk, dv)
    made = dq.to(dtype or q.dtype)
    if onto is not None:
        make = partial(torch.add, dq, onto, out=made)
        make() if later is None else later.append(make)
    return made, dk, dv


class _Batch:
    """Some query blocks of one list head with their keys. Tiles are [block, key head, heads of it x row, ...]."""

    def __init__(self, plan, blocks, columns, head, heads, key_heads):
        groups = max(plan.heads, key_heads)
        first, last = head * groups // plan.heads, (head + 1) * groups // plan.heads
        self.key_heads = slice(first * key_heads // groups, (last - 1) * key_heads // groups + 1)
        self.heads = slice(first * heads // groups, last * heads // groups)
        self.groups = self.key_heads.stop - self.key_heads.start
        queries, keys = plan.queries, plan.keys
        inside = torch.arange(queries.size, device=blocks.device)
        self.rows = (queries.start[blocks, None] + inside).long()
        self.there = inside < queries.length[blocks, None]
        listed = columns >= 0
        columns = columns.clamp(min=0)
        place = torch.arange(keys.size, device=blocks.device)
        self.key_rows = (keys.start[columns, None] + place).long().flatten(1)
        seen = (listed[..., None] & (place < keys.length[columns, None])).flatten(1)
        self.key_rows.masked_fill_(~seen, 0)
        self.rows.masked_fill_(~self.there, 0)
        seen = seen[:, None, None]  # [block, head or 1, row or 1, key]
        at = (keys.position[columns, None] + place * keys.step[columns, None]).flatten(1)
        if plan.causal:
            seen = seen & (at[:, None] <= (queries.position[blocks, None] + inside)[..., None])[:, None]
        if plan.rule is not None:
            allowed = plan.rule.seen(self.rows, at, keys.size)
            if allowed.shape[1] > 1:
                allowed = allowed.repeat_interleave(heads // allowed.shape[1], 1)[:, self.heads]
            seen = seen & allowed
        bias = torch.zeros(seen.shape, dtype=torch.float64, device=blocks.device)
        if plan.log_weight is not None:
            bias += plan.log_weight[columns].repeat_interleave(keys.size, 1)[:, None, None]
        bias.masked_fill_(~seen, -torch.inf)
        # [block, key head or 1, head of it or 1, row or 1, key]
        self.bias = bias[:, None] if seen.shape[1] == 1 else bias.unflatten(1, (self.groups, -1))

    def scores(self, q, k, scale):
        scores = self.queries(q) @ self.keys(k).mT * scale
        return (scores.unflatten(2, (-1, self.rows.shape[1])) + self.bias.to(scores.dtype)).flatten(2, 3)

    def queries(self, x):
        """[T, Hq, D] -> [block, key head, heads of it x row, D] in at least fp32, zero where there is no row."""
        tile = x[:, self.heads][self.rows].masked_fill(~self.there[..., None, None], 0)
        return tile.unflatten(2, (self.groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3).to(wide_dtype(x.dtype))

    def keys(self, x):
        """[T, Hkv, D] -> [block, key head, key, D] in at least fp32."""
        return x[:, self.key_heads][self.key_rows].transpose(1, 2).to(wide_dtype(x.dtype))

    def put(self, target, tile):
        """Tiles of queries into [T, Hq, D]."""
        tile = tile.unflatten(2, (-1, self.rows.shape[1])).permute(0, 3, 1, 2, 4).flatten(2, 3)
        target[:, self.heads][self.rows[self.there]] = tile[self.there].to(target.dtype)

    def add(self, target, tile):
        """Tiles of keys, added into [T, Hkv, D]."""
        target[:, self.key_heads].index_add_(0, self.key_rows.flatten(), tile.transpose(1, 2).flatten(0, 1))


def _batches(plan, heads, key_heads):
    counts = plan.row_ptr.diff(dim=-1).long()
    for head in range(plan.heads):
        order = counts[head].argsort(descending=True)  # blocks with lists of like length together
        order = order[: int((counts[head] > 0).sum())]
        at = 0
        while at < len(order):
            most = int(counts[head, order[at]])
            size = plan.queries.size * most * plan.keys.size * heads // max(plan.heads, 1)
            blocks = order[at : at + max(1, BATCH_ELEMENTS // size)]
            place = torch.arange(most, device=order.device)
            entries = plan.row_ptr[head, blocks, None].long() + place
            inside = place < counts[head, blocks, None]
            columns = plan.row_idx[head][entries.masked_fill(~inside, 0)].masked_fill(~inside, -1)
            yield _Batch(plan, blocks, columns, head, heads, key_heads)
            at += len(blocks)
