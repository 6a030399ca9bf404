"""What gradients need of every query: its lse in base 2 and delta, head by head, so that TMA can fetch them."""

from longspan.kernels.compiler import tl, triton
from longspan.kernels.sparse.tiles import LOG2E, load_tile


@triton.jit(do_not_specialize=["tokens"])
def rows_kernel(
    d_out_ptr, out_ptr, lse_ptr, d_lse_ptr, log_ptr, delta_ptr, d_out_stride_t, d_out_stride_h, tokens,
    HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """lse in base 2 and rowsum(d_out . out) - d_lse -> [HEADS, tokens] each."""
    tile, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    token = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = token < tokens
    d_out = load_tile(d_out_ptr, token, d_out_stride_t, head * d_out_stride_h, valid, D, D).to(tl.float32)
    out = load_tile(out_ptr, token, HEADS * D, head * D, valid, D, D).to(tl.float32)
    at, to = token * HEADS + head, head.to(tl.int64) * tokens + token
    d_lse = tl.load(d_lse_ptr + at, mask=valid, other=0.0)
    tl.store(log_ptr + to, tl.load(lse_ptr + at, mask=valid) * LOG2E, mask=valid)
    tl.store(delta_ptr + to, tl.sum(d_out * out, 1) - d_lse, mask=valid)
