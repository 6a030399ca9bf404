"""What a run ran on: the device of this rank, and environment.json for whoever reads the results later."""

import os
import platform
import socket
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import longspan
from longspan.launcher.errors import UserError
from longspan.parallel.mesh import Mesh

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"  # one of the two that torch takes for deterministic
PACKAGES = ("numpy", "triton", "megatron-core", "flash-attn-4", "nvidia-cudnn-frontend", "deepspeed")


def choose_device(setting: str) -> torch.device:
    """The device of this process for run.device; torchrun's LOCAL_RANK picks the GPU. Raises UserError."""
    available = torch.cuda.is_available()
    if setting == "cpu" or (setting == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise UserError("run.device=cuda, but torch sees no GPU: use run.device=cpu or install a CUDA build of torch")
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    local_rank, gpus = os.environ.get("LOCAL_RANK", "0" if alone else ""), torch.cuda.device_count()
    if not local_rank.isdecimal():
        raise UserError(f"LOCAL_RANK={local_rank} does not say which GPU this rank is for: start ranks with torchrun")
    local_rank = int(local_rank)
    if local_rank >= gpus:
        raise UserError(
            f"this machine has {gpus} GPUs but was given at least {local_rank + 1} ranks: "
            f"use --nproc-per-node={gpus}, or run.device=cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def make_deterministic() -> None:
    """From here on torch computes the same bits from the same inputs, or raises. Call it before CUDA starts. Raises
    UserError where a variable of the environment is in the way."""
    workspace = os.environ.setdefault(*CUBLAS_WORKSPACE)
    if workspace not in (CUBLAS_WORKSPACE[1], ":16:8"):
        raise UserError(
            f"{CUBLAS_WORKSPACE[0]}={workspace} lets sums differ from run to run, which train.deterministic=true rules"
            f" out: leave it unset or set {CUBLAS_WORKSPACE[1]}"
        )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # all that is read is written first, as tests show
    torch.backends.cudnn.benchmark = False  # which algorithm is fastest may change from run to run


def describe_environment(mesh: Mesh) -> dict[str, Any]:
    """The content of environment.json. Collective: the machines of all ranks are listed."""
    hosts = [None] * mesh.world_size
    dist.all_gather_object(hosts, socket.gethostname())
    on_gpu = mesh.device.type == "cuda"
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "longspan": longspan.__version__,
        "commit": commit() if mesh.is_main else None,  # git looks at every file, and the first rank alone writes this
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        "packages": packages(),
        "platform": platform.platform(),
        "world_size": mesh.world_size,
        "dp": mesh.dp,
        "sp": mesh.sp,
        "tp": mesh.tp,
        "machines": {host: hosts.count(host) for host in dict.fromkeys(hosts)},
        "device": torch.cuda.get_device_name(mesh.device) if on_gpu else f"{platform.machine()} CPU",
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads_per_rank": torch.get_num_threads(),
    }


def packages() -> dict[str, str | None]:
    """Versions of those that results may depend on, None of one that is not installed."""
    return {name: package_version(name) for name in PACKAGES}


def package_version(package: str) -> str | None:
    """None of one that is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """What LONGSPAN_COMMIT says, for copies without their history or with another; else the commit of the clone that
    runs, with `+changes` when files differ from it, or None."""
    if said := os.environ.get("LONGSPAN_COMMIT"):
        return said
    root = Path(longspan.__file__).resolve().parent.parent
    try:
        outputs = [
            subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, timeout=20, check=True).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    return outputs[0].strip() + ("+changes" if outputs[1].strip() else "")
