"""Bounds of memory in Triton's interpreter, which reads and writes at whatever address a kernel computes: beside a
tensor it finds or destroys what the process keeps there, as a GPU does. `install()` lets a kernel touch, through a
pointer made from a tensor, that tensor alone; anything else is an IndexError that says where.

Addresses that a kernel gets from memory or as numbers (windows of other ranks) are not looked at.
"""

from dataclasses import dataclass
from functools import wraps

import numpy as np

# What makes pointers of pointers: the result may go where the arguments may.
CARRYING = (
    "addptr", "splat", "unsplat", "broadcast", "expand_dims", "reshape", "trans", "bitcast", "select", "cat", "join",
    "ptr_to_int", "int_to_ptr",
)  # fmt: skip


@dataclass(frozen=True)
class Region:
    """Bytes from `start` to before `stop`, of a tensor."""

    start: int
    stop: int
    tensor: str

    @classmethod
    def of(cls, x):
        """From the first to the last element of x, whatever lies between."""
        last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride())) + 1 if x.numel() else 0
        name = f"{x.dtype} {list(x.shape)}" + ("" if x.is_contiguous() else f" with strides {list(x.stride())}")
        return cls(x.data_ptr(), x.data_ptr() + last * x.element_size(), name)


def install():
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if hasattr(builder, "check_bounds"):
        return
    convert, materialize = interpreter._implicit_cvt, interpreter.TensorDescHandle.materialize_pointers
    load, store = builder.create_masked_load, builder.create_masked_store
    rmw, cas = builder.create_atomic_rmw, builder.create_atomic_cas

    def implicit_cvt(arg):
        converted = convert(arg)
        if hasattr(arg, "data_ptr"):
            converted.handle.attr["regions"] = {Region.of(interpreter._unwrap_tensor(arg))}
        return converted

    def materialize_pointers(self, offsets):
        pointers, mask = materialize(self, offsets)
        pointers.attr["regions"] = _regions(self.base)
        return pointers, mask

    def carrying(make):
        @wraps(make)
        def method(self, *args):
            result = make(self, *args)
            if regions := set().union(*(_regions(x) for x in args if isinstance(x, handle))):
                result.attr["regions"] = regions
            return result

        return method

    def check_bounds(self, verb, pointers, mask, value=None):
        element = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if value is not None and value.data.itemsize != element:
            raise TypeError(f"{verb} {value.data.dtype} through a pointer to {pointers.get_element_ty()}")
        there = np.asarray(mask if isinstance(mask, np.ndarray) else mask.data, dtype=bool)
        regions, addresses = _regions(pointers), pointers.data[there]
        if not regions or not addresses.size:
            return
        low, high = addresses.min(), addresses.max()
        if any(r.start <= low and high <= r.stop - element for r in regions):
            return
        outside = np.logical_and.reduce([(addresses < r.start) | (addresses > r.stop - element) for r in regions])
        if outside.any():
            first = min(regions, key=lambda r: r.start)
            at = [int(x) - first.start for x in (addresses[outside].min(), addresses[outside].max())]
            raise IndexError(
                f"program {self.grid_idx} {verb} {outside.sum()} of {addresses.size} elements out of bounds, at bytes"
                f" {at[0]} to {at[1]} of {first.stop - first.start} of {first.tensor}"
            )

    def create_masked_load(self, pointers, mask, *rest, **options):
        check_bounds(self, "loads", pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def create_masked_store(self, pointers, value, mask, *rest):
        check_bounds(self, "stores", pointers, mask, value)
        return store(self, pointers, value, mask, *rest)

    # Atomics of the interpreter take what is broadcast for memory of its full size, and read on behind it.
    def create_atomic_rmw(self, operation, *operands_and_rest):
        pointers, value, mask = map(whole, operands_and_rest[:3])
        check_bounds(self, "changes", pointers, mask, value)
        return rmw(self, operation, pointers, value, mask, *operands_and_rest[3:])

    def create_atomic_cas(self, pointers, expected, value, *rest):
        pointers, expected, value = map(whole, (pointers, expected, value))
        check_bounds(self, "changes", pointers, np.ones_like(pointers.data, dtype=bool), value)
        return cas(self, pointers, expected, value, *rest)

    def whole(x):
        return handle(x.data.copy(), x.dtype, x.attr)

    interpreter._implicit_cvt = implicit_cvt
    interpreter.TensorDescHandle.materialize_pointers = materialize_pointers
    builder.check_bounds = check_bounds
    for name in CARRYING:
        setattr(builder, f"create_{name}", carrying(getattr(builder, f"create_{name}")))
    for method in (create_masked_load, create_masked_store, create_atomic_rmw, create_atomic_cas):
        setattr(builder, method.__name__, method)


def _regions(x) -> set[Region]:
    return x.attr.get("regions", set())
