"""What per-channel decay asks of q and k before matrix products can take over, chunk by chunk, all chunks at once."""

import triton
import triton.language as tl

from longspan.kernels.linear.channel_decay import climb, is_mild, is_second, load_rows, meets, mild_factors, store_rows

# Bytes per number of the working dtype: (key channels per step, warps, stages).
CONFIG = {2: (128, 8, 1), 4: (32, 4, 1)}


@triton.jit(do_not_specialize=["scale"])
def prepare_kernel(
    q_ptr, k_ptr, g_ptr, read_ptr, write_ptr, scores_ptr, total_ptr, chunk_first_ptr, chunk_length_ptr,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, g_stride_t, g_stride_h,
    read_stride_t, read_stride_h, scores_stride_t, scores_stride_h,
    scale, H, K: tl.constexpr, BLOCK_K: tl.constexpr, LEVELS: tl.constexpr,
    SCORES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """read = scale q exp(G), write = k exp(G_C - G), total = G_C and, with SCORES, the lower triangular
    scores_ij = scale sum_c q_ic k_jc exp(G_ic - G_jc). Grid (chunks * H). `write` has the strides of `read`."""
    CHUNK: tl.constexpr = 1 << LEVELS
    chunk, head = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    first, length = tl.load(chunk_first_ptr + chunk).to(tl.int64), tl.load(chunk_length_ptr + chunk)
    row = tl.arange(0, CHUNK)
    inside = row < length
    q_ptr += first * q_stride_t + head * q_stride_h
    k_ptr += first * k_stride_t + head * k_stride_h
    g_ptr += first * g_stride_t + head * g_stride_h
    read_ptr += first * read_stride_t + head * read_stride_h
    write_ptr += first * read_stride_t + head * read_stride_h
    total_ptr += (chunk * H + head) * K
    work: tl.constexpr = read_ptr.dtype.element_ty

    scores = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        g = load_rows(g_ptr, g_stride_t, row, column, inside, K).to(tl.float32)
        q = load_rows(q_ptr, q_stride_t, row, column, inside, K).to(tl.float32) * scale
        k = load_rows(k_ptr, k_stride_t, row, column, inside, K).to(tl.float32)
        total = tl.sum(g, 0)
        if is_mild(total):
            rise, fall, edge = mild_factors(g, total)
            q, k = q * rise, k * fall
            if SCORES:
                scores = tl.dot(q.to(work), tl.trans(k.to(work)), scores, input_precision=PRECISION)
            q, k = q * edge[None, :], k * edge[None, :]
        else:
            if SCORES:
                scores += tl.where(row[:, None] == row[None, :], tl.sum(q * k, 1)[:, None], 0.0)
            passed = tl.exp(g)
            from_start, to_end = passed, tl.full([CHUNK, BLOCK_K], 1.0, tl.float32)
            for level in tl.static_range(LEVELS):
                if SCORES:
                    x = tl.where(is_second(row, level), q * from_start, k * to_end).to(work)
                    pairs = tl.dot(x, tl.trans(x), input_precision=PRECISION)
                    scores += tl.where(meets(row, level), pairs, 0.0)
                passed, from_start, to_end = climb(row, passed, from_start, to_end, level)
            q, k = q * from_start, k * to_end
        store_rows(read_ptr, read_stride_t, row, column, inside, q, K)
        store_rows(write_ptr, read_stride_t, row, column, inside, k, K)
        tl.store(total_ptr + column, total, mask=column < K)
    if SCORES:
        scores_ptr += first * scores_stride_t + head * scores_stride_h
        scores = tl.where(row[:, None] >= row[None, :], scores, 0.0)
        store_rows(scores_ptr, scores_stride_t, row, row, inside, scores, CHUNK)
