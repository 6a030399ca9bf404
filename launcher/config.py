"""All settings of a training run: defaults here, changed by a YAML file, then by `key=value` words of the command line.

`Config.load` reads them, `Config.validate` refuses combinations that cannot work before anything else is done, and
`Config.to_yaml` writes what was resolved so that it loads to the same object.
"""

from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from os.path import expanduser, isdir, isfile
from pathlib import Path
from typing import Any, Literal

import yaml

from longspan.launcher.errors import UserError
from longspan.launcher.parsing import parse_override, parse_tokens, read_yaml, update
from longspan.launcher.validation import validate
from longspan.models.config import ModelConfig
from longspan.models.settings import Tokens, setting
from longspan.models.trainable import Trainable

__all__ = [
    "CheckpointConfig",
    "Config",
    "CorpusConfig",
    "DataConfig",
    "LogConfig",
    "OptimConfig",
    "ParallelConfig",
    "ProfileConfig",
    "RunConfig",
    "TrainConfig",
    "parse_tokens",
    "shipped_configs",
]


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Where a run writes and what it runs on."""

    name: str = setting("", "name of the run; empty: the name of the config file")
    dir: str = setting("runs/{name}", "run directory; {name} stands for run.name")
    seed: int = setting(0, "seed of initialisation, data order and everything else random")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is a GPU")


@dataclass(kw_only=True, slots=True)
class CorpusConfig:
    """One corpus written by `longspan prepare`."""

    path: str = setting("", "path of the corpus without .bin/.idx")
    weight: float = setting(1.0, "share of the samples, relative to the other corpora")


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """What is read and how documents become samples."""

    corpora: list[CorpusConfig] = setting([], "corpora of `longspan prepare`, such as [{path: data/x, weight: 2}]")
    packing: Literal["stream", "documents"] = setting(
        "stream", "stream: documents end to end, cut to seq_len; documents: whole ones, up to seq_len tokens in all"
    )
    seq_len: Tokens = setting(4096, "tokens per sample, over all ranks of a sequence-parallel group")
    respect_documents: bool = setting(True, "attention and state stop at document boundaries (false: with stream only)")
    image_size: int = setting(32, "pixels on a side of generated images (model.task=images), a power of two")
    validation_fraction: float = setting(0.0, "share of the documents kept for validation")
    validation_corpora: list[CorpusConfig] = setting(
        [], "corpora of their own for validation, like data.corpora; then data.validation_fraction stays 0"
    )
    prefetch: int = setting(2, "optimizer steps whose batches are built ahead on a CPU thread")


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How ranks share the work: data parallel x sequence parallel x tensor parallel."""

    sp: int = setting(0, "ranks that share one sequence; 0: all ranks (with tp: all / tp)")
    tp: int = setting(1, "ranks of one node that share every layer's heads, MLP channels and the vocabulary")
    sharding: Literal["fsdp", "hsdp"] = setting("fsdp", "parameters sharded over all ranks, or inside nodes (hsdp)")
    engine: Literal["fsdp2", "ddp", "deepspeed"] = setting(
        "fsdp2", "what stores and trains the model: fsdp2 shards it, ddp keeps whole copies, deepspeed is ZeRO"
    )
    zero_stage: int = setting(3, "with deepspeed, what is sharded: 1 optimizer state, 2 gradients too, 3 weights too")
    zero_offload_optimizer: bool = setting(False, "with deepspeed: optimizer state and update on the host's CPU")
    zero_offload_parameters: bool = setting(False, "with deepspeed and zero_stage=3: weights in host memory")
    layout: Literal["auto", "contiguous", "zigzag"] = setting("auto", "which rank holds which tokens")
    linear: Literal["auto", "lasp2", "lasp", "all_scan", "hierarchical"] = setting(
        "auto", "how states of linear attention travel between ranks"
    )
    softmax: Literal[
        "auto",
        "ring",
        "double_ring",
        "grouped_ring",
        "all_gather",
        "ulysses",
        "usp",
        "hybrid",
        "zeppelin_even",
        "zeppelin",
    ] = setting(
        "auto", "how softmax attention shares keys; zeppelin: by a plan that balances documents of mixed lengths"
    )
    sparse: Literal["auto", "fetch", "ring"] = setting(
        "auto", "how sparse attention shares keys: blocks by request, or all in a ring; auto: by what is chosen"
    )
    costs: str = setting("", "file of `longspan bench calibrate` for plans of zeppelin; empty: an H200")
    token_cap: float = setting(1.5, "with zeppelin: most tokens of a rank in softmax attention, in units of the mean")
    head_groups: int = setting(
        0, "groups of heads on which softmax layers work one after the other, to hold less; 0: as many as are fast"
    )
    key_blocks: int = setting(0, "most thread blocks of NCCL for keys on their way, such as 4; 0: NCCL's own choice")
    peer_memory: Literal["auto", "on", "off"] = setting(
        "auto",
        "states, halos and blocks of sparse layers through memory that GPUs of one machine share; off: by NCCL",
    )
    backend: Literal["auto", "fa4", "cudnn_ragged", "cudnn", "flash", "cpu", "math"] = setting(
        "auto", "kernel of softmax attention; auto: the fastest that is installed and fits"
    )

    @property
    def of_sequences(self) -> dict[str, Any]:
        """What a SequenceParallel goes by."""
        names = "layout", "linear", "softmax", "sparse", "backend", "token_cap", "head_groups"
        return {name: getattr(self, name) for name in names}

    @property
    def mesh_sharding(self) -> str:
        """`sharding`, or "none" with the engine that keeps all parameters on every rank."""
        return "none" if self.engine == "ddp" else self.sharding


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW, its learning-rate schedule, and what is trained."""

    lr: float = setting(3e-4, "peak learning rate")
    min_lr_ratio: float = setting(0.1, "last learning rate as a share of the peak (cosine and linear)")
    warmup_steps: int = setting(100, "steps of linear warm-up; a shorter run ends before the peak")
    schedule: Literal["cosine", "linear", "constant"] = setting("cosine", "learning rate after warm-up")
    weight_decay: float = setting(0.1, "decoupled weight decay")
    beta1: float = setting(0.9, "decay of Adam's first moment")
    beta2: float = setting(0.95, "decay of Adam's second moment")
    eps: float = setting(1e-8, "Adam's epsilon")
    clip_grad_norm: float = setting(1.0, "larger gradient norms are scaled down to this; 0: never")
    offload: Literal["none", "cpu"] = setting(
        "none", "cpu: fp32 parameters, gradients and optimizer state in (pinned) host memory, updated by the CPU"
    )
    train: list[str] = setting(
        [], "parameters that are trained, such as [linear.mixer, blocks.0, norm]; all others are frozen; empty: all"
    )
    freeze: list[str] = setting([], "parameters that stay as they are, such as [embedding, head, blocks.*.mlp]")

    @property
    def trainable(self) -> Trainable:
        """`train` without `freeze`."""
        return Trainable(tuple(self.train), tuple(self.freeze))


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """The training loop."""

    steps: int = setting(1000, "optimizer steps of the whole run")
    global_batch: int = setting(1, "samples per optimizer step, over all ranks")
    dtype: Literal["float32", "bfloat16"] = setting("float32", "dtype of compute; master weights are always float32")
    reduce_dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "dtype in which gradients are summed over ranks; bfloat16 only with train.dtype=bfloat16"
    )
    checkpointing: Literal["none", "selective", "full", "auto"] = setting(
        "none",
        "what layers compute again in the backward; none: nothing, full: all but softmax attention, selective: all but"
        " that and projections, auto: as little as memory allows, with train.mlp_tile and train.offload_activations if"
        " it must be",
    )
    checkpoint_layers: list[str] = setting(
        [], "kinds of layers that train.checkpointing is for, such as [softmax] or [linear]; empty: all layers"
    )
    offload_activations: bool = setting(False, "what checkpointed layers keep waits in (pinned) host memory")
    mlp_tile: Tokens = setting(
        0, "tokens for which an MLP is computed at once, again in the backward; smaller: less memory; 0: all tokens"
    )
    compile: bool = setting(False, "compile each layer with torch.compile")
    deterministic: bool = setting(False, "the same run again is the same bit for bit; slower")
    timeout_s: int = setting(600, "seconds a rank waits for the others before the run is given up")


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """What is saved, and where a run starts."""

    interval: int = setting(0, "steps between checkpoints; 0: only at the end")
    at_end: bool = setting(True, "save after the last step too; false for runs that measure")
    keep_last: int = setting(2, "checkpoints kept; older ones are deleted")
    resume: str = setting("auto", "auto: the run directory's newest checkpoint, if any | none: start anew | PATH")
    weights: str = setting(
        "", "folder of safetensors that a new run starts from, see `longspan import`; empty: from random weights"
    )


@dataclass(kw_only=True, slots=True)
class LogConfig:
    """What is reported while training."""

    interval: int = setting(10, "steps between progress lines (metrics.jsonl has every step)")
    tensorboard: bool = setting(True, "write TensorBoard files to the run directory")
    attention_time: bool = setting(False, "time softmax kernels on every rank, for attention_s and attention_imbalance")
    validation_interval: int = setting(0, "steps between validation losses; 0: never")
    validation_samples: int = setting(8, "samples per validation loss")


@dataclass(kw_only=True, slots=True)
class ProfileConfig:
    """Steps whose time, by component, is measured with torch's profiler (docs/profiling.md)."""

    start: int = setting(0, "first profiled step, such as 10, when all is compiled and warm; 0: none")
    steps: int = setting(2, "profiled steps")
    ranks: list[int] = setting([0], "profiled ranks; empty: all")
    trace: bool = setting(True, "keep the trace of every profiled rank, for chrome://tracing or ui.perfetto.dev")
    memory: bool = setting(False, "also record allocations of the GPU, for pytorch.org/memory_viz")


@dataclass(kw_only=True, slots=True)
class Config:
    """All settings of a training run, by section."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    @classmethod
    def load(cls, yaml_path: str | Path | None = None, overrides: list[str] | None = None) -> "Config":
        """Defaults, changed by the file, then by the overrides (`optim.lr=3e-4`) in their order; validated.

        `yaml_path` is a file or the bare name of a shipped config (`quickstart`). Raises UserError for whatever does
        not fit.
        """
        config = cls()
        if yaml_path is not None:
            path = _find(yaml_path)
            config = update(config, read_yaml(path), str(path))
            if not config.run.name:
                config.run = replace(config.run, name=path.stem)
        for text in overrides or []:
            config = update(config, parse_override(config, text), "command line")
        name = config.run.name or "longspan"
        config.run = replace(config.run, name=name, dir=expanduser(config.run.dir.replace("{name}", name)))
        starts = {name: expanduser(getattr(config.checkpoint, name)) for name in ("resume", "weights")}
        config.checkpoint = replace(config.checkpoint, **starts)
        config.parallel = replace(config.parallel, costs=expanduser(config.parallel.costs))
        config.validate()
        return config

    def to_yaml(self) -> str:
        """All settings as YAML that `load` turns into an equal Config."""
        return yaml.safe_dump(asdict(self), sort_keys=False)

    def validate(self, world_size: int | None = None) -> None:
        """Raises UserError for values and combinations that cannot work, on `world_size` ranks where it is given."""
        validate(self, world_size)


def shipped_configs() -> dict[str, Path]:
    """The configs that come with longspan, by name."""
    folder = Path(__file__).resolve().parent.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _find(yaml_path: str | Path) -> Path:
    path = Path(yaml_path)
    if isfile(path):  # whatever the path: pathlib's raises for one that is too long
        return path
    if str(yaml_path) in shipped_configs():
        return shipped_configs()[str(yaml_path)]
    nearest = get_close_matches(path.stem, shipped_configs(), n=1)
    own = path / "config.yaml"  # of a run directory
    hint = f"did you mean {own if isfile(own) else nearest[0]}? " if isfile(own) or nearest else ""
    found = "that is a folder" if isdir(path) else "there is no such file"
    raise UserError(f"--config {yaml_path}: {found}; {hint}shipped are {', '.join(shipped_configs())}")
