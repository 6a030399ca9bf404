"""FlashAttention-4 (package flash-attn-4, CuTe DSL): fastest on Hopper, packed lengths and GQA included.

An optional package. Its backward adds dq up with atomics, in whatever order; under
`torch.use_deterministic_algorithms(True)` thread blocks wait for their turn instead, in packed calls and with GQA too.

Its public functions take the output and LSE of the backward from their own forward; a ring needs
the merged ones, so this calls the two functions below the autograd class, as they are in 4.0.0b36.
"""

import functools

import torch

from longspan.kernels.softmax.pack import Pack

name = "fa4"
device_types = ("cuda",)


def limits(dtype: torch.dtype, head_dim: int, capability: tuple[int, int]) -> str | None:
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {dtype}"
    major, minor = capability
    if major not in (9, 10, 11):
        return f"needs a Hopper or Blackwell data-center GPU, not one of compute capability {major}.{minor}"
    limit = 256 if major == 9 else 128
    if head_dim % 8 or head_dim > limit:
        return f"takes head dims up to {limit} that are multiples of 8, not {head_dim}"
    if major == 9 and head_dim <= 128 and -(-head_dim // 16) % 2:  # 4.0.0b36; flash-attention pull request 2896
        return f"gets gradients wrong for heads of {head_dim} on Hopper: rounded up to 16 they are no multiple of 32"
    return None


def missing() -> str | None:
    return _load()[1]


@functools.cache
def _load():
    """((forward, backward), None), or (None, why not)."""
    try:
        from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
    except ModuleNotFoundError as error:
        return None, f'{error}; install it with: pip install flash-attn-4==4.0.0b36 "nvidia-cutlass-dsl[cu13]"'
    except ImportError as error:
        return None, f"flash-attn-4 does not load: {error}"
    return (_flash_attn_fwd, _flash_attn_bwd), None


def forward(q, k, v, pack: Pack, scale: float):
    run = _load()[0][0]
    if pack.equal:
        q, k, v = _batch(pack, q, k, v)
        out, lse, *_ = run(q, k, v, softmax_scale=scale, causal=pack.causal, return_lse=True)
        return out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)
    out, lse, *_ = run(q, k, v, softmax_scale=scale, causal=pack.causal, return_lse=True, **_lengths(pack, q.device))
    return out, lse.t()


def backward(dout, q, k, v, out, lse, pack: Pack, scale: float):
    run = functools.partial(_load()[0][1], deterministic=torch.are_deterministic_algorithms_enabled())
    if pack.equal:
        q, k, v, out, dout, lse = _batch(pack, q, k, v, out, dout, lse)
        lse_BHS = lse.transpose(1, 2).contiguous()
        return tuple(x.flatten(0, 1) for x in run(q, k, v, out, dout, lse_BHS, softmax_scale=scale, causal=pack.causal))
    return run(
        q, k, v, out, dout, lse.t().contiguous(), softmax_scale=scale, causal=pack.causal, **_lengths(pack, q.device)
    )


def _batch(pack: Pack, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """[T, ...] -> [num_sequences, T / num_sequences, ...]"""
    return [x.unflatten(0, (pack.num_sequences, -1)) for x in tensors]


def _lengths(pack: Pack, device: torch.device) -> dict:
    return {
        "cu_seqlens_q": pack.cu_q_tensor(device),
        "cu_seqlens_k": pack.cu_k_tensor(device),
        "max_seqlen_q": pack.max_q,
        "max_seqlen_k": pack.max_k,
    }
