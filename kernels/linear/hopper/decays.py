"""No, fixed and scalar decay in the Hopper kernels: a chunk's rows by the warp that fetches, pairs in registers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from longspan.kernels.linear.hopper.tiles import synchronize
from longspan.kernels.linear.splits import LEFT_OUT_LOG2_SHORT
from longspan.kernels.linear.sweep import CLOSED, LOG2E

# Rows of a chunk's decays in shared memory: log2 of the decay from the start of the chunk to each token, inclusive; its
# exp2; exp2 of that from after the token to the end. Beyond the last token the decay of the chunk, and none.
LOG, FROM_START, TO_END = (gl.constexpr(n) for n in range(3))
ROWS = gl.constexpr(3)
LEFT_OUT = gl.constexpr(LEFT_OUT_LOG2_SHORT)


@gluon.jit
def _add(x, y):
    return x + y


@gluon.jit
def log_decay_per_token(decay_ptr, head, DECAY: gl.constexpr):
    """log2 of a fixed decay; 0 for others."""
    if DECAY == "fixed":
        return gl.maximum(gl.load(decay_ptr + head).to(gl.float32), CLOSED) * LOG2E
    else:
        return 0.0


@gluon.jit
def gates_of(decay_ptr, first, head, stride_t, stride_h, DECAY: gl.constexpr):
    """Where the log decays of a head's tokens from `first` on lie, if tokens have their own."""
    if DECAY == "scalar":
        decay_ptr += gl.to_tensor(first).to(gl.int64) * stride_t + gl.to_tensor(head).to(gl.int64) * stride_h
    return decay_ptr


@gluon.jit
def load_gates(decay_ptr, at, left, stride_t, layout: gl.constexpr, DECAY: gl.constexpr):
    """Gates of the 64 tokens from `at` on, of which `left` are there; decay_ptr: `gates_of` a split. Nothing is done
    with them here, so that nothing waits for them."""
    if DECAY == "scalar":
        index = gl.arange(0, 64, layout)
        return gl.load(decay_ptr + (at + index) * stride_t, mask=index < left, other=0.0)
    else:
        return 0.0


@gluon.jit
def log_decays(gates, left, gamma, layout: gl.constexpr, DECAY: gl.constexpr):
    """log2 decays of a chunk with `left` tokens or more: from its start to each token, inclusive, from after the token
    to the end, and of all. Sums of gates in fp64."""
    if DECAY == "scalar":
        gates = gates.to(gl.float32)
        gates = gl.where(gates < CLOSED, CLOSED, gates).to(gl.float64) * LOG2E  # NaN stays
        from_start, total = gl.associative_scan(gates, 0, _add), gl.sum(gates, 0)
        return from_start.to(gl.float32), (total - from_start).to(gl.float32), total.to(gl.float32)
    else:
        last = gl.minimum(left, 64) - 1
        place = gl.minimum(gl.arange(0, 64, layout), last)
        total = (last + 1).to(gl.float32) * gamma
        return (place + 1).to(gl.float32) * gamma, (last - place).to(gl.float32) * gamma, total


@gluon.jit
def store_decays(gates, left, gamma, vectors, stage, DECAY: gl.constexpr):
    """The rows of a chunk, by one warp."""
    from_start, to_end, _ = log_decays(gates, left, gamma, gl.BlockedLayout([2], [32], [1], [0]), DECAY)
    vectors.index(stage * ROWS + LOG).store(from_start)
    vectors.index(stage * ROWS + FROM_START).store(gl.exp2(from_start))
    vectors.index(stage * ROWS + TO_END).store(gl.exp2(to_end))
    synchronize()


@gluon.jit
def pair_weights(vectors, stage, REVERSE: gl.constexpr, layout: gl.constexpr, DECAY: gl.constexpr):
    """What scores [64, 64] are multiplied by: the decay between a row and a column that is not later (REVERSE: not
    earlier), else zero."""
    i, j = gl.arange(0, 64, gl.SliceLayout(1, layout)), gl.arange(0, 64, gl.SliceLayout(0, layout))
    reads = i[:, None] >= j[None, :]
    if REVERSE:
        reads = i[:, None] <= j[None, :]
    if DECAY == "none":
        return gl.where(reads, 1.0, 0.0)
    else:
        row = vectors.index(stage * ROWS + LOG).load(gl.SliceLayout(1, layout))
        column = vectors.index(stage * ROWS + LOG).load(gl.SliceLayout(0, layout))
        between = row[:, None] - column[None, :]
        if REVERSE:
            between = -between
        return gl.exp2(gl.where(reads, between, float("-inf")))


@gluon.jit
def total_decay(vectors, stage, WHICH: gl.constexpr, layout: gl.constexpr):
    """The decay of the chunk (WHICH = FROM_START) or its log2 (LOG), [1] in the layout."""
    return vectors.index(stage * ROWS + WHICH).slice(63, 1).load(layout)
