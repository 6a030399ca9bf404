"""What gradients need of every query: its lse in base 2 and delta, block by block with short ones filled up, as TMA
fetches vectors from multiples of 16 bytes only."""

from longspan.kernels.compiler import tl, triton
from longspan.kernels.sparse.tiles import LOG2E, load_tile


@triton.jit(do_not_specialize=["M"])
def rows_kernel(
    d_out_ptr, out_ptr, lse_ptr, d_lse_ptr, log_ptr, delta_ptr, q_start, q_length, d_out_stride_t, d_out_stride_h, M,
    HEADS: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """lse in base 2 and rowsum(d_out . out) - d_lse -> [HEADS, M, SIZE] each. lse is infinite where there is no query
    or none that sees a key: its weights become 0."""
    tile, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    block, part = tile // (SIZE // ROWS), tile % (SIZE // ROWS)
    row = part * ROWS + tl.arange(0, ROWS)
    token = tl.load(q_start + block).to(tl.int64) + row
    valid = row < tl.load(q_length + block)
    d_out = load_tile(d_out_ptr, token, d_out_stride_t, head * d_out_stride_h, valid, D, D).to(tl.float32)
    out = load_tile(out_ptr, token, HEADS * D, head * D, valid, D, D).to(tl.float32)
    at, to = token * HEADS + head, (head.to(tl.int64) * M + block) * SIZE + row
    lse = tl.load(lse_ptr + at, mask=valid, other=float("-inf")) * LOG2E
    tl.store(log_ptr + to, tl.where(lse == float("-inf"), float("inf"), lse))
    tl.store(delta_ptr + to, tl.sum(d_out * out, 1) - tl.load(d_lse_ptr + at, mask=valid, other=0.0))
