"""bf16 in Triton's interpreter, which computes with the bits of bf16 as if they were integers and cuts instead of
rounding. `install()` teaches it to widen to fp32, compute, and round to the nearest even, as a GPU does."""

import numpy as np


def widen(bits):
    """fp32 from the bits of bf16."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(x):
    """The bits of bf16 nearest to x, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16).reshape(np.shape(x))


def install():
    import triton.language as tl  # noqa: TID251
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if hasattr(builder, "plain_cast"):
        return
    builder.plain_cast, dot, binary, unary = builder.cast_impl, builder.create_dot, builder.binary_op, builder.unary_op
    convert = builder.create_fp_to_fp

    def is_bf16(x):
        return x.dtype.scalar == tl.bfloat16

    def wide(x):
        return handle(widen(x.data), tl.float32) if is_bf16(x) else x

    def rounded(x):
        return x if x.data.dtype == bool else handle(narrow(x.data), tl.bfloat16)

    def cast_impl(self, src, dst_type):
        if is_bf16(src) == (dst_type.scalar == tl.bfloat16):
            return self.plain_cast(src, dst_type)
        if is_bf16(src):
            return self.plain_cast(wide(src), dst_type)
        return handle(narrow(src.data.astype(np.float32)), tl.bfloat16)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if is_bf16(src) != (dst_type.scalar == tl.bfloat16):
            return cast_impl(self, src, dst_type)
        return convert(self, src, dst_type, rounding_mode)

    def create_dot(self, a, b, d, *options):
        return dot(self, wide(a), wide(b), d, *options)

    def binary_op(self, lhs, rhs, op):
        if is_bf16(lhs) and op not in (np.bitwise_and, np.bitwise_or, np.bitwise_xor):
            return rounded(binary(self, wide(lhs), wide(rhs), op))
        return binary(self, lhs, rhs, op)

    def unary_op(self, arg, op):
        return rounded(unary(self, wide(arg), op)) if is_bf16(arg) else unary(self, arg, op)

    for method in (cast_impl, create_fp_to_fp, create_dot, binary_op, unary_op):
        setattr(builder, method.__name__, method)
