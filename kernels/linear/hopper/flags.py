"""Flags by which programs of one launch tell each other what is done, in memory that no launch has to clear.

A flag is raised where it holds the number of this launch; the last program to end counts the launch. So memory that was
zero once serves launch after launch, of any kernels, as long as these do not overlap: every stream has some of its own,
and so has every launch in a CUDA graph, which may be replayed beside others.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from longspan.kernels.linear.hopper.tiles import synchronize

SPARE = 1 << 18  # words for launches in graphs
BEGIN = gl.constexpr(8)  # of the flags: launches that ended, programs of this one that did, six words of nothing
_of_stream, _spare = {}, {}


def memory(count: int, device: torch.device) -> torch.Tensor:
    """int32, for `count` flags of the next launch on the current stream."""
    words = -(-count // 8) * 8 + 8  # aligned as kernels take it
    if device.type != "cuda":
        return torch.zeros(words, dtype=torch.int32, device=device)
    spare = _spare.get(device, ())
    if torch.cuda.is_current_stream_capturing():
        if len(spare) < words:  # then the graph clears it
            return torch.zeros(words, dtype=torch.int32, device=device)
        _spare[device] = spare[words:]
        return spare[:words]
    if len(spare) < SPARE // 2:
        _spare[device] = torch.zeros(SPARE, dtype=torch.int32, device=device)
    place = device, torch.cuda.current_stream(device).cuda_stream
    if place not in _of_stream or len(_of_stream[place]) < words:
        _of_stream[place] = torch.zeros(2 * words, dtype=torch.int32, device=device)
    return _of_stream[place]


@gluon.jit
def open_flags(words_ptr):
    """What the functions below take as `flags`."""
    return words_ptr, gl.load(words_ptr) + 1


@gluon.jit
def raise_flag(flags, index):
    """Whoever sees the flag can read what this warpgroup has stored before."""
    words_ptr, number = flags
    synchronize()
    gl.atomic_xchg(words_ptr + BEGIN + index, number, sem="release", scope="gpu")


@gluon.jit
def wait_for(flags, index):
    words_ptr, number = flags
    while gl.atomic_add(words_ptr + BEGIN + index, 0, sem="acquire", scope="gpu") != number:
        pass
    synchronize()


@gluon.jit
def close_flags(flags):
    """At the end of a program, which has waited for all that it waits for."""
    words_ptr, number = flags
    synchronize()
    if gl.atomic_add(words_ptr + 1, 1, sem="acq_rel", scope="gpu") == gl.num_programs(0) - 1:
        gl.store(words_ptr + 1, 0)
        gl.store(words_ptr, number)
