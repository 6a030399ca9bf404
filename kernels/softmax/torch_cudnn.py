"""cuDNN's fused attention through PyTorch: one dense call. Packed calls go to PyTorch's FlashAttention-2.

cuDNN builds a plan for every new pair of lengths (a fraction of a second each, kept for the life of the process), which
one call per document of ever-changing batches would pay again and again. cudnn_ragged.py has what packed calls need.
"""

import functools

import torch

from longspan.kernels.linear.splits import unit_stride
from longspan.kernels.softmax import math, torch_flash
from longspan.kernels.softmax.pack import Pack

name = "cudnn"
device_types = ("cuda",)


def limits(dtype: torch.dtype, head_dim: int, capability: tuple[int, int]) -> str | None:
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {dtype}"
    if head_dim % 8 or head_dim > 128:
        return f"takes head dims up to 128 that are multiples of 8, not {head_dim}"
    return torch_flash.too_old(capability)


def missing() -> str | None:
    if not torch.backends.cudnn.is_available():
        return "this build of PyTorch has no cuDNN"
    if torch.are_deterministic_algorithms_enabled():
        return "its backward is not deterministic, which torch.use_deterministic_algorithms asks for"
    return None


def forward(q, k, v, pack: Pack, scale: float):
    if pack.num_sequences > 1:
        return torch_flash.forward(q, k, v, pack, scale)
    if pack.max_k == 1:  # cuDNN has no plan for a single key
        return math.forward(q, k, v, pack, scale)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        _to_BHSD(q), _to_BHSD(k), _to_BHSD(v), None, True, 0.0, pack.causal, False, scale=scale
    )
    return out.squeeze(0).transpose(0, 1), lse.view(q.shape[1], q.shape[0]).t()


def backward(dout, q, k, v, out, lse, pack: Pack, scale: float):
    if pack.num_sequences > 1:
        return torch_flash.backward(dout, q, k, v, out, lse, pack, scale)
    if pack.max_k == 1:
        return math.backward(dout, q, k, v, out, lse, pack, scale)
    # cuDNN wants the statistics contiguous and the gradient in the layout of the output.
    statistics = lse.t().contiguous()[None]
    unused_seed = q.new_zeros(1, dtype=torch.int64)  # read only with dropout
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        _to_BHSD(dout.contiguous()),
        _to_BHSD(q),
        _to_BHSD(k),
        _to_BHSD(v),
        _to_BHSD(out.contiguous()),
        statistics[..., None] if _statistics_have_four_dims(q.device) else statistics,
        unused_seed,
        unused_seed,
        None,
        None,
        None,
        pack.max_q,
        pack.max_k,
        0.0,
        pack.causal,
        scale=scale,
    )
    return tuple(x.squeeze(0).transpose(0, 1) for x in gradients)


def _to_BHSD(x: torch.Tensor) -> torch.Tensor:
    """[S, H, D] -> [1, H, S, D] with unit stride in D."""
    return unit_stride(x).transpose(0, 1)[None]


@functools.cache
def _statistics_have_four_dims(device: torch.device) -> bool:
    """Releases of PyTorch differ: LSE is [B, H, S, 1] or [B, H, S], and backward expects what forward gives."""
    probe = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
    return torch.ops.aten._scaled_dot_product_cudnn_attention(probe, probe, probe, None, True)[1].ndim == 4
