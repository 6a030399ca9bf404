"""Multi-query associative recall (MQAR; Zoology, arXiv 2312.04927): its batches, and one model's training on them.

A document of n pairs has 4n tokens: "key value" n times, all keys different, then 2n slots in which every key comes
once more, in random order and at uniformly random places, with noise in between. Only there is something to predict,
the key's value. Queries are 2 to 4n - 1 tokens behind their pairs, and what has to be held grows with n.
"""

import contextlib
import copy
import math
import time
from dataclasses import dataclass

import torch

from longspan.models.config import LINEAR_KINDS, ModelConfig
from longspan.models.decay import Gate
from longspan.models.decoder import Decoder
from longspan.parallel import SequenceParallel

RATIOS = ("1:1", "3:1", "7:1")  # linear layers to softmax layers
CURVE_POINTS = 60
BATCHES_AT_ONCE = 32  # drawn together: a few dozen small operations
EVALUATION_SEEDS = {"validation": 1_000_001, "accuracy": 1_000_002}  # validation chooses among learning rates
WARMUP, LAST_RATE = 0.1, 0.05  # share of the steps; share of the peak learning rate that cosine decay ends at


@dataclass(frozen=True)
class Task:
    """pairs: numbers of pairs of the documents. Every batch has `tokens` tokens of each, in documents end to end."""

    pairs: tuple[int, ...]
    tokens: int
    num_keys: int
    num_values: int
    num_noise: int = 64

    def __post_init__(self):
        for pairs in self.pairs:
            if not 1 <= pairs <= self.num_keys:
                raise ValueError(f"--pairs {pairs}: use 1 to {self.num_keys}, as there are --num-keys {self.num_keys}")
            if self.tokens < 1 or self.tokens % (4 * pairs):
                found = f"--tokens {self.tokens} is no multiple of the {4 * pairs} tokens of {pairs} pairs"
                raise ValueError(f"{found}; use {4 * math.lcm(*self.pairs)} or a multiple")

    @property
    def vocab_size(self) -> int:
        return self.num_keys + self.num_values + self.num_noise

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the documents of every batch, so that one context serves all batches."""
        return tuple(4 * n for n in self.pairs for _ in range(self.tokens // (4 * n)))

    @property
    def labels_per_batch(self) -> int:
        return sum(self.lengths) // 4

    def batches(self, generator: torch.Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens and labels, int64 [count, T], on the generator's device; T is `tokens` for each of `pairs` in turn.

        Keys are numbered from 0, then come values, then noise. Labels are -100 except at queries.
        """
        parts = [self._documents(n, count * self.tokens // (4 * n), generator) for n in self.pairs]
        tokens, labels = (torch.cat([part.view(count, -1) for part in column], 1) for column in zip(*parts))
        return tokens, labels

    def _documents(self, n, count, generator):
        on = {"generator": generator, "device": generator.device}
        first_noise = self.num_keys + self.num_values
        keys = torch.rand(count, self.num_keys, **on).argsort(1)[:, :n]
        values = torch.randint(self.num_keys, first_noise, (count, n), **on)
        slots = torch.rand(count, 2 * n, **on).argsort(1)[:, :n]  # where each key is asked for
        queries = torch.randint(first_noise, self.vocab_size, (count, 2 * n), **on).scatter_(1, slots, keys)
        answers = torch.full_like(queries, -100).scatter_(1, slots, values)
        pairs = torch.stack([keys, values], 2).flatten(1)
        return torch.cat([pairs, queries], 1), torch.cat([torch.full_like(pairs, -100), answers], 1)


@dataclass(frozen=True)
class Run:
    """One model trained once. Runs of one seed and device see the same batches."""

    model: str  # see layer_pattern
    learning_rate: float
    seed: int
    task: Task
    steps: int
    num_layers: int
    hidden_size: int
    num_heads: int
    conv_width: int  # of linear layers; -1: the family's
    device: str
    graphs: bool  # on a GPU, replay a step from a CUDA graph instead of launching its kernels one by one

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=self.task.vocab_size,
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            pattern=layer_pattern(self.model),
            conv_width=self.conv_width,
            state_size=self.hidden_size // self.num_heads,
            # The default suits widths of a thousand: at 64, associations would take many times as long to form.
            init_std=self.hidden_size**-0.5,
            loss_chunk=sum(self.task.lengths),
        )

    def validate(self) -> None:
        """ValueError in one line for what cannot be run."""
        period = len(layer_pattern(self.model))
        if self.num_layers % period:
            raise ValueError(f"model {self.model} needs a multiple of {period} layers, not --layers {self.num_layers}")
        self.config.validate()


def layer_pattern(model: str) -> list[str]:
    """Mixers of the layers of "softmax", a linear family such as "gated_delta", or a hybrid such as "gated_delta-3:1".

    Raises ValueError for another name.
    """
    family, _, ratio = model.partition("-")
    kind = f"linear:{family}"
    if model == "softmax":
        return [model]
    if kind in LINEAR_KINDS and model == family:
        return [kind]
    if kind in LINEAR_KINDS and ratio in RATIOS:
        return [kind] * int(ratio[0]) + ["softmax"]
    families = ", ".join(["softmax", *(kind.removeprefix("linear:") for kind in LINEAR_KINDS)])
    raise ValueError(
        f"model {model!r} is unknown; use {families}, or a linear one with -{', -'.join(RATIOS)} behind it"
    )


def train(run: Run, *, evaluation_batches: int, report) -> dict:
    """Trains and evaluates: "parameters", "state" (numbers in all linear layers' states of one document), "curve"
    (step, loss, seconds since the start), "seconds", "validation" and "accuracy" by number of pairs.

    Calls report(step) about every 60th part of the way. On GPUs the model computes in bf16 from weights kept in fp32.
    """
    began, device = time.monotonic(), torch.device(run.device)
    on_gpu, task = device.type == "cuda", run.task
    torch.manual_seed(run.seed)
    with device:
        weights = Decoder(run.config)
    model = _compute_copy(weights, torch.bfloat16 if on_gpu else torch.float32)
    masters, parameters = list(weights.parameters()), list(model.parameters())
    for master in masters:
        master.grad = torch.zeros_like(master)
    seq = SequenceParallel(device=device).context(task.lengths)
    rate = torch.zeros((), device=device)
    # Without weight decay: no batch comes twice, so there is nothing to overfit.
    optimizer = torch.optim.AdamW(masters, rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True, capturable=on_gpu)
    generator = torch.Generator(device).manual_seed(run.seed)
    tokens, labels = torch.zeros(2, sum(task.lengths), dtype=torch.int64, device=device)

    def update():
        loss = model(tokens, labels, seq) / task.labels_per_batch
        loss.backward()
        torch._foreach_copy_([master.grad for master in masters], [p.grad for p in parameters])
        model.zero_grad()
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(parameters, masters)
        return loss.detach()

    curve, every = [], max(1, run.steps // CURVE_POINTS)
    with _side_stream(device):
        advance = _Graphed(update) if on_gpu and run.graphs else update
        for step in range(run.steps):
            if step % BATCHES_AT_ONCE == 0:
                drawn = task.batches(generator, BATCHES_AT_ONCE)
            tokens.copy_(drawn[0][step % BATCHES_AT_ONCE])
            labels.copy_(drawn[1][step % BATCHES_AT_ONCE])
            rate.fill_(run.learning_rate * _schedule(step + 1, run.steps))
            loss = advance()
            if (step + 1) % every == 0 or step + 1 == run.steps:
                curve.append({"step": step + 1, "loss": loss.item(), "seconds": time.monotonic() - began})
                report(step + 1)
    found = {name: _accuracy(model, task, seq, seed, evaluation_batches) for name, seed in EVALUATION_SEEDS.items()}
    size = {"parameters": sum(master.numel() for master in masters), "state": _state_numbers(run.config)}
    return size | {"curve": curve, "seconds": time.monotonic() - began} | found


class _Graphed:
    """Calls `function` as it is WARMUP times, then records it as a CUDA graph and replays that. On a side stream."""

    WARMUP = 3

    def __init__(self, function):
        self.function, self.calls, self.graph, self.result = function, 0, None, None

    def __call__(self):
        self.calls += 1
        if self.calls <= self.WARMUP:
            return self.function()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                self.result = self.function()
        self.graph.replay()
        return self.result


@contextlib.contextmanager
def _side_stream(device):
    """A stream other than the default one, which graphs cannot be recorded on. Nothing on CPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
    torch.cuda.synchronize()


def _compute_copy(weights: Decoder, dtype: torch.dtype) -> Decoder:
    """A copy in `dtype`, except for gates: those models.parallelize keeps in fp32."""
    model = copy.deepcopy(weights).to(dtype)
    for module in model.modules():
        if isinstance(module, Gate):
            module.float()
    with torch.no_grad():
        torch._foreach_copy_(list(model.parameters()), list(weights.parameters()))
    return model


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up to 1, then cosine decay."""
    warmup = max(1, round(WARMUP * steps))
    if step <= warmup:
        return step / warmup
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


@torch.no_grad()
def _accuracy(model, task, seq, seed, batches) -> dict[str, float]:
    """Share of queries whose likeliest token is the right value, by number of pairs."""
    right, generator = 0, torch.Generator(seq.positions.device).manual_seed(seed)
    for tokens, labels in zip(*task.batches(generator, batches)):
        hits = model.logits(tokens, seq).argmax(-1) == labels  # never at -100
        right = right + hits.view(len(task.pairs), task.tokens).sum(1)
    shares = right / (batches * task.tokens // 4)
    return {str(pairs): share for pairs, share in zip(task.pairs, shares.tolist(), strict=True)}


def _state_numbers(config: ModelConfig) -> int:
    return sum(math.prod(config.state_shape(kind)) for kind in config.layer_kinds if kind in LINEAR_KINDS)
