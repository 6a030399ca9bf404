"""Memory that the GPUs of one machine share, and small gathers through it, without NCCL.

Most of what NCCL takes for a gather of states is to start and to meet, on streams of its own. Through shared memory it
is two launches on the caller's stream, one that writes to all ranks and one that waits for what they wrote.
"""

import logging
from collections import deque
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from longspan.parallel.exchange import group_size

log = logging.getLogger(__name__)
CAPACITY = 2**20  # words of 4 bytes that a rank can send in a gather; more is left to NCCL
MOST_RANKS = 8
MOST_ROOM = 2**32  # bytes of each rank in windows of `room`


class PeerMemory:
    """Gathers among a group through windows that all its ranks can address.

    kernels: longspan.kernels.peer_triton, or what has its names. windows, flags: int64 [ranks], where each rank's
    window and flags are for this GPU. keep: what owns that memory. allocate: makes more of it, a collective call:
    allocate(words) gives a Room, or None on all ranks where one has no more. received: bytes from other ranks so far.
    """

    def __init__(
        self, kernels, rank: int, windows: torch.Tensor, flags: torch.Tensor, capacity: int, keep=(), allocate=None
    ):
        self._kernels, self._capacity, self._keep, self.rank = kernels, capacity, keep, rank
        self._allocate, self._room = allocate, None
        signals = torch.zeros(2, kernels.CHANNELS, len(windows), dtype=torch.int32, device=windows.device)
        self._signals = flags, signals, rank
        self._world_size, self._under_way, self.received = len(windows), deque(), 0
        calls = torch.zeros(2, self._world_size, kernels.PARTS, dtype=torch.int32, device=windows.device)
        self._given = windows, flags, calls, rank, capacity

    def takes(self, *num_bytes: int) -> bool:
        """Whether `start_gather` takes tensors of so many bytes; the same on all ranks if those are."""
        return all(n % 4 == 0 for n in num_bytes) and sum(self._kernels.words_of(*num_bytes)) <= self._capacity

    def room(self, num_bytes: int) -> "Room | None":
        """Windows of at least so many bytes, for all to read and write when signals say that they may; None where that
        is more than there is. A collective call, with equal sizes in the same order on all ranks."""
        if self._allocate is None or not has_room(num_bytes):
            return None
        if self._room is None or self._room.memory.nbytes < num_bytes:
            if self._signals[0].is_cuda:
                torch.cuda.synchronize(self._signals[0].device)  # then nobody uses the old one when the new is there
            self._room = self._allocate(-(-num_bytes // 4))
            if self._room is None:
                self._allocate = None
        return self._room

    def signal(self, channel: int) -> None:
        """Tells all ranks, itself included, that what was queued before is done."""
        self._kernels.signal(*self._signals, channel)

    def wait(self, channel: int, behind: int = 0) -> None:
        """Lets the current stream wait for the signals of all ranks, as many from each as there were waits on this
        channel, this one included, less `behind`."""
        self._kernels.wait(*self._signals, channel, behind)

    def start_gather(self, x: torch.Tensor, y: torch.Tensor | None = None) -> "Gathering":
        """Starts gathering x, and y unless it is None: on every rank of equal shapes, and in the same order with other
        gathers. `wait()`, on the same stream and once, gives both as [ranks, *shape]."""
        if len(self._under_way) == self._kernels.SLOTS:
            raise RuntimeError(f"{len(self._under_way)} gathers through shared memory are under way; finish one first")
        self.received += (self._world_size - 1) * sum(t.numel() * t.element_size() for t in (x, y) if t is not None)
        self._kernels.push(x.contiguous(), None if y is None else y.contiguous(), *self._given)
        self._under_way.append(Gathering(self, x, y))
        return self._under_way[-1]

    def collect_next(self):
        """Collects what was started first: windows are read in the order in which they are written."""
        first = self._under_way.popleft()
        out, out_y = (None if t is None else t.new_empty(self._world_size, *t.shape) for t in (first.x, first.y))
        self._kernels.collect(out, out_y, *self._given)
        first.result = out, out_y


def has_room(num_bytes: int) -> bool:
    """Whether windows of so many bytes of each rank may be asked for."""
    return num_bytes <= MOST_ROOM


@dataclass(frozen=True)
class Room:
    """addresses: int64 [ranks], where each rank's window is for this GPU; memory: int32, this rank's own."""

    addresses: torch.Tensor
    memory: torch.Tensor
    keep: object = None

    def view(self, begin: int, shape, dtype: torch.dtype) -> torch.Tensor:
        """What lies from byte `begin` on in this rank's window, as a tensor."""
        size = torch.Size(shape).numel() * dtype.itemsize
        return self.memory.view(torch.uint8)[begin : begin + size].view(dtype).view(shape)


@dataclass
class Gathering:
    """A gather under way. x, y: what this rank gave; result: of all ranks, once it has been collected."""

    memory: PeerMemory
    x: torch.Tensor
    y: torch.Tensor | None
    result: tuple | None = None

    def wait(self):
        """Those that were started before have arrived earlier; what waits for them gets them later."""
        while self.result is None:
            self.memory.collect_next()
        return self.result


def open_peer_memory(
    group, topology, device: torch.device, kernels, wanted: Literal["auto", "on", "off"] = "auto"
) -> PeerMemory | None:
    """Shared memory for the ranks of a group, or None where it is not wanted, or with "auto" where there is none.
    kernels: gives what PeerMemory takes. Collective. Raises ValueError, on all ranks, if `wanted` is "on" and it cannot
    be had."""
    if wanted == "off" or wanted == "auto" and group_size(group) == 1:
        return None
    refusal, found = _first(_refusal(topology, device), group), None
    if refusal is None:  # then all ranks try
        try:
            found = _open(group, device, kernels())
        except Exception as problem:  # what torch raises where memory cannot be shared is not documented
            refusal = f"memory cannot be shared: {type(problem).__name__}: {problem}".splitlines()[0]
        refusal = _first(refusal, group)
    if refusal is None:
        return found
    if wanted == "on":
        raise ValueError(cannot_be_honoured(refusal))
    if device.type == "cuda":
        log.info("states and blocks travel by NCCL, not through shared memory: %s", refusal)
    return None


def cannot_be_honoured(refusal: str) -> str:
    """What who asked for shared memory is told."""
    return f"parallel.peer_memory=on cannot be honoured: {refusal}; use auto or off"


def _first(refusal: str | None, group) -> str | None:
    """What the first rank that refuses says."""
    refusals = [refusal]
    if group_size(group) > 1:
        refusals *= group_size(group)
        dist.all_gather_object(refusals, refusal, group=group)
    return next((f"rank {rank}: {text}" for rank, text in enumerate(refusals) if text is not None), None)


def refusal_of_ranks(topology) -> str | None:
    """Why ranks that share a sequence cannot share memory, wherever they run; None if they may."""
    ranks = topology.nodes * topology.ranks_per_node
    if topology.nodes > 1:
        return f"the ranks that share a sequence are on {topology.nodes} machines"
    if not 2 <= ranks <= MOST_RANKS:
        return f"{ranks} ranks share a sequence; it takes 2 to {MOST_RANKS}"
    return None


def _refusal(topology, device) -> str | None:
    if device.type != "cuda":
        return f"device {device} shares no memory with other ranks' devices"
    if refusal := refusal_of_ranks(topology):
        return refusal
    others = set(range(torch.cuda.device_count())) - {device.index}
    if not all(torch.cuda.can_device_access_peer(device.index, other) for other in others):
        return f"{device} cannot address the memory of all other GPUs"
    return None


def _open(group, device, kernels) -> PeerMemory:
    world_size, rank = group_size(group), dist.get_rank(group)
    flag_words = -(-kernels.flag_words(world_size) // 256) * 256
    room = _share(_memory(flag_words + kernels.SLOTS * world_size * CAPACITY, device), group)
    room.memory[:flag_words].zero_()
    torch.cuda.synchronize(device)
    dist.barrier(group=group)  # nobody writes before all flags are zero

    def allocate(words):
        memory = refusal = None
        try:
            memory = _memory(words, device)
        except RuntimeError as problem:
            refusal = f"no memory to share: {problem}".splitlines()[0]
        refusal = _first(refusal, group)
        if refusal is not None:
            log.warning("blocks travel by NCCL, not through shared memory: %s", refusal)
            return None
        return _share(memory, group)

    flags, keep = room.addresses, (room, group)
    return PeerMemory(kernels, rank, flags + 4 * flag_words, flags, CAPACITY, keep, allocate)


def _memory(words, device):
    import torch.distributed._symmetric_memory as symmetric_memory  # private in torch up to 2.13

    return symmetric_memory.empty(words, dtype=torch.int32, device=device)


def _share(memory, group) -> Room:
    import torch.distributed._symmetric_memory as symmetric_memory

    handle = symmetric_memory.rendezvous(memory, group.group_name)
    addresses = torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64, device=memory.device)
    return Room(addresses, memory, handle)
