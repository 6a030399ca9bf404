"""Running a transport beside the work of the caller's stream."""

from functools import cache

import torch


class Background:
    """Runs the generator `steps`, whose single yield parts what needs no other rank from the rest; see transports.

    On a GPU all of it is queued at once on a stream of its own, so that hops follow each other without the host and
    beside the kernels of the current stream. On a CPU, and where it is not to run aside, what follows the yield runs in
    `wait`.
    """

    def __init__(self, steps, device, keep, aside=True):
        """keep: tensors that the generator reads, allocated on the current stream."""
        self._steps, self._stream, self._keep = steps, None, keep
        if aside and device.type == "cuda":
            self._stream = _stream(device)
            # Everything allocated on this stream is allocated between here and the end of _finish. What was freed on it
            # is idle by then: its last users on the caller's stream are waited for.
            self._stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self._stream):
                next(steps)
                self._result = _finish(steps)
        else:
            next(steps)

    def wait(self):
        """What the generator returns, ready for the current stream."""
        if self._stream is None:
            return _finish(self._steps)
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._keep = ()
        return self._result


def _finish(steps):
    try:
        next(steps)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("a transport yields once")


@cache
def _stream(device):
    return torch.cuda.Stream(device, priority=-1)
