"""PeerMemory among the ranks of a test on a CPU: their windows are a file that all of them map."""

import os
import tempfile

import torch
import torch.distributed as dist

from longspan.kernels import peer_triton
from longspan.parallel.peer_memory import PeerMemory


def shared_windows(rank, world_size, capacity=4096, parts=1, block=128) -> PeerMemory:
    """With few programs and small blocks, for Triton's interpreter. A collective call."""
    peer_triton.PARTS, peer_triton.BLOCK = parts, block
    flag_words = -(-peer_triton.flag_words(world_size) // 64) * 64
    words = flag_words + peer_triton.SLOTS * world_size * capacity
    path = [None]
    if rank == 0:
        handle, path[0] = tempfile.mkstemp(prefix="longspan_windows_")
        os.truncate(handle, 4 * words * world_size)  # zeros
        os.close(handle)
    dist.broadcast_object_list(path)
    memory = torch.from_file(path[0], shared=True, size=words * world_size, dtype=torch.int32)
    dist.barrier()
    if rank == 0:
        os.unlink(path[0])
    memory.view(world_size, words)[rank, flag_words:] = -1  # NaN
    dist.barrier()
    flags = torch.tensor([memory.data_ptr() + 4 * words * r for r in range(world_size)])
    return PeerMemory(peer_triton, rank, flags + 4 * flag_words, flags, capacity, keep=memory)
