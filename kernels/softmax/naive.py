"""The definition of a packed softmax call: the full masked score matrix. Differentiable; for tests and docs."""

import torch

from longspan.kernels.softmax.pack import Pack


def softmax_attention_naive(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pack: Pack, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [Tq, Hq, D], k and v [Tk, Hkv, D] -> out [Tq, Hq, D], lse [Tq, Hq], all in the dtype of q."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    mask = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool, device=q.device)
    for rows_q, rows_k in pack.sequences():
        mask[rows_q, rows_k] = True
        if pack.causal:
            mask[rows_q, rows_k] = torch.tril(mask[rows_q, rows_k])
    scores = torch.einsum("qhd,khd->qhk", q, k) * scale
    scores = scores.masked_fill(~mask[:, None, :], float("-inf"))
    return torch.einsum("qhk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)
