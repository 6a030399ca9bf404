"""Entry for torchrun: `torchrun --nproc-per-node 8 launcher/train.py --config configs/quickstart.yaml key=value ...`.

It works from a clone in which nothing is installed: then `longspan` is the clone's own package folder, registered
without a change to sys.path, on which the clone's folder names would hide other packages (`kernels`).
"""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main_guard: Ctrl-C in imports ends them without a traceback

import importlib.util  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
# In an installed wheel the package is the root itself.
PACKAGE = ROOT / "longspan" if (ROOT / "longspan").is_dir() else ROOT

if importlib.util.find_spec("longspan") is None:
    spec = importlib.util.spec_from_file_location("longspan", PACKAGE / "__init__.py")
    sys.modules["longspan"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["longspan"])

import longspan  # noqa: E402
from longspan.launcher.cli import COMMANDS  # noqa: E402
from longspan.launcher.errors import main_guard  # noqa: E402

if __name__ == "__main__":
    with main_guard():
        if os.environ.get("RANK", "0") == "0":
            imported = Path(longspan.__file__).resolve().parent
            print(f"longspan {longspan.__version__} from {imported}", flush=True)
            if imported != PACKAGE:
                remedy = f"`pip install -e {ROOT}` makes them one"
                print(f"warning: this is not {PACKAGE}, whose train.py was started: {remedy}")
        COMMANDS["train"](sys.argv[1:])
