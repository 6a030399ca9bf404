"""A kernel in the emulator that leaves a tensor is found."""

import gluon_emulator as emulator
import pytest
import torch

gl = emulator._modules()["triton.experimental.gluon.language"]


@emulator.Kernel
def copy_kernel(x_ptr, out_ptr, x_at, out_at, count):
    at = gl.arange(0, 8, None)
    gl.store(out_ptr + out_at + at, gl.load(x_ptr + x_at + at, mask=at < count, other=0.0), mask=at < count)


def test_within():
    x, out = torch.arange(9.0), torch.zeros(9)
    copy_kernel[(1,)](x, out, 2, 1, 7, num_warps=4)
    assert torch.equal(out[1:8], x[2:]) and not out[0] and not out[8]
    columns = torch.arange(20.0).view(5, 4)[1:, :3]  # what lies between two rows may be touched
    copy_kernel[(1,)](columns, out, 3, 0, 8, num_warps=4)
    assert out[:8].tolist() == list(range(7, 15))


def test_nothing_of_nothing():
    out = torch.ones(8)
    copy_kernel[(1,)](torch.zeros(0), out, 0, 0, 0, num_warps=4)
    assert out.all()
    with pytest.raises(IndexError):
        copy_kernel[(1,)](torch.zeros(0), out, 0, 0, 1, num_warps=4)


@pytest.mark.parametrize("x_at, out_at", [(3, 0), (-1, 0), (0, 3), (0, -1)])
def test_one_element_beside(x_at, out_at):
    memory = torch.zeros(64)
    with pytest.raises(IndexError):
        copy_kernel[(1,)](memory[20:29], memory[40:49], x_at, out_at, 7, num_warps=4)
    assert not memory.any()
