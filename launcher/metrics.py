"""What a training step measured, as metrics.jsonl and TensorBoard get it, without making the host wait for the GPU.

Every rank contributes one row of numbers; one all-gather makes them the same table on all ranks, so that all of them
take the same decisions from it and rank 0 can write it.
"""

import json
import math
import os
import resource
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longspan.attention.moved import pairs_per_rank
from longspan.launcher.agreement import listed
from longspan.launcher.batches import Batch
from longspan.launcher.clock import Clock
from longspan.launcher.errors import UserError
from longspan.launcher.event_file import EventFile
from longspan.launcher.files import replace_text, strict_json, writing
from longspan.launcher.gpus import PEAK_TFLOPS, kind_of
from longspan.models.config import ModelConfig
from longspan.models.flops import model_flops, softmax_masks
from longspan.models.trainable import ALL, Trainable
from longspan.parallel.geometry import Mask
from longspan.parallel.mesh import Mesh

GB = 2**30


def peak_tflops(device: torch.device) -> float | None:
    """The device's dense bf16 rate, None where it is not known (MFU is then null)."""
    if device.type != "cuda":
        return None
    return PEAK_TFLOPS.get(kind_of(torch.cuda.get_device_name(device)))


class StepMeter:
    """Collects the numbers of a step over all ranks."""

    COLUMNS = ("loss_sum", "tokens", "flops", "pairs", "peak_memory", "attention_s", "stop", "places")

    def __init__(self, model: ModelConfig, mesh: Mesh, trainable: Trainable = ALL):
        self._model, self._mesh, self._trainable = model, mesh, trainable
        masks = softmax_masks(model) or [Mask(model.causal)]  # without softmax layers: how they would fare
        self._masks = Counter(masks)
        self._peak_tflops = peak_tflops(mesh.device)
        self._clock = Clock(mesh.device)
        self._attention, self._timed = [], deque()  # marks around kernels: of this step, and of steps not read yet
        # On a GPU, steps that it may still be at when a step is gathered: reading their marks would wait for it.
        self._steps_behind = 2 if mesh.device.type == "cuda" else 0

    def begin(self) -> Any:
        """The mark at which a step begins."""
        self._attention.clear()  # what was evaluated since the last step does not count
        return self.mark()

    def mark_attention(self) -> None:
        """To be called before and after every softmax kernel."""
        self._attention.append(self.mark())

    def mark(self) -> Any:
        """A point in the device's time, for the `begin` and `end` of a step."""
        return self._clock.mark()

    def gather(self, loss_sum: torch.Tensor, batches: Sequence[Batch], stop: bool = False) -> torch.Tensor:
        """fp64 [world_size, columns] on the device, the same on all ranks. loss_sum: this rank's, over its tokens;
        stop: whether this rank was asked to end the run."""
        row = [0.0] * len(self.COLUMNS)
        # Each rank reports its share, so the sum over ranks counts tokens, and every SP group's work, once.
        for batch in batches:
            layout = batch.seq.layout
            row[1] += batch.seq.num_tokens_local / self._mesh.tp
            row[2] += model_flops(self._model, layout.lengths, self._trainable) / self._mesh.sp / self._mesh.tp
            row[3] += self.pairs(batch.seq) / self._mesh.tp
        row[4], row[5] = _peak_memory(self._mesh.device), self._attention_seconds()
        row[6], row[7] = float(stop), self._places(batches)
        mine = torch.tensor(row, dtype=torch.float64).to(self._mesh.device, non_blocking=True)
        mine[0] = loss_sum / self._mesh.tp
        return self._gathered(mine)

    def check_places(self, step: int, batches: Sequence[Batch]) -> None:
        """Raises UserError, the same on all ranks, where ranks of one SP group have not placed the same tokens in the
        same places. One exchange, for which the host waits; `resolve` does it with what was gathered anyway."""
        mine = torch.tensor([self._places(batches)], dtype=torch.float64).to(self._mesh.device)
        self._compare_places(step, self._gathered(mine).flatten().tolist())

    def _gathered(self, mine):
        rows = [torch.empty_like(mine) for _ in range(self._mesh.world_size)]
        dist.all_gather(rows, mine)
        return torch.stack(rows)

    def _places(self, batches) -> float:
        """A whole number that follows from where all tokens are, in softmax attention too: the same on all ranks of an
        SP group if they have planned the same. Layouts know their hashes, which are of integers alone and so the same
        in every process."""
        layouts = [(batch.seq.layout, *map(batch.seq.attention_layout, self._masks)) for batch in batches]
        return float(hash(tuple(map(hash, layouts))) % 2**53)

    def _compare_places(self, step: int, places: list[float]) -> None:
        size = self._mesh.sp * self._mesh.tp
        groups = [range(first, first + size) for first in range(0, self._mesh.world_size, size)]
        odd = [rank for group in groups for rank in group if places[rank] != places[group[0]]]
        if odd:
            first = odd[0] // size * size
            raise UserError(
                f"{listed(odd)} placed the tokens of step {step} elsewhere than rank {first} of the same SP group: what"
                " they read or planned differs; use the same corpora and versions on every machine, and resume from"
                " the last checkpoint"
            )

    def pairs(self, seq) -> float:
        """Query-key pairs of this rank in all softmax layers, times its share of their heads."""
        rank, heads = self._mesh.sp_rank, self._model.num_heads // self._mesh.tp
        return sum(layers * pairs_per_rank(seq, heads, mask)[rank] for mask, layers in self._masks.items())

    def _attention_seconds(self) -> float:
        """Of this rank's softmax kernels in the last step that is known to be done; nan before there is one."""
        self._timed.append(self._attention)
        self._attention = []
        if len(self._timed) <= self._steps_behind:
            return math.nan
        marks = self._timed.popleft()
        return sum(map(self._clock.seconds, marks[::2], marks[1::2]))

    def pending(self, step: int, lr: float, table, loss, grad_norm, begin, end) -> "PendingStep":
        """The step's numbers on their way to the host."""
        numbers = torch.cat([table.flatten(), loss.double().reshape(1), grad_norm.double().reshape(1)])
        copied = numbers.to("cpu", non_blocking=True)
        return PendingStep(step=step, lr=lr, numbers=copied, arrived=self.mark(), begin=begin, end=end)

    def resolve(self, pending: "PendingStep") -> dict[str, Any]:
        """The step's object in metrics.jsonl. Waits until the device has finished the step; sets `pending.stop`.

        Raises UserError, the same on all ranks, when the loss or the gradient norm is not finite, or ranks of one SP
        group disagree on where tokens are.
        """
        self._clock.seconds(pending.begin, pending.arrived)
        *table, loss, grad_norm = pending.numbers.tolist()
        columns = {name: table[i :: len(self.COLUMNS)] for i, name in enumerate(self.COLUMNS)}
        self._compare_places(pending.step, columns["places"])
        _check_finite(pending, loss, grad_norm, columns["loss_sum"])
        pending.stop = any(columns["stop"])
        seconds = self._clock.seconds(pending.begin, pending.end)
        tokens, world_size = round(sum(columns["tokens"])), self._mesh.world_size
        flops_per_gpu = sum(columns["flops"]) / seconds / world_size
        row = {
            "step": pending.step,
            "loss": loss,
            "tokens": tokens,
            "tokens_per_s": tokens / seconds,
            "tokens_per_s_per_gpu": tokens / seconds / world_size,
            "mfu": flops_per_gpu / (self._peak_tflops * 1e12) if self._peak_tflops else None,
            "step_time_s": seconds,
            "grad_norm": grad_norm,
            "lr": pending.lr,
            "peak_mem_gb": max(columns["peak_memory"]) / GB,
            "imbalance": max(columns["pairs"]) * world_size / sum(columns["pairs"]),
        }
        attention = columns["attention_s"]
        if sum(attention) > 0:  # not nan
            row["attention_s"] = max(attention)
            row["attention_imbalance"] = max(attention) * world_size / sum(attention)
        if pending.val_loss is not None:
            row["val_loss"] = pending.val_loss.item()
        return row


@dataclass
class PendingStep:
    """A step that the device may still be working on."""

    step: int
    lr: float
    numbers: torch.Tensor  # on the host; valid once `arrived` has passed
    arrived: Any
    begin: Any
    end: Any
    val_loss: torch.Tensor | None = None
    stop: bool = False  # whether any rank was asked to end the run, once resolved: the same on all ranks


def _check_finite(pending: PendingStep, loss: float, grad_norm: float, loss_sums: list[float]) -> None:
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    if math.isfinite(loss):
        found = f"the gradient norm is {grad_norm}"
    else:
        ranks = [str(rank) for rank, loss_sum in enumerate(loss_sums) if not math.isfinite(loss_sum)]
        found = f"the loss is {loss}" + (f" (from rank {', '.join(ranks[:8])})" if ranks else "")
    raise UserError(
        f"{found} at step {pending.step}, whose update was left out: lower optim.lr (now {pending.lr:.3g}) or "
        "optim.clip_grad_norm, or raise optim.warmup_steps, and resume from the last checkpoint"
    )


def _peak_memory(device: torch.device) -> float:
    """Bytes: allocated by torch on a GPU, resident in the process otherwise; the largest value of the run so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class MetricsWriter:
    """metrics.jsonl and, where wanted, TensorBoard's file of a run directory. Only rank 0 has one. UserError where the
    disk refuses metrics.jsonl."""

    def __init__(self, run_dir: Path, *, first_step: int, tensorboard: bool):
        """first_step: steps from here on are (again) to come; what an earlier start wrote about them is dropped."""
        path = run_dir / "metrics.jsonl"
        self._run_dir = run_dir
        with writing(run_dir):
            replace_text(path, "".join(_rows_before(path, first_step)))
            self._file = open(path, "a", buffering=1)
        self._events = EventFile(run_dir / "tensorboard", first_step) if tensorboard else None

    def write(self, row: dict[str, Any]) -> None:
        with writing(self._run_dir):
            self._file.write(strict_json(row) + "\n")
        if self._events:
            self._events.write(row)

    def sync(self) -> None:
        """On the disk itself what was written: a checkpoint must not outlive the rows of its steps."""
        with writing(self._run_dir):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with writing(self._run_dir):
            self._file.close()
        if self._events:
            self._events.close()


def _rows_before(path: Path, first_step: int) -> list[str]:
    if not path.exists():
        return []
    kept = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(keepends=True), 1):
        try:
            earlier = json.loads(line)["step"] < first_step
        except (ValueError, KeyError, TypeError):
            if not line.endswith("\n"):  # the last line of a run that was killed while writing it
                break
            raise UserError(f"{path}, line {number}: not a step's JSON object; move the file away to resume") from None
        if earlier:
            kept.append(line if line.endswith("\n") else line + "\n")
    return kept
