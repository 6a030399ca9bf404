"""cuDNN's fused attention through nvidia-cudnn-frontend: sequences of any lengths in one call, as a ragged batch.

An optional package. Compiling a graph takes a second or more, so graphs know rounded sizes only: the number of
sequences and the greatest lengths go up to powers of two, token counts to four steps an octave. Where sequences start
and how long they are lies in tables on the device; sequences that fill the batch up have no rows. Greatest lengths of
128 or more also keep clear of releases that have no plan for a single key, or write the LSE of single queries for one
head of a group only.

The backward wants q and dq in one layout, as Transformer Engine and PyTorch have them: dq is added up in a workspace
laid out like dq, but at the offsets of q. Otherwise, with cuDNN 9.19 on Hopper, dq is wrong from the second sequence
on, and memory past the workspace is written.

cuDNN's statistics are the LSE (natural logarithm); with offsets of their own they lie like `lse` here, [Tq, Hq].
"""

import functools
import threading
from typing import NamedTuple

import torch

from longspan.kernels.softmax.pack import Pack

name = "cudnn_ragged"
device_types = ("cuda",)

_OLDEST = 91002  # 9.10.2; backward passes of 9.10.0 and 9.10.1 are refused as wrong by the package itself
_SHORTEST = 128
# Whose rows an operand holds, by its name in a graph.
_SIDES = {"q": "q", "k": "k", "v": "k", "o": "q", "dO": "q", "stats": "q", "dQ": "q", "dK": "k", "dV": "k"}


def limits(dtype: torch.dtype, head_dim: int, capability: tuple[int, int]) -> str | None:
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {dtype}"
    major, minor = capability
    if major not in (9, 10):
        return f"needs a Hopper or Blackwell data-center GPU, not one of compute capability {major}.{minor}"
    limit = 256 if major == 9 else 128
    if head_dim % 8 or head_dim > limit:
        return f"takes head dims up to {limit} that are multiples of 8, not {head_dim}"
    return None


def missing() -> str | None:
    if torch.are_deterministic_algorithms_enabled():
        return "a deterministic backward, which torch.use_deterministic_algorithms asks for, would keep all scores"
    return _load()[1]


@functools.cache
def _load():
    """(the package, None), or (None, why not)."""
    try:
        import cudnn

        version = cudnn.backend_version()
    except ModuleNotFoundError as error:
        return None, f"{error}; install it with: pip install nvidia-cudnn-frontend==1.32.0"
    except Exception as error:  # of many kinds, where libraries do not fit together
        return None, f"nvidia-cudnn-frontend does not load: {error}"
    if version < _OLDEST:
        return None, f"needs cuDNN {_OLDEST} or later, this is {version}; install a newer build of PyTorch"
    return cudnn, None


def forward(q, k, v, pack: Pack, scale: float):
    q, k, v = (_aligned(x) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    inputs, outputs = {"q": q, "k": k, "v": v}, {"o": out, "stats": lse[..., None]}
    _run("sdpa", inputs, outputs, pack, scale, generate_stats=True)
    return out, lse


def backward(dout, q, k, v, out, lse, pack: Pack, scale: float):
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if q.stride() != dq.stride():
        q = q.clone(memory_format=torch.contiguous_format)
    q, k, v = (_aligned(x) for x in (q, k, v))
    inputs = {"q": q, "k": k, "v": v, "o": out.contiguous(), "dO": dout.contiguous()}
    inputs["stats"] = lse.contiguous()[..., None]
    # How many rows the workspace has room for: dq in fp32 and, with GQA, dk and dv of every query head.
    room = {"max_total_seq_len_q": _round_up(len(q), 3), "max_total_seq_len_kv": _round_up(len(k), 3)}
    _run("sdpa_backward", inputs, {"dQ": dq, "dK": dk, "dV": dv}, pack, scale, **room)
    return dq, dk, dv


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """[T, H, D] that the copy engine can read: unit stride in D, everything else in multiples of 16 bytes."""
    fits = x.stride(2) == 1 and all(stride > 0 and stride % 8 == 0 for stride in x.stride()[:2])
    return x if fits and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _round_up(count: int, bits: int) -> int:
    """To the next number with no more than `bits` significant bits: 2^(bits - 1) such numbers an octave."""
    shift = max(count.bit_length() - bits, 0)
    return -(-count >> shift) << shift


class _Rows(NamedTuple):
    """How packed rows [T, H, D] lie in memory, in elements."""

    heads: int
    dim: int
    row_stride: int
    head_stride: int
    dtype: torch.dtype

    @classmethod
    def of(cls, x: torch.Tensor) -> "_Rows":
        return cls(*x.shape[1:], *x.stride()[:2], x.dtype)


class _Sizes(NamedTuple):
    """What a graph serves: so many sequences, none longer than these."""

    batch: int
    q: int
    k: int


class _Graph(NamedTuple):
    graph: object
    operands: dict[str, object]
    lengths: dict[str, object]  # by side
    offsets: dict[tuple[str, int], object]  # by side and row stride
    workspace: int  # bytes


def _run(
    operation: str,
    inputs: dict[str, torch.Tensor],
    outputs: dict[str, torch.Tensor],
    pack: Pack,
    scale: float,
    **options,
) -> None:
    """Fills `outputs`; operands [T, H, D] by their names in _SIDES."""
    device = inputs["q"].device
    sizes = _Sizes(
        _round_up(pack.num_sequences, 1),
        max(_round_up(pack.max_q, 1), _SHORTEST),
        max(_round_up(pack.max_k, 1), _SHORTEST),
    )
    described = [tuple((name, _Rows.of(x)) for name, x in operands.items()) for operands in (inputs, outputs)]
    compiled = _compile(operation, *described, sizes, pack.causal, scale, tuple(options.items()), device)
    pointers = {compiled.operands[name]: x.data_ptr() for name, x in (inputs | outputs).items()}
    for side, table in compiled.lengths.items():
        pointers[table] = pack.lengths_tensor(side, sizes.batch, device).data_ptr()
    for (side, row_stride), table in compiled.offsets.items():
        pointers[table] = pack.offsets_tensor(side, row_stride, sizes.batch, device).data_ptr()
    workspace = torch.empty(compiled.workspace, dtype=torch.uint8, device=device)
    compiled.graph.execute(pointers, workspace.data_ptr(), handle=_handle(device))


@functools.cache
def _compile(
    operation: str,
    inputs: tuple[tuple[str, _Rows], ...],
    outputs: tuple[tuple[str, _Rows], ...],
    sizes: _Sizes,
    causal: bool,
    scale: float,
    options: tuple[tuple[str, int], ...],
    device: torch.device,
) -> _Graph:
    cudnn = _load()[0]
    types = {
        torch.bfloat16: cudnn.data_type.BFLOAT16,
        torch.float16: cudnn.data_type.HALF,
        torch.float32: cudnn.data_type.FLOAT,
    }
    graph = cudnn.pygraph(
        io_data_type=types[dict(inputs)["q"].dtype],
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
        handle=_handle(device),
    )

    def table(name, length, dtype):
        return graph.tensor(name=name, dim=[length, 1, 1, 1], stride=[1, 1, 1, 1], data_type=dtype)

    lengths = {side: table(f"lengths_{side}", sizes.batch, cudnn.data_type.INT32) for side in "qk"}
    offsets = {}

    def described(name, rows):
        """A batch of the greatest length; offsets say where each sequence starts."""
        key = side, row_stride = _SIDES[name], rows.row_stride
        if key not in offsets:
            offsets[key] = table(f"offsets_{side}_{row_stride}", sizes.batch + 1, cudnn.data_type.INT64)
        length = getattr(sizes, side)
        return {
            "dim": [sizes.batch, rows.heads, length, rows.dim],
            "stride": [length * row_stride, rows.head_stride, row_stride, 1],
            "data_type": types[rows.dtype],
            "ragged_offset": offsets[key],
        }

    operands = {name: graph.tensor(name=name, **described(name, rows)) for name, rows in inputs}
    results = getattr(graph, operation)(
        **operands,
        attn_scale=scale,
        use_causal_mask=causal,
        use_padding_mask=True,
        seq_len_q=lengths["q"],
        seq_len_kv=lengths["k"],
        **dict(options),
    )
    for result, (name, rows) in zip(results, outputs, strict=True):
        result.set_output(True)
        for attribute, value in described(name, rows).items():
            getattr(result, f"set_{attribute}")(value)
        operands[name] = result
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    return _Graph(graph, operands, lengths, offsets, graph.get_workspace_size())


def _handle(device: torch.device):
    handle = _thread_handle(device, threading.get_ident())
    _load()[0].set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    return handle


@functools.cache
def _thread_handle(device: torch.device, thread: int):
    """Of one thread: two may not use a handle at a time, and gradients are computed in a thread of their own."""
    with torch.cuda.device(device):
        return _load()[0].create_handle()
