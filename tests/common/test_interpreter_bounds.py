"""A kernel in the interpreter that leaves a tensor is found, whatever lies there; one that does not is left alone."""

import numpy as np
import pytest
import torch
from interpreted import interpreted

interpreted("compiler")

from triton.runtime import interpreter  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from longspan.kernels.compiler import tl, triton  # noqa: E402


@triton.jit
def copy_kernel(x_ptr, out_ptr, x_at, out_at, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + out_at + at, tl.load(x_ptr + x_at + at, mask=at < count, other=0), mask=at < count)


@triton.jit
def choose_kernel(x_ptr, y_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """The first of x, then of y."""
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(tl.where(at < count, x_ptr + at, y_ptr + (at - count))))


@triton.jit
def columns_kernel(x_ptr, out_ptr, row_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + row * COLUMNS + column, tl.load(x_ptr + row * row_stride + column))


@triton.jit
def descriptor_kernel(x, out_ptr, ROWS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(out_ptr + at, x.load([0, 0]))


@triton.jit
def add_kernel(out_ptr, value, start, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    values = tl.broadcast_to(value + row, (ROWS, COLUMNS))
    tl.atomic_add(out_ptr + start + row + 0 * column, values)


@triton.jit
def swap_kernel(out_ptr, at, value):
    tl.atomic_cas(out_ptr + at, 0, value)


def out_of_bounds(text):
    return pytest.raises(Exception, match=f"IndexError.* {text}.*out of bounds")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_within(dtype):
    x, out = torch.arange(9).to(dtype), torch.zeros(9).to(dtype)
    copy_kernel[(1,)](x, out, 2, 1, 7, 8)
    assert torch.equal(out[1:8], x[2:]) and not out[0] and not out[8]


@pytest.mark.parametrize("x_at, out_at, where", [(3, 0, "loads 1"), (-1, 0, "loads 1"), (0, 4, "stores 2")])
def test_one_element_beside(x_at, out_at, where):
    memory = torch.zeros(64)  # what lies beside is ours: without the check nothing would happen
    with out_of_bounds(where):
        copy_kernel[(1,)](memory[20:29], memory[40:49], x_at, out_at, 7, 8)


def test_nothing_is_touched_before_the_error():
    out = torch.zeros(12)
    with out_of_bounds("stores"):
        copy_kernel[(1,)](torch.ones(8), out[:8], 0, 2, 7, 8)
    assert not out.any()


def test_every_pointer_has_its_own_tensor():
    """Beside x lies out, which the kernel may touch, but not through x."""
    memory = torch.arange(16.0)
    with out_of_bounds("loads 4"):
        copy_kernel[(1,)](memory[:4], memory[4:12], 0, 0, 8, 8)


def test_pointers_that_are_chosen():
    x, y, out = torch.arange(3.0), torch.arange(5.0), torch.zeros(8)
    choose_kernel[(1,)](x, y, out, 3, 8)
    assert out.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    with out_of_bounds("loads 1"):
        choose_kernel[(1,)](x, y, out, 2, 8)


def test_views_reach_from_their_first_to_their_last_element():
    x, out = torch.randn(4, 10)[:, 2:6], torch.zeros(4, 4)
    columns_kernel[(1,)](x, out, x.stride(0), 4, 4)
    assert torch.equal(out, x)
    with out_of_bounds("loads 4"):
        columns_kernel[(1,)](x[:3], out, x.stride(0), 4, 4)
    with out_of_bounds("stores 16"):
        columns_kernel[(1,)](x, out[:0], x.stride(0), 4, 4)


def test_descriptors():
    x, out = torch.randn(3, 4), torch.ones(4, 4)
    descriptor_kernel[(1,)](TensorDescriptor(x, [3, 4], [4, 1], [4, 4]), out, 4)
    assert torch.equal(out[:3], x) and not out[3].any()
    with out_of_bounds("loads 4"):
        descriptor_kernel[(1,)](TensorDescriptor(x, [4, 4], [4, 1], [4, 4]), out, 4)


@pytest.mark.parametrize("rows", [1, 4])
def test_atomics(rows):
    """Of one row the interpreter alone takes what lies behind a broadcast value for values."""
    out = torch.zeros(rows, dtype=torch.int32)
    add_kernel[(1,)](out, 3, 0, rows, 8)
    assert out.tolist() == [8 * (3 + row) for row in range(rows)]
    with out_of_bounds("changes 8"):
        add_kernel[(1,)](out, 3, 1, rows, 8)


def test_compare_and_swap():
    out = torch.zeros(5, dtype=torch.int32)
    swap_kernel[(1,)](out[:4], 3, 7)
    with out_of_bounds("changes 1"):
        swap_kernel[(1,)](out[:4], 4, 7)
    assert out.tolist() == [0, 0, 0, 7, 0]


def test_values_are_as_wide_as_what_is_pointed_to():
    """The interpreter copies as many bytes as the value has."""
    out, handle = torch.zeros(2, dtype=torch.int32), interpreter.TensorHandle
    pointer = handle(np.array([out.data_ptr()], dtype=np.uint64), tl.pointer_type(tl.int32))
    value, mask = handle(np.array([-1]), tl.int64), handle(np.array([True]), tl.int1)
    with pytest.raises(TypeError, match="stores int64 through a pointer to int32"):
        interpreter.interpreter_builder.create_masked_store(pointer, value, mask, None, None)
    assert not out.any()
