"""How torch's GPU allocator is set for training, before torch reads the environment."""

import os

VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the older name
SETTING = "expandable_segments:True"


def set_allocator() -> None:
    """Lets segments grow, so that tensors of a few GiB, of another length in every batch, leave no gaps that nothing
    fits in. A setting of the user's stands. Call it before torch is imported."""
    if not any(name in os.environ for name in VARIABLES):
        os.environ[VARIABLES[0]] = SETTING


def allocator_setting() -> str:
    """What torch was told, as NAME=VALUE; it is the user's own where it is not SETTING."""
    return next(
        (f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ), f"{VARIABLES[0]} is not set"
    )
