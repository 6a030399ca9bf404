"""Bytes of what a rank keeps from step to step: parameters and their gradients in fp32, and Adam's two moments."""

MASTER, MOMENTS = 4, 8  # of a parameter; a gradient is as large as a parameter


def state_sizes(num_parameters: int, num_trained: int, shards: int) -> dict[str, float]:
    """Bytes of a rank, by what they are. num_trained: of the parameters, those that are not frozen; shards: ranks that
    share one copy of the parameters."""
    share, trained = num_parameters / shards, num_trained / shards
    return {"parameters": MASTER * share, "optimizer state": MOMENTS * trained, "gradients": MASTER * trained}
