"""Linear attention on one rank: the definition (`naive`), forms in plain PyTorch and fused Triton forms, one protocol."""

from longspan.kernels.linear.chunked import Chunked


def choose_form(q, log_decay, beta):
    """The Form (kernels.linear.form) for these inputs."""
    if beta is None and (log_decay is None or log_decay.ndim < 3):
        return Chunked
    raise NotImplementedError
