"""What checkpointed blocks keep for the backward waits in host memory instead of on the device.

A block's tensors leave on a stream of their own while the block and the next one run, and come back while the backward
of the block behind it runs. On a GPU host memory is pinned, so that copies overlap with computation; on a CPU the same
code copies at once.
"""

import weakref
from dataclasses import dataclass

import torch

from longspan.attention.host_buffers import HostBuffers

LEAST_BYTES = 2**20  # smaller tensors stay: a copy of them costs more than it frees


class Offload:
    """The traffic of one model's blocks. `parcel` is called once for each call of a block, in their order."""

    def __init__(self):
        self.stream = self.memory = None
        self._recent = []  # weak: a graph that is dropped without a backward takes its parcels with it

    def parcel(self) -> "Parcel":
        """What the block that starts now keeps. What the block before the last one kept is gone from the device."""
        *old, last = self._recent or [lambda: None]
        for parcel in filter(None, (reference() for reference in old)):
            parcel.depart()
        parcel = Parcel(self, last)
        self._recent = [last, weakref.ref(parcel)]
        return parcel

    def host_like(self, tensor):
        """(host memory for a copy of the tensor, the buffer that it lies in)."""
        self.memory = self.memory or HostBuffers(pinned=tensor.is_cuda)
        buffer = self.memory.take(tensor.nbytes)
        strides = torch.empty_like(tensor, device="meta").stride()
        return buffer[: tensor.nbytes].view(tensor.dtype).as_strided(tensor.shape, strides), buffer

    def give_back(self, buffers) -> None:
        """Copies from them may be under way: what is written there next is copied behind them."""
        for buffer in buffers:
            self.memory.give_back(buffer)

    def copy(self, pairs):
        """Starts to copy (target, source) pairs; what comes behind them: an event, None of no pairs."""
        event = None
        for target, source in pairs:
            module = torch.get_device_module(target.device if source.device.type == "cpu" else source.device)
            self.stream = self.stream or module.Stream()
            # Behind what writes the source, and what used the target's memory before.
            self.stream.wait_stream(module.current_stream())
            with module.stream(self.stream):
                target.copy_(source, non_blocking=True)
            event = self.stream.record_event()
        return event

    def wait(self, event, device: torch.device) -> None:
        """Lets the device's current stream wait for the copies in front of the event. In any thread: garbage may be
        collected in one whose device is another."""
        torch.get_device_module(device).current_stream(device).wait_event(event)


class Parcel:
    """The tensors that one call of a block keeps; `previous` is a weak reference to that of the block in front."""

    def __init__(self, offload: Offload, previous):
        self._offload, self._previous = offload, previous
        self._host, self._buffers, self._here, self._event = [], [], {}, None

    def store(self, tensor):
        """A Slot that `fetch`es the tensor again, on any later stream; small tensors and other objects as they are."""
        if not isinstance(tensor, torch.Tensor) or tensor.nbytes < LEAST_BYTES:
            return tensor
        tensor = tensor.detach()
        host, buffer = self._offload.host_like(tensor)
        self._copy([(host, tensor)])
        slot = Slot(self, len(self._host), tensor.device)
        self._here[slot.index] = tensor  # until the copy has been made
        self._host.append(host)
        self._buffers.append(buffer)
        return slot

    def depart(self) -> None:
        """Frees the device's memory, for whatever runs on the current stream from here on."""
        for tensor in self._here.values():
            self._offload.wait(self._event, tensor.device)
        self._here = {}

    def __del__(self):
        self.depart()  # a graph may be dropped while copies are under way, and its memory given to others
        self._offload.give_back(self._buffers)

    def request(self, device: torch.device) -> None:
        """Starts to bring all tensors back that are not on the device."""
        missing = [index for index in range(len(self._host)) if index not in self._here]
        self._here |= {index: torch.empty_like(self._host[index], device=device) for index in missing}
        self._copy([(self._here[index], self._host[index]) for index in missing])

    def fetch(self, index: int, device: torch.device) -> torch.Tensor:
        if index not in self._here:
            self.request(device)
        self._offload.wait(self._event, device)
        if previous := self._previous():
            previous.request(device)
        return self._here.pop(index)

    def _copy(self, pairs) -> None:
        self._event = self._offload.copy(pairs) or self._event


@dataclass(frozen=True)
class Slot:
    """Stands for a tensor that was stored."""

    parcel: Parcel
    index: int
    device: torch.device

    def fetch(self) -> torch.Tensor:
        return self.parcel.fetch(self.index, self.device)


def fetch(value):
    """The tensor that a Slot stands for; anything else as it is."""
    return value.fetch() if isinstance(value, Slot) else value
