"""Ranks that are processes on one GPU, which NCCL refuses: windows that they share, and a group whose transfers pass
through the host, by gloo."""

import os
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist

from longspan.kernels import peer_triton
from longspan.parallel import Topology, peer_memory

TRANSFERS = "all_gather_into_tensor", "all_gather_single", "all_to_all_single"


def windows_on_gpu(world_size, device) -> peer_memory.PeerMemory:
    """What a run on several GPUs opens, with windows full of NaN. A collective call."""
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"  # else torch wants a GPU for every rank
    memory = peer_memory._memory

    def poisoned(*given):
        found = memory(*given).fill_(-1)
        torch.cuda.synchronize(device)
        return found

    peer_memory._memory = poisoned  # windows of blocks come later
    return peer_memory.open_peer_memory(dist.group.WORLD, Topology(1, world_size), device, peer_triton, "on")


@contextmanager
def through_host():
    """Inside, transfers of a GPU's tensors are transfers of copies on the host, done when the call returns."""
    originals = {name: getattr(dist, name) for name in TRANSFERS if hasattr(dist, name)}
    together = dist.batch_isend_irecv

    def staged(transfer):
        def call(out, x, *sizes, group=None, async_op=False):
            if not x.is_cuda:
                return transfer(out, x, *sizes, group=group, async_op=async_op)
            here = torch.empty(out.shape, dtype=out.dtype)
            transfer(here, x.cpu(), *sizes, group=group)
            _give(out, here)
            return Done()

        return call

    def staged_together(operations):
        if not operations[0].tensor.is_cuda:
            return together(operations)
        here = [
            dist.P2POp(x.op, x.tensor.cpu(), group=x.group, group_peer=x.group_peer) for x in operations
        ]  # of receives as well
        for work in together(here):
            work.wait()
        for mine, theirs in zip(operations, here, strict=True):
            if "irecv" in mine.op.__name__:
                _give(mine.tensor, theirs.tensor)
        return [Done()]

    changed = {name: staged(x) for name, x in originals.items()} | {"batch_isend_irecv": staged_together}
    with mock.patch.multiple(dist, **changed):
        yield


def _give(target, here):
    target.copy_(here)
    torch.cuda.current_stream(target.device).synchronize()  # other streams may read it


class Done:
    """A transfer that is done."""

    def wait(self):
        pass
