"""Which settings of a training run cannot work, said before anything else is done."""

from longspan.launcher.errors import UserError
from longspan.models.config import SOFTMAX_KINDS, is_of_kind
from longspan.models.trainable import ALL

LARGEST_SEED = 2**63 - 1  # that torch takes
LARGEST_SEQ_LEN = 2**36  # beyond, a plan counts tiles for minutes


def validate(config, world_size: int | None = None) -> None:
    """Raises UserError for what cannot work in a launcher.config.Config, on `world_size` ranks where it is given."""
    try:
        config.model.validate()
    except ValueError as error:
        raise UserError(str(error)) from None
    _check_ranges(config)
    _check_trainable(config)
    _check_tensor_parallel(config)
    _check_head_groups(config)
    _check_engine(config)
    _require(
        not (config.train.deterministic and config.parallel.backend.startswith("cudnn")),
        f"parallel.backend={config.parallel.backend} is not deterministic, as train.deterministic=true asks: "
        "use auto, fa4 or flash",
    )
    {"text": _check_text, "images": _check_images}[config.model.task](config)
    if world_size is not None:
        _check_ranks(config, world_size)


def _check_ranges(config) -> None:
    def value(path, of=config):
        section, name = path.split(".")
        return getattr(getattr(of, section), name)

    for path in ("train.steps", "train.global_batch", "train.timeout_s", "data.seq_len", "data.prefetch",
                 "parallel.tp", "checkpoint.keep_last", "log.interval", "log.validation_samples",
                 "profile.steps"):  # fmt: skip
        _require(value(path) >= 1, f"{path}={value(path)}: use 1 or more")
    for path in ("parallel.sp", "parallel.head_groups", "parallel.key_blocks", "train.mlp_tile",
                 "optim.warmup_steps", "optim.weight_decay", "run.seed", "optim.clip_grad_norm",
                 "checkpoint.interval", "log.validation_interval", "profile.start"):  # fmt: skip
        _require(value(path) >= 0, f"{path}={value(path)}: use 0 or more")
    for path, most in (("run.seed", LARGEST_SEED), ("train.timeout_s", 10**9), ("data.seq_len", LARGEST_SEQ_LEN)):
        _require(value(path) <= most, f"{path}={value(path)}: use {most} or less")
    for path in ("run.dir", "checkpoint.resume"):
        _require(value(path) != "", f"{path} is empty: leave it out for the default, {value(path, type(config)())}")
    for path in ("optim.lr", "optim.eps"):
        _require(value(path) > 0, f"{path}={value(path)}: use a number above 0")
    for path in ("optim.beta1", "optim.beta2", "data.validation_fraction"):
        _require(0 <= value(path) < 1, f"{path}={value(path)}: use a number from 0 to below 1")
    _require(config.parallel.token_cap >= 1, f"parallel.token_cap={config.parallel.token_cap}: use 1 or more")
    _require(0 <= config.optim.min_lr_ratio <= 1, f"optim.min_lr_ratio={config.optim.min_lr_ratio}: use 0 to 1")
    _check_memory(config)
    _check_profile(config)


def _check_profile(config) -> None:
    profile = config.profile
    last = profile.start + profile.steps - 1
    _require(
        profile.start == 0 or last <= config.train.steps,
        f"profile.start={profile.start} with profile.steps={profile.steps} ends at step {last}, after the run"
        f" (train.steps={config.train.steps}): start earlier",
    )
    _require(
        profile.start > 0 or profile == type(profile)(),
        "profile has settings but profile.start=0 profiles no step: set it to one, such as 10",
    )


def _check_memory(config) -> None:
    train, kinds = config.train, dict.fromkeys(config.model.layer_kinds)
    _require(
        train.reduce_dtype == "float32" or train.dtype == "bfloat16",
        f"train.reduce_dtype={train.reduce_dtype} would round the gradients of train.dtype={train.dtype}: use "
        "train.reduce_dtype=float32, or train.dtype=bfloat16",
    )
    for name in ("checkpoint_layers", "offload_activations"):
        _require(
            train.checkpointing != "none" or not getattr(train, name),
            f"train.{name} is for checkpointed layers, but train.checkpointing=none: use full or selective",
        )
    for entry in train.checkpoint_layers:
        _require(
            any(is_of_kind(kind, entry) for kind in kinds),
            f"train.checkpoint_layers has {entry}, but no layer is of that kind: use some of {', '.join(kinds)}",
        )


def _check_trainable(config) -> None:
    if config.optim.trainable == ALL:
        return
    from longspan.models.flops import num_trained  # imports torch

    try:
        num_trained(config.model, config.optim.trainable)
    except ValueError as error:
        raise UserError(str(error)) from None


def _check_tensor_parallel(config) -> None:
    tp = config.parallel.tp
    try:
        config.model.validate_split(tp)
    except ValueError as error:
        raise UserError(str(error)) from None
    _require(
        tp == 1 or config.parallel.engine != "deepspeed",
        f"parallel.tp={tp} is for parallel.engine=fsdp2 and ddp, not deepspeed: use one of those, or parallel.tp=1",
    )


def _check_head_groups(config) -> None:
    model, groups, tp = config.model, config.parallel.head_groups, config.parallel.tp
    heads = model.kv_heads // tp
    allowed = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
    _require(
        groups == 0 or heads % groups == 0 or set(SOFTMAX_KINDS).isdisjoint(model.layer_kinds),
        f"parallel.head_groups={groups} does not divide the {heads} key heads of a rank (model.num_kv_heads="
        f"{model.kv_heads}{f' / parallel.tp={tp}' * (tp > 1)}): use one of {allowed}, or 0",
    )


def _check_engine(config) -> None:
    parallel = config.parallel
    engine, stage = parallel.engine, parallel.zero_stage
    _require(
        engine == "fsdp2" or parallel.sharding == "fsdp",
        f"parallel.sharding={parallel.sharding} is for parallel.engine=fsdp2, not {engine}: leave it out",
    )
    _require(stage in (1, 2, 3), f"parallel.zero_stage={stage}: use 1, 2 or 3")
    default = type(parallel)()
    for name in ("zero_stage", "zero_offload_optimizer", "zero_offload_parameters"):
        _require(
            engine == "deepspeed" or getattr(parallel, name) == getattr(default, name),
            f"parallel.{name} is for parallel.engine=deepspeed, not {engine}: leave it out",
        )
    _require(
        stage == 3 or not parallel.zero_offload_parameters,
        f"parallel.zero_offload_parameters=true needs parallel.zero_stage=3, not {stage}: below, weights are whole",
    )
    _require(
        engine != "deepspeed" or stage < 3 or not config.train.compile,
        "train.compile=true cannot trace the hooks of parallel.zero_stage=3: use 1 or 2, or parallel.engine=fsdp2",
    )
    for name, given in (
        ("optim.offload=cpu", config.optim.offload == "cpu"),
        ("train.reduce_dtype=bfloat16", config.train.reduce_dtype != "float32"),
        ("train.mlp_tile", config.train.mlp_tile > 0),
        ("train.offload_activations=true", config.train.offload_activations),
        ("train.checkpointing=selective", config.train.checkpointing == "selective"),
    ):
        _require(
            engine != "deepspeed" or not given,
            f"{name} is for parallel.engine=fsdp2 and ddp; leave it out with deepspeed, which has"
            " parallel.zero_offload_optimizer and zero_offload_parameters",
        )


def _check_text(config) -> None:
    data = config.data
    _require(data.corpora != [], "data.corpora is empty: name a corpus written by `longspan prepare`, "
                                 "such as data.corpora=[{path: data/x}]")  # fmt: skip
    for name in ("corpora", "validation_corpora"):
        for index, corpus in enumerate(getattr(data, name)):
            _require(corpus.path != "", f"data.{name}[{index}].path is not set: name a corpus without .bin/.idx")
            _require(corpus.weight > 0, f"data.{name}[{index}].weight={corpus.weight}: use a number above 0")
    _require(
        data.validation_corpora == [] or data.validation_fraction == 0,
        f"data.validation_fraction={data.validation_fraction} keeps documents of data.corpora for validation, but "
        "data.validation_corpora has others: use one of them",
    )
    _require(
        data.packing == "stream" or data.respect_documents,
        "data.respect_documents=false needs data.packing=stream: packing whole documents keeps them apart",
    )
    _require(
        config.log.validation_interval == 0 or data.validation_fraction > 0 or data.validation_corpora != [],
        f"log.validation_interval={config.log.validation_interval} needs documents kept for validation: "
        "set data.validation_fraction, such as 0.01, or data.validation_corpora",
    )


def _check_images(config) -> None:
    data, pixels = config.data, config.data.image_size**2
    for name in ("corpora", "validation_corpora"):
        _require(getattr(data, name) == [], f"data.{name} is for model.task=text; images are generated: leave it out")
    _require(data.respect_documents, "data.respect_documents=false is for model.task=text: images are kept apart")
    _require(
        data.image_size >= 2 and data.image_size.bit_count() == 1,
        f"data.image_size={data.image_size}: use a power of two, so that blocks of tokens are patches",
    )
    _require(
        data.seq_len % pixels == 0,
        f"data.seq_len={data.seq_len} holds no whole number of images of {pixels} pixels "
        f"(data.image_size={data.image_size}): use a multiple of {pixels}",
    )


def _check_ranks(config, world_size: int) -> None:
    for rank in config.profile.ranks:
        _require(
            0 <= rank < world_size or not config.profile.start,
            f"profile.ranks has {rank}, but the run has the ranks 0 to {world_size - 1}: leave it out",
        )
    tp, divisors = config.parallel.tp, [size for size in range(1, world_size + 1) if world_size % size == 0]
    allowed = ", ".join(map(str, divisors))
    _require(world_size % tp == 0, f"parallel.tp={tp} does not divide the {world_size} ranks: use one of {allowed}")
    each = f" / parallel.tp={tp}" * (tp > 1)
    sp, ranks = config.parallel.sp or world_size // tp, f"{world_size} ranks{each}"
    divisors = [size for size in divisors if world_size // tp % size == 0]
    allowed = ", ".join(map(str, divisors))
    _require(world_size // tp % sp == 0, f"parallel.sp={sp} does not divide the {ranks}: use one of {allowed}")
    heads = config.model.num_heads // tp
    allowed = " or ".join(str(size) for size in divisors if heads % size == 0)
    _require(
        config.parallel.softmax != "ulysses" or heads % sp == 0,
        f"parallel.softmax=ulysses cannot share model.num_heads={heads * tp}{each} among parallel.sp={sp} ranks: "
        f"use usp or ring, or parallel.sp={allowed}",
    )
    _require(
        tp == 1
        or config.parallel.engine != "fsdp2"
        or config.parallel.sharding != "fsdp"
        or config.model.hidden_size % (world_size // tp) == 0,
        f"with parallel.tp={tp} the {world_size // tp} ranks that shard parameters must divide model.hidden_size="
        f"{config.model.hidden_size}: use another parallel.tp, or parallel.sharding=hsdp",
    )
    dp = world_size // tp // sp
    _require(
        config.train.global_batch % dp == 0,
        f"train.global_batch={config.train.global_batch} cannot be shared by the {dp} data-parallel groups "
        f"({ranks} / parallel.sp={sp}): use a multiple of {dp}, or another parallel.sp",
    )
    _require(
        config.log.validation_interval == 0 or config.log.validation_samples % dp == 0,
        f"log.validation_samples={config.log.validation_samples} cannot be shared by the {dp} data-parallel groups: "
        f"use a multiple of {dp}",
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
