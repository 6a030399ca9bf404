"""How a run ends when something goes wrong: one clear line, printed once, and every rank stops within seconds.

Ranks that wait inside a collective cannot notice that another rank has failed. So every rank of a multi-rank run
keeps its own connection to the rendezvous store: the first rank that fails leaves its reason there, and a small thread
on each rank looks for it twice a second and ends the process.
"""

import dis
import errno
import json
import os
import re
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from longspan.launcher.stacks import elsewhere

POLL_SECONDS = 0.5
PRINT_SECONDS = 10.0  # how long a rank waits for the first failing rank to have printed its reason
CONNECT_SECONDS = 300.0  # ranks of a large job start minutes apart
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FINISH_SECONDS = 60.0  # how long the rank that hosts the store waits for the others to finish after it
ANSWER_SECONDS = 3.0  # within which ranks whose processes run have seen that one has failed
ALONE_SECONDS = 2 * PRINT_SECONDS  # after which a rank that has failed ends by itself: the store does not answer
BEHIND_SECONDS = 1.0  # others end so much later: the first to end is the root cause in torchrun's summary
LOST = "lost another rank, which ended without a word"
# In gloo's words, and in those of the store while ranks meet.
TIMED_OUT = r"(?:Timed out waiting|wait timeout after|Timed out after) (\d+) ?(ms|seconds)"
SILENT = "another rank, which neither failed nor answered"
IN_VAIN = "was left by a rank that has waited too long for"
REMEDY = ": look at processes, machines and network, or raise train.timeout_s if it may take so long"
MOST_STACKS = 4  # ranks whose stacks are printed


class UserError(Exception):
    """Something the user can put right. The message is one line: the setting or file, what was found, what to do."""


@contextmanager
def main_guard() -> Iterator[None]:
    """Wraps an entry point: `with main_guard(): main()`.

    UserError, and a ValueError that our own code raised, end the run with one line `longspan: error: ...`, printed by
    one rank (once per machine). Any other exception prints its traceback and the rank. In all cases every rank ends
    with a non-zero exit code, also one that waits inside a collective. The world is taken from torchrun's environment
    variables; without them this is one rank.
    """
    alarm = None
    _open_streams()
    with _interrupts() as interrupted:
        try:
            if _world_size() > 1:
                alarm = _Alarm()
                _check_restarts()
            yield
            sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - whatever it is, all ranks must stop
            lost = interrupted.is_set() and not isinstance(error, UserError)
            message = _describe(KeyboardInterrupt() if lost else error)
            if alarm is None:
                _print(message)
                _tell_torchrun(message)
                try:
                    sys.stdout.flush()
                except OSError:  # the interpreter would try once more to write what is left
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise SystemExit(1) from None
            alarm.raise_for_all(message)
        finally:
            if alarm is not None:
                alarm.close()


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Set once Ctrl-C has come: modules that are being imported turn a KeyboardInterrupt into exceptions of their own.
    Where it is ignored, as behind `nohup`, it stays so."""
    came, before = threading.Event(), signal.getsignal(signal.SIGINT)

    def note(*_):
        came.set()
        raise KeyboardInterrupt

    ours = before in (signal.SIG_DFL, signal.default_int_handler)
    if not ours or threading.current_thread() is not threading.main_thread():
        yield came
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)


def _open_streams() -> None:
    """Makes output possible that was closed before the start (>&-), or whose encoding lacks letters of a path."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        with suppress(AttributeError):  # in a notebook
            getattr(sys, name).reconfigure(errors="backslashreplace")


def _world_size() -> int:
    size, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
    if not size.isdecimal() or int(size) < 1:
        raise UserError(f"WORLD_SIZE={size} is no number of ranks: leave it unset, or start ranks with torchrun")
    if int(size) == 1 and rank != "0":
        raise UserError(f"RANK={rank} where WORLD_SIZE is 1 or unset: leave both unset, or start ranks with torchrun")
    return int(size)


def _check_restarts() -> None:
    """UserError where torchrun may start ranks of several machines again: its agents count such starts differently, so
    that ranks would wait for each other under the names of different starts."""
    restarts, world_size = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"), os.environ["WORLD_SIZE"]
    if restarts != "0" and os.environ.get("LOCAL_WORLD_SIZE", world_size) != world_size:
        raise UserError(
            f"--max-restarts={restarts} of torchrun is for the ranks of one machine: leave it out; the same command"
            " given again continues the run"
        )


def _describe(error: BaseException) -> str:
    """The text to print for `error`; its last line starts with `longspan: error:`."""
    line = " ".join(str(error).split())
    rank, host = os.environ.get("RANK", "0"), socket.gethostname()
    if os.strerror(errno.EMFILE) in line:  # whatever could not be opened, and in whose words
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"longspan: error: rank {rank} ({host}) may open {limit} files: allow more with `ulimit -n` ({line})"
    if isinstance(error, UserError) or (isinstance(error, ValueError) and _raised_by_us(error)):
        return f"longspan: error: {line}"
    found = re.match(r"(\S+) does not have a deterministic implementation", line)
    if found:
        return (
            f"longspan: error: train.deterministic=true, but torch's {found[1]}, which this model needs here, has no"
            " deterministic form: use train.deterministic=false, or other layers"
        )
    if isinstance(error, KeyboardInterrupt):
        return f"longspan: error: interrupted on rank {rank} ({host})"
    if re.search(r"gloo.*Connection (closed|reset) by peer|remote process exited", line):  # gloo's and NCCL's words
        return (
            f"longspan: error: rank {rank} ({host}) {LOST}: its machine is gone, or it was killed: exit codes tell"
            " which rank and how (-9: for want of memory, perhaps; -7: a file that it reads was cut off)"
        )
    if found := re.search(TIMED_OUT, line):
        seconds = int(found[1]) / (1000 if found[2] == "ms" else 1)
        return f"longspan: error: rank {rank} ({host}) has waited {seconds:g} s for {SILENT}{REMEDY}"
    if isinstance(error, MemoryError) and _raised_by_us(error):  # attention.host_buffers
        return (
            f"longspan: error: rank {rank} ({host}): {line}, which train.offload_activations=true needs: use a smaller"
            " data.seq_len or more machines; `longspan plan` says how much a machine needs"
        )
    if isinstance(error, BrokenPipeError):
        return f"longspan: error: rank {rank} ({host}) stops: what read its output has ended"
    if isinstance(error, OSError) and error.errno in FULL:
        where = error.filename or "that of its output, perhaps"
        return f"longspan: error: rank {rank} ({host}) stops: a disk is full ({error.strerror}: {where}): free it"
    trace = "".join(traceback.format_exception(error)).rstrip()
    reason = f"{type(error).__name__}: {line}"[:500]
    return f"{trace}\nlongspan: error: rank {rank} ({host}) failed, all ranks stop: {reason}"


def _raised_by_us(error: BaseException) -> bool:
    """Whether a `raise` statement of longspan raised `error`: one from a library is our mistake, not the user's."""
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    frame = trace.tb_frame
    ours = frame.f_globals.get("__name__", "").split(".")[0] == "longspan"
    return ours and frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _print(message: str) -> None:
    with suppress(OSError):  # what reads it may have ended, its disk be full: no reason to leave the others waiting
        print(message, file=sys.stderr, flush=True)


def _tell_torchrun(message: str) -> None:
    """Leaves the reason where torchrun's summary, which comes last and is long, looks for one."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"timestamp": str(int(time.time())), "py_callstack": message}
        with suppress(OSError), open(path, "w") as file:
            json.dump({"message": {"message": message.splitlines()[-1], "extraInfo": extra}}, file)


def _leave() -> None:
    """Ends this process now: ordinary interpreter shutdown may wait for collectives that will never complete."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(1)


def _end_alone(message: str) -> None:
    try:
        _print(message)
        _tell_torchrun(message)
    finally:
        _leave()


@contextmanager
def _last_words(message: str) -> Iterator[None]:
    """Prints the message if SIGTERM ends this process."""

    def end(*_):
        _print(message)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    yield
    signal.signal(signal.SIGTERM, before)


class _Alarm:
    """The connection of one rank to the store through which ranks tell each other to stop."""

    def __init__(self):
        from torch.distributed import PrefixStore, TCPStore

        self._world_size = int(os.environ["WORLD_SIZE"])
        address, port, rank = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
        for name, value, fits in (
            ("MASTER_ADDR", address, address != ""),
            ("MASTER_PORT", port, port.isdecimal() and int(port) < 2**16),
            ("RANK", rank, rank.isdecimal() and int(rank) < self._world_size),
        ):
            if not fits:
                found = f"{name}={value}" if value else f"no {name}"
                raise UserError(f"WORLD_SIZE={self._world_size} with {found}: start several ranks with torchrun")
        # torchrun's agent hosts the store; under other launchers rank 0 does, and init_process_group shares it.
        self._hosts_store = int(rank) == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            store = TCPStore(
                address,
                int(port),
                is_master=self._hosts_store,
                timeout=timedelta(seconds=CONNECT_SECONDS),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except RuntimeError as error:
            remedy = "rank 0 has to run there, and what it says tells more; this machine has to reach it"
            if self._hosts_store:
                remedy = "use a free port of this machine"
            raise UserError(
                f"rank {rank} ({socket.gethostname()}) cannot meet the others at MASTER_ADDR={address},"
                f" MASTER_PORT={port} ({str(error).splitlines()[0]}): {remedy}"
            ) from None
        # torchrun's store outlives ranks that it starts again (--max-restarts): what ended them must not end these.
        self._store = PrefixStore(f"longspan/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        # One user of the connection at a time. A thread that has begun to end the process never lets go.
        self._lock = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="longspan-alarm", daemon=True).start()

    def raise_for_all(self, message: str) -> None:
        """Prints `message` unless another rank was first, and ends all ranks; this one at least, where the process that
        has the store is stopped or out of reach."""
        alone = threading.Timer(ALONE_SECONDS, _end_alone, [message])
        alone.daemon = True
        alone.start()
        with self._lock:
            try:
                first = self._store.add("failed", 1) == 1
            except RuntimeError:  # the store is gone with its process: nobody left to agree with
                first = True
            if not first:
                self._follow()
            if SILENT in message or LOST in message:
                with _last_words(message):  # torchrun, which sees that a rank of this machine was killed, ends this one
                    message = self._name_those_awaited(message)
            _print(message)
            _tell_torchrun(message)
            try:
                self._store.set("reason", f"{socket.gethostname()}\n{message.splitlines()[-1]}")
                deadline = time.monotonic() + PRINT_SECONDS
                # The store must outlive the others' look at the reason.
                while self._hosts_store and time.monotonic() < deadline:
                    if self._store.add("seen", 0) == self._world_size - 1:
                        break
                    time.sleep(0.05)
            finally:
                _leave()

    def _name_those_awaited(self, message: str) -> str:
        """`message` with the ranks whose watch does not answer: they are dead, stopped or out of reach. If all do, with
        those whose main threads are elsewhere, and where that is."""
        from longspan.launcher.agreement import listed

        others = {rank: f"here/{rank}" for rank in range(self._world_size) if str(rank) != os.environ["RANK"]}
        deadline = time.monotonic() + ANSWER_SECONDS
        with suppress(RuntimeError):  # the store is gone
            while time.monotonic() < deadline and not self._store.check(list(others.values())):
                time.sleep(0.05)
            if silent := [rank for rank, key in others.items() if not self._store.check([key])]:
                return message.replace("another rank", listed(silent), 1)
            if places := {rank: place for rank, key in others.items() if (place := self._store.get(key).decode())}:
                shown = "".join(f"rank {rank}, {places[rank]}\n" for rank in list(places)[:MOST_STACKS])
                busy = f"{listed(places)}, which did something else, as the stacks above show"
                # Who has waited too long closes its connections, which others may tell first.
                return shown + re.sub(f"{LOST}.*", f"{IN_VAIN} {busy}{REMEDY}", message.replace(SILENT, busy))
        return message

    def _answer(self, place: str = "") -> None:
        """place: where this rank is, if it does not wait for others."""
        self._store.set(f"here/{os.environ['RANK']}", place)

    def close(self) -> None:
        """Called by a rank that has finished. The rank that hosts the store stays until all others have, too."""
        with self._lock:
            self._answer()
            finished = self._store.add("finished", 1)
        deadline = time.monotonic() + FINISH_SECONDS
        while self._hosts_store and finished < self._world_size and time.monotonic() < deadline:
            time.sleep(0.05)
            with self._lock:
                finished = self._store.add("finished", 0)
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            with self._lock:
                if self._closed.is_set():
                    return
                try:
                    failed = self._store.check(["failed"])
                except RuntimeError:
                    rank = os.environ["RANK"]
                    _print(f"longspan: error: rank {rank} stops: the process that coordinates the ranks has died")
                    _leave()
                if failed:
                    self._follow(elsewhere())

    def _follow(self, place: str = "") -> None:
        """Ends this process once the first failing rank has printed: torchrun kills that rank when this one ends."""
        try:
            self._answer(place)
            self._store.wait(["reason"], timedelta(seconds=PRINT_SECONDS))
            host, line = self._store.get("reason").decode().split("\n", 1)
            # Every machine's output names the reason once.
            if host != socket.gethostname() and os.environ.get("LOCAL_RANK", "0") == "0":
                _print(line)
            self._store.add("seen", 1)
            time.sleep(BEHIND_SECONDS)
        finally:
            _leave()
