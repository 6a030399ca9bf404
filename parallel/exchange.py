"""Thin wrappers over torch.distributed: every byte that moves between the ranks of an SP group moves through here.

`group` is a process group or None, which means one rank. Peers are numbered inside the group.
"""

from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
import torch.distributed as dist


def group_rank(group) -> int:
    return 0 if group is None else dist.get_rank(group)


def group_size(group) -> int:
    return 1 if group is None else dist.get_world_size(group)


def to_device(x: torch.Tensor, device) -> torch.Tensor:
    """x on `device`. A copy to a GPU goes through pinned memory: otherwise the host would wait for all work queued."""
    if x.device.type == "cpu" and torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class ToHost:
    """A small tensor on its way to the host, with all work queued before it."""

    def __init__(self, x: torch.Tensor):
        self._event = None
        if x.is_cuda:
            self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = x

    def wait(self) -> np.ndarray:
        """The tensor's values. The host waits for them, not for work queued after them."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()

    @contextmanager
    def beside(self, *tensors):
        """Queues the body behind the tensor, beside what was queued after it. tensors: those that the body reads and
        that may be freed early. Yields a function that hands tensors made in the body over to the current stream."""
        if self._event is None:
            yield lambda *made: None
            return
        current = torch.cuda.current_stream()
        stream = _second_stream(current.device)
        stream.wait_event(self._event)
        for x in tensors:
            x.record_stream(stream)
        with torch.cuda.stream(stream):
            yield lambda *made: [x.record_stream(current) for x in made]


@contextmanager
def aside(*tensors):
    """Queues the body behind what is queued so far, beside what comes. tensors: those that the body reads or writes.
    Yields a function: mark() gives what stands for the body so far, and its wait() lets the current stream wait for
    it."""
    if not tensors[0].is_cuda:
        yield Done
        return
    current = torch.cuda.current_stream(tensors[0].device)
    stream = _second_stream(current.device)
    stream.wait_stream(current)
    for x in tensors:
        x.record_stream(stream)
    with torch.cuda.stream(stream):
        yield stream.record_event


class Done:
    """Work that is done."""

    def wait(self):
        pass


@cache
def _second_stream(device) -> "torch.cuda.Stream":
    # Ahead of the kernels beside it: their thread blocks, all queued before, would be started first.
    return torch.cuda.Stream(device, priority=-1)


class Pending:
    """Communication under way; keeps its buffers alive. `wait()` returns the result, which has its values then."""

    def __init__(self, works, result, keep=()):
        self._works, self.result, self._keep = works, result, keep

    def wait(self):
        for _ in self.waits():
            pass
        return self.result

    def waits(self):
        """Yields after each of the works, in their order, once it is done."""
        for work in self._works:
            work.wait()
            yield
        self._works, self._keep = (), ()


def start_all_gather(x: torch.Tensor, group) -> Pending:
    """Starts gathering x [n, ...], n >= 1, equal in shape on all ranks; the result is [world_size, n, ...]."""
    if group_size(group) == 1:
        return Pending((), x[None])
    x = x.contiguous()
    out = x.new_empty(group_size(group) * x.shape[0], *x.shape[1:])
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # renamed in torch 2.13
    return Pending((gather(out, x, group=group, async_op=True),), out.unflatten(0, (-1, x.shape[0])), (x,))


def gather(x: torch.Tensor, group, peers=None) -> torch.Tensor:
    """What start_all_gather gives; through `peers`, the group's PeerMemory, where there is one that takes it."""
    if peers is not None and peers.takes(x.nbytes):
        return peers.start_gather(x).wait()[0]
    return start_all_gather(x, group).wait()


def reduce_scatter(x: torch.Tensor, group) -> torch.Tensor:
    """This rank's rows, one of equally many parts, of the sum of all ranks' x [world_size * n, ...], n >= 1."""
    out = x.new_empty(x.shape[0] // group_size(group), *x.shape[1:])
    reduce = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # renamed in torch 2.13
    reduce(out, x.contiguous(), group=group)
    return out


def start_exchange(sends, receives, group) -> Pending:
    """Starts point-to-point transfers: sends and receives are (peer, tensor) with contiguous, non-empty tensors.

    The result is the list of received tensors. Both ends must list their transfers with one another in the same order.
    """
    # Receives first: gloo sends once the peer has said that it receives, and would say so behind its own data.
    if any(x.is_meta for _, x in (*sends, *receives)):  # no data: ranks that are not there
        return Pending((), [x for _, x in receives], [x for _, x in sends])
    operations = [dist.P2POp(dist.irecv, x, group=group, group_peer=peer) for peer, x in receives]
    operations += [dist.P2POp(dist.isend, x, group=group, group_peer=peer) for peer, x in sends]
    works = dist.batch_isend_irecv(operations) if operations else ()
    return Pending(works, [x for _, x in receives], [x for _, x in sends])


def all_to_all_rows(x: torch.Tensor, send_counts, receive_counts, group) -> torch.Tensor:
    """Sends consecutive runs of rows to every rank: send_counts[r] rows to rank r; receive_counts[r] rows from it."""
    return start_all_to_all(x, send_counts, receive_counts, group).wait()


def start_all_to_all(x: torch.Tensor, send_counts, receive_counts, group, out=None) -> Pending:
    """all_to_all_rows under way. out: contiguous, what arrives is written to, or None."""
    if x.is_meta:  # no data: ranks that are not there
        return Pending((), x.new_empty(sum(receive_counts), *x.shape[1:]) if out is None else out)
    if group_size(group) == 1:
        return Pending((), x if out is None else out.copy_(x))
    x, out = x.contiguous(), x.new_empty(sum(receive_counts), *x.shape[1:]) if out is None else out
    counts = list(receive_counts), list(send_counts)
    return Pending((dist.all_to_all_single(out, x, *counts, group=group, async_op=True),), out, (x,))


def agree(error: str | None, signature, group) -> None:
    """Raises the same ValueError on every rank if one of them has an error or its signature differs from rank 0's.

    `signature` is anything picklable that must be equal on all ranks. A collective call.
    """
    if group_size(group) > 1:
        reports = [None] * group_size(group)
        dist.all_gather_object(reports, (error, signature), group=group)
        for rank, (their_error, their_signature) in enumerate(reports):
            if their_error is not None:
                raise ValueError(their_error if error == their_error else f"on rank {rank}: {their_error}")
            if their_signature != reports[0][1]:
                raise ValueError(f"ranks disagree: rank 0 has {reports[0][1]}, rank {rank} has {their_signature}")
    elif error is not None:
        raise ValueError(error)
