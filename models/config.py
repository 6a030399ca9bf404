"""The settings of a model, and what is refused before a single parameter exists."""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, get_args, get_type_hints

from longspan.models.settings import setting

LINEAR_FAMILIES = ("none", "fixed", "scalar")
LAYER_KINDS = ("softmax", *(f"linear:{family}" for family in LINEAR_FAMILIES))
# A normaliser divides by q.z, which only a strictly positive feature map keeps away from zero.
POSITIVE_FEATURE_MAPS = ("elu1",)


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """A pre-norm decoder whose layers mix tokens by softmax or linear attention, as `pattern` says.

    0 means "derived" for num_kv_heads, head_dim and mlp_size; the derived values are `kv_heads`, `head_size` and
    `mlp_width`. Call `validate` before use; `Decoder` does.
    """

    vocab_size: int = setting(257, "token ids of the tokenizer; 257 for bytes and the end-of-document token")
    num_layers: int = setting(8, "decoder blocks")
    hidden_size: int = setting(512, "width of the residual stream")
    num_heads: int = setting(8, "query heads of softmax layers; heads of linear layers")
    num_kv_heads: int = setting(0, "key and value heads of softmax layers (grouped-query attention); 0 = num_heads")
    head_dim: int = setting(0, "width of a head; 0 = hidden_size / num_heads")
    mlp_size: int = setting(0, "inner width of the SwiGLU; 0 = 8/3 of hidden_size, rounded up to a multiple of 64")
    pattern: list[str] = setting(
        ["linear", "linear", "linear", "softmax"],
        "mixer of each layer, repeated up to num_layers: softmax, linear, linear:none, linear:fixed, linear:scalar",
    )
    linear_family: Literal["none", "fixed", "scalar"] = setting(
        "fixed", "what `linear` in the pattern means: no decay, fixed decay per head, scalar decay per token and head"
    )
    decay_slopes: Literal["lightning", "retention"] = setting(
        "lightning", "decay rates of linear:fixed: lightning (slower in later layers) or retention (longer memory)"
    )
    feature_map: Literal["identity", "silu", "elu1", "relu"] = setting(
        "elu1", "applied to queries and keys of linear layers; elu1 is elu(x) + 1"
    )
    linear_normalize: bool = setting(False, "divide linear attention by the sum of its weights; needs feature_map elu1")
    rope_base: float = setting(500_000.0, "rotary base of softmax layers; larger turns the slow dimensions more slowly")
    rope_scaling: float = setting(
        1.0, "stretch the rotary base for contexts this many times longer than trained before (NTK-aware); 1 = none"
    )
    qk_norm: bool = setting(False, "RMSNorm on each query and key head of softmax layers, before rotation")
    output_gate: bool = setting(True, "multiply the output of linear layers by silu of a projection of their input")
    tie_embeddings: bool = setting(False, "use the embedding as output head")
    norm_eps: float = setting(1e-6, "added to the mean square in every RMSNorm")
    init_std: float = setting(
        0.02, "standard deviation of initial weights; less for projections into the residual stream"
    )
    embedding_std: float = setting(
        0.0, "standard deviation of the initial embedding; 0 = 1, or init_std where it is also the output head"
    )
    loss_chunk: int = setting(4096, "tokens whose logits exist at once, each taking 8 to 12 B x vocab_size")

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

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

    def validate(self) -> None:
        """Raises ValueError in one line that names the setting, what was found and what would do."""
        for name in ("vocab_size", "num_layers", "hidden_size", "num_heads", "loss_chunk"):
            _require(getattr(self, name) >= 1, f"model.{name}={getattr(self, name)} must be at least 1")
        for name in ("num_kv_heads", "head_dim", "mlp_size", "embedding_std"):
            _require(getattr(self, name) >= 0, f"model.{name}={getattr(self, name)} is negative; use 0 to derive it")
        for name in ("norm_eps", "init_std", "rope_base"):
            _require(getattr(self, name) > 0, f"model.{name}={getattr(self, name)} must be greater than 0")
        hints = get_type_hints(ModelConfig)
        for name in ("linear_family", "decay_slopes", "feature_map"):
            _require_choice(f"model.{name}", getattr(self, name), get_args(hints[name]))
        _require(len(self.pattern) > 0, "model.pattern is empty; give at least one layer, such as [linear, softmax]")
        for entry in self.pattern:
            _require_choice("model.pattern entry", entry, ("softmax", "linear", *LAYER_KINDS[1:]))
        self._validate_heads()
        _require(self.rope_scaling >= 1, f"model.rope_scaling={self.rope_scaling} must be at least 1; 1 means none")
        if self.linear_normalize:
            _require(
                self.feature_map in POSITIVE_FEATURE_MAPS,
                f"model.linear_normalize=true divides by a sum that model.feature_map={self.feature_map} may bring to"
                " zero; use model.feature_map=elu1 or model.linear_normalize=false",
            )

    def _validate_heads(self) -> None:
        divisors = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
        _require(
            self.num_heads % self.kv_heads == 0,
            f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads};"
            f" use {_either(divisors)}",
        )
        _require(
            self.head_dim > 0 or self.hidden_size % self.num_heads == 0,
            f"model.num_heads={self.num_heads} does not divide model.hidden_size={self.hidden_size}; change one of them"
            " or set model.head_dim",
        )
        if "softmax" in self.layer_kinds:
            source = (
                f"model.head_dim={self.head_dim}" if self.head_dim else f"hidden_size / num_heads = {self.head_size}"
            )
            _require(
                self.head_size % 2 == 0,
                f"{source} is odd, but rotary embedding turns pairs of dimensions; use an even model.head_dim",
            )
            _require(
                self.rope_scaling == 1 or self.head_size > 2,
                f"model.rope_scaling={self.rope_scaling} needs more than the {self.head_size} dimensions of a head",
            )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _require_choice(name: str, found: str, allowed: tuple[str, ...]) -> None:
    if found not in allowed:
        near = get_close_matches(str(found), allowed, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise ValueError(f"{name} {found!r} is unknown{hint} allowed: {', '.join(allowed)}")


def _either(values: list[int]) -> str:
    return " or ".join(filter(None, [", ".join(map(str, values[:-1])), str(values[-1])]))
