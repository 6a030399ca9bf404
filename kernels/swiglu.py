"""silu(gate) * up and its gradients, in fp32 (fp64 for fp64) and rounded once. Nothing but the inputs is kept."""

import torch
import torch.nn.functional as F

from longspan.kernels.operators import operator
from longspan.kernels.wide import wide_dtype


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (SwiGLU, arXiv 2002.05202): both [..., D], result in the dtype of gate."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return swiglu_forward(gate, up)

    @staticmethod
    def backward(ctx, d_out):
        return tuple(swiglu_backward(d_out, *ctx.saved_tensors))


def swiglu_naive(gate, up):
    """silu(gate) * up in plain PyTorch, any device and dtype."""
    wide = wide_dtype(gate.dtype)
    return (F.silu(gate.to(wide)) * up).to(gate.dtype)


def swiglu_backward_naive(d_out, gate, up):
    """[d_gate, d_up] in plain PyTorch, any device and dtype."""
    wide = wide_dtype(gate.dtype)
    d_out, gate_wide = d_out.to(wide), gate.to(wide)
    sigmoid = gate_wide.sigmoid()
    d_gate = d_out * up * sigmoid * (1 + gate_wide * (1 - sigmoid))
    return [d_gate.to(gate.dtype), (d_out * gate_wide * sigmoid).to(up.dtype)]


swiglu_forward = operator(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    naive=swiglu_naive,
    fused="swiglu_triton.swiglu_triton",
    shapes=lambda gate, up: gate.new_empty(gate.shape),
)
swiglu_backward = operator(
    "swiglu_backward(Tensor d_out, Tensor gate, Tensor up) -> Tensor[]",
    naive=swiglu_backward_naive,
    fused="swiglu_triton.swiglu_backward_triton",
    shapes=lambda d_out, gate, up: [x.new_empty(x.shape) for x in (gate, up)],
)
