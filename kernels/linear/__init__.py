"""Linear attention on one rank: the definition (`naive`), forms in plain PyTorch, fused Triton forms, one protocol."""

import torch

from longspan.kernels.linear.chunked import Chunked
from longspan.kernels.linear.general import General

MAX_WIDTH, MAX_WIDTH_NARROW = 256, 128  # of q, k and v in the fused kernels; in fp32, and of KDA


def choose_form(q, v, log_decay, beta):
    """The Form (kernels.linear.form) for these inputs: Triton on CUDA, plain PyTorch on CPU and for fp64.

    On CUDA, plain PyTorch also takes what no kernel does: fp32 heads wider than 128 (fp32 is for checking; its tiles do
    not fit), and with a decay per key channel together with the delta rule (KDA) all heads wider than 128 and fp16.
    Raises ValueError on CUDA for heads wider than MAX_WIDTH, and for fp16 without beta or a decay per channel.
    """
    per_channel, width = log_decay is not None and log_decay.ndim == 3, max(q.shape[2], v.shape[2])
    kda = per_channel and beta is not None
    narrow = kda or q.dtype == torch.float32
    untaken = (narrow and width > MAX_WIDTH_NARROW) or (kda and q.dtype == torch.float16)
    if not q.is_cuda or q.dtype == torch.float64 or untaken:
        return General if per_channel or beta is not None else Chunked
    for name, x in {"q": q, "v": v}.items():
        if x.shape[2] > MAX_WIDTH:
            raise ValueError(f"{name} has heads of width {x.shape[2]} (normalize adds one to v); GPUs take {MAX_WIDTH}")
    if kda:
        from longspan.kernels.linear.kda import KDA

        return KDA
    if beta is not None:
        from longspan.kernels.linear.delta import Delta

        return Delta
    if per_channel:
        from longspan.kernels.linear.channel import Channel

        return Channel
    if q.dtype == torch.float16:
        raise ValueError("q is torch.float16, in which sums of keys and values overflow; use torch.bfloat16 on GPUs")
    from longspan.kernels.linear.fused import Fused

    return Fused
