"""The learning rate as a function of the step, so that nothing about it needs to be saved."""

import math

from longspan.launcher.config import OptimConfig


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """The rate of optimizer step `step` (1..steps): linear warm-up to optim.lr, then the schedule.

    cosine and linear reach optim.lr * optim.min_lr_ratio at the last step; constant stays at optim.lr.
    """
    assert 1 <= step <= steps, (step, steps)
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    done = (step - optim.warmup_steps) / (steps - optim.warmup_steps)
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * _SHAPES[optim.schedule](done))


# Share of the way from the last to the peak rate, after this share of the steps that follow warm-up.
_SHAPES = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}
