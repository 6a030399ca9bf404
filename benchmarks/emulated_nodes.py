"""Nodes of a cluster as network namespaces of one Linux machine, with links of a given rate between them.

Needs root, `ip` and `tc`. Ranks of one node talk over its loopback at full speed; what leaves a node passes its link.
"""

import contextlib
import ctypes
import itertools
import json
import os
import shutil
import subprocess
from dataclasses import dataclass

CLONE_NEWNET = 0x40000000
_numbers = itertools.count()  # of clusters of this process


@dataclass(frozen=True)
class Node:
    namespace: str
    interface: str
    address: str

    def enter(self) -> None:
        """Moves this process (its threads-to-be included) onto the node, and tells gloo which interface to use."""
        libc = ctypes.CDLL(None, use_errno=True)
        handle = os.open(f"/run/netns/{self.namespace}", os.O_RDONLY)
        try:
            if libc.setns(handle, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {self.namespace}")
        finally:
            os.close(handle)
        os.environ["GLOO_SOCKET_IFNAME"] = self.interface

    def sent_bytes(self) -> int:
        """What has left the node so far."""
        shown = _run("ip", "-n", self.namespace, "-s", "-j", "link", "show", self.interface)
        return json.loads(shown)[0]["stats64"]["tx"]["bytes"]


def unavailable() -> str | None:
    """Why there can be no emulated nodes here, or None."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (package iproute2)"
    try:
        with emulated_nodes(1, megabits=100):
            return None
    except RuntimeError as error:
        return str(error)


@contextlib.contextmanager
def emulated_nodes(count: int, megabits: float):
    """`count` nodes whose links send at most `megabits` per second each; taken down at the end. RuntimeError where the
    machine does not permit it."""
    prefix = f"ls{os.getpid()}x{next(_numbers)}"
    hub, nodes = f"{prefix}h", [Node(f"{prefix}n{n}", "eth0", f"10.77.0.{n + 1}") for n in range(count)]
    try:
        _run("ip", "netns", "add", hub)
        _run("ip", "-n", hub, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", hub, "link", "set", "bridge", "up")
        for number, node in enumerate(nodes):
            port = f"port{number}"
            _run("ip", "netns", "add", node.namespace)
            _run("ip", "-n", hub, "link", "add", port, "type", "veth", "peer", node.interface, "netns", node.namespace)
            _run("ip", "-n", hub, "link", "set", port, "master", "bridge", "up")
            _run("ip", "-n", node.namespace, "addr", "add", f"{node.address}/24", "dev", node.interface)
            for interface in ("lo", node.interface):
                _run("ip", "-n", node.namespace, "link", "set", interface, "up")
            rate = ["rate", f"{megabits}mbit", "burst", "128kb", "latency", "100ms"]
            _run("tc", "-n", node.namespace, "qdisc", "add", "dev", node.interface, "root", "tbf", *rate)
        yield nodes
    finally:
        for namespace in (*(node.namespace for node in nodes), hub):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout
