"""Values and gradients of a function in fp64, and how far from them what a kernel found may be."""

import torch


def exact(function, inputs, d_outs):
    """(outputs, gradients of the inputs that are given) by autograd, in fp64 on the values that `inputs` have."""
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    outs = function(*leaves)
    given = [x for x in leaves if x is not None]
    grads = torch.autograd.grad(outs, given, [d_out.double() for d_out in d_outs])
    return [out.detach() for out in outs], list(grads)


def check(found, expected, limit, dtype):
    """Relative errors of whole tensors; dtype: of all that is found."""
    assert len(found) == len(expected), (len(found), len(expected))
    for number, (a, b) in enumerate(zip(found, expected)):
        assert a.dtype == dtype and a.shape == b.shape, (number, a.dtype, a.shape, b.shape)
        assert a.isfinite().all(), number
        assert (a.double() - b).norm() <= limit * b.norm() + 1e-12, (number, (a.double() - b).norm() / b.norm())
