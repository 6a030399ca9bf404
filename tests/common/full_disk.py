"""A disk that is full, without one: the kernel refuses what would make a file larger."""

import resource
from contextlib import contextmanager


@contextmanager
def files_of_at_most(size):
    """Writing beyond `size` bytes of a file is an OSError in this process, as Python ignores the signal for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
