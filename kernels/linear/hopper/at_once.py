"""Sums, what enters every split and the sweep in one launch, where no span is linked to other ranks.

Every program sums its split, if others need that, and sweeps through it as soon as it knows what enters
(kernels.linear.hopper.chain): programs whose heads forget do not wait for those that remember. Three launches would
start and end with all others idle, which at 32K tokens is a tenth of the time.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from longspan.kernels.launch import launched
from longspan.kernels.linear.hopper.sweep import STAGES, sweep_split
from longspan.kernels.linear.hopper.sweep_reverse import STAGES as REVERSE_STAGES
from longspan.kernels.linear.hopper.sweep_reverse import reverse_split
from longspan.kernels.linear.hopper.sweep_sum import PARTS
from longspan.kernels.linear.hopper.sweep_sum import STAGES as SUM_STAGES
from longspan.kernels.linear.hopper.sweep_sum import sum_split
from longspan.kernels.linear.hopper.tiles import synchronize, tokens_descriptor


@gluon.jit
def _sum_first(
    split, head, feed, spans, sums, chain, scale, H: gl.constexpr, D: gl.constexpr, DECAY: gl.constexpr,
    REVERSE: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Sums a split, if that is needed, and says what the sweep is given: see `entry_state`."""
    state_ptr, entry_row, place_ptr, next_row_ptr = chain
    sum_ptr, total_ptr, parts_ptr, _, flags_ptr = sums
    leaves = gl.load(next_row_ptr + split) >= 0
    if leaves:
        to = sum_ptr, total_ptr, parts_ptr, flags_ptr
        sum_split(split, head, feed, spans, to, scale, H, D, DECAY, REVERSE, PARTS, STAGES, True)
        fence_async_shared()  # tiles of the sweep come to where this wrote
        synchronize()
    row = gl.load(spans[2] + split).to(gl.int64)
    return state_ptr, gl.load(entry_row + split), (gl.load(place_ptr + split), row, leaves), sums


@launched
@gluon.jit(do_not_specialize=["scale", "T"])
def hopper_at_once_kernel(
    q_desc, k_desc, v_desc, decay_ptr, out_ptr, sum_ptr, total_ptr, parts_ptr, reach_ptr, flags_ptr, state_ptr,
    first_ptr, length_ptr, sum_row_ptr, row_ptr, next_row_ptr, place_ptr, stride_t, stride_h, scale, T,
    H: gl.constexpr, D: gl.constexpr, DECAY: gl.constexpr, PARTS: gl.constexpr, SUM_STAGES: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """`hopper_sum_kernel`, a fold and `hopper_sweep_kernel` forward in time. Grid: (splits * H)."""
    split, head = gl.program_id(0) // H, gl.program_id(0) % H
    sums, chain = (sum_ptr, total_ptr, parts_ptr, reach_ptr, flags_ptr), (state_ptr, row_ptr, place_ptr, next_row_ptr)
    feed, spans = (k_desc, v_desc, decay_ptr, stride_t, stride_h), (first_ptr, length_ptr, sum_row_ptr)
    given = _sum_first(split, head, feed, spans, sums, chain, 1.0, H, D, DECAY, False, PARTS, SUM_STAGES)
    feed, to = (q_desc, k_desc, v_desc, q_desc, decay_ptr, stride_t, stride_h), (out_ptr, out_ptr, T)
    sweep_split(
        split, head, feed, (first_ptr, length_ptr), given, to, scale, H, D, False, DECAY, False, STAGES, True, PARTS
    )  # fmt: skip


@launched
@gluon.jit(do_not_specialize=["scale", "inverse_scale", "T", "num_chunks"])
def hopper_reverse_at_once_kernel(
    v_desc, d_out_desc, q_desc, k_desc, decay_ptr, dk_ptr, dv_ptr, rows_ptr, through_ptr, sum_ptr, total_ptr,
    parts_ptr, reach_ptr, flags_ptr, state_ptr, first_ptr, length_ptr, sum_row_ptr, row_ptr, next_row_ptr, place_ptr,
    split_chunk_ptr, stride_t, stride_h, scale, inverse_scale, T, num_chunks, num_splits, H: gl.constexpr,
    D: gl.constexpr, DECAY: gl.constexpr, GATE: gl.constexpr, PARTS: gl.constexpr, SUM_STAGES: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """`hopper_sum_kernel`, a fold and `hopper_reverse_kernel` back in time. Grid: (splits * H), from the last split on."""
    split, head = num_splits - 1 - gl.program_id(0) // H, gl.program_id(0) % H
    sums, chain = (sum_ptr, total_ptr, parts_ptr, reach_ptr, flags_ptr), (state_ptr, row_ptr, place_ptr, next_row_ptr)
    feed, spans = (q_desc, d_out_desc, decay_ptr, stride_t, stride_h), (first_ptr, length_ptr, sum_row_ptr)
    given = _sum_first(split, head, feed, spans, sums, chain, scale, H, D, DECAY, True, PARTS, SUM_STAGES)
    feed = v_desc, d_out_desc, q_desc, k_desc, decay_ptr, stride_t, stride_h
    spans, gate = (first_ptr, length_ptr, split_chunk_ptr), (rows_ptr, through_ptr, T, num_chunks)
    reverse_split(
        split, head, feed, spans, given, (dk_ptr, dv_ptr), gate, scale, inverse_scale, H, D, DECAY, GATE, STAGES,
        True, PARTS,
    )  # fmt: skip


def _tables(call, direction, states):
    """What both kernels take of memory for sums, and of tables. Made anew for every launch, flags in one of their own,
    so that launches may overlap and graphs may be captured."""
    splits, rows = call.splits, call.splits.num_sums
    sums, totals, parts = call.room_for_sums(call.key_size, call.value_size)
    reach = totals.new_empty(rows, 2, call.heads)
    flags = totals.new_zeros(rows, PARTS[call.decay], 2, call.heads, dtype=torch.int32)
    memory = sums, totals, totals if parts is None else parts, reach, flags, states
    return *memory, splits.first, splits.length, splits.sum_row, direction.row, direction.next_row, direction.place


def launch(call, out, entries):
    """out, and what enters the splits, as `Fused._sweep` reads it."""
    splits = call.splits
    hopper_at_once_kernel[(splits.num_splits * call.heads,)](
        *(tokens_descriptor(t) for t in (call.q, call.k, call.v)), call.decays, out,
        *_tables(call, splits.forward, entries), *call.decay_strides, call.scale, call.num_tokens,
        call.heads, call.key_size, call.decay, PARTS[call.decay], SUM_STAGES, STAGES, num_warps=4,
    )  # fmt: skip


def launch_reverse(call, dk, dv, exits, writes, through):
    """As the launches of `Fused.gradients`, and `exits`, which that reads."""
    splits = call.splits
    hopper_reverse_at_once_kernel[(splits.num_splits * call.heads,)](
        *(tokens_descriptor(t) for t in (call.v, call.d_out, call.q, call.k)), call.decays, dk, dv, writes, through,
        *_tables(call, splits.backward, exits), splits.split_chunk, *call.decay_strides, call.scale,
        1.0 / call.scale if call.scale else 0.0, call.num_tokens, splits.num_chunks, splits.num_splits,
        call.heads, call.key_size, call.decay, call.gate, PARTS[call.decay], SUM_STAGES, REVERSE_STAGES,
        num_warps=4,
    )  # fmt: skip
