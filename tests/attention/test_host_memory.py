"""Host memory for tensors that wait: given out again, never more than was in use at a time, and as laid out as they."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longspan.attention import host_memory
from longspan.attention.host_memory import HostMemory, buffer_size
from longspan.attention.offload import Offload

KIB, MIB = 2**10, 2**20


@given(st.integers(0, 2**40))
def test_sizes(num_bytes):
    size = buffer_size(num_bytes)
    assert num_bytes <= size <= max(num_bytes + host_memory.PAGE, num_bytes * 17 / 16)
    assert size % host_memory.PAGE == 0 and buffer_size(size) == size


def test_the_same_sizes_take_no_more_the_next_time():
    memory, sizes = HostMemory(pinned=False), [3 * MIB, 3 * MIB, 8 * MIB, 0]
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
    memory, most = HostMemory(pinned=False), 0
    for sizes in steps:
        buffers = [memory.take(size) for size in sizes]
        most = max(most, sum(map(len, buffers)))
        assert sum(map(len, buffers)) <= memory.held <= most
        for buffer in buffers:
            memory.give_back(buffer)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.transpose(0, 2), lambda x: x[:, ::2], lambda x: x[:0]])
def test_copies_are_laid_out_as_tensors(device, make):
    x = make(torch.randn(70, 30, 50, device=device).bfloat16())
    traffic = Offload()
    host, buffer = traffic.host_like(x)
    assert host.stride() == torch.empty_like(x).stride() and buffer.is_pinned() == (device == "cuda")
    assert host.copy_(x).equal(x.cpu()) and traffic.memory.held == len(buffer) == buffer_size(x.nbytes)


@pytest.mark.gpu
def test_buffers_are_given_up_while_copies_from_them_are_under_way():
    memory, size = HostMemory(pinned=True), 256 * MIB
    buffer = memory.take(size)
    buffer.fill_(7)
    there = torch.empty(size, dtype=torch.uint8, device="cuda")
    for _ in range(20):
        there.copy_(buffer, non_blocking=True)
    memory.give_back(buffer)
    del buffer
    other = memory.take(size // 2)
    assert memory.held == len(other) and bool((there == 7).all())
