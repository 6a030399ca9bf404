"""The lines a training run prints about how far it is."""

import sys
import time
from datetime import timedelta
from typing import Any


class TrainingProgress:
    """Prints a line for the first, every `interval`-th and the last step, and for steps with a validation loss."""

    def __init__(self, *, first_step: int, steps: int, interval: int):
        self._first_step, self._steps, self._interval = first_step, steps, interval
        self._after_first = None
        self._tokens = self._seconds = 0.0

    def report(self, row: dict[str, Any]) -> None:
        """row: the step's object in metrics.jsonl; speeds are averaged over the steps since the last line."""
        step = row["step"]
        if step == self._first_step:
            self._after_first = time.monotonic()  # the first step compiles, warms up and reads caches: not in the ETA
        self._tokens += row["tokens"]
        self._seconds += row["step_time_s"]
        if step not in (self._first_step, self._steps) and step % self._interval and "val_loss" not in row:
            return
        parts = [
            f"step {step:>{len(str(self._steps))}}/{self._steps} {step / self._steps:4.0%}",
            f"eta {self._eta(step)}",
        ]
        parts.append(f"loss {row['loss']:.4f}")
        if "val_loss" in row:
            parts.append(f"val loss {row['val_loss']:.4f}")
        parts += [
            f"grad {row['grad_norm']:.2f}",
            f"lr {row['lr']:.2e}",
            f"{_short(self._tokens / self._seconds)} tokens/s",
        ]
        if row["mfu"] is not None:
            parts.append(f"MFU {row['mfu']:.1%}")
        parts.append(f"{row['peak_mem_gb']:.1f} GB")
        print(" | ".join(parts), file=sys.stdout, flush=True)
        self._tokens = self._seconds = 0.0

    def _eta(self, step: int) -> str:
        done = step - self._first_step
        if done == 0:
            return "0:00:00" if step == self._steps else "?"
        per_step = (time.monotonic() - self._after_first) / done
        return str(timedelta(seconds=round(per_step * (self._steps - step))))


def _short(number: float) -> str:
    """12345 as 12.3K: decimal units, unlike token counts in settings."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"
