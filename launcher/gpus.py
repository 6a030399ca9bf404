"""What GPUs and kernels give, as data: the rates that `longspan plan` works with, each with where it comes from.

TFLOP/s and TB/s are achieved ones; causal work counts half. What was not measured by longspan says so; `longspan plan`
repeats it in its output.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from longspan.launcher.errors import UserError

GIB = 2**30
PER_NODE = 8  # GPUs of a machine, unless said otherwise
CONTEXT = 2.5 * GIB  # of a GPU, outside what torch allocates: CUDA context, NCCL, libraries
HOST_PER_GPU = 128 * GIB  # of a machine's memory, unless said otherwise
PROCESS = 6 * GIB  # of host memory of a rank, outside of what training puts there: CUDA, NCCL, libraries; assumed
FRAGMENTS = 0.03  # of the peak, that the allocator cannot use (expandable segments)
# Kinds by the names that drivers have for them, behind "NVIDIA". A part of a GPU (MIG), and chips with other clocks,
# memory or links, have others.
KINDS = {
    "H100 80GB HBM3": "H100", "H100 PCIe": "H100 PCIe", "H200": "H200", "GH200 480GB": "GH200", "B200": "B200",
    "A100-SXM4-80GB": "A100", "A100-SXM4-40GB": "A100 40GB", "A100-PCIE-40GB": "A100 PCIe",
    "A100 80GB PCIe": "A100 PCIe",
}  # fmt: skip
# Dense bf16 TFLOP/s, by data sheet: what MFU counts against.
PEAK_TFLOPS = {
    "H100": 989, "H100 PCIe": 756, "H200": 989, "GH200": 989, "B200": 2250,
    "A100": 312, "A100 40GB": 312, "A100 PCIe": 312,
}  # fmt: skip


@dataclass(frozen=True)
class GPU:
    """memory: bytes that a process sees. products, products_fp32: TFLOP/s of matrix products of layers. attention:
    width of a head -> TFLOP/s of dense softmax attention forward, and backward. memory_rate: bytes per second of
    copies, of which other operations reach a share. linear: how many times longer linear attention takes than on an
    H200. intra, inter: bytes per second of one GPU to others of its machine, and to other machines. capability: by
    which CUDA and kernels know it."""

    memory: float
    products: float
    products_fp32: float
    attention: dict[int, tuple[float, float]]
    memory_rate: float
    linear: float
    intra: float
    inter: float
    source: str
    measured: bool
    capability: tuple[int, int]

    @property
    def hopper(self) -> bool:
        """Whether kernels for Hopper run."""
        return self.capability == (9, 0)


HOPPER_ATTENTION = {64: (525, 530), 128: (600, 624)}
GPUS = {
    "H100": GPU(
        memory=79.1 * GIB, products=680, products_fp32=48, attention=HOPPER_ATTENTION, memory_rate=3.03e12,
        linear=1.17, intra=326e9, inter=45e9, measured=True, capability=(9, 0),
        source="SXM 80 GB: memory rate measured, and linear attention with the Triton kernels (docs/log.md,"
        " linear_kernels_H100.json); attention and links as on the H200, which has the same chip and links;"
        " products 680 TFLOP/s, assumed",
    ),
    "H200": GPU(
        memory=139.8 * GIB, products=680, products_fp32=48, attention=HOPPER_ATTENTION, memory_rate=4.27e12,
        linear=1.0, intra=326e9, inter=45e9, measured=True, capability=(9, 0),
        source="measured 2026-11-22: copies 4.27 TB/s, products 680 TFLOP/s (profiles of steps, runs_2xH200.json),"
        " FlashAttention-4 600 to 660, NCCL over NVLink 326 GB/s; between machines 90 % of 400 Gb/s, assumed",
    ),
    "A100": GPU(
        memory=79.1 * GIB, products=250, products_fp32=17, attention={64: (180, 165), 128: (200, 185)},
        memory_rate=1.75e12, linear=3.2, intra=230e9, inter=22e9, measured=False, capability=(8, 0),
        source="SXM 80 GB, not measured: data sheet (2.04 TB/s, NVLink 600 GB/s), FlashAttention-2 as published"
        " (arXiv 2307.08691), HDR 200 Gb/s",
    ),
    "B200": GPU(
        memory=178.4 * GIB, products=1550, products_fp32=65, attention={64: (1000, 800), 128: (1400, 1100)},
        memory_rate=7.0e12, linear=0.85, intra=650e9, inter=45e9, measured=False, capability=(10, 0),
        source="not measured: data sheet (8 TB/s, NVLink 1.8 TB/s), FlashAttention-4 as published (up to 71 % of peak"
        " forward), 400 Gb/s",
    ),
}  # fmt: skip

# Shares of the rate of copies that other operations reach on an H200: norms, rotations, gates and SwiGLU of a layer
# together (pointwise_H200.json: 0.91 and 0.92); what FSDP2 copies around its transfers, many small pieces a kernel, and
# the fused update (profiles of runs_2xH200.json: 0.53 to 0.57, and 0.74 to 0.77).
POINTWISE_SHARE, SHARDING_SHARE, UPDATE_SHARE = 0.92, 0.55, 0.75
# Linear attention on an H200, K = V = 128, bf16: ns per token and head forward, and backward, of kernels alone.
LINEAR_NS = {
    "none": (0.398, 0.868),  # 32,768 tokens, linear_hopper_H200.json
    "fixed": (0.307, 0.767),  # 131,072 tokens, linear_kernels_H200_fla.json, in a graph, as those below
    "scalar": (0.284, 0.913),
    "channel": (1.014, 2.976),
    "kda": (1.220, 2.704),
    "gated_delta": (0.783, 1.828),  # 32,768 tokens, linear_kernels_H200_gated_delta.json
    "delta": (0.931, 1.813),  # linear_hopper_H200.json
    "whole": (4.0, 8.0),  # plain PyTorch without a causal mask, not measured
}
# How many times longer they take in a step: 1.14 to 1.17 as long in profiles of 512K tokens (runs_2xH200.json) as those
# of then alone (linear_hopper_H200.json), 1.37 of 128K. Products take the GPU to its limit of power, so its clock is
# 1.44 to 1.55 GHz for 1.98 alone: 1.13 to 1.17 times longer (linear_in_steps_H200.json).
LINEAR_IN_STEP = 1.17
# Share of FlashAttention-4's rate on Hopper GPUs, forward and backward, of other back ends of softmax attention with
# heads of 128: cuDNN in PyTorch in steps of 512K to 2M tokens (runs_4xH200.json: 568 and 536 TFLOP/s); cuDNN's ragged
# kernels and FlashAttention-2 on packed documents (softmax_backends_H200.json).
BACKEND_SHARE = {"cudnn": (0.95, 0.86), "cudnn_ragged": (0.85, 0.82), "flash": (0.52, 0.52)}
# Block-sparse attention on an H200: share of the dense rate forward, and backward, choosing and lists included, packing
# for other ranks not. TopBlocks: 256K tokens, alone (sparse_ranks_2xH200_variants.json).
SPARSE_SHARE = (0.57, 0.62)
# Hierarchical: of pairs with all rows of the last level, and of all others in blocks of 16, by what llsa layers took in
# steps of 1M and 2M tokens (runs_4xH200.json). Larger blocks are supposed to gain in proportion, up to the share above.
LAST_LEVEL_SHARE, SMALL_BLOCK_SHARE = (0.54, 0.60), (0.042, 0.054)
EXTRAS = {"fa4": "flash-attn-4", "cudnn_ragged": "nvidia-cudnn-frontend"}  # back ends, and packages that they need
# Bytes per second of a GPU from and to host memory (55 by one H200 alone, host_memory_H200.json; 63 by data sheet), and
# of a host's memory, by data sheet.
HOST_LINK, HOST_RATE = 50e9, 400e9
# Bytes per second of an update on the host in one thread, which is what torchrun gives a rank: 418 million parameters
# took 1.84 s more than on the GPU, 40 bytes each (last steps of loss_parity_memory_H200.json, when it ran alone).
THREAD_RATE = 9e9
# For the host to queue one operation, forward and backward, autograd and modules included: 92 to 111 us in layers of
# 2,048 tokens of four kinds, over operations as models.activations counts them (host_time_H200.json; a slow host).
LAUNCH_S = 1.05e-4
# For the host to do what FSDP2, and the update, do for a block, in one direction: half of what steps of 16,384 tokens
# took above that for each of their blocks, median of runs (8 to 12 ms; loss_parity_{sparse,engines,memory}*_H200.json,
# several runs at a time on one GPU; one at a time on two, loss_parity_sparse_2xH200.json, had 13 to 16 ms).
BLOCK_S = 5.5e-3
LATENCY_S = 5e-5  # of a small collective over NVLink: 48 us for 1 MiB on 4 H200


@dataclass(frozen=True)
class Cluster:
    """`count` GPUs of one kind, `per_node` of them in a machine with `host_memory` bytes (0: HOST_PER_GPU for each).
    known: of the GPU, where that is not what the tables say of its name."""

    name: str
    count: int
    per_node: int = PER_NODE
    host_memory: float = 0
    known: GPU | None = None

    def __post_init__(self):
        if not self.host_memory:
            object.__setattr__(self, "host_memory", self.per_node * HOST_PER_GPU)

    @property
    def gpu(self) -> GPU:
        return self.known or GPUS[self.name]

    @property
    def peak_tflops(self) -> float:
        return PEAK_TFLOPS[self.name]

    def __str__(self) -> str:
        return f"{self.count}x{self.name}"


def extras_of(packages: Mapping[str, str | None]) -> tuple[str, ...]:
    """Back ends of softmax attention that are there with these packages, name -> version, and not without."""
    return tuple(name for name, package in EXTRAS.items() if packages.get(package))


def parse_gpus(text: str, per_node: int = PER_NODE, host_gib: float = 0) -> Cluster:
    """`64xH200`, or `H200` for one; host_gib: of a machine's memory, 0 for the default. UserError for anything
    else."""
    match = re.fullmatch(r"(?:(\d+)\s*[xX*]\s*)?([A-Za-z]\w*)", text.strip())
    meant, kinds = _meant(text), f"kinds: {', '.join(GPUS)}"
    hint = f"did you mean {meant}? {kinds}" if meant else kinds
    if match is None or int(match[1] or 1) < 1:
        raise UserError(f"--gpus {text}: write how many of which kind, such as 4xH200; {hint}")
    if match[2].upper() not in GPUS:
        raise UserError(f"--gpus {text}: {match[2]} is not in the tables; {hint}")
    if per_node < 1:
        raise UserError(f"--gpus-per-node {per_node}: use 1 or more")
    count = int(match[1] or 1)
    if count > per_node and count % per_node:
        raise UserError(f"--gpus {text}: {count} GPUs do not fill machines of {per_node}; see --gpus-per-node")
    if host_gib < 0:
        raise UserError(f"--host-memory {host_gib}: use GiB of a machine, such as 512")
    return Cluster(match[2].upper(), count, min(count, per_node), host_gib * GIB)


def kind_of(device: str) -> str | None:
    """The kind of a GPU by the name that its driver has for it; None for one that is not in the tables. Of some kinds
    the rate that MFU counts against is known and those of plans are not."""
    return KINDS.get(device.removeprefix("NVIDIA "))


def cluster_of(device: str, count: int, per_node: int) -> Cluster:
    """So many GPUs of that name. UserError for one that is not in the tables."""
    name = kind_of(device)
    if name not in GPUS:
        raise UserError(f"longspan plan knows no {device}")
    return Cluster(name, count, min(count, per_node))


def _meant(text: str) -> str:
    """What someone may have meant who wrote this: a kind of the tables somewhere in it, and a number beside it."""
    text = text.upper().replace("O", "0")
    nodes = re.fullmatch(r"(\d+)\s*[X*]\s*(\d+)\s*[X*]\s*(\w+)", text.strip())
    if nodes and nodes[3] in GPUS:  # machines of so many GPUs
        return f"{int(nodes[1]) * int(nodes[2])}x{nodes[3]} --gpus-per-node {nodes[2]}"
    kind = next((name for name in GPUS if re.search(rf"(?<![A-WYZ]){name}", text)), "")  # X is for times
    count = re.search(r"[1-9]\d*", text.replace(kind, " ", 1)) if kind else None
    return f"{count[0]}x{kind}" if count else kind
