"""A run directory has one run at a time, and nothing that has died keeps it."""

import errno
import fcntl
import logging
import os
import subprocess
import sys

import pytest
from spawn import run_ranks
from tiny_runs import rows, start, tiny_config, train, write_corpus
from unreadable import locked, open_folder

from longspan.launcher.claim import check, claim
from longspan.launcher.errors import UserError

HOLDER = """
import os, sys
from pathlib import Path
from longspan.launcher.claim import claim
file = claim(Path(sys.argv[1]))
if os.fork():
    print(os.getpid(), flush=True)
else:  # as readers of data are, which may live on for a moment
    os.close(1)
sys.stdin.read()
"""


def _second_run(rank, world_size, corpus, run_dir):
    try:
        start(tiny_config(corpus, run_dir))
    except UserError as error:
        return str(error)


def _run(rank, world_size, corpus, run_dir):
    return [row["step"] for row in train(tiny_config(corpus, run_dir, "train.steps=1"))]


def test_a_second_run_is_refused_on_every_rank_and_none_once_the_first_has_ended(tmp_path):
    corpus, run_dir = write_corpus(tmp_path), tmp_path / "run"
    first = claim(run_dir)
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    refused = run_ranks(_second_run, 2, corpus, run_dir, timeout=60)
    assert refused[0] == refused[1] and "\n" not in refused[0]
    assert refused[0].startswith(f"run.dir={run_dir} is in use by another run (process {os.getpid()} on ")
    assert refused[0].endswith("end that one, or choose another run.name or run.dir")
    assert sorted(os.listdir(run_dir)) == [".lock", "metrics.jsonl"]
    assert (run_dir / "metrics.jsonl").read_text() == '{"step": 1}\n'
    first.close()
    assert run_ranks(_run, 2, corpus, run_dir, timeout=60) == [[1], [1]]


def test_what_was_killed_holds_nothing(tmp_path):
    command, pipes = [sys.executable, "-c", HOLDER, tmp_path], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as holder:
        try:
            pid = int(holder.stdout.readline())
            with pytest.raises(UserError, match=f"process {pid} on"):
                claim(tmp_path)
        finally:
            holder.kill()
        holder.wait()
        claim(tmp_path).close()  # while its child is still there


@pytest.mark.parametrize("instead", ["nothing", "a file", "another run"])
def test_a_run_whose_directory_is_moved_stops_with_the_step(tmp_path, instead):
    refused = run_ranks(_moved, 1, write_corpus(tmp_path), tmp_path, instead, timeout=60)[0]
    assert refused.startswith(f"run.dir={tmp_path}/run was moved or deleted while the run was going: move it back, or")
    assert [row["step"] for row in rows(tmp_path / "elsewhere")] == [1]
    left = {"nothing": None, "a file": None, "another run": [".lock"]}[instead]
    assert (sorted(os.listdir(tmp_path / "run")) if (tmp_path / "run").is_dir() else None) == left


def _moved(rank, world_size, corpus, folder, instead):
    trainer = start(tiny_config(corpus, folder / "run", "checkpoint.interval=2"))
    next_step = trainer.loader.next_step

    def move_in_the_second():
        if trainer.step == 1:
            (folder / "run").rename(folder / "elsewhere")
            if instead == "a file":
                (folder / "run").write_text("")
            elif instead == "another run":
                claim(folder / "run").close()
        return next_step()

    trainer.loader.next_step = move_in_the_second
    with pytest.raises(UserError) as error:
        trainer.train()
    trainer.close()
    return str(error.value)


def test_a_disk_that_does_not_answer_is_not_taken_for_a_move(tmp_path):
    with open_folder() as run_dir, claim(run_dir) as file:
        with locked(run_dir):
            check(file, run_dir)


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with caplog.at_level(logging.WARNING, logger="longspan"):
        claim(tmp_path).close()
    said = f"run.dir={tmp_path}: its file system has no locks (No locks available), so that a second run there would"
    assert [record.getMessage() for record in caplog.records] == [f"{said} go unnoticed"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run.dir=.*file/run: cannot be written"):
        claim(tmp_path / "file" / "run")
