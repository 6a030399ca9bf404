"""Output that nobody reads, that is closed, has no room or lacks letters: one line, or none, and an end."""

import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SAFE = os.environ | {"PYTHONSAFEPATH": "1"}
PRINTS = "from longspan.launcher.errors import main_guard\nwith main_guard(): print('caf\\u00e9')"


def test_output_that_nobody_reads_any_more():
    program = "from longspan.launcher.errors import main_guard\nwith main_guard(): print('x')"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 1
    assert re.fullmatch(r"longspan: error: rank 0 \(.+\) stops: what read its output has ended\n", done.stderr)


@pytest.mark.parametrize(
    "redirection, code, said",
    [
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
        (
            "> /dev/full",
            1,
            r"longspan: error: rank 0 \(.+\) stops: a disk is full \(No space left .*output.*\): free it\n",
        ),
    ],
)
def test_output_that_is_closed_or_has_no_room(redirection, code, said):
    command = ["sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, PRINTS]
    done = subprocess.run(command, capture_output=True, text=True, env=SAFE)
    assert done.returncode == code and re.fullmatch(said, done.stderr), done.stderr


@pytest.mark.slow
def test_the_first_line_of_a_run_has_no_room():
    command = [sys.executable, ROOT / "launcher" / "train.py", "--config", "quickstart"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=SAFE, timeout=60)
    assert re.fullmatch(r"longspan: error: rank 0 \(.+\) stops: a disk is full .*\n", done.stderr), done.stderr


def test_output_in_an_encoding_that_lacks_a_letter():
    environment = SAFE | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", PRINTS], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "caf\\xe9\n", "")


def test_a_log_that_nobody_reads_any_more_ends_the_run(monkeypatch, capfd):
    from longspan.launcher.trainer import log, set_up_log

    read, write = os.pipe()
    os.close(read)
    with suppress(BrokenPipeError), open(write, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        set_up_log()
        with pytest.raises(BrokenPipeError):
            log.info("run directory: x")
    log.handlers.clear()
    assert capfd.readouterr().err == ""
