"""What enters a split in the Hopper kernels: read where a fold put it, or put together from splits before it while they
are at work.

In the second case, of scalar gates alone, programs wait for programs of splits before them, never for later ones, so
that it does not matter how many fit on the GPU. If each followed the state of the one before it, a chain would take as
long as its hops; if each read the sums of all before it, memory would. So sums lie in a Fenwick tree: node n (from 1)
is the state that splits n - lowbit(n) to n - 1 of a span leave by themselves, and what enters split n is made of one
node for each one in the binary number n, the nearest first. Beyond a node that is forgotten nothing is read, nor waited
for.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from longspan.kernels.linear.hopper.decays import LEFT_OUT
from longspan.kernels.linear.hopper.flags import raise_flag, wait_for
from longspan.kernels.linear.sweep import LOG2E


@gluon.jit
def columns_of(ptr, half, TRANSPOSED: gl.constexpr, layout: gl.constexpr, D: gl.constexpr):
    """Where 64 columns of a state [D, D] lie (TRANSPOSED: 64 rows), as a transposed tile. Pointers come first, so that
    constants end up in instructions, not in registers."""
    column, key = half * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout)), gl.arange(0, D, gl.SliceLayout(0, layout))
    if TRANSPOSED:
        return ptr + column[:, None] * D + key[None, :]
    else:
        return ptr + column[:, None] + key[None, :] * D


@gluon.jit
def entry_state(
    half, head, given, layout: gl.constexpr, H: gl.constexpr, D: gl.constexpr, TRANSPOSED: gl.constexpr,
    REVERSE: gl.constexpr, CHAINED: gl.constexpr,
):  # fmt: skip
    """64 columns of the state (TRANSPOSED: rows) that enters a split, as a transposed tile. given: states and the row
    among them, -1 for zero; CHAINED: also what `_make_state` takes, and this row is written."""
    state_ptr, row = given[0], given[1]
    state_ptr += (gl.maximum(row, 0).to(gl.int64) * H + head) * (D * D)
    if CHAINED:
        state = _make_state(half, head, given[2], given[3], layout, H, D, REVERSE)
        if row >= 0:
            gl.store(columns_of(state_ptr, half, TRANSPOSED, layout, D), state)
    else:
        state = gl.load(columns_of(state_ptr, half, TRANSPOSED, layout, D), mask=row >= 0, other=0.0)
    return state


@gluon.jit
def _make_state(
    half, head, split, sums, layout: gl.constexpr, H: gl.constexpr, D: gl.constexpr, REVERSE: gl.constexpr
):  # fmt: skip
    """split: its place in the span, the row of its sum, and whether others need it, whose node this makes of it first.
    sums: sums, transposed, and their log decays; log2 decays of nodes and flags for them [rows, 2, H], by halves."""
    place, row, leaves = split
    sum_ptr, total_ptr, reach_ptr, flags = sums
    n, passed, state = place, place.to(gl.float32) * 0.0, gl.full([64, D], 0.0, gl.float32, layout)
    if leaves:
        sum_at = columns_of(sum_ptr + (row * H + head) * (D * D), half, True, layout, D)
        first, total = place & (place + 1), gl.load(total_ptr + row * H + head) * LOG2E
        first = gl.where(total < LEFT_OUT, place, first)  # the node holds splits from the first on
        state, passed, n = _add_nodes(state, passed, n, first, half, head, split, sums, layout, H, D, REVERSE)
        if place > first:
            gl.store(sum_at, gl.load(sum_at) + state * gl.exp2(total))
        gl.store(reach_ptr + (row * 2 + half) * H + head, total + passed)
        raise_flag(flags, (row * 2 + half) * H + head)
    state, passed, n = _add_nodes(state, passed, n, 0, half, head, split, sums, layout, H, D, REVERSE)
    return state


@gluon.jit
def _add_nodes(
    state, passed, n, stop, half, head, split, sums, layout: gl.constexpr, H: gl.constexpr, D: gl.constexpr,
    REVERSE: gl.constexpr,
):  # fmt: skip
    """(state, log2 decay of what it holds, next node) with nodes n, n - lowbit(n), .. above `stop` as far as they are
    remembered."""
    place, row, _ = split
    sum_ptr, _, reach_ptr, flags = sums
    while (n > stop) & (passed >= LEFT_OUT):
        node = row + (place + 1 - n if REVERSE else n - 1 - place)
        wait_for(flags, (node * 2 + half) * H + head)
        x = gl.load(columns_of(sum_ptr + (node * H + head) * (D * D), half, True, layout, D))
        state += x * gl.exp2(passed)
        passed += gl.load(reach_ptr + (node * 2 + half) * H + head)
        n = n & (n - 1)
    return state, passed, n
