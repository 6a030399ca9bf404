"""Feature maps phi: what linear attention applies to each head of queries and keys, [T, H, K] -> [T, H, K'].

Shape letters: T local tokens, H heads, K head width, K' width after the map. The dtype is kept.
"""

from difflib import get_close_matches

import torch
import torch.nn.functional as F
from torch import nn

from longspan.kernels.elu import elu1
from longspan.kernels.norm import l2_norm


class FeatureMap(nn.Module):
    """out_size: K', what `width` makes of K."""

    def __init__(self, num_heads: int, head_size: int):
        super().__init__()
        self.out_size = self.width(head_size)

    @staticmethod
    def width(head_size: int) -> int:
        return head_size


class Identity(FeatureMap):
    def forward(self, x_THK: torch.Tensor) -> torch.Tensor:
        return x_THK


class SiLU(FeatureMap):
    def forward(self, x_THK: torch.Tensor) -> torch.Tensor:
        return F.silu(x_THK)


class ReLU(FeatureMap):
    def forward(self, x_THK: torch.Tensor) -> torch.Tensor:
        return F.relu(x_THK)


class Elu1(FeatureMap):
    """exp(x) below zero and 1 + x above: elu(x) + 1 without its cancellation, so strictly positive."""

    def forward(self, x_THK: torch.Tensor) -> torch.Tensor:
        return elu1(x_THK)


class Softmax(FeatureMap):
    """Softmax over the features of a head."""

    def forward(self, x_THK: torch.Tensor) -> torch.Tensor:
        return x_THK.softmax(-1)


class Hedgehog(FeatureMap):
    """softmax([Wx, -Wx]) with a learned W per head that starts as the identity (Hedgehog, arXiv 2402.04347).

    Some other implementations take softmax([2Wx, -2Wx]); their weights are twice these.
    """

    def __init__(self, num_heads: int, head_size: int):
        super().__init__(num_heads, head_size)
        self.weight = nn.Parameter(torch.empty(num_heads, head_size, head_size))

    @staticmethod
    def width(head_size: int) -> int:
        return 2 * head_size

    def init_weights(self) -> None:
        with torch.no_grad():
            self.weight.copy_(torch.eye(self.weight.shape[-1], device=self.weight.device).expand_as(self.weight))

    def forward(self, x_THK: torch.Tensor) -> torch.Tensor:
        x_THK = torch.einsum("thk,hjk->thj", x_THK, self.weight)
        return torch.cat([x_THK, -x_THK], dim=-1).softmax(-1)


class L2Norm(FeatureMap):
    """x / |x| over the features of a head, computed in at least fp32: what the delta rule needs of keys."""

    EPS = 1e-6  # added to the sum of squares

    def forward(self, x_THK: torch.Tensor) -> torch.Tensor:
        return l2_norm(x_THK, self.EPS)


class Composed(nn.Sequential):
    """One feature map after another."""

    @property
    def out_size(self) -> int:
        return self[-1].out_size


FEATURE_MAPS = {
    "identity": Identity,
    "silu": SiLU,
    "relu": ReLU,
    "elu1": Elu1,
    "softmax": Softmax,
    "hedgehog": Hedgehog,
    "l2norm": L2Norm,
}
# The sum of linear attention's weights, q . sum(k), is above zero for every input. relu's may be zero, and a later map
# could undo it: names joined by + are not in here.
POSITIVE_FEATURE_MAPS = ("elu1", "softmax", "hedgehog")


def feature_map_parts(name: str) -> list[str]:
    """The names joined by + in `name`, such as silu+l2norm; ValueError for one that is not in FEATURE_MAPS."""
    parts = name.split("+")
    for part in parts:
        if part not in FEATURE_MAPS:
            near = get_close_matches(part, FEATURE_MAPS, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            raise ValueError(f"feature map {part!r} is unknown{hint} allowed: {', '.join(FEATURE_MAPS)}, or several"
                             " joined by +")  # fmt: skip
    return parts


def feature_width(name: str, head_size: int) -> int:
    """K' of the feature map `name` for heads of `head_size`."""
    for part in feature_map_parts(name):
        head_size = FEATURE_MAPS[part].width(head_size)
    return head_size


def build_feature_map(name: str, num_heads: int, head_size: int) -> nn.Module:
    """The feature map `name`: one of FEATURE_MAPS, or several joined by + and applied from left to right.

    The module's `out_size` is the width of its outputs. ValueError for an unknown name.
    """
    maps = []
    for part in feature_map_parts(name):
        maps.append(FEATURE_MAPS[part](num_heads, head_size))
        head_size = maps[-1].out_size
    return maps[0] if len(maps) == 1 else Composed(*maps)
