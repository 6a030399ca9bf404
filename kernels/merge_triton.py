"""merge as one Triton kernel: every tensor is read once and the accumulators written once."""

import torch

from longspan.kernels.compiler import cdiv, next_power_of_2, tl, triton
from longspan.kernels.launch import launched


def merge_triton(out_acc, lse_acc, out, lse, rows=None):
    """See kernels.merge.merge. fp32 lse, unit stride in D."""
    indexed = isinstance(rows, torch.Tensor)
    if isinstance(rows, slice):
        out_acc, lse_acc = out_acc[rows], lse_acc[rows]
    num_rows, num_heads, head_dim = out.shape
    assert lse_acc.dtype == lse.dtype == torch.float32, (lse_acc.dtype, lse.dtype)
    assert out_acc.stride(-1) == out.stride(-1) == 1 and lse.shape == (num_rows, num_heads)
    assert num_rows == (rows if indexed else out_acc).shape[0] and out_acc.shape[1:] == out.shape[1:]
    if num_rows == 0:
        return
    block_dim = next_power_of_2(head_dim)
    block_rows = max(1, 4096 // block_dim)
    merge_kernel[(cdiv(num_rows, block_rows) * num_heads,)](
        out_acc, lse_acc, out, lse, rows if indexed else None, num_rows, num_heads,
        *out_acc.stride()[:2], *lse_acc.stride(), *out.stride()[:2], *lse.stride(),
        HEAD_DIM=head_dim, BLOCK_DIM=block_dim, BLOCK_ROWS=block_rows, INDEXED=indexed,
    )  # fmt: skip


@launched
@triton.jit(do_not_specialize=["num_rows"])
def merge_kernel(
    out_acc_ptr, lse_acc_ptr, out_ptr, lse_ptr, rows_ptr, num_rows, num_heads, out_acc_stride_row, out_acc_stride_head,
    lse_acc_stride_row, lse_acc_stride_head, out_stride_row, out_stride_head, lse_stride_row, lse_stride_head,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    head = program % num_heads  # heads of the same rows run together: they share the cache lines of lse
    row = program // num_heads * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    inside = row < num_rows
    row_acc = row
    if INDEXED:
        row_acc = tl.load(rows_ptr + row, mask=inside, other=0)

    lse_acc_at = lse_acc_ptr + row_acc * lse_acc_stride_row + head * lse_acc_stride_head
    old_lse = tl.load(lse_acc_at, mask=inside, other=0.0)
    lse = tl.load(lse_ptr + row * lse_stride_row + head * lse_stride_head, mask=inside, other=0.0)
    high, low = tl.maximum(old_lse, lse), tl.minimum(old_lse, lse)
    # high - low is NaN only if both are -inf; then nothing has been seen and both weights are zero.
    seen = high > float("-inf")
    new_lse = tl.where(seen, high + tl.log(1.0 + tl.exp(low - high)), high)
    old_weight = tl.where(seen, tl.exp(old_lse - new_lse), 0.0)[:, None]
    weight = tl.where(seen, tl.exp(lse - new_lse), 0.0)[:, None]

    mask = inside[:, None] & (dim < HEAD_DIM)[None, :]
    out_acc_at = out_acc_ptr + (row_acc * out_acc_stride_row + head * out_acc_stride_head)[:, None] + dim[None, :]
    out_at = out_ptr + (row * out_stride_row + head * out_stride_head)[:, None] + dim[None, :]
    old_out = tl.load(out_acc_at, mask=mask & (old_weight > 0.0), other=0.0).to(tl.float32)
    out = tl.load(out_at, mask=mask & (weight > 0.0), other=0.0).to(tl.float32)
    tl.store(out_acc_at, old_out * old_weight + out * weight, mask=mask)
    tl.store(lse_acc_at, new_lse, mask=inside)
