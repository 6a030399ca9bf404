"""Profiles some steps of training: a trace and a memory snapshot per rank, and a table of the step by component.

Nothing of it changes what is computed. Outside the profiled steps no range is recorded and nothing is waited for.
"""

import logging
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerAction, ProfilerActivity, profile

from longspan.attention.ranges import component
from longspan.launcher.breakdown import break_down
from longspan.launcher.config import Config
from longspan.launcher.environment import packages
from longspan.launcher.errors import UserError
from longspan.launcher.estimate import Job, estimate
from longspan.launcher.files import replace_text, strict_json
from longspan.launcher.gpus import cluster_of, extras_of
from longspan.launcher.profile_report import lines
from longspan.launcher.timeline import LAYERS, LOSS, MIXER, MLP, attribute, read_trace
from longspan.parallel.mesh import Mesh, ranks_here

log = logging.getLogger("longspan")

MEMORY_EVENTS = 1_000_000  # allocations and frees that a snapshot holds, the latest


class StepProfiler:
    """Profiles the steps of `config.profile`. Collective: `begin` and `end` are called around every step by all ranks.

    UserError for what cannot be profiled here.
    """

    def __init__(self, config: Config, mesh: Mesh, model: nn.Module, *, first_step: int):
        """first_step: of this start of the run. model: what runs the steps, as the engine has it."""
        wanted = config.profile
        if wanted.memory and mesh.device.type != "cuda":
            raise UserError("profile.memory=true records the GPU's allocator, and this run has no GPU: leave it out")
        self._config, self._mesh = config, mesh
        self._model = getattr(model, "module", model)  # DeepSpeed's engine is a module around the model
        self.first, self.last = wanted.start, wanted.start + wanted.steps - 1
        self._active = not wanted.ranks or dist.get_rank() in wanted.ranks
        # In the step before, if there is one, the profiler sets itself up.
        self._warmup = min(1, max(0, self.first - first_step))
        self._profile, self._hooks, self._lengths = None, ExitStack(), []
        if 0 < self.first < first_step:
            log.warning("profile.start=%d: not profiled, this start begins at step %d", self.first, first_step)
            self.first = self.last = 0

    def begin(self, step: int) -> None:
        """Before step `step`."""
        if self.first == 0 or not self._active:
            return
        if step == self.first - self._warmup:
            self._profile = profile(activities=_activities(self._mesh.device), schedule=self._action)
            self._wait()
            self._profile.start()
        if step == self.first:
            self._open_ranges()
            if self._config.profile.memory:
                torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS, stacks="python")

    def observe(self, batches) -> None:
        """What the step trains on."""
        if self._profile is not None:
            self._lengths += [length for batch in batches for length in batch.seq.layout.lengths]

    def end(self, step: int) -> None:
        """After step `step`, validation and saving included."""
        if self.first == 0 or not self.first - 1 <= step <= self.last:
            return
        if self._profile is not None:
            if step in (self.first - 1, self.last):  # work of this step ends in it
                self._wait()
            self._profile.step()
        if step == self.last:
            self._finish()

    def _action(self, number: int) -> ProfilerAction:
        """Of the profiler's step `number`, which are counted from 0."""
        left = self._warmup + self._config.profile.steps - number
        if number < self._warmup:
            return ProfilerAction.WARMUP
        return {1: ProfilerAction.RECORD_AND_SAVE}.get(left, ProfilerAction.RECORD if left > 0 else ProfilerAction.NONE)

    def _wait(self) -> None:
        if self._mesh.device.type == "cuda":
            torch.cuda.synchronize()

    def _open_ranges(self) -> None:
        """Makes modules tell the profiler what runs, until the profile is done."""
        ranges = ExitStack()  # of the model: the layers, and what follows the last norm

        def enter(*_):
            ranges.enter_context(component(LAYERS))

        def change(*_):
            ranges.close()
            ranges.enter_context(component(LOSS))

        self._hook(self._model, enter, lambda *_: ranges.close())
        self._hooks.callback(self._model.norm.register_forward_hook(change).remove)
        if self._config.train.compile:  # inside compiled blocks there are no modules
            return
        for block in self._model.blocks:
            for module, name in ((block.mixer, MIXER), (block.mlp, MLP)):
                self._hook(module, *_hooks_of(name))

    def _hook(self, module, before, after) -> None:
        self._hooks.callback(module.register_forward_pre_hook(before).remove)
        # Also when a recomputation ends early, by an exception.
        self._hooks.callback(module.register_forward_hook(after, always_call=True).remove)

    def _finish(self) -> None:
        """Writes the files of this rank; the first rank gathers the numbers of all and prints them."""
        found, folder = None, Path(self._config.run.dir) / "profile" / f"step-{self.first:08d}"
        if self._profile is not None:
            self._hooks.close()
            self._profile.stop()
            try:
                found = self._write(folder)
            except (OSError, ValueError) as error:  # training goes on
                log.error("no profile of rank %d in %s: %s", dist.get_rank(), folder, error)
            self._profile = None
        everyone = [None] * self._mesh.world_size
        dist.all_gather_object(everyone, found)
        ranks = [one for one in everyone if one is not None]
        if self._mesh.is_main and ranks:
            self._publish(folder, ranks)
        self.first = 0

    def _write(self, folder: Path) -> dict[str, Any]:
        """The trace and the snapshot of this rank; returns what a step took here."""
        folder.mkdir(parents=True, exist_ok=True)
        rank = dist.get_rank()
        if self._config.profile.memory:
            torch.cuda.memory._dump_snapshot(str(folder / f"memory-rank-{rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        with tempfile.TemporaryDirectory() as scratch:
            path = (folder if self._config.profile.trace else Path(scratch)) / f"trace-rank-{rank}.json.gz"
            self._profile.export_chrome_trace(str(path))
            timeline = attribute(read_trace(path))
        found = break_down(timeline.work, timeline.window, timeline.host).as_dict(timeline.steps)
        return {"rank": rank, "document": self._document(), **found}

    def _document(self) -> int:
        """Length of equal documents whose queries see as many keys."""
        return round(sum(length**2 for length in self._lengths) / sum(self._lengths))

    def _publish(self, folder: Path, ranks: list[dict]) -> None:
        planned, note = self._planned(ranks[0]["document"])
        record = {"steps": [self.first, self.last], "planned_s": planned, "note": note, "ranks": ranks}
        try:
            replace_text(folder / "profile.json", strict_json(record, indent=1) + "\n")
        except OSError as error:
            log.error("no profile.json in %s: %s", folder, error)
        log.info("\n".join(lines(record)))
        log.info("profile: %s", folder)

    def _planned(self, document: int) -> tuple[dict[str, float] | None, str]:
        """Seconds by component as `longspan plan` has them, or why it has none."""
        if self._mesh.device.type != "cuda":
            return None, "longspan plan is for GPUs"
        device = torch.cuda.get_device_name(self._mesh.device)
        try:
            cluster = cluster_of(device, self._mesh.world_size, ranks_here())
            return estimate(Job(self._config, cluster, document, extras_of(packages()))).seconds, ""
        except UserError as error:
            return None, str(error)


def _activities(device: torch.device) -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]


def _hooks_of(name: str):
    """What to do before and after a call of a module whose work is of this component."""
    open_ranges = []

    def enter(*_):
        open_ranges.append(component(name))
        open_ranges[-1].__enter__()

    def leave(*_):
        open_ranges.pop().__exit__(None, None, None)

    return enter, leave
