"""Plain PyTorch: any device and dtype, a block of queries at a time. The only back end for fp32 and fp64 on GPUs."""

import torch

from longspan.kernels.softmax.pack import Pack
from longspan.kernels.wide import wide_dtype

name = "math"
device_types = ("cpu", "cuda")

# Largest score block, in elements: 256 MiB in fp32.
_BLOCK_ELEMENTS = 1 << 26


def limits(dtype: torch.dtype, head_dim: int, capability: tuple[int, int]) -> str | None:
    return None if dtype.is_floating_point and dtype.itemsize >= 2 else f"no arithmetic for {dtype}"


def missing() -> str | None:
    return None


def forward(q, k, v, pack: Pack, scale: float):
    out = q.new_empty(q.shape)
    lse = torch.empty(q.shape[:2], dtype=wide_dtype(q.dtype), device=q.device)
    for rows_q, rows_k in pack.sequences():
        k_HSD, v_HSD = _heads_first(k[rows_k]), _heads_first(v[rows_k])
        for rows, scores in _score_blocks(q, k_HSD, rows_q, pack.causal, scale):
            block_lse = scores.logsumexp(-1)
            probabilities = scores.sub_(block_lse[..., None]).exp_()
            out[rows] = _merge_groups(probabilities @ v_HSD, q.shape[1]).to(q.dtype)
            lse[rows] = _merge_groups(block_lse[..., None], q.shape[1]).squeeze(-1)
    return out, lse


def backward(dout, q, k, v, out, lse, pack: Pack, scale: float):
    dtype, num_kv_heads = wide_dtype(q.dtype), k.shape[1]
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1, keepdim=True)
    lse = lse.to(dtype)[..., None]
    for rows_q, rows_k in pack.sequences():
        k_HSD, v_HSD = _heads_first(k[rows_k]), _heads_first(v[rows_k])
        for rows, scores in _score_blocks(q, k_HSD, rows_q, pack.causal, scale):
            q_HBD, dout_HBD = _split_groups(q[rows], num_kv_heads), _split_groups(dout[rows], num_kv_heads)
            probabilities = scores.sub_(_split_groups(lse[rows], num_kv_heads)).exp_()
            dv[rows_k] += (probabilities.mT @ dout_HBD).transpose(0, 1)
            dscores = (dout_HBD @ v_HSD.mT).sub_(_split_groups(delta[rows], num_kv_heads)).mul_(probabilities)
            dq[rows] = _merge_groups(dscores @ k_HSD, q.shape[1]).mul_(scale)
            dk[rows_k] += (dscores.mT @ q_HBD).transpose(0, 1).mul_(scale)
    return dq, dk, dv


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """[S, Hkv, D] -> [Hkv, S, D] in the compute dtype."""
    return x.to(wide_dtype(x.dtype)).transpose(0, 1)


def _split_groups(x: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[B, Hq, D] -> [Hkv, Hq / Hkv * B, D] in the compute dtype: the queries that share a key head stand together."""
    x = x.to(wide_dtype(x.dtype)).unflatten(1, (num_kv_heads, -1))
    return x.permute(1, 2, 0, 3).flatten(1, 2)


def _merge_groups(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The inverse of _split_groups."""
    x = x.unflatten(1, (num_heads // x.shape[0], -1))
    return x.permute(2, 0, 1, 3).flatten(1, 2)


def _score_blocks(q: torch.Tensor, k_HSD: torch.Tensor, rows_q: slice, causal: bool, scale: float):
    """Yields (query rows, scaled and masked scores [Hkv, Hq / Hkv * B, S]) over blocks of B queries of one sequence."""
    num_heads, num_keys = q.shape[1], k_HSD.shape[1]
    block = max(1, _BLOCK_ELEMENTS // (num_heads * num_keys))
    key_positions = torch.arange(num_keys, device=q.device)
    for start in range(rows_q.start, rows_q.stop, block):
        rows = slice(start, min(start + block, rows_q.stop))
        scores = (_split_groups(q[rows], k_HSD.shape[0]) @ k_HSD.mT).mul_(scale)
        if causal:
            positions = torch.arange(rows.start - rows_q.start, rows.stop - rows_q.start, device=q.device)
            hidden = key_positions > positions[:, None]
            scores.masked_fill_(hidden.repeat(num_heads // k_HSD.shape[0], 1), float("-inf"))
        yield rows, scores
