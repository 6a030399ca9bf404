"""Host memory for tensors that wait: given out again, never more than was in use at a time, and as laid out as they."""

import os
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from types import SimpleNamespace

import pytest
import torch
from devices import DEVICES
from hypothesis import given
from hypothesis import strategies as st

from longspan.attention import host_buffers
from longspan.attention.host_buffers import HostBuffers, buffer_size
from longspan.attention.offload import Offload

KIB, MIB = 2**10, 2**20


@given(st.integers(0, 2**40))
def test_sizes(num_bytes):
    size = buffer_size(num_bytes)
    assert num_bytes <= size <= max(num_bytes + host_buffers.PAGE, num_bytes * 17 / 16)
    assert size % host_buffers.PAGE == 0 and buffer_size(size) == size


def test_the_same_sizes_take_no_more_the_next_time():
    memory, sizes = HostBuffers(pinned=False), [3 * MIB, 3 * MIB, 8 * MIB, 0]
    held = []
    for _ in range(3):
        buffers = [memory.take(size) for size in sizes]
        for number, buffer in enumerate(buffers):
            buffer.fill_(number)
        assert [int(buffer.max()) for buffer in buffers] == [0, 1, 2, 3]  # nobody writes to another's
        for buffer in buffers:
            memory.give_back(buffer)
        held.append(memory.held)
    assert held == 3 * [sum(map(buffer_size, sizes))]


@given(st.lists(st.lists(st.integers(0, 64 * MIB), max_size=5), max_size=8))
def test_no_more_is_held_than_was_in_use_at_a_time(steps):
    memory, most = HostBuffers(pinned=False), 0
    for sizes in steps:
        buffers = [memory.take(size) for size in sizes]
        most = max(most, sum(map(len, buffers)))
        assert sum(map(len, buffers)) <= memory.held <= most
        for buffer in buffers:
            memory.give_back(buffer)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.transpose(0, 2), lambda x: x[:, ::2], lambda x: x[:0]])
def test_copies_are_laid_out_as_tensors(device, make):
    x = make(torch.randn(70, 30, 50, device=device).bfloat16())
    traffic = Offload()
    host, buffer = traffic.host_like(x)
    assert host.stride() == torch.empty_like(x).stride() and buffer.is_pinned() == (device == "cuda")
    assert host.copy_(x).equal(x.cpu()) and traffic.memory.held == len(buffer) == buffer_size(x.nbytes)


def test_buffers_given_back_while_others_are_counted(monkeypatch):
    """Whatever runs may be interrupted by a collection of garbage, which gives back what it finds."""
    memory, garbage = HostBuffers(pinned=False), []

    class Buffer(SimpleNamespace):
        def __len__(self):
            while garbage:
                memory.give_back(garbage.pop())
            return self.size

    def allocate(size, pinned):
        while garbage:
            memory.give_back(garbage.pop())
        return Buffer(size=size)

    monkeypatch.setattr(host_buffers, "_allocate", allocate)
    first, *others = [memory.take(2 * MIB) for _ in range(5)]
    garbage += others[:2]
    memory.give_back(first)
    taken = [memory.take(2 * MIB)]
    garbage += others[2:]
    taken.append(memory.take(4 * MIB))
    assert memory.held == 10 * MIB  # as were in use at a time; now 6 are, and 4 free
    for buffer in taken:
        memory.give_back(buffer)
    assert len(memory.take(64 * MIB)) == memory.held  # of nobody else's


@pytest.mark.parametrize("device", DEVICES)
def test_threads_that_take_buffers_at_once(device, monkeypatch):
    """A thread that runs a backward recomputes, and keeps, while another one runs a forward."""
    memory, both = HostBuffers(pinned=device == "cuda"), Barrier(2)
    for buffer in [memory.take(2 * MIB) for _ in range(5)]:
        memory.give_back(buffer)
    allocate = host_buffers._allocate

    def allocate_at_once(size, pinned):
        with suppress(BrokenBarrierError):
            both.wait(0.2)
        return allocate(size, pinned)

    monkeypatch.setattr(host_buffers, "_allocate", allocate_at_once)
    with ThreadPoolExecutor(2) as threads:
        buffers = list(threads.map(memory.take, [4 * MIB, 8 * MIB]))
    assert memory.held == sum(map(len, buffers)) == 12 * MIB


@pytest.mark.parametrize("device", DEVICES)
def test_threads_get_back_what_they_have_copied(device):
    """Buffers go from one thread to the other while copies from them are under way, and are freed now and then."""
    memory, stream = HostBuffers(pinned=device == "cuda"), torch.cuda.Stream() if device == "cuda" else None

    def copy(thread):
        chance, found = random.Random(thread), []
        with torch.cuda.stream(stream):  # None: nothing
            for number in range(20):
                size, value = chance.randrange(1, 5 * MIB), (thread + 2 * number) % 251
                there = torch.full((size,), value, dtype=torch.uint8, device=device)
                buffer = memory.take(size)
                here, again = buffer[:size], torch.empty_like(there)
                for target, source in ((here, there), (again, here)):
                    target.copy_(source, non_blocking=True)
                memory.give_back(buffer)
                found.append((again, value))
            if stream:
                stream.synchronize()
        return [value for again, value in found if not bool((again == value).all())]

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(copy, [0, 1])) == [[], []]
    assert 0 < memory.held <= 2 * buffer_size(5 * MIB)


class Cuda:
    """A CUDA runtime that pins no more than `room` bytes, and what it was asked, in order."""

    def __init__(self, room):
        self.room, self.pinned, self.asked = room, {}, []

    def cudaHostRegister(self, address, size, flags):
        if sum(self.pinned.values()) + size > self.room:
            return 2
        self.pinned[address] = size
        return 0

    def cudaHostUnregister(self, address):
        del self.pinned[address]
        self.asked.append("unregister")
        return 0


@pytest.fixture
def cuda(monkeypatch):
    runtime = Cuda(8 * MIB)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: runtime.asked.append(f"synchronize {device}"))
    return runtime


def test_memory_that_cannot_be_pinned_or_had_is_not_counted(cuda):
    memory = HostBuffers(pinned=True)
    buffer = memory.take(6 * MIB)
    with pytest.raises(MemoryError, match=r"^0\.00 GiB of host memory cannot be pinned \(CUDA error 2\)$"):
        memory.take(4 * MIB)
    assert memory.held == 6 * MIB
    memory.give_back(buffer)
    del buffer
    assert len(memory.take(8 * MIB)) == memory.held == 8 * MIB == sum(cuda.pinned.values())
    with pytest.raises(MemoryError, match=r"^1048576\.00 GiB of host memory cannot be had \(Cannot allocate memory\)$"):
        HostBuffers(pinned=False).take(2**50)


def test_memory_stays_pinned_until_copies_from_it_have_ended(cuda):
    memory = HostBuffers(pinned=True)
    memory.give_back(memory.take(6 * MIB))
    buffer = memory.take(8 * MIB)
    assert cuda.asked == ["synchronize 3", "unregister"]
    memory.give_back(buffer)
    del buffer, memory  # of a model that is dropped
    assert cuda.asked == ["synchronize 3", "unregister"] * 2 and not cuda.pinned


def test_systems_without_large_pages(monkeypatch):
    monkeypatch.setattr(host_buffers.mmap, "MADV_HUGEPAGE", 999, raising=False)  # refused, as by kernels without them
    assert len(HostBuffers(pinned=False).take(3 * MIB)) == 4 * MIB


def test_no_process_that_is_forked_gets_pinned_memory(cuda):
    buffer = HostBuffers(pinned=True).take(6 * MIB)
    child = os.fork()
    if not child:
        os._exit(any(start <= buffer.data_ptr() < stop for start, stop in mapped()))
    assert os.waitpid(child, 0)[1] == 0
    assert any(start <= buffer.data_ptr() < stop for start, stop in mapped())


def mapped():
    """What this process has of addresses."""
    areas = Path("/proc/self/maps").read_text().splitlines()
    return [[int(end, 16) for end in area.split()[0].split("-")] for area in areas]


def test_a_parcel_dropped_by_any_thread_waits_on_its_own_device(monkeypatch):
    waited = []
    stream = {"cuda:2": SimpleNamespace(wait_event=waited.append)}
    module = SimpleNamespace(current_stream=lambda device=None: stream[str(device)])
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    Offload().wait("event", torch.device("cuda:2"))
    assert waited == ["event"]


@pytest.mark.gpu
def test_buffers_are_given_up_while_copies_from_them_are_under_way():
    memory, size = HostBuffers(pinned=True), 256 * MIB
    buffer = memory.take(size)
    buffer.fill_(7)
    there = torch.empty(size, dtype=torch.uint8, device="cuda")
    for _ in range(20):
        there.copy_(buffer, non_blocking=True)
    memory.give_back(buffer)
    del buffer
    other = memory.take(size // 2)
    assert memory.held == len(other) and bool((there == 7).all())
