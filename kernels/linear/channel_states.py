"""States along splits under decay per key channel: a chain of one product and one scaling per chunk."""

from longspan.kernels.compiler import tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.linear.channel_decay import LOG2E, load_rows

# (bytes per number, key channels padded): (value columns per program, warps, stages).
STATES = {
    (2, 16): (64, 4, 3), (2, 32): (64, 4, 3), (2, 64): (64, 4, 3), (2, 128): (64, 4, 3), (2, 256): (64, 8, 2),
    (4, 16): (64, 4, 2), (4, 32): (64, 4, 2), (4, 64): (64, 4, 2), (4, 128): (32, 4, 2), (4, 256): (32, 8, 1),
}  # fmt: skip


@launched
@triton.jit(do_not_specialize=["first_split", "first_chunk"])
def states_kernel(
    x_ptr, y_ptr, total_ptr, entry_ptr, out_ptr, decay_ptr,
    which_ptr, first_ptr, length_ptr, split_chunk_ptr, row_ptr, first_split, first_chunk,
    x_stride_t, x_stride_h, y_stride_t, y_stride_h, H, K: tl.constexpr, V: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    REVERSE: tl.constexpr, PER_CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Along each split, chunk after chunk from the first (REVERSE: the last) on, S <- exp(total) S + x^T y.

    PER_CHUNK: from entry[row of the split] (zero for row -1), the S that meets each chunk -> out [chunk - first_chunk,
    H, K, V], for the splits from first_split on. Otherwise from zero, the last S -> out [row, H, K, V] in fp32 and the
    log decay of the split -> decay [row, H, K], for the splits listed in `which`.
    Grid (value column blocks * H * splits): programs that read the same x run together.
    """
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0) // blocks
    head, split = (program % H).to(tl.int64), program // H
    split = first_split + split if PER_CHUNK else tl.load(which_ptr + split)
    first, length = tl.load(first_ptr + split).to(tl.int64), tl.load(length_ptr + split)
    row = tl.load(row_ptr + split).to(tl.int64) * H + head
    chunk = tl.load(split_chunk_ptr + split).to(tl.int64)
    token, channel = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K)
    column = tl.program_id(0) % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    x_ptr += first * x_stride_t + head * x_stride_h
    y_ptr += first * y_stride_t + head * y_stride_h
    at = channel[:, None] * V + column[None, :]
    inside = (channel < K)[:, None] & (column < V)[None, :]

    state, decay = tl.zeros([BLOCK_K, BLOCK_V], dtype=tl.float32), tl.zeros([BLOCK_K], dtype=tl.float32)
    if PER_CHUNK:
        state = tl.load(entry_ptr + row * K * V + at, mask=inside & (row >= 0), other=0.0)
    chunks = tl.cdiv(length, CHUNK)
    for step in range(0, chunks):
        n = chunks - 1 - step if REVERSE else step
        if PER_CHUNK:
            out_at = out_ptr + ((chunk - first_chunk + n) * H + head) * K * V + at
            tl.store(out_at, state.to(out_ptr.dtype.element_ty), mask=inside)
        x = load_rows(x_ptr, x_stride_t, n * CHUNK + token, channel, length, K)
        y = load_rows(y_ptr, y_stride_t, n * CHUNK + token, column, length, V).to(x.dtype)
        total = tl.load(total_ptr + ((chunk + n) * H + head) * K + channel, mask=channel < K, other=0.0)
        state = tl.dot(tl.trans(x), y, state * tl.exp2(total * LOG2E)[:, None], input_precision=PRECISION)
        decay += total
    if not PER_CHUNK:
        tl.store(out_ptr + row * K * V + at, state, mask=inside)
        tl.store(decay_ptr + row * K + channel, decay, mask=(channel < K) & (tl.program_id(0) % blocks == 0))
