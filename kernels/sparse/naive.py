"""The definition: full scores of all queries and all keys, of which the plan says which count."""

import torch

from longspan.kernels.sparse.plan import BlockPlan


def attend(q, k, v, plan: BlockPlan, scale: float):
    """q: [Tq, Hq, D]; k, v: [Tk, Hkv, D] -> (out [Tq, Hq, D], lse [Tq, Hq]), differentiable. A query that sees nothing
    has out 0 and lse -inf."""
    heads = q.shape[1]
    bias = log_weights(plan, q.shape[0], k.shape[0], heads).to(q.dtype)
    k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale + bias
    seen = (bias > -torch.inf).any(-1)
    lse = scores.masked_fill(~seen[..., None], 0).logsumexp(-1)
    weights = (scores - lse[..., None]).exp().masked_fill(~seen[..., None], 0)
    return torch.einsum("hqk,khd->qhd", weights, v), lse.masked_fill(~seen, -torch.inf).t()


def log_weights(plan: BlockPlan, num_queries: int, num_keys: int, heads: int) -> torch.Tensor:
    """fp64 [heads, Tq, Tk]: what is added to the scores of query heads, -inf where a query does not see a key."""
    bias = torch.full((heads, num_queries, num_keys), -torch.inf, dtype=torch.float64, device=plan.row_ptr.device)
    queries, keys = ([x.tolist() for x in (b.start, b.length, b.position, b.step)] for b in (plan.queries, plan.keys))
    pointers, lists = plan.row_ptr.tolist(), plan.row_idx.tolist()
    for head in range(plan.heads):
        group = slice(head * heads // plan.heads, (head + 1) * heads // plan.heads)
        for i, (first, count, position, _) in enumerate(zip(*queries)):
            rows = torch.arange(first, first + count, device=bias.device)
            for j in lists[head][pointers[head][i] : pointers[head][i + 1]]:
                key_first, key_count, key_position, step = (column[j] for column in keys)
                at = torch.arange(key_count, device=bias.device) * step + key_position
                part = bias[group, first : first + count, key_first : key_first + key_count]
                part.fill_(0.0 if plan.log_weight is None else plan.log_weight[j].item())
                if plan.causal:
                    part.masked_fill_(at > (rows - first + position)[:, None], -torch.inf)
                if plan.rule is not None:
                    seen = plan.rule.seen(rows, at, plan.keys.size)
                    part.masked_fill_(~seen.repeat_interleave(heads // len(seen), 0)[group], -torch.inf)
    return bias
