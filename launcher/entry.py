"""The `longspan` console command: Ctrl-C while it is still being imported ends it without a traceback."""

import signal


def main() -> None:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main_guard
    from longspan.launcher.cli import main

    main()
