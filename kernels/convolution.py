"""Causal depthwise convolutions over packed tokens of one rank, with an activation: PyTorch form and choice of kernel.

`reach` int8 [T] says how many of the tokens just before each token (at most W - 1) belong to what it may read; -1 marks
tokens whose output is not computed here: what stands in their rows is undefined, and they take part in no gradient.
"""

import torch
import torch.nn.functional as F

from longspan.kernels.wide import wide_dtype

ACTIVATIONS = (None, "silu")
WIDTHS = range(2, 9)


def convolve(x, weight, bias, activation, reach):
    """out_t = activation(bias + sum over lags l <= reach_t of weight[:, W-1-l] * x_{t-l}): [T, D] in x's dtype.

    x: [T, D]; weight: [D, W]; bias: [D] or None; accumulated in fp32 (fp64 for fp64).
    """
    if _fused(x):
        from longspan.kernels.convolution_triton import convolve_triton

        return convolve_triton(x, weight, bias, activation, reach)
    return convolve_naive(x, weight, bias, activation, reach)


def convolve_backward(d_out, x, weight, bias, activation, reach, dtype):
    """Gradients of `convolve`: dx [T, D] in `dtype`; dweight [D, W] and dbias [D] (or None) in fp32, or fp64 for fp64.

    Sums over tokens have one order, so that results repeat bit by bit.
    """
    if _fused(x):
        from longspan.kernels.convolution_triton import convolve_backward_triton

        return convolve_backward_triton(d_out, x, weight, bias, activation, reach, dtype)
    return convolve_backward_naive(d_out, x, weight, bias, activation, reach, dtype)


def _fused(x):
    return x.is_cuda and x.dtype != torch.float64


def convolve_naive(x, weight, bias, activation, reach):
    """convolve in plain PyTorch, any device and dtype."""
    out = _linear_part(x, weight, bias, reach)
    return (F.silu(out) if activation else out).to(x.dtype)


def convolve_backward_naive(d_out, x, weight, bias, activation, reach, dtype):
    """convolve_backward in plain PyTorch, any device and dtype."""
    wide = wide_dtype(x.dtype)
    d_pre = torch.where(reach[:, None] >= 0, d_out.to(wide), 0.0)
    if activation:
        pre = _linear_part(x, weight, bias, reach)
        gate = pre.sigmoid()
        d_pre = d_pre * gate * (1 + pre * (1 - gate))
    dx, d_weight = torch.zeros_like(x, dtype=wide), torch.zeros_like(weight, dtype=wide)
    for lag, tap, later, earlier in _lags(x, weight):
        reached = reach[later, None] >= lag
        dx[earlier] += torch.where(reached, d_pre[later], 0.0) * weight[:, tap]
        d_weight[:, tap] = (d_pre[later] * torch.where(reached, x[earlier], 0.0)).sum(0)
    return dx.to(dtype), d_weight, None if bias is None else d_pre.sum(0)


def _linear_part(x, weight, bias, reach):
    out = torch.zeros_like(x, dtype=wide_dtype(x.dtype))
    if bias is not None:
        out += bias
    for lag, tap, later, earlier in _lags(x, weight):
        out[later] += torch.where(reach[later, None] >= lag, x[earlier], 0.0).to(out.dtype) * weight[:, tap]
    return out


def _lags(x, weight):
    """(lag, column of weight, rows that read `lag` tokens back, rows that they read) where there are such rows."""
    num_tokens, width = x.shape[0], weight.shape[1]
    for lag in range(min(width, num_tokens)):
        yield lag, width - 1 - lag, slice(lag, None), slice(0, num_tokens - lag)
