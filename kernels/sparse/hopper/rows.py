"""lse and delta of every query, block by block with short ones filled up: TMA fetches vectors from multiples of 16
bytes only."""

from longspan.kernels.compiler import tl, triton
from longspan.kernels.launch import launched


@launched
@triton.jit(do_not_specialize=["M"])
def rows_kernel(
    rows_ptr, log_ptr, delta_ptr, q_start, q_length, M, HEADS: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """fp32 [T, HEADS, 2], lse in base 2 and delta, -> two of [HEADS, M, SIZE]. lse becomes infinite where there is no
    query or none that sees a key: its weights are 0."""
    block, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    row = tl.arange(0, SIZE)
    valid = row < tl.load(q_length + block)
    at = ((tl.load(q_start + block).to(tl.int64) + row) * HEADS + head) * 2
    lse = tl.load(rows_ptr + at, mask=valid, other=float("-inf"))
    to = (head.to(tl.int64) * M + block) * SIZE + row
    tl.store(log_ptr + to, tl.where(lse == float("-inf"), float("inf"), lse))
    tl.store(delta_ptr + to, tl.load(rows_ptr + at + 1, mask=valid, other=0.0))
