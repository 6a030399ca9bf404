"""Sums, what enters every split and the sweep in one launch, where no span is linked to other ranks.

Every program sums its split, if others need that, and sweeps through it as soon as it knows what enters
(`kernels.linear.hopper.chain`): programs whose heads forget do not wait for those that remember. For scalar gates: of
a fixed decay one head may forget nothing, and hold up the launch.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from longspan.kernels.launch import launched
from longspan.kernels.linear.hopper.flags import close_flags, memory, open_flags
from longspan.kernels.linear.hopper.sweep import STAGES, sweep_split
from longspan.kernels.linear.hopper.sweep_reverse import STAGES as REVERSE_STAGES
from longspan.kernels.linear.hopper.sweep_reverse import reverse_split
from longspan.kernels.linear.hopper.sweep_sum import STAGES as SUM_STAGES
from longspan.kernels.linear.hopper.sweep_sum import sum_split
from longspan.kernels.linear.hopper.tiles import synchronize, tokens_descriptor


@gluon.jit
def _sum_first(
    split, head, feed, sums, tables, scale, H: gl.constexpr, D: gl.constexpr, REVERSE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Sums a split, if others need that. (its first token, its length, what the sweep is given: see `entry_state`).
    tables: states, and what is there of every split, as `_memory_and_tables` lists it."""
    state_ptr, first_ptr, length_ptr, sum_row_ptr, row_ptr, next_row_ptr, place_ptr = tables
    first, length, place = gl.load(first_ptr + split), gl.load(length_ptr + split), gl.load(place_ptr + split)
    sum_row, leaves = gl.load(sum_row_ptr + split).to(gl.int64), gl.load(next_row_ptr + split) >= 0
    row = gl.load(row_ptr + split)
    if leaves:
        sum_to = sums[0], sums[1], None
        sum_split(first, length, sum_row, head, feed, sum_to, scale, H, D, "scalar", REVERSE, 1, STAGES, True)
        fence_async_shared()  # tiles of the sweep come to where this wrote
        synchronize()
    return first, length, (state_ptr, row, (place, sum_row, leaves), sums)


@launched
@gluon.jit(do_not_specialize=["scale", "T"])
def hopper_at_once_kernel(
    q_desc, k_desc, v_desc, decay_ptr, out_ptr, sum_ptr, total_ptr, reach_ptr, words_ptr, state_ptr,
    first_ptr, length_ptr, sum_row_ptr, row_ptr, next_row_ptr, place_ptr, stride_t, stride_h, scale, T,
    H: gl.constexpr, D: gl.constexpr, SUM_STAGES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """`hopper_sum_kernel`, a fold and `hopper_sweep_kernel` forward in time. Grid: (splits * H)."""
    split, head = gl.program_id(0) // H, gl.program_id(0) % H
    flags = open_flags(words_ptr)
    sums = sum_ptr, total_ptr, reach_ptr, flags
    tables = state_ptr, first_ptr, length_ptr, sum_row_ptr, row_ptr, next_row_ptr, place_ptr
    feed = k_desc, v_desc, decay_ptr, stride_t, stride_h
    first, length, given = _sum_first(split, head, feed, sums, tables, 1.0, H, D, False, SUM_STAGES)
    feed, to = (q_desc, k_desc, v_desc, q_desc, decay_ptr, stride_t, stride_h), (out_ptr, out_ptr, T)
    sweep_split(first, length, head, feed, given, to, scale, H, D, False, "scalar", False, STAGES, True)
    close_flags(flags)


@launched
@gluon.jit(do_not_specialize=["scale", "inverse_scale", "T", "num_chunks", "num_splits"])
def hopper_reverse_at_once_kernel(
    v_desc, d_out_desc, q_desc, k_desc, decay_ptr, dk_ptr, dv_ptr, rows_ptr, through_ptr, sum_ptr, total_ptr,
    reach_ptr, words_ptr, state_ptr, first_ptr, length_ptr, sum_row_ptr, row_ptr, next_row_ptr, place_ptr,
    split_chunk_ptr, stride_t, stride_h, scale, inverse_scale, T, num_chunks, num_splits, H: gl.constexpr,
    D: gl.constexpr, GATE: gl.constexpr, SUM_STAGES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """`hopper_sum_kernel`, a fold and `hopper_reverse_kernel` back in time. Grid: (splits * H), from the last."""
    split, head = num_splits - 1 - gl.program_id(0) // H, gl.program_id(0) % H
    flags = open_flags(words_ptr)
    sums = sum_ptr, total_ptr, reach_ptr, flags
    tables = state_ptr, first_ptr, length_ptr, sum_row_ptr, row_ptr, next_row_ptr, place_ptr
    feed = q_desc, d_out_desc, decay_ptr, stride_t, stride_h
    first, length, given = _sum_first(split, head, feed, sums, tables, scale, H, D, True, SUM_STAGES)
    feed = v_desc, d_out_desc, q_desc, k_desc, decay_ptr, stride_t, stride_h
    gate = rows_ptr, through_ptr, T, gl.load(split_chunk_ptr + split), num_chunks
    reverse_split(
        first, length, head, feed, given, (dk_ptr, dv_ptr), gate, scale, inverse_scale, H, D, "scalar", GATE, STAGES,
        True,
    )  # fmt: skip
    close_flags(flags)


def _memory_and_tables(call, direction, states):
    splits, rows = call.splits, call.splits.num_sums
    sums, totals = states.new_empty(rows, *states.shape[1:]), states.new_empty(rows, call.heads)
    reach, words = states.new_empty(rows, 2, call.heads), memory(rows * 2 * call.heads, states.device)
    return (
        sums, totals, reach, words, states, splits.first, splits.length, splits.sum_row, direction.row,
        direction.next_row, direction.place,
    )  # fmt: skip


def launch(call, out, entries):
    """out, and the states that enter the splits, [N, H, K, V] in rows of `forward.inner`."""
    splits = call.splits
    hopper_at_once_kernel[(splits.num_splits * call.heads,)](
        *(tokens_descriptor(t) for t in (call.q, call.k, call.v)), call.decays, out,
        *_memory_and_tables(call, splits.forward, entries), *call.decay_strides, call.scale, call.num_tokens,
        call.heads, call.key_size, SUM_STAGES, STAGES, num_warps=4,
    )  # fmt: skip


def launch_reverse(call, dk, dv, exits, writes, through):
    """As the launches of `Fused.gradients`, and `exits`: gradients of the states leaving the splits."""
    splits = call.splits
    hopper_reverse_at_once_kernel[(splits.num_splits * call.heads,)](
        *(tokens_descriptor(t) for t in (call.v, call.d_out, call.q, call.k)), call.decays, dk, dv, writes, through,
        *_memory_and_tables(call, splits.backward, exits), splits.split_chunk, *call.decay_strides, call.scale,
        1.0 / call.scale if call.scale else 0.0, call.num_tokens, splits.num_chunks, splits.num_splits,
        call.heads, call.key_size, call.gate, SUM_STAGES, REVERSE_STAGES, num_warps=4,
    )  # fmt: skip
