"""What decay per key channel asks of q and k before plain matrix products can take over: all chunks at once."""

from longspan.kernels.compiler import tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.linear.channel_decay import (
    LOG2E,
    chunk_tokens,
    climb,
    is_mild,
    is_second,
    load_rows,
    meets,
    store_rows,
)

# (bytes per number, key channels padded): (channels per step, per step where gates are strong, warps, registers per
# thread at most).
PREPARE = {
    (2, 16): (16, 16, 4, 255), (2, 32): (32, 32, 4, 255), (2, 64): (64, 32, 8, 128), (2, 128): (128, 16, 4, 255),
    (2, 256): (64, 16, 8, 168),
    (4, 16): (16, 16, 4, 255), (4, 32): (32, 16, 4, 255), (4, 64): (32, 16, 4, 255), (4, 128): (32, 16, 4, 255),
    (4, 256): (32, 16, 4, 255),
}  # fmt: skip


@triton.jit
def _cumulative(x):
    """Inclusive cumulative sum along the tokens of a tile [C, channels] in the order of `chunk_tokens`."""
    C: tl.constexpr = x.shape[0]
    N: tl.constexpr = x.shape[1]
    groups = tl.reshape(x, [C // 8, 8, N])
    of_group = tl.sum(groups, 0)
    before = tl.cumsum(of_group, 0) - of_group
    return tl.reshape(tl.cumsum(groups, 0) + before[None, :, :], [C, N])


@launched
@triton.jit(do_not_specialize=["scale"])
def prepare_kernel(
    q_ptr, k_ptr, g_ptr, read_ptr, write_ptr, scores_ptr, total_ptr, chunk_first_ptr, chunk_length_ptr,
    q_stride_t, q_stride_h, k_stride_t, k_stride_h, g_stride_t, g_stride_h,
    scratch_stride_t, scratch_stride_h, scores_stride_t, scores_stride_h, scale, H,
    K: tl.constexpr, BLOCK_K: tl.constexpr, STRONG_K: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """read = scale q exp(G), write = k exp(G_C - G), both [T, H, K] with the strides of scratch; total = G_C,
    [chunks, H, K]; scores_ij = scale sum_c q_ic k_jc exp(G_ic - G_jc) for j <= i, [T, H, C] with columns in the order
    of `chunk_tokens`. Grid (chunks * H)."""
    CHUNK: tl.constexpr = 1 << LEVELS
    chunk, head = (tl.program_id(0) // H).to(tl.int64), (tl.program_id(0) % H).to(tl.int64)
    first, length = tl.load(chunk_first_ptr + chunk).to(tl.int64), tl.load(chunk_length_ptr + chunk)
    token = chunk_tokens(CHUNK)
    q_ptr += first * q_stride_t + head * q_stride_h
    k_ptr += first * k_stride_t + head * k_stride_h
    g_ptr += first * g_stride_t + head * g_stride_h
    read_ptr += first * scratch_stride_t + head * scratch_stride_h
    write_ptr += first * scratch_stride_t + head * scratch_stride_h
    scores_ptr += first * scores_stride_t + head * scores_stride_h
    total_ptr += (chunk * H + head) * K
    work: tl.constexpr = read_ptr.dtype.element_ty

    scores = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        g = load_rows(g_ptr, g_stride_t, token, column, length, K).to(tl.float32)
        total = tl.sum(g, 0)
        tl.store(total_ptr + column, total, mask=column < K)
        if is_mild(total):
            half = total * (0.5 * LOG2E)
            rise = _cumulative(g) * LOG2E - half[None, :]
            edge = tl.exp2(half)
            q = load_rows(q_ptr, q_stride_t, token, column, length, K) * tl.exp2(rise)
            k = load_rows(k_ptr, k_stride_t, token, column, length, K) * tl.exp2(-rise)
            scores = tl.dot(q.to(work), tl.trans(k.to(work)), scores, input_precision=PRECISION)
            store_rows(read_ptr, scratch_stride_t, token, column, length, q * (edge * scale)[None, :], K)
            store_rows(write_ptr, scratch_stride_t, token, column, length, k * edge[None, :], K)
        else:
            for part in range(0, BLOCK_K, STRONG_K):  # the tree needs many registers per channel
                part_column = start + part + tl.arange(0, STRONG_K)
                passed = tl.exp(load_rows(g_ptr, g_stride_t, token, part_column, length, K).to(tl.float32))
                q = load_rows(q_ptr, q_stride_t, token, part_column, length, K).to(tl.float32)
                k = load_rows(k_ptr, k_stride_t, token, part_column, length, K).to(tl.float32)
                scores += tl.where(token[:, None] == token[None, :], tl.sum(q * k, 1)[:, None], 0.0)
                from_start, to_end = passed, tl.full([CHUNK, STRONG_K], 1.0, tl.float32)
                for level in range(LEVELS):
                    x = tl.where(is_second(token, level), q * from_start, k * to_end).to(work)
                    pairs = tl.dot(x, tl.trans(x), input_precision=PRECISION)
                    scores += tl.where(meets(token, level), pairs, 0.0)
                    sibling = token ^ (1 << level)
                    row = sibling % (CHUNK // 8) * 8 + sibling // (CHUNK // 8)
                    passed, from_start, to_end = climb(passed, from_start, to_end, row, is_second(token, level))
                store_rows(read_ptr, scratch_stride_t, token, part_column, length, q * from_start * scale, K)
                store_rows(write_ptr, scratch_stride_t, token, part_column, length, k * to_end, K)
    scores = tl.where(token[:, None] >= token[None, :], scores * scale, 0.0)
    store_rows(scores_ptr, scores_stride_t, token, tl.arange(0, CHUNK), length, scores, CHUNK)
