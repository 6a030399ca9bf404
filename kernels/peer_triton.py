"""A gather through memory that GPUs of one machine share: every rank writes to all others, and they see when it has.

NCCL takes 70 us for 1 MiB from each of two H200, most of it to start and to meet. Here one launch writes and one reads.
A rank's window, which all ranks of the group can address, has SLOTS places, one gather in each, and in each place
`capacity` words from every rank; its flags say which gathers arrived from each rank, and which each rank has collected
from here, so that its place is free. Both are counted part by part: every program has a part of one rank's words and
counts its own launches, so nothing depends on the host and launches can be captured in CUDA graphs.

What is too large for that lies in windows of its own, which kernels of the caller read and write. When they may, ranks
say with signals, counted alike: the n-th wait on a channel is for the n-th signal of every rank.
"""

from longspan.kernels.compiler import cdiv, tl, triton
from longspan.kernels.launch import launched

PARTS = 32  # of what one rank sends another
SLOTS = 4
BLOCK = 4096
ALIGNED = 4  # words of a store
CHANNELS = 4  # of signals


def flag_words(world_size: int) -> int:
    """int32 in the flags of a window, zero at first: [arrived, collected] x ranks x PARTS, and signals that came,
    CHANNELS x ranks."""
    return (2 * PARTS + CHANNELS) * world_size


def words_of(*num_bytes: int) -> list[int]:
    """Words of 4 bytes that tensors of so many bytes take in a window."""
    return [cdiv(n, 4 * ALIGNED) * ALIGNED for n in num_bytes]


def push(x, y, windows, flags, calls, rank: int, capacity: int) -> None:
    """Writes x, and y if it is not None, contiguous, to every rank's window. windows, flags: int64 [ranks], addresses
    of all ranks' windows and flags as this GPU sees them; calls: int32 [2, ranks, PARTS], zero at first, this rank's
    own; capacity: words. A launch waits until what all ranks pushed SLOTS launches ago has been collected."""
    _launch(peer_push_kernel, x, y, x, y, windows, flags, calls, rank, capacity)


def collect(out, out_y, windows, flags, calls, rank: int, capacity: int) -> None:
    """Waits for what every rank pushed and copies it to out [ranks, ...] and out_y, for what `push` got as x and y."""
    one_y = None if out_y is None else out_y[0]
    _launch(peer_collect_kernel, out, out_y, out[0], one_y, windows, flags, calls, rank, capacity)


def signal(flags, calls, rank: int, channel: int) -> None:
    """Tells all ranks that what was queued before is done. flags: as above; calls: int32 [2, CHANNELS, ranks], zero at
    first, this rank's own."""
    peer_signal_kernel[(len(flags),)](flags, calls, rank, channel, len(flags), CHANNELS, PARTS, num_warps=1)


def wait(flags, calls, rank: int, channel: int, behind: int = 0) -> None:
    """Waits for the signals of all ranks, as many from each as there were waits, this one included, less `behind`."""
    peer_wait_kernel[(len(flags),)](flags, calls, rank, channel, behind, len(flags), CHANNELS, PARTS, num_warps=1)


def _launch(kernel, x, y, one, one_y, windows, flags, calls, rank, capacity):
    """one, one_y: what one rank sends."""
    assert x.is_contiguous() and (y is None or y.is_contiguous())
    num_bytes = [0 if t is None else t.numel() * t.element_size() for t in (one, one_y)]
    begin, words = words_of(*num_bytes)
    assert begin + words <= capacity, (num_bytes, capacity)
    kernel[(PARTS, len(windows))](
        x, y, windows, flags, calls, *(n // 4 for n in num_bytes), begin, capacity, rank,
        WORLD=len(windows), PARTS=PARTS, SLOTS=SLOTS, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip


@launched
@triton.jit(do_not_specialize=["rank"])
def peer_push_kernel(
    x_ptr, y_ptr, windows_ptr, flags_ptr, calls_ptr, x_words, y_words, y_begin, capacity, rank,
    WORLD: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part, peer = tl.program_id(0), tl.program_id(1)
    calls_ptr += peer * PARTS + part
    call = tl.load(calls_ptr)
    collected = (WORLD + peer) * PARTS + part
    _wait(_at(flags_ptr, rank) + collected, call - SLOTS + 1)
    place = _at(windows_ptr, peer) + ((call % SLOTS) * WORLD + rank).to(tl.int64) * capacity
    _copy(_words(x_ptr), place, x_words, part, PARTS, BLOCK)
    if y_ptr is not None:
        _copy(_words(y_ptr), place + y_begin, y_words, part, PARTS, BLOCK)
    tl.debug_barrier()
    tl.atomic_xchg(_at(flags_ptr, peer) + rank * PARTS + part, call + 1, sem="release", scope="sys")
    tl.store(calls_ptr, call + 1)


@launched
@triton.jit(do_not_specialize=["rank"])
def peer_collect_kernel(
    out_ptr, out_y_ptr, windows_ptr, flags_ptr, calls_ptr, x_words, y_words, y_begin, capacity, rank,
    WORLD: tl.constexpr, PARTS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part, peer = tl.program_id(0), tl.program_id(1)
    calls_ptr += (WORLD + peer) * PARTS + part
    call = tl.load(calls_ptr)
    _wait(_at(flags_ptr, rank) + peer * PARTS + part, call + 1)
    place = _at(windows_ptr, rank) + ((call % SLOTS) * WORLD + peer).to(tl.int64) * capacity
    _copy(place, _words(out_ptr) + peer.to(tl.int64) * x_words, x_words, part, PARTS, BLOCK)
    if out_y_ptr is not None:
        _copy(place + y_begin, _words(out_y_ptr) + peer.to(tl.int64) * y_words, y_words, part, PARTS, BLOCK)
    tl.debug_barrier()
    collected = (WORLD + rank) * PARTS + part
    tl.atomic_xchg(_at(flags_ptr, peer) + collected, call + 1, sem="release", scope="sys")
    tl.store(calls_ptr, call + 1)


@launched
@triton.jit(do_not_specialize=["rank", "channel"])
def peer_signal_kernel(
    flags_ptr, calls_ptr, rank, channel, WORLD: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    peer = tl.program_id(0)
    calls_ptr += channel * WORLD + peer
    call = tl.load(calls_ptr) + 1
    flag = 2 * WORLD * PARTS + channel * WORLD + rank
    tl.atomic_xchg(_at(flags_ptr, peer) + flag, call, sem="release", scope="sys")
    tl.store(calls_ptr, call)


@launched
@triton.jit(do_not_specialize=["rank", "channel", "behind"])
def peer_wait_kernel(
    flags_ptr, calls_ptr, rank, channel, behind, WORLD: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    peer = tl.program_id(0)
    calls_ptr += (CHANNELS + channel) * WORLD + peer
    call = tl.load(calls_ptr) + 1
    _wait(_at(flags_ptr, rank) + 2 * WORLD * PARTS + channel * WORLD + peer, call - behind)
    tl.store(calls_ptr, call)


@triton.jit
def _words(ptr):
    return ptr.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def _at(addresses, rank):
    """Words at one of these addresses."""
    return tl.multiple_of(tl.load(addresses + rank).to(tl.pointer_type(tl.int32)), 16)


@triton.jit
def _wait(flag, least):
    while tl.atomic_add(flag, 0, sem="acquire", scope="sys") < least:
        pass


@triton.jit
def _copy(source, target, words, part, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Blocks part, part + PARTS, .. of so many words; past L1, which does not see what others write."""
    for begin in range(part * BLOCK, words, PARTS * BLOCK):
        word = begin + tl.arange(0, BLOCK)
        inside = word < words
        tl.store(target + word, tl.load(source + word, mask=inside, cache_modifier=".cg"), mask=inside)
