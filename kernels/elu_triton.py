"""elu(x) + 1 as one Triton kernel each way."""

from longspan.kernels.compiler import cdiv, next_power_of_2, tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.linear.splits import unit_stride

BLOCK = 1024  # elements of a row per program


def elu1_triton(x):
    """See kernels.elu.elu1_naive. bf16, fp16 or fp32."""
    return _launch(x, None)


def elu1_backward_triton(d_out, x):
    """See kernels.elu.elu1_backward_naive. bf16, fp16 or fp32."""
    return _launch(x, d_out.contiguous())


def _launch(x, d_out):
    rows = x.flatten(1)  # heads of a token lie side by side, or are copied
    rows, out = unit_stride(rows), x.new_empty(x.shape)
    width = rows.shape[1]
    if x.numel():
        block = min(BLOCK, next_power_of_2(width))
        elu1_kernel[(len(x) * cdiv(width, block),)](rows, d_out, out, rows.stride(0), WIDTH=width, BLOCK=block)
    return out


@launched
@triton.jit
def elu1_kernel(x_ptr, d_out_ptr, out_ptr, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A part of a row: its values, or with d_out its gradient."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    out = tl.exp(tl.minimum(x, 0.0))
    if d_out_ptr is not None:
        out *= tl.load(d_out_ptr + row * WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    else:
        out += tl.maximum(x, 0.0)
    tl.store(out_ptr + row * WIDTH + column, out.to(out_ptr.dtype.element_ty), mask=column < WIDTH)
