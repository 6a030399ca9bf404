"""Times of a device, a GPU's without waiting for it while they are taken."""

import time
from typing import Any

import torch


class Clock:
    """Times of the device: `mark` never waits, `seconds` between two marks waits until the later has passed."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"

    def mark(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        if not self._on_gpu:
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1000
