"""The families of linear attention as benchmark cases: random inputs, the definition in fp64, bytes that must move."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from longspan.kernels.linear import naive
from longspan.models.decay import lightning_slopes

LAYERS = 16  # fixed decay is that of the first of so many layers
GATE_BYTES = 4  # log decay and beta are fp32, as models make them


@dataclass(frozen=True)
class Family:
    gate: str | None = None  # log decay: None, "fixed" [H], "scalar" [T, H] or "channel" [T, H, D]
    delta: bool = False  # has beta [T, H]


FAMILIES = {
    "none": Family(),
    "fixed": Family("fixed"),
    "scalar": Family("scalar"),
    "channel": Family("channel"),
    "delta": Family(delta=True),
    "gated_delta": Family("scalar", delta=True),
    "kda": Family("channel", delta=True),
}


@dataclass(frozen=True)
class Inputs:
    """q, k, v, d_out: [T, H, D] of one dtype; log_decay: None, [H], [T, H] or [T, H, D]; beta: None or [T, H]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    log_decay: torch.Tensor | None
    beta: torch.Tensor | None
    d_out: torch.Tensor

    def map(self, function) -> "Inputs":
        return replace(self, **{name: function(x) for name, x in vars(self).items() if x is not None})

    def double(self) -> "Inputs":
        return self.map(lambda x: x.double())

    def leaves(self) -> dict[str, torch.Tensor]:
        """Names of gradients and the inputs they belong to; makes those inputs require them."""
        named = {"dq": self.q, "dk": self.k, "dv": self.v, "dg": self.log_decay, "dbeta": self.beta}
        return {name: x.requires_grad_() for name, x in named.items() if x is not None and x.ndim > 1}


@dataclass(frozen=True)
class Problem:
    """One document on one GPU; keys and values have head_dim numbers."""

    family: str
    tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_heads(self) -> int:
        return self.tokens * self.heads

    def random(self, seed: int) -> Inputs:
        """Normal q, k, v and d_out; keys of unit length with the delta rule; log decay is logsigmoid(normal) / 16."""
        generator = torch.Generator(self.device).manual_seed(seed)
        family, shape = FAMILIES[self.family], (self.tokens, self.heads, self.head_dim)

        def normal(*shape, dtype=torch.float32):
            return torch.randn(*shape, generator=generator, dtype=dtype, device=self.device)

        q, k, v, d_out = (normal(*shape, dtype=self.dtype) for _ in range(4))
        log_decay = None
        if family.gate == "fixed":
            heads = torch.arange(self.heads, dtype=torch.float64, device=self.device)
            log_decay = lightning_slopes(heads, 0, LAYERS).float()
        elif family.gate:
            log_decay = F.logsigmoid(normal(*(shape[:2] if family.gate == "scalar" else shape))) / 16
        if not family.delta:
            return Inputs(q, k, v, log_decay, None, d_out)
        return Inputs(q, F.normalize(k, dim=-1), v, log_decay, normal(*shape[:2]).sigmoid(), d_out)


def gradients(out: torch.Tensor, inputs: Inputs) -> dict[str, torch.Tensor]:
    leaves = inputs.leaves()
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), inputs.d_out), strict=True))


def exact(inputs: Inputs) -> dict[str, torch.Tensor]:
    """out and every gradient by the recurrence over tokens, in fp64."""
    x = inputs.double()
    x.leaves()
    scale = x.q.shape[-1] ** -0.5
    out, _ = naive.linear_attention(x.q, x.k, x.v, x.log_decay, x.beta, (0, len(x.q)), scale=scale)
    return {"out": out.detach()} | gradients(out, x)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|; NaN where something found is not finite."""
    if found.ndim > expected.ndim:  # a gate that was expanded over channels
        found = found.double().sum(-1)
    return ((found.double() - expected).norm() / expected.norm()).item()


# What each pass over the tokens reads and writes. "once": every tensor once, the least that any design moves.
# "design": a pass that sums the states of splits, then a sweep that starts from them; backward, a pass over gradients
# of states, a sweep for dq and one for the rest. States are left out: there is one for 512 tokens or more.
PASSES = {
    "once": {"forward": ("q k v g beta o",), "backward": ("q k v g beta do dq dk dv dg dbeta",)},
    "design": {
        "forward": ("k v g beta", "q k v g beta o"),
        "backward": ("q do g", "k v do g beta dq", "q k v do g beta dk dv dg dbeta"),
    },
}
DELTA_PASSES = {  # with the delta rule the pass over gradients of states reads keys, too
    "once": PASSES["once"],
    "design": PASSES["design"] | {"backward": ("q k do g beta", *PASSES["design"]["backward"][1:])},
}


def bytes_per_token_head(family: str, head_dim: int, element_bytes: int = 2) -> dict[str, dict[str, int]]:
    """Bytes by bound ("once" or "design") and direction ("forward" or "forward+backward")."""
    kind = FAMILIES[family]
    gate = {"scalar": GATE_BYTES, "channel": GATE_BYTES * head_dim}.get(kind.gate, 0)
    beta = GATE_BYTES if kind.delta else 0
    size = {"g": gate, "dg": gate, "beta": beta, "dbeta": beta}
    result = {}
    for bound, passes in (DELTA_PASSES if kind.delta else PASSES).items():
        moved = {
            direction: sum(size.get(name, head_dim * element_bytes) for names in lists for name in names.split())
            for direction, lists in passes.items()
        }
        result[bound] = {"forward": moved["forward"], "forward+backward": sum(moved.values())}
    return result
