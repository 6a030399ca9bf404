"""Storages of tensors, from the operations that make them until they are freed."""

from weakref import ref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Storages(TorchDispatchMode):
    """Follows the storages that operations make. What derives from it has `made(size)`, called for every new storage of
    so many bytes; what that returns is called when the storage is freed."""

    def __init__(self):
        super().__init__()
        self._known = {}

    def ignore(self, tensor: torch.Tensor) -> None:
        """Its storage is counted elsewhere; it must outlive this."""
        self._known[tensor.untyped_storage()._cdata] = None

    def follow(self, result) -> list[torch.Tensor]:
        """The tensors in what an operation returns."""
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        for x in tensors:
            self._follow(x.untyped_storage())
        return tensors

    def _follow(self, storage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        free = self.made(storage.nbytes())

        def freed(_):
            del self._known[key]
            free()

        self._known[key] = ref(storage, freed)


class Peak(Storages):
    """most: bytes of storages at any time."""

    def __init__(self):
        super().__init__()
        self.most = self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.follow(result)
        return result

    def made(self, size):
        self._add(size)
        return lambda: self._add(-size)

    def _add(self, size):
        self.total += size
        self.most = max(self.most, self.total)
