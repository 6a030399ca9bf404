"""Sparse attention by its definition, token by token: what each selection lets a query see, and the full matrix of it.

Plain differentiable torch on whole tensors, documents laid end to end; called with fp64, autograd gives the gradients.
"""

import torch
from selection_oracle import SEEN

from longspan.attention import Hierarchical
from longspan.kernels.sparse import Shares, Tree


def sparse_attention(q, k, v, lengths, *, selection, causal=True):
    """q: [T, H, D]; k, v: [T, G, D]. Blocks are chosen from detached tensors."""
    matrix = hierarchy_matrix if isinstance(selection, Hierarchical) else full_matrix
    return matrix(q, k, v, lengths, selection=selection, causal=causal)


def seen_by(q, k, causal, selection, document=0):
    """bool [query heads, T, T]: what queries of one document see of its keys."""
    if type(selection) in SEEN:
        return SEEN[type(selection)](q, k, causal, selection, document)
    return blocks_seen(q, k, causal, selection)


def blocks_seen(q, k, causal, selection):
    """[query heads, T, T] of one document, token by token from the definition in TopBlocks."""
    length, per_key = q.shape[0], q.shape[1] // k.shape[1]
    query_starts, key_starts = (range(0, length, n) for n in (selection.query_block, selection.key_block))
    seen = torch.zeros(q.shape[1], length, length, dtype=torch.bool)
    for key_head in range(k.shape[1]):
        group = slice(key_head * per_key, (key_head + 1) * per_key)
        means = [k[j : j + selection.key_block, key_head].mean(0) for j in key_starts]
        for i in query_starts:
            stop = min(i + selection.query_block, length)
            past = [n for n, j in enumerate(key_starts) if not causal or j + selection.key_block <= i]
            kept = set()
            if past:
                router = q[i - selection.query_block : i, group] if causal else q[i:stop, group]
                scores = {n: (router.mean((0, 1)) @ means[n]).item() for n in past}
                forced = [*past[: selection.first], *past[len(past) - selection.recent :]]
                scores |= dict.fromkeys(forced, torch.inf)
                count = selection.keep if selection.keep >= 1 else max(1, int(selection.keep * len(past)))
                kept |= set(sorted(past, key=scores.get, reverse=True)[:count])
            if causal:
                kept |= {n for n, j in enumerate(key_starts) if j < stop and j + selection.key_block > i}
            for n in kept:
                j = key_starts[n]
                seen[group, i:stop, j : j + selection.key_block] = True
    return seen.tril() if causal else seen


def full_matrix(q, k, v, lengths, *, selection, causal=True):
    out, start = [], 0
    for document, length in enumerate(lengths):
        rows = slice(start, start + length)
        seen = seen_by(q[rows].detach(), k[rows].detach(), causal, selection, document)
        k_rows, v_rows = (x[rows].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("thd,shd->hts", q[rows], k_rows) * q.shape[-1] ** -0.5
        blind = ~seen.any(-1, keepdim=True)  # sees nothing, gets 0
        weights = scores.masked_fill(~seen & ~blind, -torch.inf).softmax(-1).masked_fill(blind, 0)
        out.append(torch.einsum("hts,shd->thd", weights, v_rows))
        start += length
    return torch.cat(out)


def hierarchy_seen(q, k, causal, selection):
    """(fine [query heads, T, T], [(level, row, log weight)], coarse [query heads, T, rows]) of one document."""
    B, length, per_key = selection.block, q.shape[0], q.shape[1] // k.shape[1]
    rows = {n: range(-(-length // B**n)) for n in range(1, selection.levels + 1)}
    spans = {(n, r): (r * B**n, min((r + 1) * B**n, length)) for n in rows for r in rows[n]}
    names = list(spans)
    fine = torch.zeros(q.shape[1], length, length, dtype=torch.bool)
    coarse = torch.zeros(q.shape[1], length, len(names), dtype=torch.bool)
    for key_head in range(k.shape[1]):
        group = slice(key_head * per_key, (key_head + 1) * per_key)

        def query(n, r):  # the mean that chooses for a row
            start, stop = spans[n, r - 1 if causal else r]
            return q[start:stop, group].mean((0, 1))

        def best(n, r, candidates):
            candidates = [c for c in candidates if not causal or c < r]
            if not candidates:
                return []
            means = {c: k[slice(*spans[n, c]), key_head].mean(0) for c in candidates}
            router = query(n, r)
            return sorted(candidates, key=lambda c: (router @ means[c]).item(), reverse=True)[: selection.keep]

        top = selection.levels
        chosen = {(top, r): best(top, r, rows[top]) for r in rows[top]}
        for n in range(top - 1, 0, -1):
            for r in rows[n]:
                parents = [*chosen[n + 1, r // B], *([r // B] if causal else [])]
                chosen[n, r] = best(n, r, [c for c in rows[n] if c // B in parents])
        for t in range(length):
            i = t // B
            for block in [*chosen[1, i], *([i] if causal else [])]:
                fine[group, t, block * B : (block + 1) * B] = True
            for index, (n, r) in enumerate(names):
                if n == top:
                    listed = True
                else:
                    above = i // B**n  # the row of level n + 1 that t is in
                    listed = r // B in [*chosen[n + 1, above], *([above] if causal else [])]
                coarse[group, t, index] = listed and (not causal or (r + 1) * B**n <= t)
    return fine.tril() if causal else fine, spans, coarse


def hierarchy_matrix(q, k, v, lengths, *, selection, causal=True):
    """Fine keys and means of rows side by side; a mean's weight is its number of tokens."""
    out, start = [], 0
    for length in lengths:
        rows = slice(start, start + length)
        fine, spans, coarse = hierarchy_seen(q[rows].detach(), k[rows].detach(), causal, selection)
        seen = torch.cat([fine, coarse], 2)
        heads = q.shape[1] // k.shape[1]
        k_rows, v_rows = (
            torch.cat([x[rows], *(x[rows][a:b].mean(0, keepdim=True) for a, b in spans.values())]).repeat_interleave(
                heads, 1
            )
            for x in (k, v)
        )
        counts = [1.0] * length + [float(stop - start) for start, stop in spans.values()]
        weight = torch.tensor(counts, dtype=torch.float64).log().to(q.dtype)
        scores = torch.einsum("thd,shd->hts", q[rows], k_rows) * q.shape[-1] ** -0.5 + weight
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out.append(torch.einsum("hts,shd->thd", weights, v_rows))
        start += length
    return torch.cat(out)


def linear_branch(q, k, v, weight, bias, lengths, *, over, feature_map, selection, causal=True):
    """SLA's linear branch by its full matrix, projected: over all that the mask lets a query see, or over the blocks
    that could have been chosen and were not. Added to sparse_attention it gives the layer."""
    out, start = [], 0
    for length in lengths:
        rows = slice(start, start + length)
        if over == "all":
            counted = torch.ones(length, length, dtype=torch.bool)
            counted = counted.tril() if causal else counted
        else:
            counted = ~blocks_seen(q[rows].detach(), k[rows].detach(), causal, selection)
            for t in range(length if causal else 0):
                first = t // selection.query_block * selection.query_block
                counted[:, t, first // selection.key_block * selection.key_block :] = False
        heads = q.shape[1] // k.shape[1]
        phi_k, v_rows = (x.repeat_interleave(heads, 1) for x in (feature(k[rows], feature_map), v[rows]))
        weights = torch.einsum("thk,shk->hts", feature(q[rows], feature_map), phi_k) * counted
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1)
        out.append(torch.einsum("hts,shd->thd", weights, v_rows) @ weight.T + bias)
        start += length
    return torch.cat(out)


def feature(x, name):
    if name == "softmax":
        return x.softmax(-1)
    return torch.nn.functional.elu(x) + 1 if name == "elu1" else x


def random_lists(queries, keys, heads, most, causal, generator):
    """[heads, M, most]: 0 to `most` key blocks of the same document, under `causal` none of the future."""
    chosen = torch.full((heads, len(queries), most), -1)
    for head in range(heads):
        for i in range(len(queries)):
            last = queries.position[i] + queries.length[i] - 1
            allowed = (keys.document == queries.document[i]) & ((keys.position <= last) if causal else True)
            allowed = allowed.nonzero().flatten()
            count = int(torch.randint(0, min(most, len(allowed)) + 1, (), generator=generator))
            chosen[head, i, :count] = allowed[torch.randperm(len(allowed), generator=generator)[:count]]
    return chosen


def make_shares(blocks, heads, dim):
    """(Shares of a tree of three levels, what every token gets of keys, of values)."""
    generator, n = torch.Generator().manual_seed(5), len(blocks)
    counts = n, -(-n // 3), 2
    up = [n + i // 3 for i in range(n)] + [n + counts[1] + i % 2 for i in range(counts[1])] + [-1, -1]
    size = torch.randint(1, 9, (sum(counts),), generator=generator).int()
    grads = [torch.randn(sum(counts), heads, dim, generator=generator) for _ in range(2)]
    wanted = []
    for grad in grads:
        rows = [(i, up[i], up[up[i]]) for i in range(n)]
        each = [sum(grad[row].double() / int(size[row]) for row in way) for way in rows]
        wanted.append(torch.cat([x.expand(int(k), -1, -1) for x, k in zip(each, blocks.length)]))
    return Shares(Tree(size, torch.tensor(up, dtype=torch.int32), 3), *grads), *wanted
