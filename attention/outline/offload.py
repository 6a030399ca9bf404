"""Offload of tensors without data."""

from collections.abc import Callable

import torch

from longspan.attention.offload import Offload


class OutlinedOffload(Offload):
    """Of tensors without data: nothing is copied. put_away: gets every tensor that leaves, and returns one that takes
    no memory of the device."""

    def __init__(self, put_away: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.put_away = put_away

    def host_like(self, tensor):
        return self.put_away(tensor), None

    def give_back(self, buffers):
        pass

    def copy(self, pairs):
        return None

    def wait(self, event, device):
        pass
