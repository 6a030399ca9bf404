"""Feature maps phi: what linear attention applies to queries and keys. Shape and dtype are kept."""

import torch
import torch.nn.functional as F

FEATURE_MAPS = {
    "identity": lambda x: x,
    "silu": F.silu,
    "relu": F.relu,
    # exp(x) below zero and 1 + x above: strictly positive, as the normaliser needs.
    "elu1": lambda x: torch.where(x < 0, x.clamp(max=0).exp(), x + 1),
}
