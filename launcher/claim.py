"""One run at a time in a run directory: rank 0 holds a lock on a file there, which ends with its process."""

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import TextIO

from longspan.launcher.errors import UserError
from longspan.launcher.files import writing

log = logging.getLogger(__name__)

NAME = ".lock"  # stays: to delete it would let two processes lock different files of that name
HELD = (errno.EACCES, errno.EAGAIN)


def check(file: TextIO, run_dir: Path) -> None:
    """UserError where `run_dir` is no longer what `claim` has locked: what a run made anew there would have neither its
    lock nor its rows. A disk that does not answer is not meant."""
    try:
        if os.path.samestat(os.fstat(file.fileno()), (run_dir / NAME).stat()):
            return
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError:
        return
    raise UserError(
        f"run.dir={run_dir} was moved or deleted while the run was going: move it back, or name its new place with"
        " run.dir; the same command then continues from its last checkpoint"
    )


def claim(run_dir: Path) -> TextIO:
    """Locks `run_dir`, made if need be, until the returned file is closed or this process dies, however it does.
    UserError where another process, of this or another machine, has it. Where the file system has no locks: a warning.

    A POSIX record lock: processes forked from this one do not hold it on, and NFS passes it to its server.
    """
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(run_dir / NAME, "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise UserError(
                f"run.dir={run_dir} is in use by another run ({holder}): end that one, or choose another run.name or"
                " run.dir"
            ) from None
        log.warning(
            "run.dir=%s: its file system has no locks (%s), so that a second run there would go unnoticed",
            run_dir,
            error.strerror,
        )
        return file
    with writing(run_dir):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    return file
