"""Run a function on several gloo ranks of this machine and collect what every rank returned.

The ranks are forked from a server process that has already imported torch, so eight of them start in about a second on
two cores. A rank that raises, dies or hangs ends the others, and the error shows every rank's traceback.
"""

import faulthandler
import importlib.util
import multiprocessing as mp
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

# Imported once, in the process that ranks are forked from: torch, megatron-core and what longspan and test modules
# import of them takes seconds. longspan itself is left to the ranks, where an error in it has a traceback.
PRELOAD = ["torch", "torch._dynamo", "torch.distributed.fsdp", "numpy", "pytest", "hypothesis"]
PRELOAD += [] if shutil.which("nvidia-smi") else ["megatron.core"]  # it might start CUDA: no fork may come after
# What is left to the other ranks after the first failure: gloo notices a closed peer at once.
GRACE_SECONDS = 2.0


class RanksFailed(RuntimeError):
    """At least one rank raised, died or ran past the time limit; the message holds every rank's traceback."""


def run_ranks(fn, world_size, *args, timeout=120, places=None):
    """Call ``fn(rank, world_size, *args)`` on `world_size` processes that share a gloo group.

    `fn` is a module-level function; `args` and the results must pickle. Every rank has one torch thread, the same
    seed (0) and NaN-filled scratch memory in longspan code (see poison.py). places: where each rank runs, of
    emulated_nodes.

    Returns the list of results, indexed by rank. Raises RanksFailed otherwise, with the traceback of every rank, or
    where it crashed; after `timeout` seconds for all of it, with the place where each was stuck. No process is left
    behind.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    where = (fn.__module__, fn.__code__.co_filename, fn.__qualname__)
    payload = pickle.dumps(args)
    with tempfile.TemporaryDirectory(prefix="longspan-ranks-") as folder:
        processes, connections = [], []
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank_main,
                    args=(rank, world_size, where, payload, sender, folder, timeout, places and places[rank]),
                    daemon=True,
                )
                process.start()
                sender.close()
                processes.append(process)
                connections.append(receiver)
            results, failures = _collect(processes, connections, time.monotonic() + timeout)
            if failures:
                raise RanksFailed(_describe(processes, results, failures, timeout, Path(folder)))
            for process in processes:
                process.join(GRACE_SECONDS)
            return [pickle.loads(results[rank]) for rank in range(world_size)]
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
            for connection in connections:
                connection.close()


def _collect(processes, connections, deadline):
    """Results by rank (pickled) and failures by rank (text), in the order in which they arrived."""
    results, failures = {}, {}
    waiting = {connection: rank for rank, connection in enumerate(connections)}
    while waiting and (left := deadline - time.monotonic()) > 0:
        ready = wait(list(waiting), left)
        for connection in ready:
            rank = waiting.pop(connection)
            try:
                succeeded, report = pickle.loads(connection.recv_bytes())
            except EOFError:
                processes[rank].join()
                succeeded, report = False, f"died with exit code {processes[rank].exitcode}\n"
            (results if succeeded else failures)[rank] = report
            if not succeeded:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    if waiting and not failures:
        failures[next(iter(waiting.values()))] = ""  # The time limit itself is the failure; stacks come below.
    return results, failures


def _describe(processes, results, failures, timeout, folder):
    """One text with every rank's fate: the failures first, then what the others were doing."""
    stuck = [rank for rank in range(len(processes)) if rank not in results and not failures.get(rank)]
    for rank in stuck:
        if processes[rank].is_alive():
            os.kill(processes[rank].pid, signal.SIGUSR1)  # faulthandler writes the stacks, even from inside gloo
    files, limit = [folder / f"stacks.{rank}" for rank in stuck], time.monotonic() + GRACE_SECONDS
    while time.monotonic() < limit and not all(file.exists() and file.stat().st_size for file in files):
        time.sleep(0.1)
    time.sleep(0.3 if stuck else 0)
    # What died of a signal has written its stacks, nothing else that failed by itself has.
    parts = [f"rank {rank}: {text}{_stacks(folder, rank)}" for rank, text in failures.items() if text]
    reason = "stopped after another rank failed" if parts else f"still running after {timeout} s"
    for rank in stuck:
        parts.append(f"rank {rank}: {reason}, at\n{_stacks(folder, rank, '  (not started)')}")
    if results:
        parts.append(f"ranks {sorted(results)}: returned normally")
    return f"{len(processes)} ranks, {len(failures)} failed\n" + "\n".join(parts)


def _stacks(folder, rank, otherwise=""):
    file = folder / f"stacks.{rank}"
    return file.read_text() if file.exists() else otherwise


def _rank_main(rank, world_size, where, payload, sender, folder, timeout, place):
    threading.Thread(target=_die_with_parent, daemon=True).start()
    stacks = open(Path(folder) / f"stacks.{rank}", "w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    faulthandler.enable(stacks)  # a crash leaves no other trace
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    if Path("/sys/class/net/lo").exists():  # The host name of a container may not resolve.
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if place:
        place.enter()
    import poison
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(0)
    poison.install()
    if "TRITON_INTERPRET" in os.environ and importlib.util.find_spec("triton"):
        import interpreter_bounds

        interpreter_bounds.install()
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        result = _load(*where)(rank, world_size, *pickle.loads(payload))
        report = pickle.dumps((True, pickle.dumps(result)))
    except BaseException:
        report = pickle.dumps((False, traceback.format_exc()))
        sender.send_bytes(report)
        os._exit(1)  # Not through the interpreter's shutdown: open gloo pairs may block there.
    sender.send_bytes(report)
    try:
        dist.barrier()  # A rank that left early would break its peers' connections.
    except RuntimeError:
        pass  # A peer failed, and said so itself.
    sys.stdout.flush()
    os._exit(0)


def _die_with_parent():
    wait([mp.parent_process().sentinel])
    os._exit(1)


def _load(module_name, file, qualname):
    """The function of a test module, which under pytest's importlib mode cannot be imported by its name."""
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, file)
        sys.modules[module_name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    found = sys.modules[module_name]
    for name in qualname.split("."):
        found = getattr(found, name)
    return found
