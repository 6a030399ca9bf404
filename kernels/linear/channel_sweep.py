"""Outputs under decay per key channel, and with time reversed dv: one sweep along each split with the state on chip."""

from longspan.kernels.compiler import tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.linear.channel_decay import LOG2E, chunk_tokens, load_rows, store_rows

# (bytes per number, key channels padded): (value columns per program, warps, stages) forward and in reverse.
SWEEP = {
    (2, 16): ((64, 4, 3), (64, 4, 3)), (2, 32): ((64, 4, 3), (64, 4, 3)), (2, 64): ((64, 4, 3), (64, 4, 2)),
    (2, 128): ((64, 4, 2), (128, 8, 2)), (2, 256): ((64, 8, 2), (64, 8, 2)),
    (4, 16): ((64, 4, 2), (64, 4, 2)), (4, 32): ((64, 4, 2), (64, 4, 2)), (4, 64): ((32, 4, 2), (32, 4, 2)),
    (4, 128): ((32, 8, 1), (32, 8, 1)), (4, 256): ((16, 8, 1), (16, 8, 1)),
}  # fmt: skip


@launched
@triton.jit(do_not_specialize=["first_split", "first_chunk"])
def sweep_kernel(
    x_ptr, y_ptr, scores_ptr, z_ptr, total_ptr, entry_ptr, out_ptr, states_ptr,
    first_ptr, length_ptr, split_chunk_ptr, row_ptr, first_split, first_chunk,
    x_stride_t, x_stride_h, scores_stride_t, scores_stride_h, z_stride_t, z_stride_h, H,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Chunk after chunk of the splits from first_split on, S from entry[row of the split] (zero for row -1):

        forward   out = scores z + x S     S <- exp(total) S + y^T z     x, y, z = read, write, v; out contiguous
        REVERSE   out = scores^T z + x S   S <- exp(total) S + y^T z     x, y, z = write, read, d_out, from the last
                  chunk back; the S that meets each chunk is also stored, in states [chunk - first_chunk, H, K, V]

    read, write, scores, total: from prepare_kernel; x and y have the same strides.
    Grid (value column blocks * H * splits): programs that read the same x and y run together.
    """
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0) // blocks
    head, split = (program % H).to(tl.int64), first_split + program // H
    first, length = tl.load(first_ptr + split).to(tl.int64), tl.load(length_ptr + split)
    row = tl.load(row_ptr + split).to(tl.int64) * H + head
    chunk = tl.load(split_chunk_ptr + split).to(tl.int64)
    token, channel, place = chunk_tokens(CHUNK), tl.arange(0, BLOCK_K), tl.arange(0, CHUNK)
    column = tl.program_id(0) % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    x_ptr += first * x_stride_t + head * x_stride_h
    y_ptr += first * x_stride_t + head * x_stride_h
    scores_ptr += first * scores_stride_t + head * scores_stride_h
    z_ptr += first * z_stride_t + head * z_stride_h
    out_ptr += (first * H + head) * V

    at = channel[:, None] * V + column[None, :]
    inside = (channel < K)[:, None] & (column < V)[None, :]
    state = tl.load(entry_ptr + row * K * V + at, mask=inside & (row >= 0), other=0.0)
    chunks = tl.cdiv(length, CHUNK)
    for step in range(0, chunks):
        n = chunks - 1 - step if REVERSE else step
        tokens = n * CHUNK + token
        x = load_rows(x_ptr, x_stride_t, tokens, channel, length, K)
        scores = load_rows(scores_ptr, scores_stride_t, tokens, place, length, CHUNK)
        z = load_rows(z_ptr, z_stride_t, tokens, column, length, V).to(x.dtype)
        if REVERSE:
            states_at = states_ptr + ((chunk - first_chunk + n) * H + head) * K * V + at
            tl.store(states_at, state.to(x.dtype), mask=inside)
            scores = tl.trans(scores)
        out = tl.dot(x, state.to(x.dtype), input_precision=PRECISION)
        out = tl.dot(scores, z, out, input_precision=PRECISION)
        store_rows(out_ptr, H * V, tokens, column, length, out, V)
        y = load_rows(y_ptr, x_stride_t, tokens, channel, length, K)
        total = tl.load(total_ptr + ((chunk + n) * H + head) * K + channel, mask=channel < K, other=0.0)
        state = tl.dot(tl.trans(y), z, state * tl.exp2(total * LOG2E)[:, None], input_precision=PRECISION)
