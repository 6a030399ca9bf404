"""FlashAttention-2 as compiled into PyTorch, through its packed (varlen) operators.

They look at `torch.use_deterministic_algorithms` themselves; with its warn_only they stay as they are.
"""

import torch

from longspan.kernels.linear.splits import unit_stride
from longspan.kernels.softmax.pack import Pack

name = "flash"
device_types = ("cuda",)


def limits(dtype: torch.dtype, head_dim: int, capability: tuple[int, int]) -> str | None:
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {dtype}"
    if head_dim % 8 or head_dim > 256:
        return f"takes head dims up to 256 that are multiples of 8, not {head_dim}"
    return too_old(capability)


def too_old(capability: tuple[int, int]) -> str | None:
    return None if capability >= (8, 0) else "needs compute capability 8.0 or later, not {}.{}".format(*capability)


def missing() -> str | None:
    return None


def forward(q, k, v, pack: Pack, scale: float):
    out, lse_HT, *_ = torch.ops.aten._flash_attention_forward(
        unit_stride(q),
        unit_stride(k),
        unit_stride(v),
        pack.cu_q_tensor(q.device),
        pack.cu_k_tensor(q.device),
        # One query per sequence and GQA would enter the library's decoding path, which packs (head, query) otherwise.
        max(pack.max_q, 2),
        pack.max_k,
        0.0,
        pack.causal,
        False,
        scale=scale,
    )
    return out, lse_HT.t()


def backward(dout, q, k, v, out, lse, pack: Pack, scale: float):
    unused_rng_state = q.new_zeros(2, dtype=torch.uint64)  # read only with dropout
    return torch.ops.aten._flash_attention_backward(
        unit_stride(dout),
        unit_stride(q),
        unit_stride(k),
        unit_stride(v),
        unit_stride(out),
        lse.t().contiguous(),
        pack.cu_q_tensor(q.device),
        pack.cu_k_tensor(q.device),
        pack.max_q,
        pack.max_k,
        0.0,
        pack.causal,
        unused_rng_state,
        unused_rng_state,
        scale=scale,
    )
