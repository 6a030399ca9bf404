"""Feature maps that need no parameters, and their gradients, in PyTorch. `identity`: the map is applied already."""

import torch

MAPS = ("softmax", "elu1", "identity")


def mapped(x, name: str):
    """phi(x) over the last dimension; softmax, elu(x) + 1."""
    if name == "softmax":
        return x.softmax(-1)
    return torch.where(x < 0, x.clamp(max=0).exp(), x + 1) if name == "elu1" else x


def map_gradient(x, phi, d_phi, name: str):
    """The gradient of x, from phi(x) and its gradient."""
    if name == "softmax":
        return phi * (d_phi - (phi * d_phi).sum(-1, keepdim=True))
    return torch.where(x < 0, d_phi * phi, d_phi) if name == "elu1" else d_phi
