"""Block-sparse softmax attention across ranks: blocks are chosen where the queries are, and their keys come there.

Mean keys of all blocks are gathered, each rank chooses for its queries, and asks the owners for the blocks that it
does not hold; while they are under way it attends to those that it holds. Gradients go back the same way and are added
in rank order. Where ranks want most of what others hold, keys go round in a ring instead, without asking.
"""

from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from longspan.attention.arguments import pick, resolve
from longspan.attention.recompute import keep, recall
from longspan.kernels.merge import merge
from longspan.kernels.sparse import BlockPlan, Blocks, choose
from longspan.parallel.exchange import all_to_all_rows, group_rank, group_size, start_all_gather, start_exchange

STRATEGIES = ("fetch", "ring")
RING_SHARE = 0.5  # of all key blocks that ranks could ask for: above, "auto" takes the ring


@torch.compiler.disable
def sparse_attention(
    q, k, v, *, selection, causal=True, scale=None, layout=None, group=None, strategy="auto", seq=None
):
    """softmax(scale * q k^T) v over the key blocks that `selection` chooses for every block of queries.

    q: [T, Hq, D]; k, v: [T, Hkv, D] with Hq a multiple of Hkv: this rank's tokens in the order of `layout`, one
    floating dtype; returns [T, Hq, D] in it; a query that sees nothing gets 0. fp64 is computed and sent in fp64, all
    else in fp32 where sums are made. scale defaults to D**-0.5. selection: one of attention.selections; it gets no
    gradient. The result does not depend on the layout: blocks are those of documents. layout, group: a Layout and its
    process group (None: one rank, by default one document). strategy: "fetch", blocks by request; "ring", all keys of
    one rank after the other; "auto", by what is chosen. seq: a SequenceContext instead of those three. Raises
    ValueError, on all ranks, for what does not fit.
    """

    def check():
        if k.shape != v.shape:
            raise ValueError(f"k has shape {tuple(k.shape)} but v has {tuple(v.shape)}; they must be equal")
        if k.shape[2] != q.shape[2]:
            raise ValueError(f"k has shape {tuple(k.shape)}; its head_dim must be that of q, {tuple(q.shape)}")
        if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
            raise ValueError(f"k has {k.shape[1]} heads, which does not divide the {q.shape[1]} heads of q")

    options = causal, scale, selection
    seq = resolve(seq, layout, group, {"q": q, "k": k, "v": v}, check, options, sparse=strategy)
    strategy = pick(STRATEGIES, seq.parallel.sparse, "auto", "sparse strategy")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _Attention.apply(q, k, v, selection, causal, seq, strategy, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, selection, causal, seq, strategy, scale):
        kept = recall()
        if kept is None:
            tables = selection.tables(seq, causal)
            kept = keep(_forward(q, k, v, selection, tables, causal, strategy, seq.parallel.group, scale))
        out, lse, parts, fetched = kept
        out = out.detach()
        ctx.save_for_backward(q, k, v, out, lse, *fetched)
        ctx.rest = parts, seq.parallel.group, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        return *_backward(d_out.contiguous(), *ctx.saved_tensors[:5], ctx.saved_tensors[5:], *ctx.rest), *[None] * 5


@dataclass(frozen=True)
class Part:
    """Keys that arrive from some ranks, and what to attend to among them. sends: (peer, rows of the local keys, heads
    of those rows or None for all); receives: (peer, rows of the buffer). The local keys have neither."""

    plan: BlockPlan
    sends: tuple = ()
    receives: tuple = ()
    num_rows: int = 0
    one_head: bool = False

    def start(self, k, v, group):
        """(pending, keys, values): [rows, Hkv or 1, D]."""
        heads = 1 if self.one_head else k.shape[1]
        buffers = [x.new_empty(self.num_rows, heads, x.shape[2]) for x in (k, v)]
        sends = [(peer, _taken(x, rows, head)) for peer, rows, head in self.sends for x in (k, v)]
        receives = [(peer, x[rows]) for peer, rows in self.receives for x in buffers]
        return start_exchange(sends, receives, group), *buffers

    def start_return(self, gradients, dtype, group):
        """Starts sending gradients of the buffer back; (pending, what arrives for each of `sends`)."""
        sends = [(peer, x[rows].to(dtype)) for peer, rows in self.receives for x in gradients]
        counts = [rows.stop if isinstance(rows, slice) else len(rows) for _, rows, _ in self.sends]
        arriving = [tuple(x.new_empty(n, *x.shape[1:], dtype=dtype) for x in gradients) for n in counts]
        receives = [(peer, x) for (peer, _, _), pair in zip(self.sends, arriving) for x in pair]
        return start_exchange(sends, receives, group), arriving

    def add_returned(self, arriving, totals):
        for (_, rows, head), pair in zip(self.sends, arriving):
            for total, x in zip(totals, pair):
                if head is None:
                    total[rows] += x
                else:  # rows of a block that is asked for by several heads differ in their head
                    total.index_put_((rows, head), total[rows, head] + x[:, 0])


def _taken(x, rows, head):
    return x[rows].contiguous() if head is None else x[rows, head][:, None].contiguous()


def _forward(q, k, v, selection, tables, causal, strategy, group, scale):
    """(out, lse, parts, buffers of keys and values of all parts but the first)."""

    def gather(x):
        return start_all_gather(x, group).wait().flatten(0, 1)

    keys = tables.keys
    chosen = selection.choose(q, k, tables, gather)
    wanted = keys.of_block[chosen.clamp(min=0)].masked_fill((chosen < 0)[..., None], -1).flatten(2)
    parts = _parts(wanted, tables, causal, strategy, group)
    out, fetched = None, []
    coming = (None, k, v)
    for number, part in enumerate(parts):
        pending, part_keys, part_values = coming
        if pending is not None:
            pending.wait()
            fetched += [part_keys, part_values]
        if number + 1 < len(parts):
            coming = parts[number + 1].start(k, v, group)
        form, _ = choose(q.device.type, q.dtype, q.shape[2], part.plan)
        if q.shape[0] and len(part.plan.keys):
            found = form.forward(q, part_keys, part_values, part.plan, scale)
            if out is None:
                out, lse = found
            else:
                out = out.to(lse.dtype)
                merge(out, lse, *found)
    if out is None:
        wide = torch.promote_types(q.dtype, torch.float32)
        out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=wide)
    return out.to(q.dtype), lse, parts, fetched


def _backward(d_out, q, k, v, out, lse, fetched, parts, group, scale):
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
    returning = []
    for part, keys, values in zip(parts, (k, *fetched[::2]), (v, *fetched[1::2])):
        gradients = (torch.zeros_like(keys), torch.zeros_like(values))
        if q.shape[0] and len(part.plan.keys):
            form, _ = choose(q.device.type, q.dtype, q.shape[2], part.plan)
            found, *gradients = form.backward(d_out, None, q, keys, values, out, lse, part.plan, scale)
            dq += found
        if keys is k:
            dk += gradients[0]
            dv += gradients[1]
        else:
            returning.append((part, *part.start_return(gradients, k.dtype, group)))
    for part, pending, arriving in returning:
        pending.wait()
        part.add_returned(arriving, (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _parts(wanted, tables, causal, strategy, group) -> list[Part]:
    """wanted: int64 [Hkv, local query pieces, n], pieces of keys, -1 for none."""
    keys = tables.keys
    rank, world_size = group_rank(group), group_size(group)
    owner = torch.where(wanted < 0, -1, wanted // keys.width)
    here = torch.where(owner == rank, wanted % keys.width, -1)
    local = Part(BlockPlan.of(tables.queries.local, keys.local, here, causal=causal))
    if world_size == 1:
        return [local]
    heads = wanted.shape[0]
    asked = torch.zeros(heads, world_size * keys.width + 1, dtype=torch.bool, device=wanted.device)
    asked.scatter_(1, torch.where(owner == rank, -1, wanted).flatten(1) % asked.shape[1], True)
    asked = asked[:, :-1].unflatten(1, (world_size, -1))
    counts = start_all_gather(asked.sum((0, 2))[None], group).wait().flatten(0, 1).tolist()  # [who asks][whom]
    others = heads * (world_size - 1) * int((keys.lengths > 0).sum())
    if strategy == "ring" or (strategy == "auto" and sum(map(sum, counts)) > RING_SHARE * others):
        return [local, *_ring(wanted, owner, tables, causal, counts, rank, world_size)]
    return [local, _fetch(wanted, asked, tables, causal, counts, rank, group)]


def _fetch(wanted, asked, tables, causal, counts, rank, group) -> Part:
    """The blocks that are asked for, one row of the buffer per token and head: a block goes to whom its head's queries
    chose it for."""
    keys, (heads, world_size, width) = tables.keys, asked.shape
    ids = asked.transpose(0, 1).flatten().nonzero().flatten()  # by owner, then head, then piece
    mine, theirs = counts[rank], [row[rank] for row in counts]
    requests = all_to_all_rows(ids % (heads * width), mine, theirs, group)
    unit_owner, unit_head, unit_piece = ids // (heads * width), ids // width % heads, ids % width
    lengths = keys.lengths[unit_owner * width + unit_piece]
    first = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    # Rows to send, and to receive, from each peer: lengths are known to both.
    sent_head, sent_piece = requests // width, requests % width
    start, length = keys.local.start.long()[sent_piece], keys.local.length.long()[sent_piece]
    sends, receives, at, row = [], [], 0, 0
    bounds = first.tolist()
    for peer in range(world_size):
        if theirs[peer]:
            part = slice(at, at + theirs[peer])
            sends.append((peer, *_rows_of(start[part], length[part], sent_head[part])))
        at += theirs[peer]
        if mine[peer]:
            receives.append((peer, slice(bounds[row], bounds[row + mine[peer]])))
        row += mine[peer]
    unit = torch.full((heads, world_size * width), -1, dtype=torch.int64, device=wanted.device)
    unit[unit_head, unit_owner * width + unit_piece] = torch.arange(len(ids), device=wanted.device)
    columns = unit.gather(1, wanted.clamp(min=0).flatten(1)).view_as(wanted).masked_fill(wanted < 0, -1)
    blocks = _arrived(keys, unit_owner * width + unit_piece, first[:-1], lengths)
    listed = max(unit_head.bincount(minlength=heads).tolist())
    plan = BlockPlan.of(tables.queries.local, blocks, columns, causal=causal, listed=listed)
    return Part(plan, tuple(sends), tuple(receives), bounds[-1], one_head=True)


def _ring(wanted, owner, tables, causal, counts, rank, world_size) -> list[Part]:
    """All keys of one rank after the other, where anybody wants any of them."""
    keys, parts = tables.keys, []
    num_local = int(keys.local.length.sum())
    for step in range(1, world_size):
        source, target = (rank - step) % world_size, (rank + step) % world_size
        number = torch.arange(source * keys.width, (source + 1) * keys.width, device=wanted.device)
        lengths = keys.lengths[number]
        first = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        columns = torch.where(owner == source, wanted % keys.width, -1)
        plan = BlockPlan.of(tables.queries.local, _arrived(keys, number, first[:-1], lengths), columns, causal=causal)
        num_rows = int(first[-1]) if counts[rank][source] else 0
        sends = ((target, slice(0, num_local), None),) if counts[target][rank] else ()
        receives = ((source, slice(0, num_rows)),) if num_rows else ()
        parts.append(Part(plan, sends, receives, num_rows))
    return parts


def _arrived(keys, number, first, lengths) -> Blocks:
    """Pieces of other ranks where they lie in a buffer."""
    ones = torch.ones_like(first).int()
    return Blocks(keys.size, first.int(), lengths.int(), keys.positions[number].int(), ones, ones)


def _rows_of(start, length, head):
    """(rows, heads) of some runs of rows, one after another."""
    index = torch.repeat_interleave(torch.arange(len(start), device=start.device), length)
    inside = torch.arange(len(index), device=start.device) - (length.cumsum(0) - length)[index]
    return start[index] + inside, head[index]
