"""Block-sparse softmax attention across ranks: blocks are chosen where the queries are, and their keys come there.

Mean keys of all blocks are gathered, each rank chooses for its queries, and asks the owners for the blocks that it
does not hold; while they are under way it attends to those that it holds. Gradients go back the same way and are added
in rank order. Where ranks want most of what others hold, keys go round in a ring instead, without asking.
"""

from dataclasses import replace

import torch
from torch.autograd.function import once_differentiable

from longspan.attention.arguments import pick, resolve
from longspan.attention.block_parts import STRATEGIES, Part, block_parts
from longspan.attention.gather_rows import Ranks, gather_rows
from longspan.attention.recompute import keep, recall
from longspan.attention.selection import Selection
from longspan.kernels.merge import merge
from longspan.kernels.sparse import BlockPlan, choose


@torch.compiler.disable
def sparse_attention(
    q, k, v, *, selection, causal=True, scale=None, layout=None, group=None, strategy="auto", seq=None
):
    """softmax(scale * q k^T) v over the key blocks that `selection` chooses for every block of queries.

    q: [T, Hq, D]; k, v: [T, Hkv, D] with Hq a multiple of Hkv: this rank's tokens in the order of `layout`, one
    floating dtype; returns [T, Hq, D] in it; a query that sees nothing gets 0. fp64 is computed and sent in fp64, all
    else in fp32 where sums are made. scale defaults to D**-0.5. selection: TopBlocks, Hierarchical, Window, Radial,
    Antidiagonal, TokenTop, CompressedTop, BlockLists or a Selection of one's own; it gets no gradient. The result does
    not depend on the layout: blocks are those of documents. layout, group: a Layout and its process group (None: one
    rank, by default one document). strategy: "fetch", blocks by request; "ring", all keys of one rank after the other;
    "auto", by what is chosen. seq: a SequenceContext instead of those three. Raises ValueError, on all ranks, for what
    does not fit.
    """

    def check():
        if not isinstance(selection, Selection) or isinstance(selection, type):
            raise ValueError(
                f"selection is a {type(selection).__name__}; give one such as TopBlocks(...) or Window(...)"
            )
        if k.shape != v.shape:
            raise ValueError(f"k has shape {tuple(k.shape)} but v has {tuple(v.shape)}; they must be equal")
        if k.shape[2] != q.shape[2]:
            raise ValueError(f"k has shape {tuple(k.shape)}; its head_dim must be that of q, {tuple(q.shape)}")
        if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
            raise ValueError(f"k has {k.shape[1]} heads, which does not divide the {q.shape[1]} heads of q")

    options = causal, scale, getattr(selection, "signature", selection)
    seq = resolve(seq, layout, group, {"q": q, "k": k, "v": v}, check, options, sparse=strategy)
    strategy = pick(STRATEGIES, seq.parallel.sparse, "auto", "sparse strategy")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tables = selection.tables(seq, causal)
    coarse = selection.coarse(k, v, tables, lambda x: gather_rows(x, seq.parallel.group))
    return _Attention.apply(q, k, v, *coarse, selection, tables, causal, seq.parallel.group, strategy, scale)


class _Attention(torch.autograd.Function):
    """coarse_k, coarse_v: [rows, Hkv, D], keys and values that stand for many and are on every rank, or None."""

    @staticmethod
    def forward(ctx, q, k, v, coarse_k, coarse_v, selection, tables, causal, group, strategy, scale):
        kept = recall()
        if kept is None:
            parts = _choose(q, k, coarse_k, selection, tables, causal, strategy, group)
            kept = keep(attend(q, (k, v), (coarse_k, coarse_v), parts, group, scale))
        out, lse, parts, arrived = kept
        out = out.detach()
        ctx.save_for_backward(q, k, v, coarse_k, coarse_v, out, lse, *arrived)
        ctx.rest = parts, group, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, k, v, coarse_k, coarse_v, out, lse, *arrived = ctx.saved_tensors
        given = d_out.contiguous(), q, (k, v), (coarse_k, coarse_v), out, lse, arrived
        return *gradients_of(*given, *ctx.rest), *[None] * 6


def _choose(q, k, coarse_k, selection, tables, causal, strategy, group) -> list[Part]:
    with torch.no_grad():
        chosen = selection.choose(q, k, coarse_k, tables, Ranks(group))
        return parts_of(chosen, tables, causal, strategy, group)


def parts_of(chosen, tables, causal, strategy, group) -> list[Part]:
    """What to attend to, the local keys first, then coarse ones, then those of other ranks. chosen: what a selection
    chose of blocks of keys and of blocks of coarse keys, or None, and the rule of single queries where it has one."""
    fine, coarse, *rule = chosen
    parts = block_parts(fine, tables, causal, strategy, group)
    if coarse is not None:
        options = {"causal": causal, "log_weight": tables.coarse_weight, "ascending": True}
        parts.insert(1, Part(BlockPlan.of(tables.queries.local, tables.coarse_blocks, coarse, **options), coarse=True))
    return [replace(part, plan=replace(part.plan, rule=rule[0])) for part in parts] if rule else parts


def attend(q, local, coarse, parts, group, scale):
    """(out, lse, parts, keys and values that arrived, part after part). local, coarse: keys and values."""
    out, arrived = None, []
    coming = (None, *local)
    for number, part in enumerate(parts):
        pending, keys, values = coming
        if pending is not None:
            pending.wait()
            arrived += [keys, values]
        if number + 1 < len(parts):
            following = parts[number + 1]
            coming = (None, *coarse) if following.coarse else following.start(*local, group)
        form, _ = choose(q.device.type, q.dtype, q.shape[2], part.plan)
        if q.shape[0] and len(part.plan.keys):
            found = form.forward(q, keys, values, part.plan, scale)
            if out is None:
                out, lse = found
            else:
                out = out.to(_sum_dtype(q, parts))
                merge(out, lse, *found)
    if out is None:
        out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=_wide(q))
    return out.to(q.dtype), lse, parts, arrived


def gradients_of(d_out, q, local, coarse, out, lse, arrived, parts, group, scale):
    """Gradients of q, local keys and values, coarse keys and values."""
    dq, d_local, d_coarse, returning, arrived = None, None, (None, None), [], list(arrived)
    for number, part in enumerate(parts):
        keys, values = local if number == 0 else coarse if part.coarse else (arrived.pop(0), arrived.pop(0))
        if not q.shape[0] or not len(part.plan.keys):
            gradients = torch.zeros_like(keys), torch.zeros_like(values)
        else:
            form, _ = choose(q.device.type, q.dtype, q.shape[2], part.plan)
            found, *gradients = form.backward(d_out, None, q, keys, values, out, lse, part.plan, scale)
            dq = found.to(_sum_dtype(q, parts)) if dq is None else dq.add_(found)
        if number == 0:
            d_local = gradients
        elif part.coarse:
            d_coarse = gradients
        else:
            returning.append((part, *part.start_return(gradients, keys.dtype, group)))
    if returning:
        d_local = [x.to(_wide(q)) for x in d_local]
    for part, pending, returned in returning:
        pending.wait()
        part.add_returned(returned, d_local)
    dq = torch.zeros_like(q) if dq is None else dq.to(q.dtype)
    return dq, *(x.to(y.dtype) for x, y in zip(d_local, local)), *d_coarse


def _sum_dtype(x, parts):
    """What results of parts are added in: with two, their sum is rounded once in any case."""
    return _wide(x) if len(parts) > 2 else x.dtype


def _wide(x):
    return torch.promote_types(x.dtype, torch.float32)
