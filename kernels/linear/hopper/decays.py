"""No, fixed and scalar decay in the Hopper kernels: a chunk's rows by the warp that fetches, pairs in registers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from longspan.kernels.linear.hopper.tiles import synchronize
from longspan.kernels.linear.sweep import CLOSED, LOG2E

# Rows of a chunk's decays in shared memory: log2 of the decay from the start of the chunk to each token, inclusive; its
# exp2; exp2 of that from after the token to the end. Beyond the last token the decay of the chunk, and none.
LOG, FROM_START, TO_END = (gl.constexpr(n) for n in range(3))
ROWS = gl.constexpr(3)


@gluon.jit
def log_decay_per_token(decay_ptr, head, DECAY: gl.constexpr):
    """log2 of a fixed decay; 0 for others."""
    if DECAY == "fixed":
        return gl.maximum(gl.load(decay_ptr + head).to(gl.float32), CLOSED) * LOG2E
    else:
        return 0.0


@gluon.jit
def load_log_decays(decay_ptr, token, left, gamma, layout: gl.constexpr, DECAY: gl.constexpr):
    """log2 decays of the 64 tokens from `token` on, `left` to the end of the split: from the start of the chunk, to its
    end. decay_ptr: `decay_kernel`'s numbers of the head."""
    index, last = gl.arange(0, 64, layout), gl.minimum(left, 64) - 1
    place = gl.minimum(index, last)
    if DECAY == "scalar":
        at = decay_ptr + (token + place) * 2
        return gl.load(at), gl.load(at + 1)
    else:
        return (place + 1).to(gl.float32) * gamma, (last - place).to(gl.float32) * gamma


@gluon.jit
def fetch_decays(decay_ptr, token, left, gamma, vectors, stage, DECAY: gl.constexpr):
    """The rows of a chunk, by one warp."""
    from_start, to_end = load_log_decays(decay_ptr, token, left, gamma, gl.BlockedLayout([2], [32], [1], [0]), DECAY)
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
