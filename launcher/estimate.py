"""Memory and time of a training step before any GPU is asked for: what every rank holds, what takes how long.

Memory and work are counted on the model itself (models.activations); what sharding adds is here, seconds are in
launcher.step_time. One step is the steady state: compilation, autotuning and reading data are not in it. In softmax
attention the rank with most pairs is counted; else ranks are taken as equally busy.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import gcd

import torch
from torch import nn

from longspan.attention.head_groups import head_groups
from longspan.attention.moved import head_parallel_ranks, pairs_per_rank
from longspan.attention.offload import Offload
from longspan.kernels.softmax import BACKENDS
from longspan.launcher.calibration import load_costs
from longspan.launcher.config import Config
from longspan.launcher.errors import UserError
from longspan.launcher.gpus import CONTEXT, EXTRAS, FRAGMENTS, LAUNCH_S, Cluster
from longspan.launcher.host_memory import host_memory
from longspan.launcher.state_sizes import MASTER, state_sizes
from longspan.launcher.step_time import WAITING, step_seconds
from longspan.models.activations import GRADIENTS, WHOLE, Measured, measure
from longspan.models.checkpointing import checkpoint_blocks
from longspan.models.config import SOFTMAX_KINDS, SPARSE_KINDS
from longspan.models.flops import model_flops, num_parameters, num_trained, softmax_masks
from longspan.models.parallelize import freeze
from longspan.parallel.context import SequenceParallel
from longspan.parallel.geometry import Mask
from longspan.parallel.layout import Layout
from longspan.parallel.peer_memory import cannot_be_honoured, refusal_of_ranks
from longspan.parallel.topology import Topology

GATHERED = 2  # blocks whose parameters are whole at once: in use, and arriving or in the buffer they arrived in
WINDOWS = "windows shared with other ranks"
COUNTED = ("top", "hierarchical")  # of model.sparse_selection
NOT_OF_GPUS = ("cpu", "math")  # of parallel.backend: does not run there, or was not measured


@dataclass(frozen=True)
class Estimate:
    """memory: bytes per rank at the peak, by what they are; other_peak: those of the optimizer's update, when no
    activations exist. kept: bytes of activations at the end of the forward pass. host: bytes of a machine's memory, by
    what they are. seconds: of one step, by component; they add up. limit: bytes that torch may allocate; host_limit:
    that a machine has."""

    memory: dict[str, float]
    other_peak: float
    kept: dict[str, float]
    limit: float
    host: dict[str, float]
    host_limit: float
    seconds: dict[str, float]
    tokens: int
    gpus: int
    mfu: float
    num_parameters: int
    num_trained: int
    notes: tuple[str, ...]

    @property
    def peak(self) -> float:
        return max(sum(self.memory.values()), self.other_peak)

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit and sum(self.host.values()) <= self.host_limit

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def binds(self) -> str:
        """The component that takes longest."""
        return max(self.seconds, key=self.seconds.get)

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.tokens / self.step_s / self.gpus

    def as_dict(self) -> dict:
        """For JSON: bytes, seconds and what follows from them."""
        return {
            "parameters": self.num_parameters, "trained_parameters": self.num_trained,
            "memory_bytes": self.memory, "kept_bytes": self.kept,
            "peak_bytes": self.peak, "limit_bytes": self.limit, "host_bytes": self.host,
            "host_limit_bytes": self.host_limit, "fits": self.fits, "seconds": self.seconds,
            "step_time_s": self.step_s, "binds": self.binds, "tokens": self.tokens,
            "tokens_per_s_per_gpu": self.tokens_per_s_per_gpu, "mfu": self.mfu, "notes": list(self.notes),
        }  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A config on a cluster. document: tokens of every document (0: a sample is one). extras: back ends of softmax
    attention that are there beside PyTorch's. UserError for settings that cannot go together on so many GPUs."""

    config: Config
    cluster: Cluster
    document: int = 0
    extras: tuple[str, ...] = ("fa4",)

    def __post_init__(self):
        self.config.validate(world_size=self.cluster.count)
        if self.cluster.per_node % self.tp:
            raise UserError(
                f"parallel.tp={self.tp} makes GPUs of different machines share layers, with {self.cluster.per_node} in"
                " each: use a divisor of that, or see --gpus-per-node"
            )
        self._refuse_what_is_not_counted()

    @property
    def has_softmax(self) -> bool:
        """Whether some layer is of softmax attention."""
        return _has_softmax(self.config)

    @property
    def backend(self) -> str:
        """Of softmax attention: with auto the first that takes such heads on this kind of GPU."""
        if self.config.parallel.backend != "auto":
            return self.config.parallel.backend
        there = [name for name in BACKENDS if name != "cpu" and (name in self.extras or name not in EXTRAS)]
        if self.config.train.deterministic:
            there = [name for name in there if not name.startswith("cudnn")]
        return next(name for name in there if self._limits(name) is None)

    def _limits(self, backend: str) -> str | None:
        return BACKENDS[backend].limits(self.dtype, self.config.model.head_size, self.cluster.gpu.capability)

    @property
    def tp(self) -> int:
        return self.config.parallel.tp

    @property
    def sp(self) -> int:
        return self.config.parallel.sp or self.cluster.count // self.tp

    @property
    def dp(self) -> int:
        return self.cluster.count // (self.sp * self.tp)

    @property
    def per_node(self) -> int:
        """GPUs of a machine with the same part of layers."""
        return self.cluster.per_node // self.tp

    @property
    def topology(self) -> Topology:
        """Of the ranks that share a sequence."""
        shared = gcd(self.sp, self.per_node)
        return Topology(self.sp // shared, shared)

    def _refuse_what_is_not_counted(self) -> None:
        for setting, remedy in _not_counted(self.config):
            raise UserError(f"{setting} is not counted by longspan plan: {remedy}")
        if self.has_softmax and (limits := self._limits(self.backend)):
            raise UserError(f"parallel.backend={self.backend} {limits}: use auto")
        if self.config.parallel.peer_memory == "on" and (refusal := refusal_of_ranks(self.topology)):
            raise UserError(cannot_be_honoured(refusal))

    @property
    def peer_blocks(self) -> bool:
        """Whether blocks of sparse layers go through memory that GPUs share."""
        return self.config.parallel.peer_memory != "off" and refusal_of_ranks(self.topology) is None

    @property
    def shards(self) -> int:
        """Ranks that share one copy of the parameters, or of a tensor-parallel rank's part of them."""
        copies = self.cluster.count // self.tp
        return {"none": 1, "hsdp": self.per_node}.get(self.config.parallel.mesh_sharding, copies)

    @property
    def offload(self) -> bool:
        """Whether parameters, gradients and optimizer states are in host memory."""
        return self.config.optim.offload == "cpu"

    def state_sizes(self, measured: Measured) -> dict[str, float]:
        """Bytes that a GPU keeps of so many parameters from step to step, by what they are."""
        numbers = (0, 0) if self.offload else (measured.num_parameters, measured.num_trained)
        return state_sizes(*numbers, self.shards)

    @property
    def reduce_size(self) -> int:
        """Bytes of a number of a gradient that travels."""
        return getattr(torch, self.config.train.reduce_dtype).itemsize

    @property
    def micro_batches(self) -> int:
        return self.config.train.global_batch // self.dp

    @property
    def lengths(self) -> list[int]:
        """Documents of one sample."""
        return lengths_of(self.config, self.document)

    @cached_property
    def parallel(self) -> SequenceParallel:
        """As training has it, seen from the first rank of a sequence."""
        settings = self.config.parallel.of_sequences | {"backend": self.backend}
        return SequenceParallel(rank=0, topology=self.topology, costs=load_costs(self.config), **settings)

    @cached_property
    def layout(self) -> Layout:
        """Of the ranks that share a sequence, outside of softmax attention."""
        return self.parallel.base_layout(self.lengths)

    def attention_layout(self, mask: Mask) -> Layout:
        """In softmax attention with this mask."""
        return self.parallel.attention_layout(self.layout, mask)

    def pairs(self, mask: Mask) -> float:
        """Query-key pairs of the rank with most, times its share of the heads, in a softmax layer with this mask."""
        return max(pairs_per_rank(self, self.heads, mask))

    @property
    def heads(self) -> int:
        """Query heads of the ranks that share a sequence."""
        return self.config.model.num_heads // self.tp

    @property
    def head_groups(self) -> int:
        """Groups of heads on which softmax layers, if there are any, work one after the other, at most."""
        model, tokens = self.config.model, sum(self.lengths) // self.sp
        if not self.has_softmax:
            return 1
        sizes = tokens, self.heads, model.kv_heads // self.tp
        wanted, masks = self.config.parallel.head_groups, set(softmax_masks(model))
        keys = sizes[-1] // gcd(sizes[-1], head_parallel_ranks(self.parallel, self.heads))  # of a rank
        return max(gcd(head_groups(wanted, *sizes, mask, self.lengths), keys) for mask in masks)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.config.train.dtype)

    def with_settings(self, **sections) -> "Job":
        """Another with settings changed, as in train={"checkpointing": "full"}."""
        changed = {name: replace(getattr(self.config, name), **values) for name, values in sections.items()}
        return replace(self, config=replace(self.config, **changed))

    def measure(self) -> Measured:
        """One micro-batch of a rank; gradients stay, sharded, from the first."""
        return measure(
            self.config.model, self.lengths, parallel=self.parallel, dtype=self.dtype,
            prepare=partial(prepare, self.config), hopper=self.cluster.gpu.hopper,
            gradient_bytes=0 if self.offload else MASTER / self.shards, tp=self.tp, peer_blocks=self.peer_blocks,
        )  # fmt: skip


def lengths_of(config: Config, document: int = 0) -> list[int]:
    """Documents of one sample: of so many tokens each (0: one), or images."""
    length, size = config.data.seq_len, document or config.data.seq_len
    if config.model.task == "images":
        size = config.data.image_size**2
    return [size] * (length // size) + [length % size] * (length % size > 0)


def countable(config: Config, gpu: bool = True) -> bool:
    """Whether what a rank holds, on a GPU or a CPU, can be counted."""
    return not any(_not_counted(config, gpu))


def _has_softmax(config: Config) -> bool:
    return not set(SOFTMAX_KINDS).isdisjoint(config.model.layer_kinds)


def _not_counted(config: Config, gpu: bool = True) -> Iterator[tuple[str, str]]:
    """Settings that are not counted, and what to plan with."""
    if gpu and config.parallel.backend in NOT_OF_GPUS and _has_softmax(config):
        yield f"parallel.backend={config.parallel.backend}", "plan with auto"
    if config.parallel.engine == "deepspeed":
        yield "parallel.engine=deepspeed", "plan with fsdp2 or ddp"
    selection = config.model.sparse_selection.get("name")
    if selection not in (None, *COUNTED):
        yield f"model.sparse_selection with name={selection}", "plan with name=top"


def prepare(config: Config, model: nn.Module, offload: Offload) -> None:
    """What `parallelize` does that changes what layers keep."""
    train = config.train
    for block in model.blocks:
        block.mlp_tile = train.mlp_tile
    if train.checkpointing != "none":
        away = offload if train.offload_activations else None
        checkpoint_blocks(model, train.checkpointing, train.checkpoint_layers, away)
    freeze(model, config.optim.trainable)


def estimate(job: Job) -> Estimate:
    """What a step of the job takes and holds."""
    measured = job.measure()
    memory = memory_at_peak(job, measured)
    states = sum(job.state_sizes(measured).values()) + memory[WINDOWS]
    seconds = step_seconds(job, measured)
    model, samples, count = job.config.model, job.config.train.global_batch, job.cluster.count
    flops = model_flops(model, job.lengths, job.config.optim.trainable) * samples
    mfu = flops / sum(seconds.values()) / count / (job.cluster.peak_tflops * 1e12)
    return Estimate(
        memory, states, dict(measured.kept), usable(job.cluster), host_memory(job, measured),
        job.cluster.host_memory, seconds,
        job.config.data.seq_len * samples, count, mfu, num_parameters(model),
        num_trained(model, job.config.optim.trainable), tuple(notes(job, seconds)),
    )  # fmt: skip


def usable(cluster: Cluster) -> float:
    """Bytes that torch can allocate on a GPU before it runs out."""
    return (cluster.gpu.memory - CONTEXT) / (1 + FRAGMENTS)


def share_of_memory(job: Job) -> float:
    """What is taken at the peak of what there is, of a GPU or of its machine, whichever is fuller."""
    measured = job.measure()
    device = sum(memory_at_peak(job, measured).values()) / usable(job.cluster)
    return max(device, sum(host_memory(job, measured).values()) / job.cluster.host_memory)


def memory_at_peak(job: Job, measured: Measured) -> dict[str, float]:
    """Bytes of a rank by what they are, when most exist."""
    stages = range(len(measured.stages))
    return max((_memory(job, measured, number) for number in stages), key=lambda memory: sum(memory.values()))


def _memory(job: Job, measured: Measured, number: int) -> dict[str, float]:
    """When most exist in one stage."""
    states, at_peak = job.state_sizes(measured), dict(measured.stages[number].at_peak)
    gradients, whole = at_peak.pop(GRADIENTS, 0), at_peak.pop(WHOLE, 0)
    if job.micro_batches == 1:  # else all of them, from the micro-batches before
        states["gradients"] = gradients
    return {
        **states,
        "gathered parameters, reduced gradients": whole + sharding_buffers(job, measured, number),
        WINDOWS: measured.window,
        **at_peak,
    }


def sharding_buffers(job: Job, measured: Measured, number: int) -> float:
    """Bytes of FSDP2 in a stage, without whole gradients of what it computes: whole parameters of the root and of some
    blocks, and gradients on their way, of the block that is done, at the end of the root. From and to host memory parts
    of the root and of a block travel too, in fp32."""
    stage, block, root = measured.stages[number], max(measured.block_parameters), measured.root_parameters
    trained, root_trained = measured.block_trained, measured.root_trained
    reduced = 0
    if stage.backward and stage.block is not None:
        reduced = trained[stage.block + 1] if stage.block + 1 < len(trained) else 0
    elif number + 1 == len(measured.stages):
        reduced = max(*trained, root_trained)
    moved = MASTER * (root + block + root_trained + max(trained)) / job.shards if job.offload else 0
    return (root + GATHERED * block) * job.itemsize + reduced * job.reduce_size + moved


def notes(job: Job, seconds: dict[str, float]) -> Iterator[str]:
    """What the numbers leave out."""
    if not job.cluster.gpu.measured:
        yield f"rates of {job.cluster.name} are not measured by longspan"
    if job.has_softmax and job.cluster.gpu.hopper and job.backend == "fa4":
        yield (
            "softmax attention is FlashAttention-4's: without flash-attn-4 it takes 5 % more forward and 16 % more"
            " backward, as parallel.backend=cudnn plans it"
        )
    if job.has_softmax and job.dtype == torch.float32:
        yield "softmax attention in float32 is plain PyTorch on GPUs, not measured: time and memory are lower bounds"
    if job.sp > 1 and not set(SPARSE_KINDS).isdisjoint(job.config.model.layer_kinds):
        yield "blocks of sparse attention are taken as chosen evenly: where choices agree, ranks fetch fewer"
    if job.offload or job.config.train.offload_activations:
        yield "PCIe is taken as 50 GB/s a GPU (one H200 alone has 55), the rate of host memory from data sheets"
    if job.offload:
        yield "the host updates in one thread of each rank, as torchrun has it: OMP_NUM_THREADS=8 or so takes less"
    if seconds.get(WAITING, 0.0) > 0.02 * sum(seconds.values()):
        yield (
            f"the host is taken to queue an operation in {1e6 * LAUNCH_S:.0f} us, as slow ones did: GPUs wait for it"
            " where they have few tokens each, which train.compile=true is for"
        )
    if job.config.train.compile:
        yield "train.compile fuses operations, which is not counted: memory and time are upper bounds"
