"""Count what this process hands to torch.distributed: calls and bytes, by name."""

from collections import Counter

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

# The argument that holds what this rank contributes. Receives are their senders' sends.
_SENT = {
    "all_gather": 1,
    "all_gather_into_tensor": 1,
    "all_gather_single": 1,
    "all_reduce": 0,
    "all_to_all": 1,
    "all_to_all_single": 1,
    "broadcast": 0,
    "gather": 0,
    "isend": 0,
    "reduce": 0,
    "reduce_scatter": 1,
    "reduce_scatter_single": 1,
    "reduce_scatter_tensor": 1,
    "scatter": 0,
    "send": 0,
}


class Traffic:
    """``with Traffic() as traffic: ...`` then `traffic.calls` and `traffic.bytes`, Counters by collective name.

    Bytes are those of the tensors passed in, counted once whatever the number of receivers; all_to_all's own share is
    included. Autograd runs CPU backwards on the calling thread, so backward communication is counted too.
    """

    def __init__(self):
        self.calls, self.bytes = Counter(), Counter()
        self._depth = 0
        self._originals = []

    @property
    def num_calls(self):
        return self.calls.total()

    @property
    def num_bytes(self):
        return self.bytes.total()

    def __enter__(self):
        for name, argument in _SENT.items():
            if original := getattr(dist, name, None):
                counted = self._counted(name, argument, original)
                for module in (dist, distributed_c10d):  # P2POp recognises isend by identity.
                    self._originals.append((module, name, original))
                    setattr(module, name, counted)
        return self

    def __exit__(self, *_):
        for module, name, original in self._originals:
            setattr(module, name, original)
        self._originals.clear()

    def _counted(self, name, argument, original):
        def call(*args, **kwargs):
            if self._depth == 0:  # Newer names are thin wrappers of older ones.
                self.calls[name] += 1
                sent = args[argument] if argument < len(args) else next(iter(kwargs.values()))
                self.bytes[name] += sum(x.nbytes for x in ([sent] if torch.is_tensor(sent) else sent or ()))
            self._depth += 1
            try:
                return original(*args, **kwargs)
            finally:
                self._depth -= 1

        return call
