"""Block-sparse softmax attention across ranks: blocks are chosen where the queries are, and their keys come there.

Mean keys of all blocks are gathered, each rank chooses for its queries, and asks the owners for the blocks that it
does not hold; while they are under way it attends to those that it holds. Gradients go back the same way and are added
in rank order. Where ranks want most of what others hold, keys go round in a ring instead, without asking.
"""

from functools import partial

import torch
from torch.autograd.function import once_differentiable

from longspan.attention.arguments import pick, resolve, without_autocast
from longspan.attention.block_parts import STRATEGIES, Part
from longspan.attention.gather_rows import Ranks, gather_rows
from longspan.attention.linear_branch import Branch, LinearBranch
from longspan.attention.outline import Outline
from longspan.attention.outline.sparse import outlined_sparse
from longspan.attention.ranges import SPARSE, of_component
from longspan.attention.recompute import keep, keeping, recall, recomputing
from longspan.attention.requests import Asked, Request, block_parts
from longspan.attention.selection import selects
from longspan.attention.selections import TopBlocks
from longspan.attention.shared_requests import stage
from longspan.attention.sparse_estimate import Estimate
from longspan.kernels.sparse import BlockPlan, add_shares, choose
from longspan.kernels.wide import wide_dtype


@torch.compiler.disable
@of_component(SPARSE)
def sparse_attention(
    q, k, v, *, selection, linear=None, causal=True, scale=None, layout=None, group=None, strategy="auto", seq=None
):
    """softmax(scale * q k^T) v over the key blocks that `selection` chooses for every block of queries.

    q: [T, Hq, D]; k, v: [T, Hkv, D] with Hq a multiple of Hkv: this rank's tokens in the order of `layout`, one
    floating dtype; returns [T, Hq, D] in it; a query that sees nothing gets 0. fp64 is computed and sent in fp64, all
    else in fp32 where sums are made. scale defaults to D**-0.5. selection: TopBlocks, Hierarchical, Window, Radial,
    Antidiagonal, TokenTop, CompressedTop, BlockLists or a Selection of one's own; it gets no gradient. linear: a
    LinearBranch to add, with TopBlocks. The result does not depend on the layout: blocks are those of documents.
    layout, group: a Layout and its process group (None: one rank, by default one document). strategy: "fetch", blocks
    by request; "ring", all keys of one rank after the other; "auto", by what is chosen. seq: a SequenceContext instead
    of those three. Raises ValueError, on all ranks, for what does not fit.
    """

    def check():
        if not selects(selection):
            raise ValueError(
                f"selection is a {type(selection).__name__}; give one such as TopBlocks(...) or Window(...)"
            )
        if k.shape != v.shape:
            raise ValueError(f"k has shape {tuple(k.shape)} but v has {tuple(v.shape)}; they must be equal")
        if k.shape[2] != q.shape[2]:
            raise ValueError(f"k has shape {tuple(k.shape)}; its head_dim must be that of q, {tuple(q.shape)}")
        if k.shape[1] < 1 or q.shape[1] % k.shape[1]:
            raise ValueError(f"k has {k.shape[1]} heads, which does not divide the {q.shape[1]} heads of q")
        if linear is not None:
            if not isinstance(linear, LinearBranch) or not isinstance(selection, TopBlocks):
                raise ValueError("linear is a LinearBranch beside TopBlocks, or None")
            linear.check(q, k, selection, causal)

    options = causal, scale, getattr(selection, "signature", selection), getattr(linear, "options", None)
    tensors = {"q": q, "k": k, "v": v}
    if isinstance(linear, LinearBranch):
        tensors |= {"linear.q": linear.q, "linear.k": linear.k}
    seq = resolve(seq, layout, group, tensors, check, options, sparse=strategy)
    if isinstance(seq, Outline):
        return outlined_sparse(seq, q, k, v, selection, linear, causal)
    strategy = pick(STRATEGIES, seq.parallel.sparse, "auto", "sparse strategy")
    if strategy == "auto" and seq.parallel.world_size > 1:
        strategy = Estimate(q.shape[1], *k.shape[1:], k.itemsize, seq.parallel.topology)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tables = selection.tables(seq, causal)
    group, peers, staged = seq.parallel.group, seq.parallel.peers, None
    if not recomputing():  # first: keys are copied while those that stand for many are made and gathered
        staged = stage(k.detach(), v.detach(), tables.keys, strategy, peers)
    coarse = selection.coarse(k, v, tables, lambda x: gather_rows(x, group, peers))
    branch, own = None, (None,) * 4
    if linear is not None:
        branch = Branch(linear, selection, causal, seq)
        own = linear.weight, linear.bias, linear.q, linear.k
    with without_autocast(q.device.type):
        return _Attention.apply(
            q, k, v, *coarse, *own, branch, selection, tables, causal, group, peers, strategy, staged, scale
        )


class _Attention(torch.autograd.Function):
    """coarse_k, coarse_v: [rows, Hkv, D], keys and values that stand for many and are on every rank, or None. weight,
    bias, own_q, own_k: those of the linear branch; without own_q and own_k it takes q and k."""

    @staticmethod
    def forward(
        ctx, q, k, v, coarse_k, coarse_v, weight, bias, own_q, own_k, branch, selection, tables, causal, group,
        peers, strategy, staged, scale,
    ):  # fmt: skip
        kept = recall()
        own = (q if own_q is None else own_q, k if own_k is None else own_k)
        if branch is not None:
            sums, pending = branch.start(own[1], v, travels=kept is None)
        if kept is None:
            coarse = coarse_k, coarse_v
            apart = branch is not None and branch.rest  # whose states are of local blocks
            given = _choose(q, k, coarse[0], selection, tables, causal, strategy, group, peers, staged, apart)
            out, lse, parts, arrived = attend(q, (k, v), coarse, *given, group, scale)
            entry = None if branch is None else branch.finish(pending, sums)
            if keeping():  # this rank's own keys are made again with the layer
                way = _by_request(parts)
                keep((out, lse, parts, way.foreign(arrived) if way else arrived, entry))
        else:
            out, lse, parts, arrived, entry = kept
            way = _by_request(parts)
            arrived = way.whole(arrived, k, v) if way else arrived
        result, states = out.detach(), (None, None)
        if branch is not None:
            tensors = [(own[1], v), *zip(arrived[::2], arrived[1::2])]
            listed = zip(parts, tensors, strict=True) if branch.rest else ()
            states = branch.states(*own, v, weight, sums, entry, [(part, *x) for part, x in listed])
            result = branch.output(out, *own, v, *states, weight, bias)
        saved = coarse_k, coarse_v, weight, bias, own_q, own_k, *states
        ctx.save_for_backward(q, k, v, out.detach(), lse, *saved, *arrived)
        ctx.rest = parts, group, scale, getattr(tables, "owned", None), branch
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, k, v, out, lse, coarse_k, coarse_v, weight, bias, own_q, own_k, states, totals, *arrived = ctx.saved_tensors
        parts, group, scale, owned, branch = ctx.rest
        d_out, d_branch, work, meanwhile = d_out.contiguous(), [None] * 4, None, None
        if branch is not None:
            mine = q if own_q is None else own_q, k if own_k is None else own_k, v
            d_own_q, d_weight, d_bias, work = branch.start_backward(d_out, *mine, states, totals, weight)
            d_branch[:2] = d_weight.to(weight.dtype), d_bias.to(bias.dtype)

            def meanwhile(dk, dv):
                d_own_k, dv = branch.gradients(parts[0], *mine[1:], work, (dk if own_k is None else None, dv))
                if own_k is None:
                    return d_own_k, dv
                d_branch[2:] = d_own_q.to(own_q.dtype), d_own_k.to(own_k.dtype)
                return dk, dv

        given = q, (k, v), (coarse_k, coarse_v), out, lse, arrived, parts, group, scale
        onto = d_own_q if branch and own_q is None else None
        states = branch is not None and own_k is None and branch.gives_states(k, v)
        gradients = gradients_of(d_out, *given, owned, branch, work, onto, meanwhile, states)
        inputs = q, k, v, coarse_k, coarse_v
        gradients = [_as(x, like) for x, like in zip(gradients, inputs, strict=True)]
        return *gradients, *d_branch, *[None] * 9


def _by_request(parts):
    """How blocks that were asked for came, or None where there are none."""
    return next((part.way for part in parts if isinstance(part.way, Asked)), None)


def _choose(q, k, coarse_k, selection, tables, causal, strategy, group, peers, staged, apart):
    """What `attend` takes: parts that are here, and what follows. Without gradients, as all in _Attention."""
    chosen = selection.choose(q, k, coarse_k, tables, Ranks(group, peers))
    return parts_of(chosen, tables, causal, strategy, group, apart, peers, staged)


def parts_of(chosen, tables, causal, strategy, group, apart=False, peers=None, staged=None):
    """(parts of coarse keys and then of local ones, what follows of other ranks: see block_parts). chosen: what a
    selection chose of blocks of keys and of blocks of coarse keys, or None, and the rule of single queries where it has
    one; apart: local blocks are a part of their own; peers: the group's PeerMemory or None; staged: see block_parts."""
    fine, coarse, *rule = chosen
    full = getattr(tables, "full", False)
    here, dense = [], getattr(tables, "dense", None)
    how = {"full": full, "apart": apart, "alone": dense is None, "peers": peers, "staged": staged}
    local, remote = block_parts(fine, tables, causal, strategy, group, *rule, **how)
    if coarse is not None:
        options = {"causal": causal, "log_weight": tables.coarse_weight, "ascending": True, "full": full}
        plan = BlockPlan.of(dense.queries, tables.coarse_blocks, coarse, **options)
        entries = coarse.shape[1] * (coarse.shape[2] - tables.always.shape[1])
        dense = plan.beside(dense, tables.chosen_blocks, entries, tables.chunk)
    if dense is not None:
        here.append(Part(dense, coarse=True))
    return [*here, *local], remote


def attend(q, local, coarse, here, remote, group, scale):
    """(out, lse, parts, keys and values that arrived, part after part). local, coarse: keys and values; here, remote:
    what parts_of gives. What is here is queued before the host waits for anything."""
    found, arrived, parts, (tokens, _, head_dim), dtype, device_type = None, [], [], q.shape, q.dtype, q.device.type

    def add(part, keys, values, turns=None):
        nonlocal found
        parts.append(part)
        if not tokens or not len(part.plan.keys):
            return
        form, _ = choose(device_type, dtype, head_dim, part.plan)
        count = len(here) + (len(remote) if isinstance(remote, list) else 1)
        made_in = dtype if len(parts) == count else _sum_dtype(q, count)
        found = form.forward(q, keys, values, part.plan, scale, found, made_in, turns)

    request = remote if isinstance(remote, Request) else None
    pending = remote[0].way.start(*local, group) if isinstance(remote, list) and remote else None
    for part in here:
        add(part, *_keys_of(part, local, coarse))
    if request is not None:
        more, remote, pending = request.parts(*local)
        here = [*here, *more]
        for part in more:
            add(part, *local)
    for number, part in enumerate(remote, 1):
        turns = (part.way.turns, pending.waits()) if part.way.turns > 1 else None
        tensors = pending.wait() if turns is None else pending.result
        if number < len(remote):
            pending = remote[number].way.start(*local, group)
        arrived += tensors
        add(part, *tensors, turns)
        if turns is not None:
            pending.wait()  # where nothing was attended to
    if request is not None:
        parts, arrived = request.settle(parts, arrived)
    if found is None:
        found = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf, dtype=wide_dtype(q.dtype))
    return _as(found[0], q), found[1], parts, arrived


def gradients_of(
    d_out, q, local, coarse, out, lse, arrived, parts, group, scale, owned=None, branch=None, work=None, dq=None,
    meanwhile=None, states=False,
):  # fmt: skip
    """Gradients of q, local keys and values, in at least fp32 where several are added, and of coarse keys and values.
    What arrived comes first: its gradients are on their way back while those of what is here are made. owned: of
    coarse rows whose gradients go on to the local keys and values, which come last; None where they are returned. work:
    of the branch, or None; its gradients of what arrived go back with the others. dq: what gradients of queries are
    added to, or None; meanwhile: adds to those of local keys and values while others are on their way back, or None.
    states: whether the branch's own may be added where attention's are made, instead."""
    here, remote = ([part for part in parts if part.remote == there] for there in (False, True))
    sums, returning, passing, arrived = {}, [], None, list(zip(arrived[::2], arrived[1::2], strict=True))
    later = [] if owned is not None and remote else None  # means' gradients travel beside those of queries
    own, blocks, d_coarse = None, None, (None, None)
    (tokens, _, head_dim), dtype, device_type = q.shape, q.dtype, q.device.type

    def send(part, keys, values, *gradients):
        if work is not None and branch.rest and keys.shape[0]:
            gradients = branch.part_gradients(part, keys, values, work, gradients)
        returning.insert(0, (part.way, part.way.start_return(gradients, keys.dtype, group)))

    for number, part in enumerate(remote[::-1] + here, 1):
        keys, values = arrived.pop() if part.remote else _keys_of(part, local, coarse)
        shares, plan, is_local = None, part.plan, not (part.remote or part.coarse)
        if owned is not None and is_local:  # the last part: all means have their gradients
            passing = owned.start(d_coarse, group)
            if not remote:
                shares, passing = owned.shares(passing), None
        if not tokens or not len(plan.keys):
            gradients = [torch.zeros_like(x) for x in (keys, values)]
            if shares is not None:
                add_shares(gradients, plan.keys, shares)
            if part.remote:
                send(part, keys, values, *gradients)
        else:
            form, _ = choose(device_type, dtype, head_dim, plan)
            if len(parts) > 1 and form not in sums:
                coarse_queries = next((x.plan.queries for x in parts if x.coarse), None)
                sums[form] = form.row_sums(d_out, None, out, lse, coarse_queries)
            made_in, given = dtype if number == len(parts) else _sum_dtype(q, len(parts)), None
            more = {"rows": sums.get(form), "onto": dq, "shares": shares, "dtype": made_in, "later": later}
            if part.remote:
                more["send"] = partial(send, part, keys, values)
            if states and is_local and form.takes_states(q, keys, plan, scale):
                more["states"] = given = branch.key_states(work)
                meanwhile = None
            dq, *gradients = form.backward(d_out, None, q, keys, values, out, lse, plan, scale, **more)
            if given is not None:
                branch.lonely_gradients(part, keys, values, given, gradients)
        if is_local:
            own, blocks = gradients, plan.keys
        if part.coarse:
            d_coarse = gradients
    if own is None and owned is not None:
        passing = owned.start(d_coarse, group)
    for make_queries in later or ():
        make_queries()
    if meanwhile is not None:
        own = meanwhile(*own or (None, None))
    shares = None if passing is None else owned.shares(passing)
    for way, pending in returning:
        own = way.add_returned(pending.wait(), own, blocks, shares)
        shares = None
    return [torch.zeros_like(q) if dq is None else dq, *own, *(d_coarse if owned is None else (None, None))]


def _keys_of(part, local, coarse):
    """Keys and values of a part that is here."""
    return coarse if part.coarse else local


def _as(gradient, like):
    """None stays None."""
    return gradient if gradient is None or gradient.dtype == like.dtype else gradient.to(like.dtype)


def _sum_dtype(x, num_parts):
    """What results of parts are added in: with two, their sum is rounded once in any case."""
    return wide_dtype(x.dtype) if num_parts > 2 else x.dtype
