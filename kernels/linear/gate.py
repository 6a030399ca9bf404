"""The gradient of a scalar gate, from row sums that the sweeps leave. Derivation: docs/linear-attention.md."""

from longspan.kernels.compiler import tl, triton
from longspan.kernels.launch import launched
from longspan.kernels.linear.sweep import FORGOTTEN

STEP = 32  # chunks at a time
STATE_STEP = tl.constexpr(8192)  # numbers of the states at a time


@launched
@triton.jit(do_not_specialize=["T", "num_chunks"])
def gate_kernel(
    reads_ptr, writes_ptr, through_ptr, decay_ptr, entry_ptr, exit_ptr, gate_ptr,
    first_ptr, length_ptr, split_chunk_ptr, leaving_row_ptr, exit_row_ptr, T, num_chunks, H,
    SIZE: tl.constexpr, READS: tl.constexpr, WRITES: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """d_log_decay -> gate [H, T] of one split and head, from reads a = rowsum(q . dq) [READS, H, T] and writes
    b = rowsum(k . dk) [WRITES, H, T]: the sum of a - b from the token to the end of its chunk, and <S, dS> there.

    <S, dS> at the end of the split is taken from the states, entry[leaving row] and exit[exit row], and carried from
    chunk to chunk as the sum of a - b. A chunk that forgets all (`FORGOTTEN`) starts it anew: what passes its end is
    what it has written itself, through [WRITES, num_chunks, H]. The log2 decays of chunks are taken from decay, see
    `decay_kernel`, or, if that is None, from one row more of through. Grid: splits x H.
    """
    split, head = tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)
    first, length = tl.load(first_ptr + split).to(tl.int64), tl.load(length_ptr + split)
    leaving_row, exit_row = tl.load(leaving_row_ptr + split).to(tl.int64), tl.load(exit_row_ptr + split).to(tl.int64)
    step, column = tl.arange(0, STEP), tl.arange(0, CHUNK)
    at = head * T + first
    through_ptr += tl.load(split_chunk_ptr + split).to(tl.int64) * H + head

    carried = 0.0  # of what passes the end of the chunks at hand
    if (leaving_row >= 0) & (exit_row >= 0):
        passed = tl.zeros([STATE_STEP], dtype=tl.float32)
        for block in range(0, (SIZE + STATE_STEP - 1) // STATE_STEP):
            element = block * STATE_STEP + tl.arange(0, STATE_STEP)
            state = tl.load(entry_ptr + (leaving_row * H + head) * SIZE + element, mask=element < SIZE, other=0.0)
            d_state = tl.load(exit_ptr + (exit_row * H + head) * SIZE + element, mask=element < SIZE, other=0.0)
            passed += state * d_state
        carried = tl.sum(passed)

    chunks = tl.cdiv(length, CHUNK)
    for block in range(0, tl.cdiv(chunks, STEP)):
        chunk = chunks - (block + 1) * STEP + step
        token = chunk[:, None] * CHUNK + column[None, :]
        inside = (chunk >= 0)[:, None] & (token < length)
        change = tl.zeros([STEP, CHUNK], dtype=tl.float32)
        for part in tl.static_range(READS):
            change += tl.load(reads_ptr + part * H * T.to(tl.int64) + at + token, mask=inside, other=0.0)
        for part in tl.static_range(WRITES):
            change -= tl.load(writes_ptr + part * H * T.to(tl.int64) + at + token, mask=inside, other=0.0)
        if decay_ptr is None:
            total_at = through_ptr + (WRITES * num_chunks.to(tl.int64) + chunk) * H
            total = tl.load(total_at, mask=chunk >= 0, other=0.0)
        else:
            last = tl.minimum(chunk * CHUNK + CHUNK, length) - 1
            total = tl.load(decay_ptr + (at + last) * 2, mask=chunk >= 0, other=0.0).to(tl.float32)
        anew = total < FORGOTTEN
        restart = tl.zeros([STEP], dtype=tl.float32)
        for part in tl.static_range(WRITES):
            place = part * num_chunks.to(tl.int64) * H + chunk * H
            restart += tl.load(through_ptr + place, mask=anew, other=0.0)
        # At the start of chunk n: the changes from there to the first chunk that starts anew, with what that one has,
        # or to the end of the chunks at hand, with what is carried. Equal counts: nothing starts anew in between.
        changes = tl.sum(change, 1)
        count = tl.cumsum(anew.to(tl.int32), 0, reverse=True)
        same = (step[:, None] <= step[None, :]) & (count[:, None] == count[None, :])
        at_start = tl.sum(tl.where(same, (changes + restart)[None, :], 0.0), 1) + tl.where(count == 0, carried, 0.0)
        gate = tl.cumsum(change, 1, reverse=True) + (at_start - changes)[:, None]
        tl.store(gate_ptr + at + token, gate, mask=inside)
        carried = tl.sum(tl.where(step == 0, at_start, 0.0))
