"""The sets of training runs that loss_parity.py compares: variants of one config, the first is the reference."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """settings: what it changes. ranks: its own number. package: must be importable, or the variant is skipped.
    control: no parity is expected; it shows what a difference looks like."""

    settings: tuple[str, ...] = ()
    ranks: int | None = None
    package: str = "longspan"
    control: bool = False


@dataclass(frozen=True)
class RunSet:
    """config: a shipped one. settings: of all variants; `small` comes after them on a CPU. ranks: of a variant.
    measure: a key of loss_parity.MEASURES, whose value may be `tolerance` at most, or on a CPU `small_tolerance`."""

    config: str
    variants: dict[str, Variant]
    settings: tuple[str, ...]
    measure: str
    tolerance: float
    small_tolerance: float
    small: tuple[str, ...] = ()
    ranks: int = 2


def _pattern(*kinds: str) -> tuple[str, ...]:
    return (f"model.pattern=[{', '.join(kinds)}]",)


def _hybrid(kind: str) -> Variant:
    return Variant(_pattern("linear", "linear", "linear", kind))


def _zero(stage: int) -> Variant:
    return Variant(("parallel.engine=deepspeed", f"parallel.zero_stage={stage}"), package="deepspeed")


FULL = "train.checkpointing=full"
# A few steps of the 0.4B model, or of one for two CPU cores, from weights that change at once.
SHORT = (
    "data.seq_len=16K", "train.steps=8", "optim.warmup_steps=2", "train.global_batch=2", "train.checkpointing=full",
)  # fmt: skip
TINY = (
    "model.num_layers=4", "model.hidden_size=64", "model.num_heads=4", "model.num_kv_heads=2", "data.seq_len=2K",
    "train.steps=6", "train.dtype=float32",
)  # fmt: skip
# Of sets whose variants compute the same.
SAME = {
    "config": "hybrid-0.4b", "settings": SHORT, "small": TINY, "measure": "difference", "tolerance": 1e-3,
    "small_tolerance": 1e-5,
}  # fmt: skip

SETS = {
    "sparse": RunSet(
        config="hybrid-0.4b",
        variants={
            "softmax": _hybrid("softmax"),
            "llsa": _hybrid("llsa"),
            "sla": _hybrid("sla"),
            "linear alone": Variant(_pattern("linear"), control=True),
            "softmax, other seed": Variant((*_hybrid("softmax").settings, "run.seed=1"), control=True),
        },
        settings=(
            "model.num_layers=8", "model.hidden_size=512", "train.checkpointing=none", "data.seq_len=16K",
            "train.steps=400", "optim.lr=2e-3", "optim.warmup_steps=40", "log.validation_interval=100",
            "log.validation_samples=16",
        ),
        small=(
            "model.num_layers=4", "model.hidden_size=128", "model.num_heads=4", "data.seq_len=2K", "train.steps=240",
            "train.dtype=float32", "optim.lr=4e-3", "optim.warmup_steps=20", "log.validation_interval=60",
        ),
        measure="excess",
        tolerance=0.02,
        small_tolerance=0.02,
    ),
    "engines": RunSet(
        variants={
            "fsdp2": Variant(),
            "ddp": Variant(("parallel.engine=ddp",)),
            "deepspeed 1": _zero(1),
            "deepspeed 2": _zero(2),
            "deepspeed 3": _zero(3),
        },
        **SAME,
    ),
    "memory": RunSet(
        variants={
            "none": Variant(("train.checkpointing=none",)),
            "mlp_tile": Variant(("train.checkpointing=none", "train.mlp_tile=1000")),
            "selective": Variant(("train.checkpointing=selective",)),
            "full, layers [linear]": Variant((FULL, "train.checkpoint_layers=[linear]")),
            "full": Variant((FULL,)),
            "full, offload_activations": Variant((FULL, "train.offload_activations=true")),
            "full, optim.offload": Variant((FULL, "optim.offload=cpu")),
            "full, loss_chunk": Variant((FULL, "model.loss_chunk=1000")),
        },
        ranks=1,
        **SAME,
    ),
    "tensor": RunSet(
        variants={
            "one rank": Variant(ranks=1),
            "sp=2": Variant(("parallel.sp=2",)),
            "tp=2": Variant(("parallel.tp=2", "parallel.sp=1")),
            "dp=2": Variant(("parallel.sp=1",)),
        },
        **SAME,
    ),
    "diffusion": RunSet(
        config="diffusion-128",
        variants={kind: Variant(_pattern(kind)) for kind in ("softmax", "sla", "llsa")},
        settings=(
            "train.steps=300", "train.global_batch=1", "optim.lr=1e-3", "optim.warmup_steps=30",
            "log.validation_interval=50", "log.validation_samples=2",
        ),
        small=(
            "model.num_layers=2", "model.hidden_size=48", "model.num_heads=3", "model.llsa_block=4",
            "model.sla_query_block=64", "model.sla_key_block=16", "model.sla_keep=8", "data.image_size=32",
            "data.seq_len=1K", "train.dtype=float32",
        ),
        measure="missing fall",
        tolerance=0.1,
        small_tolerance=0.1,
        ranks=1,
    ),
}  # fmt: skip
