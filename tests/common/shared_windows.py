"""PeerMemory among the ranks of a test on a CPU: their windows are a file that all of them map."""

import os
import tempfile

import torch
import torch.distributed as dist

from longspan.kernels import peer_triton
from longspan.parallel.peer_memory import PeerMemory, Room


def shared_windows(rank, world_size, capacity=4096, parts=1, block=128) -> PeerMemory:
    """With few programs and small blocks, for Triton's interpreter. A collective call."""
    peer_triton.PARTS, peer_triton.BLOCK = parts, block
    flag_words = -(-peer_triton.flag_words(world_size) // 64) * 64
    room = mapped(rank, world_size, flag_words + peer_triton.SLOTS * world_size * capacity)
    room.memory[:flag_words] = 0
    dist.barrier()
    windows = room.addresses + 4 * flag_words
    return PeerMemory(
        peer_triton, rank, windows, room.addresses, capacity, room, lambda words: mapped(rank, world_size, words)
    )


def mapped(rank, world_size, words) -> Room:
    """Windows full of NaN."""
    words, path = -(-words // 64) * 64, [None]
    if rank == 0:
        handle, path[0] = tempfile.mkstemp(prefix="longspan_windows_")
        os.truncate(handle, 4 * words * world_size)
        os.close(handle)
    dist.broadcast_object_list(path)
    memory = torch.from_file(path[0], shared=True, size=words * world_size, dtype=torch.int32)
    dist.barrier()
    if rank == 0:
        os.unlink(path[0])
    own = memory.view(world_size, words)[rank]
    own.fill_(-1)
    dist.barrier()
    addresses = torch.tensor([memory.data_ptr() + 4 * words * r for r in range(world_size)])
    return Room(addresses, own, memory)
