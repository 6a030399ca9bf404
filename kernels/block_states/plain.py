"""In plain PyTorch, for any device, dtype and block size. Tiles are [block, row, key head, heads of it, ...]."""

import torch

from longspan.kernels.block_states.maps import map_gradient, mapped
from longspan.kernels.wide import wide_dtype

BATCH_ELEMENTS = 1 << 24  # numbers of listed states taken at once


def sums(x, y, weight, blocks, feature_map: str, heads: int, dtype):
    """[blocks, heads, 1, K * V + K] in `dtype`: sums of phi(x) y^T and of phi(x) weight over the rows of each block and
    the heads that share one of `heads`. x: [T, Hx, K]; y: [T, Hx, V]; weight: [T, Hx], or None for ones."""
    tiles = _Tiles(blocks, heads)
    phi, y = mapped(tiles.of(x), feature_map) * tiles.there[..., None], tiles.of(y)
    weight = torch.ones_like(y[..., 0]) if weight is None else tiles.of(weight[..., None])[..., 0]
    products = torch.einsum("nrhgk,nrhgv->nhkv", phi, y).flatten(2)
    return torch.cat([products, torch.einsum("nrhgk,nrhg->nhk", phi, weight)], 2)[:, :, None].to(dtype)


def listed(total, total_row, states, plan, *, transposed: bool, heads: int, dtype):
    """total[total_row] less the states that a plan lists for a block of queries (transposed: of keys), [blocks, heads,
    1, n] in `dtype`. total: None for zero; total_row: -1 for zero. With a causal plan only pairs count of which all
    keys are before all queries: keys may not start before the queries and end after that."""
    count = len(plan.keys) if transposed else len(plan.queries)
    out = states.new_zeros(count, heads, *states.shape[2:], dtype=wide_dtype(states.dtype))
    if total is not None:
        out += total[total_row.clamp(min=0)].masked_fill((total_row < 0)[:, None, None, None], 0)
    for head in range(plan.heads):
        row = torch.repeat_interleave(torch.arange(len(plan.queries), device=out.device), plan.row_ptr[head].diff())
        column = plan.row_idx[head, plan.row_ptr[head, 0] :][: len(row)].long()
        if plan.causal:
            before = plan.keys.position[column] < plan.queries.position[row]
            row, column = row[before], column[before]
        source, target = (row, column) if transposed else (column, row)
        mine, theirs = (head * x // plan.heads for x in (heads, states.shape[1]))
        step = max(1, BATCH_ELEMENTS // states.shape[-1])
        for at in range(0, len(row), step):
            part = slice(at, at + step)
            out[:, mine].index_add_(0, target[part], -states[source[part], theirs].to(out.dtype))
    return out.to(dtype)


def output(sparse, q, k, v, states, totals, rows, queries, weight, bias, feature_map: str, inside: bool, lost: float):
    """sparse + o W^T + b, [T, H, V] in the dtype of `sparse`.

    rows: int32 [query blocks], the state of each, -1 for zero; totals: [rows, Hkv, K], the z of every state before
    blocks were taken out. inside: queries also see the keys of their own block up to their own.
    """
    read = _Read(q, k, v, states, totals, rows, queries, feature_map, inside, lost)
    out = read.tiles.of(sparse) + read.value @ weight.to(read.value.dtype).mT + bias
    return read.tiles.rows(out, sparse)


def query_gradients(d_out, q, k, v, states, totals, rows, queries, weight, feature_map: str, inside: bool, lost: float):
    """(dq [T, H, K], d_num [T, H, V], d_den [T, H], o [T, H, V]); see `output`."""
    read = _Read(q, k, v, states, totals, rows, queries, feature_map, inside, lost)
    d_value = read.tiles.of(d_out) @ weight.to(read.value.dtype)
    d_num = d_value * read.inverse[..., None]
    d_den = -(d_num * read.value).sum(-1)
    d_phi = torch.einsum("nrhgv,nhkv->nrhgk", d_num, read.state) + d_den[..., None] * read.normalizer[:, None, :, None]
    if inside:
        d_scores = torch.einsum("nrhgv,nshv->nhgrs", d_num, read.v) + d_den.permute(0, 2, 3, 1)[..., None]
        d_phi += torch.einsum("nhgrs,nshk->nrhgk", d_scores.masked_fill(~read.seen, 0), read.phi_k)
    dq = map_gradient(read.q, read.phi, d_phi, feature_map)
    wide = q.new_empty(0, dtype=wide_dtype(q.dtype))
    put = read.tiles.rows
    return put(dq, q), put(d_num, wide, v.shape[2]), put(d_den[..., None], wide, 1)[..., 0], put(read.value, v)


def whole_output(sparse, q, states, rows, blocks, bias, feature_map: str):
    """sparse + o W^T + b, as `output` without blocks taken out, from projected states: S W^T and z."""
    read = _ReadWhole(q, states, rows, blocks, feature_map)
    out = read.tiles.of(sparse) + torch.einsum("nrhgk,nhkv->nrhgv", read.unit, read.state) + bias
    return read.tiles.rows(out, sparse)


def whole_query_gradients(d_out, q, states, rows, blocks, feature_map: str, dtype):
    """(dq [T, H, K]; for every block the gradient of its projected S, and of z, [blocks, Hkv, 1, K * V + K] in `dtype`;
    the sum of d_out, [V])."""
    read = _ReadWhole(q, states, rows, blocks, feature_map)
    d_value = read.tiles.of(d_out)
    d_unit = torch.einsum("nrhgv,nhkv->nrhgk", d_value, read.state)
    along = (read.unit * d_unit).sum(-1, keepdim=True)
    d_phi = (d_unit - along * read.normalizer[:, None, :, None]) * read.inverse
    products = torch.einsum("nrhgk,nrhgv->nhkv", read.unit, d_value).flatten(2)
    sums = torch.cat([products, torch.einsum("nrhgk,nrhgl->nhk", read.unit, -along)], 2)[:, :, None].to(dtype)
    dq = read.tiles.rows(map_gradient(read.q, read.phi, d_phi, feature_map), q)
    return dq, sums, d_value.sum((0, 1, 2, 3))


def key_gradients(k, v, states, rows, blocks, feature_map: str, inside=None, onto=(None, None)):
    """(dk, dv) from the gradients of the states that the keys are in; rows: int32 [blocks], -1 for zero. inside: (q,
    d_num, d_den), where queries also see the keys of their own block. onto: contiguous dk and dv that these are added
    to, overwritten and returned, or None for new ones."""
    tiles = _Tiles(blocks, k.shape[1])
    k_tile, v_tile = tiles.of(k)[:, :, :, 0], tiles.of(v)[:, :, :, 0]
    phi = mapped(k_tile, feature_map)
    state, normalizer = _state(states, rows, k.shape[2], phi.dtype)
    dv = torch.einsum("nshk,nhkv->nshv", phi, state)
    d_phi = torch.einsum("nshv,nhkv->nshk", v_tile, state) + normalizer[:, None]
    if inside is not None:
        q, d_num, d_den = inside
        phi_q, d_num = mapped(tiles.of(q), feature_map), tiles.of(d_num)
        seen = tiles.seen()
        scores = torch.einsum("nrhgk,nshk->nhgrs", phi_q, phi).masked_fill(~seen, 0)
        d_den = tiles.of(d_den[..., None])[..., 0].permute(0, 2, 3, 1)[..., None]
        d_scores = (torch.einsum("nrhgv,nshv->nhgrs", d_num, v_tile) + d_den).masked_fill(~seen, 0)
        dv += torch.einsum("nhgrs,nrhgv->nshv", scores, d_num)
        d_phi += torch.einsum("nhgrs,nrhgk->nshk", d_scores, phi_q)
    dk = map_gradient(k_tile, phi, d_phi, feature_map)
    wide = k.new_empty(0, dtype=wide_dtype(k.dtype))
    found = (tiles.rows(x[:, :, :, None], wide, x.shape[-1], len(k)) for x in (dk, dv))
    return tuple(x if total is None else total.add_(x) for x, total in zip(found, onto))


class _Tiles:
    """Rows of blocks side by side. there: [blocks, size, 1, 1], which are rows of a block."""

    def __init__(self, blocks, heads):
        inside = torch.arange(blocks.size, device=blocks.start.device)
        there = inside < blocks.length[:, None]
        self.index = (blocks.start[:, None] + inside).long().masked_fill(~there, 0)
        self.heads, self.there, self.inside = heads, there[..., None, None], inside

    def of(self, x):
        """[T, H, D] -> tiles in at least fp32, zero where there is no row."""
        tile = x[self.index].unflatten(2, (self.heads, -1)).to(wide_dtype(x.dtype))
        return tile.masked_fill(~self.there[..., None], 0)

    def rows(self, tile, like, width=None, count=None):
        """Tiles -> [T, H, D] in the dtype of `like`, whose shape it has unless others are given."""
        there = self.there[..., 0, 0]
        count = int(there.sum()) if count is None else count
        out = like.new_zeros(count, tile.shape[2] * tile.shape[3], tile.shape[4] if width is None else width)
        out[self.index[there]] = tile.flatten(2, 3)[there].to(out.dtype)
        return out

    def seen(self):
        """[blocks, 1, 1, queries, keys]: keys of the block up to the query."""
        there = self.there[:, :, 0, 0]
        before = self.inside[:, None] >= self.inside
        return (there[:, :, None] & there[:, None] & before)[:, None, None]


class _Read:
    """What queries read of their states: `value` is o, `inverse` the inverse of the denominator, 0 where there is no
    weight."""

    def __init__(self, q, k, v, states, totals, rows, queries, feature_map, inside, lost):
        self.tiles = _Tiles(queries, k.shape[1])
        self.q = self.tiles.of(q)
        self.phi = mapped(self.q, feature_map)
        self.state, self.normalizer = _state(states, rows, q.shape[2], self.phi.dtype)
        totals = totals[rows.clamp(min=0)].masked_fill((rows < 0)[:, None, None], 0).to(self.phi.dtype)
        numerator = torch.einsum("nrhgk,nhkv->nrhgv", self.phi, self.state)
        denominator, total = (torch.einsum("nrhgk,nhk->nrhg", self.phi, z) for z in (self.normalizer, totals))
        if inside:
            self.v, self.seen = self.tiles.of(v)[:, :, :, 0], self.tiles.seen()
            self.phi_k = mapped(self.tiles.of(k)[:, :, :, 0], feature_map)
            scores = torch.einsum("nrhgk,nshk->nhgrs", self.phi, self.phi_k).masked_fill(~self.seen, 0)
            numerator += torch.einsum("nhgrs,nshv->nrhgv", scores, self.v)
            within = scores.sum(-1).permute(0, 3, 1, 2)
            denominator, total = denominator + within, total + within
        there = denominator > lost * total
        self.inverse = torch.where(there, 1 / torch.where(there, denominator, 1), 0)
        self.value = numerator * self.inverse[..., None]


class _ReadWhole:
    """unit: phi over its weight, `inverse` the inverse of that weight, 0 where there is none."""

    def __init__(self, q, states, rows, blocks, feature_map):
        self.tiles = _Tiles(blocks, states.shape[1])
        self.q = self.tiles.of(q)
        self.phi = mapped(self.q, feature_map)
        self.state, self.normalizer = _state(states, rows, q.shape[2], self.phi.dtype)
        weight = torch.einsum("nrhgk,nhk->nrhg", self.phi, self.normalizer)[..., None]
        there = (weight > 0) & self.tiles.there[..., None]
        self.inverse = torch.where(there, 1 / torch.where(there, weight, 1), 0)
        self.unit = self.phi * self.inverse


def _state(states, rows, key_size, dtype):
    """([blocks, heads, K, V], [blocks, heads, K]) of the rows, zero for -1."""
    picked = states[rows.clamp(min=0)].masked_fill((rows < 0)[:, None, None, None], 0).to(dtype)[:, :, 0]
    return picked[..., :-key_size].unflatten(-1, (key_size, -1)), picked[..., -key_size:]
