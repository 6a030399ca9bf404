"""Multi-query associative recall (MQAR; Zoology, arXiv 2312.04927): its batches, and one model's training on them.

A document of n pairs has 4n tokens: "key value" n times, keys all different, then 2n slots in which every key comes once
more, in random order and at random places, with noise in between. Only there is something to predict: the key's value.
How far a query is from its pair is thus spread over 1 to 4n - 1 tokens, and what has to be held grows with n.
"""

import copy
import math
import time
from dataclasses import dataclass

import torch

from longspan.models.config import LAYER_KINDS, ModelConfig
from longspan.models.decay import Gate
from longspan.models.decoder import Decoder
from longspan.parallel import SequenceParallel

RATIOS = (1, 3, 7)  # linear layers to one of softmax
NUM_LAYERS = 8  # so that 7:1 has one softmax layer
CURVE_POINTS = 60


@dataclass(frozen=True)
class Task:
    """pairs: numbers of pairs of the documents; every batch has tokens_per_size tokens of each of them."""

    pairs: tuple[int, ...]
    tokens_per_size: int
    num_keys: int = 256
    num_values: int = 256
    num_noise: int = 64

    def __post_init__(self):
        for pairs in self.pairs:
            if not 1 <= pairs <= self.num_keys:
                raise ValueError(f"--pairs {pairs}: there are {self.num_keys} keys, so use 1 to {self.num_keys} pairs")
            if self.tokens_per_size % (4 * pairs):
                raise ValueError(
                    f"--tokens {self.tokens_per_size} is no multiple of the {4 * pairs} tokens that {pairs} pairs take"
                )

    @property
    def vocab_size(self) -> int:
        return self.num_keys + self.num_values + self.num_noise

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the documents of every batch, so that one context serves them all."""
        return tuple(4 * n for n in self.pairs for _ in range(self.tokens_per_size // (4 * n)))

    def batch(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens and labels, int64 [T], on the generator's device; T = tokens_per_size for each of `pairs` in turn.

        Tokens are keys from 0, values from num_keys, then noise; labels are -100 at all but the queries.
        """
        parts = [self._documents(n, self.tokens_per_size // (4 * n), generator) for n in self.pairs]
        tokens, labels = (torch.cat([part.flatten() for part in column]) for column in zip(*parts, strict=True))
        return tokens, labels

    def _documents(self, n, count, generator):
        on = {"generator": generator, "device": generator.device}
        keys = torch.rand(count, self.num_keys, **on).argsort(1)[:, :n]
        values = torch.randint(self.num_keys, self.num_keys + self.num_values, (count, n), **on)
        queries = torch.randint(self.num_keys + self.num_values, self.vocab_size, (count, 2 * n), **on)
        slots = torch.rand(count, 2 * n, **on).argsort(1)[:, :n]  # of each key: different, in random order
        queries.scatter_(1, slots, keys)
        answers = torch.full_like(queries, -100).scatter_(1, slots, values)
        pairs = torch.stack([keys, values], 2).flatten(1)
        return torch.cat([pairs, queries], 1), torch.cat([torch.full_like(pairs, -100), answers], 1)


def layer_pattern(model: str) -> list[str]:
    """Mixers of a model's layers: "softmax", a linear family such as "gated_delta", or "gated_delta-3:1".

    Raises ValueError for another name.
    """
    if model == "softmax":
        return ["softmax"]
    family, _, ratio = model.partition("-")
    kind = f"linear:{family}"
    if kind in LAYER_KINDS and not ratio:
        return [kind]
    if kind in LAYER_KINDS and ratio in [f"{n}:1" for n in RATIOS]:
        return [kind] * int(ratio[0]) + ["softmax"]
    families = ", ".join(kind.removeprefix("linear:") for kind in LAYER_KINDS[1:])
    raise ValueError(
        f"model {model!r} is unknown; use softmax, a family ({families}), or a family with"
        f" {', '.join(f'-{n}:1' for n in RATIOS)} behind it, such as gated_delta-3:1"
    )


@dataclass(frozen=True)
class Run:
    """One model trained once. Every model sees the same batches for the same `seed`."""

    model: str
    learning_rate: float
    seed: int
    task: Task
    steps: int
    hidden_size: int
    num_heads: int
    conv_width: int  # of linear layers; -1: the family's
    device: str

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=self.task.vocab_size,
            num_layers=NUM_LAYERS,
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            pattern=layer_pattern(self.model),
            conv_width=self.conv_width,
            state_size=self.hidden_size // self.num_heads,
            loss_chunk=sum(self.task.lengths),
        )


def train(run: Run, *, evaluations: int, report) -> dict:
    """Trains and evaluates: parameters, numbers in the states, loss curve, accuracy by number of pairs, seconds.

    report(step, loss) is called now and then. On a GPU the model computes in bf16, from weights kept in fp32.
    """
    began, device = time.monotonic(), torch.device(run.device)
    torch.manual_seed(run.seed)
    with device:
        weights = Decoder(run.config)
    model = compute_copy(weights, torch.bfloat16 if device.type == "cuda" else torch.float32)
    seq = SequenceParallel(device=device).context(run.task.lengths)
    generator = torch.Generator(device).manual_seed(run.seed)
    labels_per_batch = sum(run.task.lengths) // 4
    # No weight decay: no batch comes twice, so there is nothing to overfit.
    optimizer = torch.optim.AdamW(
        weights.parameters(), lr=run.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    curve, every = [], max(1, run.steps // CURVE_POINTS)
    for step in range(1, run.steps + 1):
        tokens, labels = run.task.batch(generator)
        loss = model(tokens, labels, seq) / labels_per_batch
        loss.backward()
        for weight, parameter in zip(weights.parameters(), model.parameters(), strict=True):
            weight.grad = parameter.grad.to(weight.dtype)
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(weights.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate * schedule(step, run.steps)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), list(weights.parameters()))
        if step % every == 0 or step == run.steps:
            curve.append({"step": step, "loss": loss.item()})
            report(step, curve[-1]["loss"])
    trained = time.monotonic()
    # Seeds of evaluation are beyond those that train.
    found = {name: accuracy(model, run.task, seq, seed, evaluations) for name, seed in EVALUATION_SEEDS.items()}
    return {
        "parameters": sum(weight.numel() for weight in weights.parameters()),
        "state": state_numbers(run.config),
        "curve": curve,
        "train_seconds": trained - began,
        "seconds": time.monotonic() - began,
    } | found
