"""Perplexity of a stored model on held-out text, by how much context it sees and by position in the document.

The same samples, as long as the longest length asked for, are cut for every shorter one. Every length predicts the same
tokens, also in every row of positions, which are those in the longest length: differences are what context is worth.
"""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from longspan.launcher.agreement import decide
from longspan.launcher.batches import NO_LABEL, Batch, TextBuilder
from longspan.launcher.config import Config, CorpusConfig
from longspan.launcher.corpus import Corpus
from longspan.launcher.engines.fsdp2 import shard
from longspan.launcher.engines.optimizer import compute_dtype
from longspan.launcher.environment import choose_device
from longspan.launcher.errors import UserError
from longspan.launcher.files import replace_text, strict_json
from longspan.launcher.samples import Piece, Sample, SampleStream
from longspan.launcher.stored_models import StoredModel, changed, open_model
from longspan.launcher.tasks import open_corpora
from longspan.launcher.trainer import build_sequence_parallel, set_up_log
from longspan.models.build import build_model
from longspan.models.parallelize import parallelize
from longspan.parallel.mesh import Mesh, build_mesh

PROGRESS_SECONDS = 5.0
# Of parallel: how ranks share sequences and parameters, whatever the run did.
SHARED = {"sp": 0, "tp": 1, "engine": "fsdp2", "sharding": "fsdp", "zero_stage": 3, "zero_offload_optimizer": False,
          "zero_offload_parameters": False}  # fmt: skip
FIRST_ROW = 256  # most positions of the first row of the table; every next row ends at twice the position


def evaluate_run(
    run: str, lengths: Sequence[int], samples: int, corpora: Sequence[str], overrides: Sequence[str], output: str | None
) -> None:
    """Prints what the model of `run` (a run directory, a checkpoint or a folder of weights) loses at each of `lengths`.

    Collective over the ranks that torchrun started, which share every sequence. lengths: tokens, empty for that of
    training. samples: of the longest length. corpora: paths to evaluate on; empty: what the run kept for validation.
    overrides: key=value settings. output: a JSON file to write. UserError for what does not fit.
    """
    for name, value in (("samples", samples), ("lengths", min(lengths, default=1))):
        if value < 1:
            raise UserError(f"--{name} {value}: use 1 or more")
    set_up_log()
    stored = open_model(run)
    config = evaluation_config(stored, overrides, corpora)
    mesh = build_mesh(
        sp=0, sharding="fsdp", device=choose_device(config.run.device), timeout_s=config.train.timeout_s,
        key_blocks=config.parallel.key_blocks,
    )  # fmt: skip
    result = evaluate(stored, config, mesh, lengths or [config.data.seq_len], samples) | {"settings": list(overrides)}
    if mesh.is_main:
        print(report(result))
    if output is not None:
        decide(partial(_write, Path(output), result))
    dist.destroy_process_group()


def evaluate(stored: StoredModel, config: Config, mesh: Mesh, lengths: Sequence[int], samples: int) -> dict[str, Any]:
    """What the model loses on so many samples of the longest of `lengths`, cut to each of them: the object
    that `--output` is. Collective over the ranks of `mesh`; config: of `evaluation_config`."""
    lengths = sorted(set(lengths))
    stream = _held_out(config, lengths[-1])
    decide(lambda: stored.check_corpora([corpus.prefix for corpus in stream.corpora]))
    evaluation = Evaluation(stored, config, mesh)
    progress = _Progress(len(lengths) * samples, mesh.is_main)
    ends = row_ends(lengths[-1], min(FIRST_ROW, lengths[0]))
    records = []
    for length in lengths:
        drawn = progress.over(length, map(stream.sample, range(samples)))  # anew: held by none, there may be many
        parts = cut(drawn, length, stream.corpora, config.data.respect_documents)
        losses = evaluation.losses(parts, stream.corpora, ends)
        if not any(losses.labels):
            raise UserError(
                f"--lengths {lengths[-1]}, --samples {samples}: nothing follows any of these tokens in its document;"
                " use longer or more samples"
            )
        records.append({"length": length} | losses.record())
    return {
        "checkpoint": str(stored.path),
        "step": stored.step,
        "corpora": [corpus.prefix for corpus in stream.corpora],
        "samples": samples,
        "lengths": records,
    }


def evaluation_config(stored: StoredModel, overrides: Sequence[str], corpora: Sequence[str]) -> Config:
    """The settings of the model's run, changed by key=value words. Ranks share sequences and nothing else. UserError
    for what does not fit, also where the run kept nothing for validation and no corpora are given."""
    config = stored.config
    parallel = replace(config.parallel, **SHARED)
    optim = replace(config.optim, train=[], freeze=[])
    config = changed(replace(config, parallel=parallel, optim=optim), overrides)
    if config.model.task != "text":
        raise UserError(f"{stored.path} holds a model of model.task={config.model.task}; perplexity is of text")
    for name, value in SHARED.items():
        if getattr(config.parallel, name) != value:
            raise UserError(
                f"parallel.{name} is for training: all ranks share every sequence and the parameters; leave it out"
            )
    if corpora:
        named = [CorpusConfig(path=path) for path in corpora]
        config.data = replace(config.data, corpora=named, validation_corpora=[], validation_fraction=0.0)
        config.log = replace(config.log, validation_interval=0)
    elif not config.data.validation_corpora and not config.data.validation_fraction:
        why = "the run kept no documents for validation (data.validation_fraction=0)"
        why = why if config.data.corpora else "weights come without documents"
        raise UserError(f"{stored.path}: {why}: name some with --corpora")
    config.validate()
    stored.check(config.model)
    return config


def _held_out(config: Config, length: int) -> SampleStream:
    """Samples of `length` tokens: the first are those of validation, where that is the length of training."""
    data = config.data
    if data.validation_corpora:
        data = replace(data, corpora=data.validation_corpora)
    data = replace(data, seq_len=length)
    corpora = open_corpora([corpus.path for corpus in data.corpora], config.model.vocab_size)
    try:
        return SampleStream(corpora, data, config.run.seed, "validation")
    except UserError as error:
        raise UserError(f"--lengths {length}: {error}") from None


@dataclass(frozen=True)
class Part:
    """A sample of shorter documents; origins: of each, its place in the document of the longest length."""

    sample: Sample
    origins: tuple[int, ...]


def cut(samples: Iterable[Sample], length: int, corpora: Sequence[Corpus], apart: bool) -> Iterator[Part]:
    """The samples in parts of at most `length` tokens. apart: pieces of a sample do not see each other, so that its
    parts stay together as pieces of one; else every part is a sample. Those with nothing to predict are left out."""
    for sample in samples:
        starts = range(0, _tokens(sample), length)
        parts = [list(_between(sample.pieces, start, start + length)) for start in starts]
        if apart:
            found = [(list(chain.from_iterable(parts)), None)]
        else:
            found = list(zip(parts, starts, strict=True))
        for pieces, start in found:
            if any(len(piece) > 1 or _goes_on(piece, corpora) for piece, _ in pieces):
                origins = tuple(first for _, first in pieces) if start is None else (start,)
                yield Part(Sample(tuple(piece for piece, _ in pieces)), origins)


def _goes_on(piece: Piece, corpora: Sequence[Corpus]) -> bool:
    return piece.stop < corpora[piece.corpus].lengths[piece.document]


def row_ends(length: int, first: int) -> list[int]:
    """Where rows of positions end: at `first`, at twice the last end, and at `length`."""
    ends = [min(first, length)]
    while ends[-1] < length:
        ends.append(min(2 * ends[-1], length))
    return ends


def _between(pieces: Sequence[Piece], start: int, stop: int) -> Iterator[tuple[Piece, int]]:
    """What tokens [start, stop) of a sample have of each piece, and where in the piece that begins."""
    for piece in pieces:
        first, last = max(start, 0), min(stop, len(piece))
        if first < last:
            yield replace(piece, start=piece.start + first, stop=piece.start + last), first
        start, stop = start - len(piece), stop - len(piece)


def _tokens(sample: Sample) -> int:
    return sum(map(len, sample.pieces))


@dataclass(frozen=True)
class Losses:
    """fp64 sums of losses, and labels, of positions that end at `ends`, over all ranks."""

    ends: list[int]
    sums: list[float]
    labels: list[int]

    def record(self) -> dict[str, Any]:
        labels, loss = sum(self.labels), sum(self.sums) / sum(self.labels)
        starts = [0, *self.ends[:-1]]
        rows = zip(starts, self.ends, self.sums, self.labels, strict=True)
        return {
            "labels": labels,
            "loss": loss,
            "perplexity": _perplexity(loss),
            "by_position": [
                {"start": start, "stop": stop, "labels": count, "loss": total / count if count else None}
                for start, stop, total, count in rows
            ],
        }


class Evaluation:
    """A stored model on the ranks of `mesh`, for forward passes."""

    def __init__(self, stored: StoredModel, config: Config, mesh: Mesh):
        self._config, self._mesh = config, mesh
        self._parallel = build_sequence_parallel(config, mesh)
        torch.manual_seed(config.run.seed)  # of what the stored model does not have, the same on every rank
        with mesh.device:
            model = build_model(config.model)
        model.cross_entropy = partial(self._by_position, model.cross_entropy)
        place = partial(shard, mesh=mesh.fsdp_mesh, param_dtype=compute_dtype(config.train), reduce_dtype=None)
        place = partial(parallelize, shard=place, checkpointing="none", compile=False, mlp_tile=config.train.mlp_tile)
        self._model: nn.Module = stored.fill(model, place)
        self._rows = torch.empty(0)

    @torch.no_grad()
    def losses(self, parts: Iterable[Part], corpora: Sequence[Corpus], ends: list[int]) -> Losses:
        """Of one part after the other, in rows of places in the longest length that end at `ends`."""
        device, given = self._mesh.device, _One(corpora)
        builder = TextBuilder(
            given, self._parallel,
            respect_documents=self._config.data.respect_documents, vocab_size=self._config.model.vocab_size,
            dp=1, dp_rank=0, samples=1, device=device,
        )  # fmt: skip
        totals = torch.zeros(2, len(ends), dtype=torch.float64, device=device)
        for part in parts:
            given.one = part.sample
            batch: Batch = builder.to_device(builder.build(0))[0]
            spans = batch.seq.layout.spans[batch.seq.rank]
            places = [part.origins[span.document] + torch.arange(span.start, span.stop) for span in spans]
            places = torch.cat([torch.empty(0, dtype=torch.int64), *places])
            self._rows = torch.bucketize(places, torch.tensor(ends[:-1]), right=True).to(device)
            self._num_rows = len(ends)
            totals[0] += self._model(*batch.inputs, batch.seq)
            totals[1] += torch.bincount(self._rows[batch.labels != NO_LABEL], minlength=len(ends))
        dist.all_reduce(totals)
        sums, labels = totals.tolist()
        return Losses(ends, sums, [round(number) for number in labels])

    def _by_position(self, cross_entropy, hidden, weight, labels, chunk) -> torch.Tensor:
        """[rows]: the loss that `Decoder.forward` sums over tokens, summed over the tokens of every row."""
        places = [(self._rows == row).nonzero().squeeze(1) for row in range(self._num_rows)]
        return torch.stack([cross_entropy(hidden[place], weight, labels[place], chunk) for place in places])


class _One:
    """The sample that is `one` now, in the form of a SampleStream."""

    def __init__(self, corpora: Sequence[Corpus]):
        self.corpora, self.one = corpora, Sample(())

    def sample(self, _: int) -> Sample:
        return self.one


class _Progress:
    """A line every few seconds, of the first rank."""

    def __init__(self, samples: int, shown: bool):
        """samples: of all lengths together."""
        self._samples, self._shown, self._done = samples, shown, 0
        self._begin = self._last = time.monotonic()

    def over(self, length: int, samples: Iterable[Sample]) -> Iterator[Sample]:
        """The samples, each of which is done when the next is asked for."""
        for sample in samples:
            yield sample
            self._done += 1
            now = time.monotonic()
            if self._shown and now - self._last >= PROGRESS_SECONDS:
                self._last, share = now, self._done / self._samples
                left = (now - self._begin) * (1 / share - 1)
                where = f"{share:4.0%} of {self._samples:,} samples, at length {length:,}"
                print(f"{where}; {left:,.0f} s left", flush=True)


def report(result: dict[str, Any]) -> str:
    """The table of a result: rows of positions and of totals, a column for every length."""
    columns = result["lengths"]
    lines = [["tokens of context, at most", *(f"{column['length']:,}" for column in columns)]]
    for rows in zip(*(column["by_position"] for column in columns), strict=True):
        where = f"position {rows[0]['start']:,} to {rows[0]['stop'] - 1:,}"
        if any(row["labels"] for row in rows):
            lines.append([where, *("" if row["loss"] is None else f"{row['loss']:.4f}" for row in rows)])
    for name, digits in (("loss", ".4f"), ("perplexity", ".3f"), ("labels", ",")):
        lines.append([name, *(format(column[name], digits) for column in columns)])
    wide = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    text = ["  ".join([cells[0].ljust(wide[0]), *map(str.rjust, cells[1:], wide[1:])]) for cells in lines]
    step = "" if result["step"] is None else f", step {result['step']}"
    where = f"{result['checkpoint']}{step}, on {', '.join(result['corpora'])}"
    return "\n".join([f"{where}: {result['samples']} samples of {columns[-1]['length']:,} tokens", *text])


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _write(path: Path, result: dict[str, Any]) -> None:
    try:
        replace_text(path, strict_json(result, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror or error})") from None
