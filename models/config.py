"""The settings of a model, and what is refused before a single parameter exists.

Modules that import torch are imported where they are needed: `--help` shows these settings without waiting for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from math import gcd
from typing import Literal, get_args, get_type_hints

from longspan.models.families import LINEAR_FAMILIES, LinearFamily
from longspan.models.settings import Tokens, setting

SOFTMAX_KINDS = ("softmax", "softmax:window")
SPARSE_KINDS = ("sla", "llsa", "sparse")
LINEAR_KINDS = tuple(f"linear:{family}" for family in LINEAR_FAMILIES)
LAYER_KINDS = SOFTMAX_KINDS + SPARSE_KINDS + LINEAR_KINDS
MAX_HEAD = 256  # widest keys and values that the kernels take
BIDIRECTIONAL_KINDS = ("softmax", "sla", "llsa", "linear:none")  # of models whose tokens have no direction
CHANNELS = 3  # of a pixel: red, green, blue


def is_of_kind(kind: str, entry: str) -> bool:
    """Whether `kind`, one of LAYER_KINDS, is `entry` or a variety of it, as linear:gla is of linear."""
    return kind == entry or kind.startswith(f"{entry}:")


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """A pre-norm transformer whose layers mix tokens by softmax, block-sparse or linear attention, as `pattern` says.

    0 means "derived" for numbers of heads and widths; the derived values are the properties `kv_heads`, `head_size` and
    so on. `family` resolves what is "auto". Call `validate` before use; `build_model` does.
    """

    task: Literal["text", "images"] = setting(
        "text", "text: next tokens, looking back; images: pixels from noise by flow matching, looking both ways"
    )
    vocab_size: int = setting(257, "token ids of the tokenizer; 257 for bytes and the end-of-document token")
    num_layers: int = setting(8, "decoder blocks")
    hidden_size: int = setting(512, "width of the residual stream")
    num_heads: int = setting(8, "query heads of softmax layers")
    num_kv_heads: int = setting(0, "key and value heads of softmax layers (grouped-query attention); 0 = num_heads")
    head_dim: int = setting(0, "width of a softmax head; 0 = hidden_size / num_heads")
    linear_num_heads: int = setting(0, "heads of linear layers; 0 = num_heads")
    linear_head_dim: int = setting(0, "width of queries and keys in linear layers but mamba2; 0 = head_dim")
    linear_value_dim: int = setting(0, "width of values in linear layers; 0 = linear_head_dim")
    state_size: int = setting(128, "width of queries and keys (C and B, shared by all heads) in linear:mamba2")
    mlp_size: int = setting(0, "inner width of the SwiGLU; 0 = 8/3 of hidden_size, rounded up to a multiple of 64")
    pattern: list[str] = setting(
        ["linear", "linear", "linear", "softmax"],
        f"mixer of each layer, repeated up to num_layers: {', '.join(('linear', *LAYER_KINDS))}",
    )
    window: Tokens = setting(0, "keys that a query of softmax:window layers sees, itself included; 0 = no such layers")
    sla_keep: float = setting(
        0.05, "blocks of past keys that a block of queries of sla layers chooses; below 1: a share of those there are"
    )
    sla_query_block: int = setting(128, "tokens of a block of queries in sla layers")
    sla_key_block: int = setting(64, "tokens of a block of keys in sla layers")
    sla_feature_map: str = setting(
        "softmax", "applied to queries and keys of the linear part of sla layers; a positive one, see feature_map"
    )
    sla_linear: Literal["all", "rest"] = setting(
        "all",
        "what the linear part of sla layers covers: all tokens seen, as SLA's public code, or as its paper the rest,"
        " blocks that are not chosen",
    )
    llsa_block: int = setting(16, "tokens of a block in llsa layers, and rows of a level that make one of the next")
    llsa_keep: int = setting(8, "blocks chosen on every level in llsa layers")
    llsa_levels: int = setting(2, "levels of means in llsa layers; cost grows like tokens / llsa_block ^ llsa_levels")
    sparse_selection: dict = setting(
        {},
        "what sparse layers attend to: a name (top, hierarchical, window, radial, antidiagonal, tokens, compressed or"
        " lists) and its settings, see docs/sparse-attention.md, such as {name: window, window: 4096}",
    )
    linear_family: Literal[tuple(LINEAR_FAMILIES)] = setting("fixed", "the family that `linear` in the pattern means")
    decay_slopes: Literal["lightning", "retention"] = setting(
        "lightning", "decay rates of linear:fixed: lightning (slower in later layers) or retention (longer memory)"
    )
    feature_map: str = setting(
        "auto",
        "applied to queries and keys of linear layers: identity, silu, relu, elu1 (elu + 1), softmax, hedgehog, l2norm,"
        " or several in turn, such as silu+l2norm; auto: the family's",
    )
    conv_width: int = setting(
        -1, "tokens seen by the short convolution of linear layers; 0: no convolution, -1: the family's width"
    )
    linear_normalize: bool = setting(
        False, "divide linear attention by the sum of its weights; needs a positive feature_map such as elu1"
    )
    output_norm: Literal["rmsnorm", "simple_rmsnorm"] = setting(
        "rmsnorm", "norm of the output of linear layers; simple_rmsnorm has no learned scale"
    )
    output_gate: Literal["auto", "silu", "none"] = setting(
        "auto", "gate of the output of linear layers: silu of a projection of their input; auto: the family's"
    )
    gate_rank: int = setting(16, "rank of the projection that gives linear:gla and linear:kda their decay")
    rope_base: float = setting(500_000.0, "rotary base of softmax layers; larger turns the slow dimensions more slowly")
    rope_scaling: float = setting(
        1.0, "slow rotary dimensions down for contexts this many times longer than trained before; 1 = none"
    )
    rope_type: Literal["ntk", "llama3", "yarn"] = setting(
        "ntk", "how rope_scaling does so; ntk: a larger rotary base; llama3, yarn: what turns slowly alone"
    )
    rope_trained: Tokens = setting(0, "with rope_type=llama3 and yarn: tokens of context trained before")
    qk_norm: bool = setting(False, "RMSNorm on each query and key head of softmax layers, before rotation")
    tie_embeddings: bool = setting(False, "use the embedding as output head")
    norm_eps: float = setting(1e-6, "added to the mean square in every RMSNorm")
    init_std: float = setting(
        0.02, "standard deviation of initial weights; less for projections into the residual stream"
    )
    embedding_std: float = setting(
        0.0, "standard deviation of the initial embedding; 0 = 1, or init_std where it is also the output head"
    )
    loss_chunk: int = setting(4096, "tokens whose logits exist at once, each taking 6 to 12 B x vocab_size")

    @property
    def causal(self) -> bool:
        """Whether a token sees nothing of what comes after it."""
        return self.task == "text"

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def linear_heads(self) -> int:
        return self.linear_num_heads or self.num_heads

    @property
    def value_size(self) -> int:
        return self.linear_value_dim or self.linear_head_dim or self.head_size

    @property
    def mlp_width(self) -> int:
        return self.mlp_size or -(-self.hidden_size * 8 // (3 * 64)) * 64

    @property
    def embedding_init_std(self) -> float:
        """Rows of unit size keep the first layers' gradients in proportion: the norm in front of them divides by it."""
        return self.embedding_std or (self.init_std if self.tie_embeddings else 1.0)

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The kind of every layer, one of LAYER_KINDS: the pattern repeated, and cut where num_layers ends."""
        kinds = [f"linear:{self.linear_family}" if entry == "linear" else entry for entry in self.pattern]
        return tuple(kinds[layer % len(kinds)] for layer in range(self.num_layers))

    @property
    def rope(self) -> dict:
        """Options of models.rope.rotary_angles."""
        options = {"base": self.rope_base, "scaling": self.rope_scaling}
        return options | {"kind": self.rope_type, "trained": self.rope_trained}

    def window_of(self, kind: str) -> int | None:
        """Keys that a query of a softmax kind sees at most; None for all before it."""
        return self.window if kind == "softmax:window" else None

    def selection(self, kind: str):
        """What a layer of a sparse kind attends to, a selection of longspan.attention."""
        from longspan.attention import Hierarchical, TopBlocks
        from longspan.models.selections import build_selection

        if kind == "sla":
            return TopBlocks(self.sla_keep, self.sla_query_block, self.sla_key_block)
        if kind == "sparse":
            return build_selection(self.sparse_selection)
        return Hierarchical(self.llsa_block, self.llsa_keep, self.llsa_levels)

    def family(self, kind: str) -> LinearFamily:
        """What a layer of a linear kind, such as "linear:gla", is made of: its family, changed by settings."""
        given = {"feature_map": self.feature_map, "output_gate": self.output_gate, "conv_width": self.conv_width}
        given = {name: value for name, value in given.items() if value not in ("auto", -1)}
        family = replace(LINEAR_FAMILIES[kind.removeprefix("linear:")], **given)
        if family.delta_rule and family.feature_map.split("+")[-1] != "l2norm":
            # I - beta k k^T makes the state grow where a key is longer than sqrt(2).
            family = replace(family, feature_map=f"{family.feature_map}+l2norm")
        return family

    def state_shape(self, kind: str) -> tuple[int, int, int]:
        """Heads, key width after the feature map and value width of a linear kind's state."""
        from longspan.models.feature_maps import feature_width

        key_size = feature_width(self.family(kind).feature_map, self.projected_key_size(kind))
        return self.linear_heads, key_size, self.value_size

    def projected_key_size(self, kind: str) -> int:
        """Width of a head of queries and keys in a linear kind, before the feature map."""
        return self.state_size if kind == "linear:mamba2" else self.linear_head_dim or self.head_size

    def validate(self) -> None:
        """Raises ValueError in one line that names the setting, what was found and what would do."""
        for name in ("vocab_size", "num_layers", "hidden_size", "num_heads", "state_size", "gate_rank", "loss_chunk"):
            _require(getattr(self, name) >= 1, f"model.{name}={getattr(self, name)} must be at least 1")
        derived = ("num_kv_heads", "head_dim", "linear_num_heads", "linear_head_dim", "linear_value_dim", "mlp_size")
        for name in (*derived, "embedding_std"):
            _require(getattr(self, name) >= 0, f"model.{name}={getattr(self, name)} is negative; use 0 to derive it")
        for name in ("norm_eps", "init_std", "rope_base"):
            _require(getattr(self, name) > 0, f"model.{name}={getattr(self, name)} must be greater than 0")
        hints = get_type_hints(ModelConfig)
        for name in ("task", "rope_type", "linear_family", "decay_slopes", "output_norm", "output_gate", "sla_linear"):
            _require_choice(f"model.{name}", getattr(self, name), get_args(hints[name]))
        _require(len(self.pattern) > 0, "model.pattern is empty; give at least one layer, such as [linear, softmax]")
        for entry in self.pattern:
            _require_choice("model.pattern entry", entry, (*SOFTMAX_KINDS, *SPARSE_KINDS, "linear", *LINEAR_KINDS))
        self._validate_window()
        self._validate_direction()
        self._validate_sparse()
        self._validate_heads()
        self._validate_features()
        for kind in dict.fromkeys(self.layer_kinds):
            if kind in LINEAR_KINDS:
                self._validate_linear(kind)
        self._validate_rope()

    def validate_split(self, ranks: int) -> None:
        """Raises ValueError where heads, MLPs and the vocabulary cannot be split over parallel.tp=ranks."""
        if ranks == 1:
            return
        _require(self.task == "text", f"parallel.tp={ranks} is for model.task=text, not {self.task}: use parallel.tp=1")
        kinds, numbers = set(self.layer_kinds), {"mlp_size": self.mlp_width}
        if not kinds.isdisjoint(SOFTMAX_KINDS + SPARSE_KINDS):
            numbers |= {"num_heads": self.num_heads, "num_kv_heads": self.kv_heads}
        if not kinds.isdisjoint(LINEAR_KINDS):
            numbers["linear_num_heads"] = self.linear_heads
        common = gcd(*numbers.values())
        divisors = [n for n in range(1, common + 1) if common % n == 0]
        for name, number in numbers.items():
            _require(
                number % ranks == 0,
                f"parallel.tp={ranks} does not divide model.{name}={number}; use parallel.tp={_either(divisors)}",
            )
        _require(
            (ranks - 1) * -(-self.vocab_size // ranks) < self.vocab_size,
            f"parallel.tp={ranks} leaves a rank without any of model.vocab_size={self.vocab_size}; use a smaller one",
        )

    def _validate_window(self) -> None:
        _require(self.window >= 0, f"model.window={self.window} is negative; give the keys that softmax:window sees")
        windowed = "softmax:window" in self.pattern
        _require(
            self.window > 0 or not windowed,
            "model.pattern has softmax:window, but model.window=0; set the keys that it sees, such as model.window=4K",
        )
        _require(
            windowed or self.window == 0,
            f"model.window={self.window} is for softmax:window layers, of which model.pattern has none; use"
            " softmax:window there, or model.window=0",
        )

    def _validate_rope(self) -> None:
        _require(self.rope_scaling >= 1, f"model.rope_scaling={self.rope_scaling} must be at least 1; 1 means none")
        if self.rope_type == "ntk":
            _require(
                self.rope_trained == 0,
                f"model.rope_trained={self.rope_trained} is for model.rope_type=llama3 and yarn; leave it out",
            )
            return
        _require(self.causal, f"model.rope_type={self.rope_type} is for model.task=text; use ntk")
        _require(
            self.rope_trained >= 1,
            f"model.rope_type={self.rope_type} needs the tokens of context trained before, such as"
            " model.rope_trained=8K",
        )

    def _validate_direction(self) -> None:
        if self.causal:
            return
        _require(not self.tie_embeddings, "model.tie_embeddings=true is for model.task=text: pixels have no vocabulary")
        for kind in self.layer_kinds:
            convolved = kind == "linear:none" and self.family(kind).conv_width > 0
            _require(
                kind in BIDIRECTIONAL_KINDS and not convolved,
                f"model.task=images has no direction, but {kind} layers{convolved * ' with a convolution'} look back;"
                f" use {_either(BIDIRECTIONAL_KINDS)} in model.pattern{convolved * ', and model.conv_width=0'}",
            )

    def _validate_sparse(self) -> None:
        from longspan.kernels.block_states.maps import MAPS
        from longspan.models.feature_maps import POSITIVE_FEATURE_MAPS

        for name, least in (("sla_query_block", 1), ("sla_key_block", 1), ("llsa_block", 2), ("llsa_keep", 1)):
            _require(getattr(self, name) >= least, f"model.{name}={getattr(self, name)} must be at least {least}")
        _require(self.llsa_levels >= 1, f"model.llsa_levels={self.llsa_levels} must be at least 1")
        whole = self.sla_keep < 1 or self.sla_keep == int(self.sla_keep)
        _require(
            self.sla_keep > 0 and whole,
            f"model.sla_keep={self.sla_keep} must be a whole number of blocks, or a share between 0 and 1",
        )
        _require_choice("model.sla_feature_map", self.sla_feature_map, POSITIVE_FEATURE_MAPS)
        if self.sla_linear == "rest":
            _require(
                self.sla_query_block % self.sla_key_block == 0,
                f"model.sla_linear=rest needs whole blocks of keys in a block of queries, but model.sla_key_block="
                f"{self.sla_key_block} does not divide model.sla_query_block={self.sla_query_block}",
            )
            _require(
                self.sla_feature_map in MAPS,
                f"model.sla_linear=rest maps keys of other ranks where they arrive, which"
                f" model.sla_feature_map={self.sla_feature_map} with its weights per head cannot; use softmax or elu1",
            )
        if "sparse" not in self.pattern:
            _require(
                not self.sparse_selection,
                f"model.sparse_selection={self.sparse_selection} is for sparse layers, of which model.pattern has none;"
                " use sparse there, or model.sparse_selection={}",
            )
            return
        try:
            self.selection("sparse")
        except ValueError as error:
            raise ValueError(f"model.sparse_selection: {error}") from None

    def _validate_heads(self) -> None:
        if self.num_heads % self.kv_heads:
            divisors = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise ValueError(
                f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads};"
                f" use {_either(divisors)}"
            )
        _require(
            self.head_dim > 0 or self.hidden_size % self.num_heads == 0,
            f"model.num_heads={self.num_heads} does not divide model.hidden_size={self.hidden_size}; change one of them"
            " or set model.head_dim",
        )
        if not set(self.layer_kinds).isdisjoint(SOFTMAX_KINDS + SPARSE_KINDS):
            source = self._source("head_dim")
            _require(
                self.causal or self.head_size % 4 == 0,
                f"{source} is no multiple of 4, but rotary embedding of images turns pairs by row and as many by"
                " column; use another model.head_dim",
            )
            _require(
                self.head_size % 2 == 0,
                f"{source} is odd, but rotary embedding turns pairs of dimensions; use an even model.head_dim",
            )
            _require(
                self.head_size <= MAX_HEAD,
                f"{source} is wider than the {MAX_HEAD} that attention takes; use more heads or a smaller"
                " model.head_dim",
            )
            _require(
                self.rope_scaling == 1 or self.head_size > (2 if self.causal else 4),
                f"model.rope_scaling={self.rope_scaling} needs more than the {self.head_size} dimensions of a head",
            )

    def _validate_features(self) -> None:
        from longspan.kernels.convolution import WIDTHS
        from longspan.models.feature_maps import feature_map_parts

        if self.feature_map != "auto":
            try:
                feature_map_parts(self.feature_map)
            except ValueError as error:
                raise ValueError(f"model.feature_map={self.feature_map}: {error}") from None
        _require(
            self.conv_width in (-1, 0, *WIDTHS),
            f"model.conv_width={self.conv_width} must be 0 (no convolution), {WIDTHS[0]} to {WIDTHS[-1]}, or -1 for the"
            " family's width",
        )

    def _validate_linear(self, kind: str) -> None:
        from longspan.models.feature_maps import POSITIVE_FEATURE_MAPS

        family, width = self.family(kind), self.projected_key_size(kind)
        _, key_size, value_size = self.state_shape(kind)
        limit = f"but keys of {kind} can be {MAX_HEAD} wide at most"
        name = "state_size" if kind == "linear:mamba2" else "linear_head_dim"
        widened = f" and model.feature_map={family.feature_map} makes it {key_size}" if key_size > width else ""
        _require(
            key_size <= MAX_HEAD,
            f"{self._source(name, 'head_dim')}{widened}, {limit}; use a smaller model.{name}",
        )
        _require(
            not (family.keys_from_decay and widened),
            f"model.feature_map={family.feature_map} widens queries from {width} to {key_size}, but the keys of {kind}"
            " are its decay; use a feature map that keeps the width, such as silu",
        )
        source = self._source("linear_value_dim", "linear_head_dim", "head_dim")
        column = " and a column for model.linear_normalize" if self.linear_normalize else ""
        _require(
            value_size + self.linear_normalize <= MAX_HEAD,
            f"{source}{column}, {limit.replace('keys', 'values')}; use a smaller model.linear_value_dim",
        )
        if self.linear_normalize:
            _require(
                family.normalizer,
                f"model.linear_normalize=true divides by a sum of weights, which {kind} does not have; use"
                " model.linear_normalize=false",
            )
            _require(
                family.feature_map in POSITIVE_FEATURE_MAPS,
                f"model.linear_normalize=true divides by a sum that model.feature_map={family.feature_map} may bring to"
                " zero; use model.feature_map=elu1 or model.linear_normalize=false",
            )

    def _source(self, *names: str) -> str:
        """The setting that a derived width comes from: the first that is not 0."""
        for name in names:
            if getattr(self, name):
                return f"model.{name}={getattr(self, name)}"
        return f"hidden_size / num_heads = {self.head_size}"


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _require_choice(name: str, found: str, allowed: tuple[str, ...]) -> None:
    if found not in allowed:
        near = get_close_matches(str(found), allowed, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise ValueError(f"{name} {found!r} is unknown{hint} allowed: {', '.join(allowed)}")


def _either(values: Sequence) -> str:
    return " or ".join(filter(None, [", ".join(map(str, values[:-1])), str(values[-1])]))
