"""TensorBoard's file of a run: one event per step with all its numbers, written like metrics.jsonl, by no thread."""

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class EventFile:
    """A new file in `folder`. first_step: TensorBoard drops what earlier files have of it and later ones. Where the
    disk refuses, one warning, and from then on nothing is written."""

    def __init__(self, folder: Path, first_step: int):
        # Late: these take a second to import.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._folder, self._file = folder, None
        with self._trying():
            folder.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
            self._file = open(folder / name, "wb")
            self._records = RecordWriter(self._file)
            self._write(file_version="brain.Event:2")
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(step=first_step, session_log=start)

    def write(self, row: dict[str, Any]) -> None:
        """row: `step` and numbers by name, None for none."""
        value = self._summary.Value
        given = [value(tag=k, simple_value=v) for k, v in row.items() if k != "step" and v is not None]
        with self._trying():
            self._write(step=row["step"], summary=self._summary(value=given))

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _write(self, **fields) -> None:
        if self._file:
            self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
            self._records.flush()

    @contextmanager
    def _trying(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log.warning(
                "%s cannot be written (%s): TensorBoard gets no more of this run, which goes on; or free the disk and"
                " start it again, or set log.tensorboard=false",
                self._folder,
                error.strerror or error,
            )
            if self._file:
                self._file.raw.close()  # without what is in its buffer
            self._file = None
