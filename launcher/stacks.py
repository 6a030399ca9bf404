"""Where the threads of this process are, for a rank that others wait for."""

import sys
import threading
import traceback

# Code in which a main thread waits for other ranks, or has failed itself; not that of checkpoints, which reads files.
WAITING = ("torch.distributed", "longspan.parallel", "longspan.launcher.clock", "longspan.launcher.errors")
WORKING = ("torch.distributed.checkpoint",)
MOST_FRAMES = 24  # innermost ones of a thread


def elsewhere() -> str:
    """The stacks of all threads, the main one first, unless that waits for other ranks: then nothing. The innermost of
    its frames that is of longspan or torch.distributed tells. For another thread to call."""
    frames, main = sys._current_frames(), threading.main_thread().ident
    for frame, _ in traceback.walk_stack(frames[main]):
        name = frame.f_globals.get("__name__", "")
        if _is_of(("longspan", "torch.distributed"), name):
            if _is_of(WAITING, name) and not _is_of(WORKING, name):
                return ""
            break
    names = {thread.ident: thread.name for thread in threading.enumerate() if thread is not threading.current_thread()}
    shown = sorted(names.keys() & frames.keys(), key=lambda thread: thread != main)
    return "".join(
        f"{names[thread]}:\n{''.join(traceback.format_stack(frames[thread], MOST_FRAMES))}" for thread in shown
    )


def _is_of(packages: tuple[str, ...], module: str) -> bool:
    return f"{module}.".startswith(tuple(f"{package}." for package in packages))
