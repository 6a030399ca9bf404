"""Host memory for copies of a device's tensors, kept and given out again.

torch rounds pinned memory up to a power of two and pins it in one thread. Here buffers are at most a sixteenth larger
than what is asked for, and several threads touch their (large) pages before those are pinned.
"""

import mmap
import weakref
from concurrent.futures import ThreadPoolExecutor

import torch

PAGE, STEPS, THREADS = 2**21, 16, 8


def buffer_size(num_bytes: int) -> int:
    """Of a buffer for so many bytes: whole pages, and 16 sizes an octave, so that lengths that nearly agree share."""
    last = max(1, num_bytes) - 1
    step = max(PAGE, (1 << last.bit_length()) // 2 // STEPS)
    return (last // step + 1) * step


class HostMemory:
    """Buffers that are copied to and from on one stream: one given back may be taken while a copy from it is under way.

    pinned: for copies that run beside computation on a GPU. held: bytes of all buffers, never more than were in use at
    a time.
    """

    def __init__(self, *, pinned: bool):
        self.pinned, self.held = pinned, 0
        self._used, self._most, self._free = 0, 0, {}  # size: buffers

    def take(self, num_bytes: int) -> torch.Tensor:
        """A buffer for so many bytes: uint8 [size]. Raises MemoryError where it cannot be pinned."""
        size = buffer_size(num_bytes)
        free = self._free.setdefault(size, [])
        self._used += size
        self._most = max(self._most, self._used)
        if free:
            return free.pop()
        self._shrink(self._most - size)
        self.held += size
        return _allocate(size, self.pinned)

    def give_back(self, buffer: torch.Tensor) -> None:
        self._used -= len(buffer)
        self._free[len(buffer)].append(buffer)

    def _shrink(self, limit: int) -> None:
        """Frees buffers that nobody uses until no more than so many bytes are left."""
        for size, free in self._free.items():
            while free and self.held > limit:
                if self.pinned:
                    torch.cuda.synchronize()  # copies may be under way
                self.held -= size
                del free[-1]


def _allocate(size: int, pinned: bool) -> torch.Tensor:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    if pinned:
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(torch.Tensor.zero_, buffer.chunk(THREADS)))
        runtime, address = torch.cuda.cudart(), buffer.data_ptr()
        error = int(runtime.cudaHostRegister(address, size, 0))
        if error:
            raise MemoryError(f"{size / 2**30:.2f} GiB of host memory cannot be pinned (CUDA error {error})")
        weakref.finalize(buffer, runtime.cudaHostUnregister, address).atexit = False
    return buffer
