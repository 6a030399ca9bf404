"""Host memory for copies of a device's tensors, kept and given out again.

torch rounds pinned memory up to a power of two and pins it in one thread. Here buffers are at most a sixteenth larger
than what is asked for, and several threads touch their (large) pages before those are pinned.
"""

import mmap
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Lock

import torch

PAGE, STEPS, THREADS = 2**21, 16, 8


def buffer_size(num_bytes: int) -> int:
    """Of a buffer for so many bytes: whole pages, and 16 sizes an octave, so that lengths that nearly agree share."""
    last = max(1, num_bytes) - 1
    step = max(PAGE, (1 << last.bit_length()) // 2 // STEPS)
    return (last // step + 1) * step


class HostBuffers:
    """Buffers that are copied to and from on one stream: one given back may be taken while a copy from it is under way.

    pinned: for copies that run beside computation on a GPU. held: bytes of all buffers, never more than were in use at
    a time. Any thread may take buffers and give them back, also one that collects garbage amid a call of `take`: what
    is given back is counted by the next `take`, under a lock that nothing else needs.
    """

    def __init__(self, *, pinned: bool):
        self.pinned, self.held = pinned, 0
        self._used, self._most, self._free = 0, 0, {}  # size: buffers
        self._lock, self._given_back = Lock(), deque()

    def take(self, num_bytes: int) -> torch.Tensor:
        """A buffer for so many bytes: uint8 [size]. Raises MemoryError where there is none, or it cannot be pinned."""
        size = buffer_size(num_bytes)
        with self._lock:
            self._count_free()
            free = self._free.setdefault(size, [])
            most = max(self._most, self._used + size)
            if free:
                buffer = free.pop()
            else:
                self._shrink(most - size)
                buffer = _allocate(size, self.pinned)
                self.held += size
            self._used, self._most = self._used + size, most
            return buffer

    def give_back(self, buffer: torch.Tensor) -> None:
        self._given_back.append(buffer)  # in one step, whatever it comes between

    def _count_free(self) -> None:
        while self._given_back:
            buffer = self._given_back.popleft()
            self._used -= len(buffer)
            self._free[len(buffer)].append(buffer)

    def _shrink(self, limit: int) -> None:
        """Frees buffers that nobody uses until no more than so many bytes are left."""
        for size, free in self._free.items():
            while free and self.held > limit:
                self.held -= size
                del free[-1]


def _allocate(size: int, pinned: bool) -> torch.Tensor:
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size / 2**30:.2f} GiB of host memory cannot be had ({error.strerror})") from None
    _advise(memory, "MADV_HUGEPAGE")
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    if pinned:
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(torch.Tensor.zero_, buffer.chunk(THREADS)))
        address = buffer.data_ptr()
        error = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
        if error:
            raise MemoryError(f"{size / 2**30:.2f} GiB of host memory cannot be pinned (CUDA error {error})")
        _advise(memory, "MADV_DONTFORK")  # else a fork copies all of it, or parts it from what the device writes to
        weakref.finalize(buffer, _unpin, torch.cuda.current_device(), address).atexit = False
    return buffer


def _advise(memory: mmap.mmap, advice: str) -> None:
    """What the system does not know it does without."""
    if hasattr(mmap, advice):
        with suppress(OSError):
            memory.madvise(getattr(mmap, advice))


def _unpin(device: int, address: int) -> None:
    with suppress(RuntimeError):  # of a device that has failed, which copies nothing any more
        torch.cuda.synchronize(device)  # copies may be under way
    torch.cuda.cudart().cudaHostUnregister(address)
