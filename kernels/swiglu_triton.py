"""silu(gate) * up as one Triton kernel each way; the backward forms the activation again and writes both gradients."""

from longspan.kernels.compiler import cdiv, next_power_of_2, tl, triton
from longspan.kernels.launch import launched

BLOCK = 1024  # elements of a row per program


def swiglu_triton(gate, up):
    """See kernels.swiglu.swiglu_naive. bf16, fp16 or fp32."""
    out = gate.new_empty(gate.shape)
    _launch(swiglu_kernel, gate, up, out)
    return out


def swiglu_backward_triton(d_out, gate, up):
    """See kernels.swiglu.swiglu_backward_naive. bf16, fp16 or fp32."""
    d_gate, d_up = (x.new_empty(x.shape) for x in (gate, up))
    _launch(swiglu_backward_kernel, gate, up, d_out.contiguous(), d_gate, d_up)
    return [d_gate, d_up]


def _launch(kernel, gate, up, *others):
    assert gate.shape == up.shape, (gate.shape, up.shape)
    gate, up = (x if x.ndim == 2 and x.stride(1) == 1 else x.contiguous() for x in (gate, up))
    width = gate.shape[-1]
    if gate.numel():
        block = min(BLOCK, next_power_of_2(width))
        grid = (gate.numel() // width * cdiv(width, block),)
        kernel[grid](gate, up, *others, gate.stride(-2), up.stride(-2), WIDTH=width, BLOCK=block)


@triton.jit
def place(gate_stride, up_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """(offsets of this program's part of a row in gate, in up, in contiguous tensors; mask)"""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return row * gate_stride + column, row * up_stride + column, row * WIDTH + column, column < WIDTH


@launched
@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    at_gate, at_up, at, mask = place(gate_stride, up_stride, WIDTH, BLOCK)
    gate = tl.load(gate_ptr + at_gate, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at_up, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=mask)


@launched
@triton.jit
def swiglu_backward_kernel(
    gate_ptr, up_ptr, d_out_ptr, d_gate_ptr, d_up_ptr, gate_stride, up_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at_gate, at_up, at, mask = place(gate_stride, up_stride, WIDTH, BLOCK)
    gate = tl.load(gate_ptr + at_gate, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at_up, mask=mask, other=0.0).to(tl.float32)
    d_out = tl.load(d_out_ptr + at, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate = d_out * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(d_gate_ptr + at, d_gate.to(d_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(d_up_ptr + at, (d_out * gate * sigmoid).to(d_up_ptr.dtype.element_ty), mask=mask)
