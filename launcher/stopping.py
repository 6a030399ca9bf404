"""How a scheduler asks a run to end early: SIGUSR1, of which every rank takes note and all ranks decide together.

Other signals keep their meaning: SIGTERM is how torchrun ends the ranks that are left when one has failed, and must not
wait for a step that never ends.
"""

import os
import signal
from pathlib import Path

from longspan.launcher.errors import UserError

SIGNAL = signal.SIGUSR1
MARKER_VARIABLE = "LONGSPAN_STOPPED"


class StopSignal:
    """Whether this process has received SIGUSR1 since the object was made. Make it in the main thread."""

    def __init__(self):
        self.received = False
        signal.signal(SIGNAL, self._note)

    def __call__(self) -> bool:
        return self.received

    def _note(self, number, frame) -> None:
        self.received = True


def mark_stopped() -> None:
    """Creates the file that LONGSPAN_STOPPED names, if set: the run has saved before its last step and can go on.

    Under torchrun no exit code of a rank reaches the job script. UserError when the file cannot be written.
    """
    if path := os.environ.get(MARKER_VARIABLE):
        try:
            Path(path).touch()
        except OSError as error:
            raise UserError(f"{MARKER_VARIABLE}={path}: cannot be written ({error.strerror})") from None
