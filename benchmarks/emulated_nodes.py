"""Nodes of a cluster on one Linux machine: a network namespace for every rank, with a link of its own to other nodes.

Needs root, `ip` and `tc`. A rank reaches those of its node over a switch at full speed, all others over its link, which
sends at a given rate.
"""

import contextlib
import ctypes
import itertools
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from longspan.parallel.topology import Topology

CLONE_NEWNET = 0x40000000
LINK, NEAR = "far0", "near0"  # interfaces of a rank, towards other nodes and towards its own
_numbers = itertools.count()  # of clusters of this process


@dataclass(frozen=True)
class EmulatedRank:
    """Where a rank runs. environment: what torchrun and gloo want to know of it."""

    namespace: str
    address: str
    environment: dict

    def enter(self) -> None:
        """Moves this process (its threads-to-be included) there, and tells gloo which interface to use."""
        libc = ctypes.CDLL(None, use_errno=True)
        handle = os.open(f"/run/netns/{self.namespace}", os.O_RDONLY)
        try:
            if libc.setns(handle, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {self.namespace}")
        finally:
            os.close(handle)
        os.environ |= self.environment


def sent_bytes(interface: str = LINK) -> int:
    """What this process's rank has sent so far: over its link to other nodes, or over NEAR to its own."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == interface:
            return int(counters.split()[8])
    raise RuntimeError(f"this process is on no emulated node: there is no interface {interface}")


def unavailable() -> str | None:
    """Why there can be no emulated nodes here, or None."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (package iproute2)"
    try:
        with emulated_nodes(Topology(1, 1), megabits=100):
            return None
    except RuntimeError as error:
        return str(error)


@contextlib.contextmanager
def emulated_nodes(topology: Topology, megabits: float):
    """The EmulatedRank of every rank, whose links send at most `megabits` per second each; taken down at the end.
    RuntimeError where the machine does not permit it."""
    prefix, size = f"ls{os.getpid()}x{next(_numbers)}", topology.ranks_per_node
    switches, ranks = f"{prefix}s", [_rank(prefix, rank, topology) for rank in range(topology.world_size)]
    try:
        _run("ip", "netns", "add", switches)
        for switch in ("between", *(f"node{n}" for n in range(topology.nodes))):
            _run("ip", "-n", switches, "link", "add", switch, "type", "bridge")
            _run("ip", "-n", switches, "link", "set", switch, "up")
        for number, rank in enumerate(ranks):
            inside, node = ("ip", "-n", rank.namespace), number // size
            _run("ip", "netns", "add", rank.namespace)
            for interface, switch in ((LINK, "between"), (NEAR, f"node{node}")):
                port = f"{interface}r{number}"
                plug = ["type", "veth", "peer", "name", interface, "netns", rank.namespace]
                _run("ip", "-n", switches, "link", "add", port, *plug)
                _run("ip", "-n", switches, "link", "set", port, "master", switch, "up")
            _run(*inside, "addr", "add", f"{rank.address}/16", "dev", LINK)
            for interface in ("lo", LINK, NEAR):
                _run(*inside, "link", "set", interface, "up")
            # the longer prefix wins: what stays in the node never takes the link
            _run(*inside, "route", "add", f"10.77.{node}.0/24", "dev", NEAR, "src", rank.address)
            rate = ["rate", f"{megabits}mbit", "burst", "64kb", "latency", "50ms"]
            _run("tc", "-n", rank.namespace, "qdisc", "add", "dev", LINK, "root", "tbf", *rate)
        yield ranks
    finally:
        for namespace in (*(rank.namespace for rank in ranks), switches):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)


def run_on_emulated_nodes(module: str, topology: Topology, megabits: float) -> int:
    """Runs `python -m module` with this process's arguments as every rank; 1 where one fails, else 0."""
    with emulated_nodes(topology, megabits) as ranks, contextlib.ExitStack() as stack:
        processes = []
        master = {"MASTER_ADDR": ranks[0].address, "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"}
        for rank in ranks:
            command = ["ip", "netns", "exec", rank.namespace, sys.executable, "-m", module, *sys.argv[1:]]
            processes.append(subprocess.Popen(command, env=os.environ | rank.environment | master))
            stack.callback(processes[-1].kill)
        while all(process.poll() is None for process in processes):
            time.sleep(0.2)
        failed = any(process.poll() for process in processes)  # the others would wait for a rank that is gone
        return int(failed or any(process.wait() for process in processes))


def _rank(prefix: str, rank: int, topology: Topology) -> EmulatedRank:
    node, place = divmod(rank, topology.ranks_per_node)
    environment = {
        "RANK": rank, "WORLD_SIZE": topology.world_size, "LOCAL_RANK": place,
        "LOCAL_WORLD_SIZE": topology.ranks_per_node, "GLOO_SOCKET_IFNAME": LINK,
    }  # fmt: skip
    return EmulatedRank(f"{prefix}r{rank}", f"10.77.{node}.{place + 1}", {k: str(v) for k, v in environment.items()})


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout
