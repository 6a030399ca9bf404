"""Memory and work of one training step, counted on the model itself while it runs on tensors without data.

The model is built, checkpointed and differentiated as in training, on torch's meta device (shapes and dtypes, no
memory), with `longspan.attention.outline` in the place of attention's kernels. Every storage that appears is
followed until it is freed, so what autograd keeps, and when, is not derived a second time: a change of a layer changes
the count.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from longspan.attention.offload import Offload
from longspan.attention.outline import Call, Outline, OutlinedOffload
from longspan.attention.outline.storages import Storages
from longspan.kernels.segment_rows import Runs
from longspan.models.build import build_model
from longspan.models.config import CHANNELS, ModelConfig
from longspan.models.decay import Gate
from longspan.models.diffusion import Pixels, pixels
from longspan.models.tensor_parallel import split_model
from longspan.models.tiles import Tile, Tiles, runs_in_tiles
from longspan.parallel.context import SequenceParallel
from longspan.parallel.tensor import OutlinedRanks

# What storages and work are booked under.
BATCH, EMBEDDING, RESIDUAL, MLP, NORMS, LOSS = "batch", "embedding, angles", "residual stream", "MLP", "norms", "loss"
BACKWARD, GRADIENTS, WHOLE = "backward scratch", "gradients", "whole gradients"
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # matrix products: where the left operand stands
LOOKUPS = ("embedding", "index", "gather", "index_select", "scatter_")  # read as much as they write
SILENT = ("empty", "detach", "alias", "view", "record_stream")  # beginnings of the names of what touches no memory


@dataclass
class Stage:
    """What happens in one direction of one block, or between blocks, in the order in which it happens.

    block: its number, None for what is outside all. backward: whether it is of the backward pass, recomputation
    included. waits: whether the host waits, before it queues this stage, until the device has done the one before.
    flops: of matrix products, traffic: bytes read and written by all other operations, both by name; attention is in
    `calls` instead. launches: operations. exchanged: bytes that the rank gets from those that share its layers, or
    where tokens or heads move for attention, crossed: from other machines, in so many exchanges. peak: the most bytes
    at any time, and at_peak what they were.
    """

    block: int | None
    backward: bool
    waits: bool = False
    flops: Counter = field(default_factory=Counter)
    traffic: Counter = field(default_factory=Counter)
    calls: Counter = field(default_factory=Counter)
    launches: int = 0
    exchanged: float = 0
    crossed: float = 0
    exchanges: int = 0
    peak: int = 0
    at_peak: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """Of one micro-batch, forward and backward, on one rank; parameters not included.

    kept: bytes by name at the end of the forward pass, all that the backward pass will need. stages: the work, in
    order. trained_sizes, block_trained: of parameters that have gradients, and how many those of each block are.
    put_away: bytes of every tensor that waits in host memory for the backward pass.
    """

    kept: dict[str, int]
    stages: tuple[Stage, ...]
    parameter_sizes: tuple[int, ...]
    block_parameters: tuple[int, ...]
    trained_sizes: tuple[int, ...]
    block_trained: tuple[int, ...]
    put_away: tuple[int, ...]

    @property
    def peak(self) -> int:
        """The most bytes at any time."""
        return max(stage.peak for stage in self.stages)

    @property
    def at_peak(self) -> dict[str, int]:
        """What they were."""
        return max(self.stages, key=lambda stage: stage.peak).at_peak

    @property
    def flops(self) -> Counter:
        """Of matrix products by name, recomputation included."""
        return sum((stage.flops for stage in self.stages), Counter())

    @property
    def traffic(self) -> Counter:
        """Bytes by name."""
        return sum((stage.traffic for stage in self.stages), Counter())

    @property
    def launches(self) -> int:
        return sum(stage.launches for stage in self.stages)

    @property
    def exchanged(self) -> float:
        return sum(stage.exchanged for stage in self.stages)

    @property
    def window(self) -> int:
        """Bytes that this rank shares with others for blocks of sparse layers, allocated once, outside of the peak."""
        return max((call.window for stage in self.stages for call in stage.calls), default=0)

    @property
    def num_parameters(self) -> int:
        return sum(self.parameter_sizes)

    @property
    def root_parameters(self) -> int:
        """Those outside the blocks."""
        return self.num_parameters - sum(self.block_parameters)

    @property
    def num_trained(self) -> int:
        return sum(self.trained_sizes)

    @property
    def root_trained(self) -> int:
        return self.num_trained - sum(self.block_trained)


def measure(
    config: ModelConfig,
    lengths: Iterable[int],
    *,
    parallel: SequenceParallel | None = None,
    dtype: torch.dtype = torch.bfloat16,
    prepare: Callable[[nn.Module, Offload], object] = lambda model, offload: None,
    gpu: bool = True,
    hopper: bool = True,
    gradient_bytes: float = 0.0,
    tp: int = 1,
    peer_blocks: bool = False,
) -> Measured:
    """A step over documents with these lengths, of which this rank has its share.

    parallel: a SequenceParallel with a rank, by which ranks that are not there share them; None: one rank. dtype: of
    compute, and of the parameters that products see (gates' are fp32). gpu: kernels and fused operations of GPUs,
    hopper: of Hopper GPUs. prepare: does to the model what training does to it before it is sharded, such as
    checkpointing, for which it gets an Offload without data; it is not compiled. gradient_bytes: what stays of the
    gradient of one parameter once its block is done; until then it is whole. tp: ranks that share layers; parameters
    are then those of one of them. peer_blocks: whether blocks of sparse layers go through memory that ranks share,
    whose windows are in no peak.
    """
    lengths, meter, parallel = tuple(lengths), _Meter(gradient_bytes), parallel or SequenceParallel()
    with torch.device("meta"):
        model = build_model(config)
    _cast(model, dtype)
    if tp > 1:
        split_model(model, OutlinedRanks(tp, meter.receive))
    parameters = list(model.parameters())
    for parameter in parameters:
        meter.ignore(parameter)
    book_layers(model, meter)
    prepare(model, OutlinedOffload(meter.put_away))
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(meter.take_gradient)
    for block in model.blocks:
        block.visit_tiles = meter.first_of
    # A rank of several may hold one token more than others.
    tokens = -(-sum(lengths) // parallel.world_size)
    with meter:
        with _Kernels(gpu), meter.booked(EMBEDDING):
            kernels, tile = (gpu, hopper), model.blocks[0].mlp_tile
            inputs, seq = _inputs(config, lengths, tokens, parallel, kernels, tile, meter, peer_blocks)
            loss = model(*inputs, seq)
        kept = {name: count for name, count in meter.live.items() if count}
        with meter.booked(BACKWARD):
            meter.begin_backward()
            loss.backward()
            if meter.stages[-1].block is not None:  # blocks in front of it are frozen
                meter.enter(None)
    if config.task == "text":  # of the loss one chunk was run (kernels.loss)
        for stage in meter.stages:
            for work in (stage.flops, stage.traffic):
                if LOSS in work:
                    work[LOSS] *= max(1.0, tokens / config.loss_chunk)
        meter.end_of_forward.exchanges += (tp > 1) * (tokens // config.loss_chunk)  # of few bytes
    return Measured(
        kept, tuple(meter.stages),
        tuple(parameter.numel() for parameter in parameters),
        tuple(map(_count, model.blocks)), tuple(parameter.numel() for parameter in trained),
        tuple(_count(block, trained=True) for block in model.blocks), tuple(meter.away),
    )  # fmt: skip


def _count(module: nn.Module, trained: bool = False) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad or not trained)


def book_layers(model: nn.Module, meter) -> None:
    """What a layer makes is booked under its name: mixers by kind, MLPs, norms; what stands between under the stream,
    and what comes after the last norm under the loss. Stages begin where blocks do, in either direction."""

    def book(module, name):
        module.register_forward_pre_hook(lambda *_: meter.push(name), prepend=True)
        module.register_forward_hook(lambda *_: meter.pop(), always_call=True)

    def stage(number, last, module):
        """Of the module before which `last` is done: forward it is `number`; once its input has its gradient, `last`
        is next."""

        def before(_, args):
            meter.enter(number)
            if args[0].requires_grad:
                args[0].register_hook(lambda _: meter.enter(last))

        module.register_forward_pre_hook(before)

    numbers = [None, *range(len(model.blocks)), None]
    for number, last, module in zip(numbers[1:], numbers, [*model.blocks, model.norm]):
        stage(number, last, module)
    for block, kind in zip(model.blocks, model.config.layer_kinds):
        book(block, RESIDUAL)
        book(block.mixer, kind)
        for module in (block.mixer_norm, block.mlp_norm):
            book(module, NORMS)
        book(block.mlp, MLP)
    book(model.norm, NORMS)
    model.norm.register_forward_hook(lambda *_: meter.rename(LOSS))


class _Meter(Storages):
    """Follows storages from the operation that makes them until they are freed, and counts operations."""

    def __init__(self, gradient_bytes: float = 0.0):
        super().__init__()
        self.live, self.total = Counter(), 0
        self.stages = [Stage(None, backward=False)]
        self._repeats, self._counts, self.away = 1, True, []
        self.gradient_bytes, self._whole = gradient_bytes, []
        self._names = []

    def enter(self, block: int | None, *, backward: bool | None = None, waits: bool = False) -> None:
        """What comes is of this block; backward: None for as before."""
        last = self.stages[-1]
        if last.backward and last.block is not None:
            self._reduce_gradients()
        self._whole = []
        backward = last.backward if backward is None else backward
        self.stages.append(Stage(block, backward, waits, peak=self.total, at_peak=self._alive()))

    def begin_backward(self) -> None:
        self.end_of_forward = self.stages[-1]
        self.enter(None, backward=True)

    def push(self, name: str) -> None:
        self._names.append(name)

    def pop(self) -> None:
        self._names.pop()

    def rename(self, name: str) -> None:
        """What is not inside any layer is from now on booked under `name`."""
        if self._names and self._names[0] == EMBEDDING:
            self._names[0] = name

    @contextmanager
    def booked(self, name: str):
        self.push(name)
        yield
        self.pop()

    def first_of(self, tiles: list[slice]):
        """The first tile, whose work counts for all, and which holds what any of them does."""
        if tiles:
            self._repeats = len(tiles)
            yield tiles[0]
            self._repeats = 1

    def put_away(self, tensor: torch.Tensor) -> torch.Tensor:
        self.away.append(tensor.nbytes)
        with self.uncounted():
            return torch.empty_like(tensor)

    @contextmanager
    def uncounted(self):
        self._counts = False
        yield
        self._counts = True

    def record(self, call: Call) -> None:
        if call.asked is not None and not call.window and not call.backward:
            self.enter(self.stages[-1].block, waits=True)
        self.stages[-1].calls[call] += 1

    def receive(self, size: float, crossing: float = 0.0) -> None:
        self.stages[-1].exchanged += self._repeats * size
        self.stages[-1].crossed += self._repeats * crossing
        self.stages[-1].exchanges += self._repeats

    def take_gradient(self, parameter) -> None:
        """What happens to a gradient where parameters are sharded: it is whole until its block, or all, is done."""
        parameter.grad = None
        self._whole.append(parameter)
        self._add(WHOLE, parameter.nbytes)

    def _reduce_gradients(self) -> None:
        """Of the block that is done: a part of them stays."""
        for parameter in self._whole:
            self._add(WHOLE, -parameter.nbytes)
            self._add(GRADIENTS, int(parameter.numel() * self.gradient_bytes))

    def _alive(self) -> dict[str, int]:
        return {name: count for name, count in self.live.items() if count}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not self._counts:
            return result
        self._count(func, args, self.follow(result))
        return result

    def made(self, size):
        name = self._names[-1]
        self._add(name, size)

        def freed():
            self.live[name] -= size
            self.total -= size

        return freed

    def _add(self, name, size):
        self.live[name] += size
        self.total += size
        stage = self.stages[-1]
        if self.total > stage.peak:
            stage.peak, stage.at_peak = self.total, self._alive()

    def _count(self, func, args, outputs) -> None:
        name, where, stage = func._schema.name.removeprefix("aten::"), self._names[-1], self.stages[-1]
        if func.is_view or name.lstrip("_").removeprefix("new_").removeprefix("unsafe_").startswith(SILENT):
            return
        stage.launches += self._repeats
        if name in PRODUCTS:
            left = args[PRODUCTS[name]]
            stage.flops[where] += 2.0 * self._repeats * outputs[0].numel() * left.shape[-1]
            return
        read = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        touched = outputs * 2 if name in LOOKUPS else read + outputs
        size = sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in touched)
        stage.traffic[where] += self._repeats * size


class _Kernels(TorchFunctionMode):
    """Whether a tensor is on a GPU, which the meta device does not know."""

    def __init__(self, gpu: bool):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.gpu if func is torch.Tensor.is_cuda.__get__ else func(*args, **(kwargs or {}))


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    for module in model.modules():
        kept = torch.promote_types(dtype, torch.float32) if isinstance(module, Gate) else dtype
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().to("meta", kept)))


def _inputs(config, lengths, tokens, parallel, kernels, mlp_tile, meter, peer_blocks):
    """What a model takes in training, for this rank's tokens."""

    def numbers(*shape, dtype=torch.int64):
        return torch.empty(*shape, dtype=dtype, device="meta")

    with meter.booked(BATCH):
        positions, derived = numbers(tokens), {}
        counts = meter.record, meter.receive, derived, peer_blocks, meter.uncounted
        seq = Outline(lengths, tokens, parallel, *kernels, positions, *counts)
        if config.task == "text":
            return [numbers(tokens), numbers(tokens)], seq

        def runs(tokens, count):
            return Runs(numbers(tokens), numbers(count), numbers(count))

        derived[pixels] = Pixels(numbers(tokens), numbers(tokens), runs(tokens, seq.spans), numbers(seq.spans))
        if size := min(mlp_tile, tokens):  # all as the first, the only one that is run
            count = -(-seq.spans * size // tokens)
            tiles = range(-(-tokens // size))
            derived[runs_in_tiles] = Tiles(tuple(Tile(slice(size), slice(count), runs(size, count)) for _ in tiles))
        pair = 2 * [(tokens, CHANNELS)]
        return [numbers(*shape, dtype=torch.float32) for shape in (*pair, (len(lengths),))], seq
