"""PyTorch's flash attention for CPUs, one call per sequence."""

import torch

from longspan.kernels.linear.splits import unit_stride
from longspan.kernels.softmax.pack import Pack
from longspan.kernels.wide import wide_dtype

name = "cpu"
device_types = ("cpu",)

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def limits(dtype: torch.dtype, head_dim: int, capability: tuple[int, int]) -> str | None:
    return None if dtype in _DTYPES else f"takes float32, float64 and bfloat16, not {dtype}"


def missing() -> str | None:
    return None


def forward(q, k, v, pack: Pack, scale: float):
    num_kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    out = q.new_empty(q.shape)
    lse = torch.empty(q.shape[:2], dtype=wide_dtype(q.dtype))
    for rows_q, rows_k in pack.sequences():
        out_KGSD, lse_KGS = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _queries(q[rows_q], num_kv_heads),
            _keys(k[rows_k], group),
            _keys(v[rows_k], group),
            0.0,
            pack.causal,
            scale=scale,
        )
        out[rows_q] = _rows(out_KGSD)
        lse[rows_q] = lse_KGS.permute(2, 0, 1).flatten(1, 2)
    return out, lse


def backward(dout, q, k, v, out, lse, pack: Pack, scale: float):
    num_kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    dtype = wide_dtype(q.dtype)
    dq, dk, dv = (torch.empty(x.shape, dtype=dtype) for x in (q, k, v))
    for rows_q, rows_k in pack.sequences():
        dq_KGSD, dk_KGSD, dv_KGSD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _queries(dout[rows_q], num_kv_heads),
            _queries(q[rows_q], num_kv_heads),
            _keys(k[rows_k], group),
            _keys(v[rows_k], group),
            _queries(out[rows_q], num_kv_heads),
            lse[rows_q].unflatten(1, (num_kv_heads, group)).permute(1, 2, 0),
            0.0,
            pack.causal,
            scale=scale,
        )
        dq[rows_q] = _rows(dq_KGSD)
        dk[rows_k] = dk_KGSD.sum(1, dtype=dtype).transpose(0, 1)
        dv[rows_k] = dv_KGSD.sum(1, dtype=dtype).transpose(0, 1)
    return dq, dk, dv


# The operator wants as many key heads as query heads. Each key head becomes a batch entry and its group of query
# heads the heads of that entry; the keys are repeated over the group by a stride of zero, not by a copy. It reads rows
# as if their numbers lay side by side, whatever the tensor's stride says.


def _queries(x: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[S, Hq, D] -> [Hkv, Hq / Hkv, S, D]"""
    return unit_stride(x).unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)


def _keys(x: torch.Tensor, group: int) -> torch.Tensor:
    """[S, Hkv, D] -> [Hkv, group, S, D]"""
    return unit_stride(x).transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[Hkv, group, S, D] -> [S, Hq, D]"""
    return x.permute(2, 0, 1, 3).flatten(1, 2)
