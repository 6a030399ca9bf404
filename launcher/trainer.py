"""The training run: everything is built from the config, then one loop of steps, validation and checkpoints."""

import logging
import os
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from longspan.attention.ranges import component
from longspan.kernels.peer import peer_kernels
from longspan.launcher import checkpoint, claim, weights
from longspan.launcher.agreement import agree_on, decide
from longspan.launcher.allocator import allocator_setting
from longspan.launcher.batches import BatchLoader
from longspan.launcher.breakdown import DATA, OPTIMIZER, OUTSIDE
from longspan.launcher.calibration import load_costs
from longspan.launcher.config import CheckpointConfig, Config
from longspan.launcher.cpu_limits import check_model, check_step
from longspan.launcher.engines import find_engine
from longspan.launcher.environment import choose_device, describe_environment, make_deterministic
from longspan.launcher.facts import facts_of, weights_in
from longspan.launcher.files import replace_text, strict_json, writing
from longspan.launcher.memory_choice import NAMES, settle_run
from longspan.launcher.metrics import MetricsWriter, PendingStep, StepMeter
from longspan.launcher.profiling import StepProfiler
from longspan.launcher.progress import TrainingProgress
from longspan.launcher.schedule import learning_rate
from longspan.launcher.stopping import StopSignal, mark_stopped
from longspan.launcher.tasks import step_builder
from longspan.models.build import build_model
from longspan.models.parallelize import parallelize
from longspan.models.trainable import ALL, table
from longspan.parallel import SequenceParallel
from longspan.parallel.mesh import Mesh, build_mesh, join
from longspan.parallel.peer_memory import open_peer_memory
from longspan.parallel.tensor import TensorParallel

log = logging.getLogger("longspan")


def run(config: Config) -> None:
    """Trains as `config` says, on the ranks that torchrun started (without torchrun: on one rank).

    Every rank calls it. Raises UserError or ValueError for what the user can put right, on all ranks or on some; the
    caller's main_guard stops the others.
    """
    stop_signal = StopSignal()
    config.validate(world_size=int(os.environ.get("WORLD_SIZE", "1")))
    if config.train.deterministic:
        make_deterministic()
    device = choose_device(config.run.device)
    set_up_log()
    join(device, config.train.timeout_s)
    agree_on(facts_of(config))
    mesh = build_mesh(
        sp=config.parallel.sp,
        sharding=config.parallel.mesh_sharding,
        device=device,
        timeout_s=config.train.timeout_s,
        tp=config.parallel.tp,
        key_blocks=config.parallel.key_blocks,
    )
    trainer = Trainer(config, mesh, stop_asked=stop_signal)
    trainer.train()
    trainer.close()
    dist.destroy_process_group()


def build_sequence_parallel(config: Config, mesh: Mesh) -> SequenceParallel:
    """How the ranks of `mesh` share sequences, as parallel.* says. Collective. UserError for a file of costs that
    cannot be used."""
    return SequenceParallel(
        mesh.sp_group,
        mesh.sp_state_group,
        peers=open_peer_memory(
            mesh.sp_state_group, mesh.sp_topology, mesh.device, peer_kernels, config.parallel.peer_memory
        ),
        topology=mesh.sp_topology,
        costs=decide(lambda: load_costs(config)),
        device=mesh.device,
        **config.parallel.of_sequences,
    )


def saves(wanted: CheckpointConfig, steps: int) -> str:
    """What a run that is ended on the way would lose, in a line for its log."""
    if 0 < wanted.interval < steps:
        return f"checkpoints every {wanted.interval} steps, the last {wanted.keep_last} are kept"
    if wanted.at_end:
        return "a checkpoint at the end only: an interrupted run loses all (checkpoint.interval=N saves every N steps)"
    return "no checkpoints (checkpoint.interval=0, checkpoint.at_end=false)"


class Trainer:
    """A run on the ranks of `mesh`. Collective: every rank builds one from the same config and calls its methods.

    stop_asked: whether this rank is asked to end the run early; one rank is enough to end it on all.
    """

    def __init__(self, config: Config, mesh: Mesh, stop_asked: Callable[[], bool] = lambda: False):
        asked, config = config, settle_run(config, mesh)
        self._chosen = [] if config is asked else [f"train.{name}" for name in NAMES]
        self.config, self.mesh = config, mesh
        self._stop_asked, self._stop = stop_asked, False
        self.run_dir = Path(config.run.dir)
        self._claimed, self._metrics = None, None
        start = decide(self._claim)
        if start is not None:
            checkpoint.check_model(start, config.model)
        shard = find_engine(config, mesh)
        self.sequence_parallel = build_sequence_parallel(config, mesh)
        self._open_data()
        if mesh.device.type == "cpu":
            check_model(config)
        torch.manual_seed(config.run.seed)  # the same on every rank, so that all of them shard the same model
        with mesh.device:
            model = build_model(config.model)
        if start is None and config.checkpoint.weights:
            folder = Path(config.checkpoint.weights)
            agree_on(weights_in(folder))
            corpora = [corpus.path for corpus in (*config.data.corpora, *config.data.validation_corpora)]
            decide(lambda: weights.check_tokenizer(folder, corpora))
            weights.take_over(weights.find(folder), model)
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        trainable = config.optim.trainable
        self._trained = table(model, trainable.names(model)) if trainable != ALL else []
        self.engine = parallelize(
            model,
            shard=shard,
            checkpointing=config.train.checkpointing,
            compile=config.train.compile,
            checkpoint_layers=config.train.checkpoint_layers,
            offload_activations=config.train.offload_activations,
            mlp_tile=config.train.mlp_tile,
            ranks=None if mesh.tp_mesh is None else TensorParallel(mesh.tp_mesh),
            trainable=trainable,
        )
        self.model = self.engine.model
        self.step = 0
        if start is not None:
            checkpoint.load(start, self.engine)
            self.loader.load_state_dict(start.data)
            self.step = start.step
        self.profiler = StepProfiler(config, mesh, self.model, first_step=self.step + 1)
        self.meter = StepMeter(config.model, mesh, trainable)
        if config.log.attention_time:
            self.sequence_parallel.mark = self.meter.mark_attention
        self._pending: deque[PendingStep] = deque()
        # On a GPU the host prepares the next step while this one runs and reads its numbers one step late.
        self._steps_in_flight = 1 if mesh.device.type == "cuda" else 0
        self._start, self._progress, self._places_agreed = start, None, False

    def _claim(self) -> checkpoint.Info | None:
        """Where to start, in a run directory that no other run is in."""
        self._claimed = claim.claim(self.run_dir)
        return checkpoint.find(self.run_dir, self.config.checkpoint.resume)

    def _open_data(self) -> None:
        config = self.config
        build = step_builder(config, self.sequence_parallel, self.mesh)
        self.loader = BatchLoader(build("train", config.train.global_batch), prefetch=config.data.prefetch)
        self._validation_batches = []
        if config.log.validation_interval:
            # The first samples of the validation split, every time: built once and kept.
            builder = build("validation", config.log.validation_samples)
            self._validation_batches = builder.to_device(builder.build(0))

    def _open_outputs(self) -> None:
        config, mesh = self.config, self.mesh
        environment = describe_environment(mesh) | {"chosen": self._chosen}
        decide(lambda: self._write_descriptions(environment))
        if mesh.is_main:
            first, steps = self.step + 1, config.train.steps
            self._metrics = MetricsWriter(self.run_dir, first_step=first, tensorboard=config.log.tensorboard)
            self._progress = TrainingProgress(first_step=first, steps=steps, interval=config.log.interval)
        log.info("run directory: %s", self.run_dir)
        log.info(
            "%d ranks = %s on %s; %s parameters; %d samples of %s%s tokens a step",
            mesh.world_size,
            mesh,
            environment["device"],
            f"{self.num_parameters:,}",
            config.train.global_batch,
            "up to " if config.data.packing == "documents" else "",
            f"{config.data.seq_len:,}",
        )
        for line in self._trained:
            log.info("%s", line)
        log.info("%s", saves(config.checkpoint, config.train.steps))
        if mesh.device.type == "cuda":
            log.info("GPU memory allocator: %s", allocator_setting())
        if self._start is not None:
            log.info("resumed from %s", self._start.path)
            checkpoint.warn_about_data(self._start, config)

    def _write_descriptions(self, environment: dict) -> None:
        with writing(self.run_dir):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            replace_text(self.run_dir / "config.yaml", self.config.to_yaml())
            replace_text(self.run_dir / "environment.json", strict_json(environment, indent=1) + "\n")
        if self.config.checkpoint.interval or self.config.checkpoint.at_end:
            checkpoint.try_folder(self.run_dir)

    def train(self) -> None:
        """Runs the steps that are left, with validation and checkpoints when they are due; asked to stop, saves and
        returns before the last."""
        steps, log_config = self.config.train.steps, self.config.log
        if self.step >= steps:
            log.info(
                "nothing to do: %s holds %d steps, train.steps=%d; a larger one continues it",
                self._start.path,
                self.step,
                steps,
            )
            return
        self._open_outputs()
        while self.step < steps and not self._stop:
            self.profiler.begin(self.step + 1)
            pending = self._train_step()
            if self._due(log_config.validation_interval):
                with component(OUTSIDE):
                    pending.val_loss = self._validation_loss()
            self._pending.append(pending)
            self._report(keep=self._steps_in_flight)
            if self._saves():
                self._report(keep=0)
                if self._metrics:
                    self._metrics.sync()
                data = self.loader.state_dict()
                with component(OUTSIDE):
                    path = checkpoint.save(self.run_dir, self.config, self.engine, step=self.step, data=data)
                log.info("saved %s", path)
            self.profiler.end(self.step)
        self._report(keep=0)
        if self.step < steps:
            decide(mark_stopped)
            log.info("stopped by a signal after step %d of %d; the same command continues the run", self.step, steps)
        else:
            log.info("finished %d steps: %s", self.step, self.run_dir)

    def close(self) -> None:
        """Ends threads and files of this rank."""
        self.loader.close()
        for file in (self._metrics, self._claimed):
            if file:
                file.close()

    def _due(self, interval: int) -> bool:
        """Whether a thing done every `interval` steps (0: never) is due; the last step is when it is done at all."""
        return interval > 0 and (self.step % interval == 0 or self.step == self.config.train.steps)

    def _saves(self) -> bool:
        """Whether a checkpoint is due; a run that is asked to stop always saves."""
        wanted, last = self.config.checkpoint, self.step == self.config.train.steps
        return self._stop or (wanted.at_end if last else self._due(wanted.interval))

    def _train_step(self) -> PendingStep:
        """One optimizer step. The update is left out on the device when the loss or the gradient norm is not finite."""
        begin = self.meter.begin()
        with component(DATA):
            batches = self.loader.next_step()
        self.profiler.observe(batches)
        self.step += 1
        if not self._places_agreed:  # before the first exchange that would wait, or mix tokens up, if they do not
            self.meter.check_places(self.step, batches)
            if self.mesh.device.type == "cpu":
                check_step(self.config, self.mesh, batches, self.sequence_parallel.costs)
            self._places_agreed = True
        num_labels = batches[0].num_labels_global
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for batch in batches:
            batch_loss = self.model(*batch.inputs, batch.seq)
            self.engine.backward(batch_loss / num_labels, last=batch is batches[-1])
            loss_sum += batch_loss.detach()
        table = self.meter.gather(loss_sum, batches, self._stop_asked())
        loss = table[:, 0].sum() / num_labels
        lr = learning_rate(self.config.optim, self.step, self.config.train.steps)
        with component(OPTIMIZER):
            grad_norm = self.engine.step(lr, loss)
        return self.meter.pending(self.step, lr, table, loss, grad_norm, begin, self.meter.mark())

    @torch.no_grad()
    def _validation_loss(self) -> torch.Tensor:
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for batch in self._validation_batches:
            loss_sum += self.model(*batch.inputs, batch.seq)
        dist.all_reduce(loss_sum)
        loss_sum /= self.mesh.tp  # ranks that share layers have the loss of the same tokens
        return loss_sum / self._validation_batches[0].num_labels_global

    def _report(self, keep: int) -> None:
        """Checks and writes the steps that the device has finished, all but the last `keep`; learns from them whether
        to stop."""
        while len(self._pending) > keep:
            pending = self._pending.popleft()
            row = self.meter.resolve(pending)
            self._stop |= pending.stop
            if self.mesh.is_main:
                claim.check(self._claimed, self.run_dir)
                self._metrics.write(row)
                self._progress.report(row)


class _Output(logging.StreamHandler):
    """Output that nobody reads any more, or on a full disk, ends the run like any other error."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


def set_up_log() -> None:
    """The first rank's log goes to the terminal; all ranks would say the same."""
    log.handlers = [_Output(sys.stdout)]
    log.handlers[0].setFormatter(logging.Formatter("%(message)s"))
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    log.propagate = False
