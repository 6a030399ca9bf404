"""Linear attention by all-to-all, what state passing is measured against: every rank gets all tokens of some heads."""

from itertools import chain

import torch
import torch.distributed as dist

from longspan.attention import linear_attention
from longspan.parallel import SequenceParallel
from longspan.parallel.layout import Layout

HEAD_PARALLEL = "all_to_all"  # its name beside the transports of states


class HeadParallel:
    """Stands in for `linear_attention` on the tokens that `layout` gives this rank: tokens to heads, one-rank linear
    attention over the whole sequence, back. The sequence stays in the order in which the ranks hold it, as spans; the
    caller's `seq` is the one of `layout`."""

    def __init__(self, layout: Layout, group, device: torch.device):
        self.group, self.rank, self.ranks = group, dist.get_rank(group), layout.world_size
        if len(set(layout.tokens_per_rank)) > 1:
            raise ValueError(f"all-to-all needs equal ranks, the layout has {layout.tokens_per_rank} tokens")
        whole = Layout(layout.lengths, (tuple(chain(*layout.spans)),))
        self.seq = SequenceParallel(device=device).context(whole)

    def __call__(self, q, k, v, *, log_decay=None, beta=None, seq=None, **options):
        if q.shape[1] % self.ranks:
            raise ValueError(f"all-to-all needs heads divisible by ranks, got {q.shape[1]} heads on {self.ranks} ranks")
        inputs = {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta}
        fixed = {}
        if log_decay is not None and log_decay.ndim == 1:
            fixed["log_decay"] = inputs.pop("log_decay").chunk(self.ranks)[self.rank]
        moving = {name: x for name, x in inputs.items() if x is not None}
        moved = dict(zip(moving, _Exchange.apply(self.group, True, *moving.values()), strict=True))
        out = linear_attention(**moved, **fixed, seq=self.seq, **options)
        return _Exchange.apply(self.group, False, out)[0]


class _Exchange(torch.autograd.Function):
    """to_heads: [T, H, ...] -> [ranks * T, H / ranks, ...]; otherwise the reverse, which is also the gradient."""

    @staticmethod
    def forward(ctx, group, to_heads, *tensors):
        ctx.group, ctx.to_heads = group, to_heads
        return _exchange(tensors, group, to_heads)

    @staticmethod
    def backward(ctx, *gradients):
        return None, None, *_exchange(gradients, ctx.group, not ctx.to_heads)


def _exchange(tensors, group, to_heads):
    ranks, pending = dist.get_world_size(group), []
    for x in tensors:
        send = x.unflatten(1, (ranks, -1)).transpose(0, 1) if to_heads else x.unflatten(0, (ranks, -1))
        send = send.contiguous()
        received = torch.empty_like(send)
        pending.append((dist.all_to_all_single(received, send, group=group, async_op=True), received, send))
    for work, *_ in pending:
        work.wait()
    if to_heads:
        return tuple(received.flatten(0, 1) for _, received, _ in pending)
    return tuple(received.transpose(0, 1).flatten(1, 2) for _, received, _ in pending)
