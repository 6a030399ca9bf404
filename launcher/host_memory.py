"""What a training step holds in the memory of a machine: what layers and the optimizer put there, and the processes.

torch gives out pinned memory in powers of two and keeps what is given back, so that parameters and gradients there
count as the next one.
"""

from longspan.attention.host_buffers import buffer_size
from longspan.launcher.gpus import PROCESS
from longspan.launcher.state_sizes import MASTER, MOMENTS
from longspan.models.activations import Measured


def host_memory(job, measured: Measured) -> dict[str, float]:
    """Bytes of one machine of the job (an estimate.Job), of all its ranks, by what they are."""
    found = {"processes": PROCESS, "what layers keep": sum(map(buffer_size, measured.put_away))}
    if job.offload:
        both = measured.parameter_sizes, measured.trained_sizes  # parameters, gradients
        found["parameters, gradients"] = sum(_pinned(MASTER * size / job.shards) for sizes in both for size in sizes)
        found["optimizer state"] = MOMENTS * measured.num_trained / job.shards  # not pinned
    return {name: size * job.cluster.per_node for name, size in found.items() if size}


def _pinned(size: float) -> int:
    return 1 << max(0, round(size) - 1).bit_length()
