"""A SLURM cluster on this machine: one controller and several nodes, in a folder, without touching /etc or /run.

It needs Debian's `munge`, `slurmctld`, `slurmd` and `slurm-client`; slurmd wants root.
"""

import os
import pwd
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
SEARCHED = os.environ["PATH"] + ":/usr/sbin:/sbin"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")


def missing() -> str | None:
    """Why no cluster can be started here; None if one can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=SEARCHED) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install munge slurmctld slurmd slurm-client"
    return None if os.geteuid() == 0 else "slurmd needs root"


class Cluster:
    """Commands of a running cluster. environment: what makes SLURM's commands find it."""

    def __init__(self, folder: Path, nodes: int, cpus: int):
        self.folder, self.nodes = folder, nodes
        self.environment = os.environ | {"PATH": SEARCHED, "SLURM_CONF": str(folder / "slurm.conf")}
        for name in [name for name in self.environment if name.startswith(("SLURM_JOB", "SBATCH_"))]:
            del self.environment[name]
        ports = _free_ports(nodes + 1)
        (folder / "slurm.conf").write_text(_configuration(folder, ports[0], ports[1:], cpus))
        self._daemons = []

    def start(self) -> None:
        folder, key = self.folder, self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key-file": key, "socket": folder / "munge", "pid-file": folder / "munge.pid"}
        files |= {"log-file": folder / "munge.log", "seed-file": folder / "munge.seed"}
        munged = ["munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in files.items())]
        self._daemons = [self._daemon(munged)]
        self.until(lambda: (folder / "munge").exists(), "munged does not start")
        self._daemons.append(self._daemon(["slurmctld", "-D", "-c"]))
        self._daemons += [self._daemon(["slurmd", "-D", "-N", f"node{i}"]) for i in range(self.nodes)]
        idle = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"]
        self.until(lambda: len(set(self.run(*idle, check=False).split())) == self.nodes, "the nodes do not get ready")

    def stop(self) -> None:
        """Ends jobs, then daemons: nothing of them is needed any more."""
        try:
            if len(self._daemons) > 1:
                self.run("scancel", "--user", _user(), check=False)
                self.until(lambda: not self.run("squeue", "--noheader", check=False).split(), "jobs do not end")
        finally:
            for daemon in self._daemons:
                daemon.kill()
                daemon.wait()

    def run(self, *command, check: bool = True, **options) -> str:
        """What a command prints; `environment` goes with it."""
        options = {"env": self.environment, "capture_output": True, "text": True, "timeout": 30} | options
        done = subprocess.run(list(map(str, command)), **options)
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *arguments, cwd: Path, **variables: str) -> str:
        """sbatch from `cwd` with these environment variables; returns the job's number."""
        environment = self.environment | variables
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd, env=environment).strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode, ..."""
        shown = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in shown if "=" in word)

    def wait(self, number: str, limit_s: float) -> dict[str, str]:
        """The job as it is when it has ended for good."""
        found = {}

        def over() -> bool:
            nonlocal found
            found = self.job(number)
            return found["JobState"] in OVER

        self.until(over, f"job {number} does not end", limit_s)
        return found

    def until(self, condition, what: str, limit_s: float = 30) -> None:
        """Waits for a condition; AssertionError with the logs of the cluster's daemons when it stays false."""
        deadline = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > deadline:
                logs = [path for path in sorted(self.folder.iterdir()) if path.suffix in (".out", ".log")]
                raise AssertionError(what + "".join(f"\n{p.name}: {p.read_text()[-1500:]}" for p in logs))
            time.sleep(0.1)

    def _daemon(self, command: list[str]) -> subprocess.Popen:
        with open(self.folder / f"{command[0]}.out", "a") as output:
            return subprocess.Popen(command, env=self.environment, stdout=output, stderr=subprocess.STDOUT)


@contextmanager
def slurm_cluster(folder: Path, nodes: int = 2, cpus: int = 2):
    """A running Cluster of nodes node0, node1, ...; its daemons and files live in `folder`, and end with the block."""
    cluster = Cluster(folder, nodes, cpus)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _configuration(folder: Path, port: int, node_ports: list[int], cpus: int) -> str:
    host, user = socket.gethostname().split(".")[0], _user()
    lines = [
        "ClusterName=longspan",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={port}",
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder / 'munge'},cred_expire=5",  # a requeued job waits as long as its credential lives
        f"SlurmUser={user}",
        f"SlurmdUser={user}",
        f"StateSaveLocation={folder / 'state'}",
        f"SlurmdSpoolDir={folder / 'spool-%n'}",
        f"SlurmctldPidFile={folder / 'slurmctld.pid'}",
        f"SlurmdPidFile={folder / 'slurmd-%n.pid'}",
        f"SlurmctldLogFile={folder / 'slurmctld.log'}",
        f"SlurmdLogFile={folder / 'slurmd-%n.log'}",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/none",
        "MpiDefault=none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "ReturnToService=2",
        "KillWait=5",
        "SlurmdParameters=config_overrides",
    ]
    lines += [
        f"NodeName=node{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=1000"
        for i, port in enumerate(node_ports)
    ]
    # Jobs of the partition `urgent` preempt those of `main`.
    lines.append("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60")
    lines.append("PartitionName=urgent Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF")
    return "\n".join(lines) + "\n"


def _user() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]
    finally:
        for listener in sockets:
            listener.close()
