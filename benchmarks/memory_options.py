"""What each memory option keeps between forward and backward, its peak, and its time, on one rank.

    python -m longspan.benchmarks.memory_options --config hybrid-0.4b --tokens 32K --output FILE.json

On a GPU the numbers are those of torch's allocator. On a CPU every storage that exists is counted, except what offload
has put away and what exists only inside one operation.
"""

import argparse
import gc
import time
from functools import partial
from weakref import WeakSet, finalize

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longspan.attention.offload import Parcel
from longspan.benchmarks.arguments import device_name, writable
from longspan.benchmarks.common import format_table, new_record, save
from longspan.benchmarks.ranks import join
from longspan.launcher.arguments import num_tokens
from longspan.launcher.config import Config, OptimConfig
from longspan.launcher.engines.fsdp2 import shard
from longspan.launcher.engines.optimizer import build_optimizer
from longspan.launcher.parsing import parse_tokens
from longspan.models.build import build_model
from longspan.models.config import ModelConfig
from longspan.models.parallelize import parallelize
from longspan.parallel import SequenceParallel

OPTIONS = {
    "none": {},
    "mlp_tile": {"mlp_tile": True},
    "selective": {"checkpointing": "selective"},
    "selective, mlp_tile": {"checkpointing": "selective", "mlp_tile": True},
    "full, layers [linear]": {"checkpointing": "full", "checkpoint_layers": ["linear"]},
    "full": {"checkpointing": "full"},
    "full, mlp_tile": {"checkpointing": "full", "mlp_tile": True},
    "full, mlp_tile, offload_activations": {"checkpointing": "full", "mlp_tile": True, "offload_activations": True},
    "full, mlp_tile, optim.offload": {"checkpointing": "full", "mlp_tile": True, "offload_optimizer": True},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file or shipped config; its model is what is measured")
    parser.add_argument("--tokens", type=num_tokens, default=parse_tokens("32K"), help="tokens of the one document")
    parser.add_argument("--tile", type=num_tokens, default=parse_tokens("4K"), help="train.mlp_tile where it is set")
    parser.add_argument("--steps", type=int, default=3, help="steps, of which the last is reported")
    parser.add_argument("--output", type=writable, required=True, help="JSON file to write")
    parser.add_argument("--device", type=device_name, choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings, such as model.num_layers=4")
    arguments = parser.parse_args()
    mesh = join(arguments.device, timeout_s=600.0)
    config = Config.load(arguments.config, arguments.settings).model
    record, rows = new_record("memory_options", vars(arguments)), []
    for name, options in OPTIONS.items():
        if mesh.device.type == "cpu" and "offload_optimizer" in options:
            continue  # device and host are one memory
        rows.append({"option": name, **_measure(config, mesh.fsdp_mesh, arguments, options)})
        save(record | {"rows": rows}, arguments.output)
    print(format_table([{k: f"{v:.3f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows],
                       list(rows[0])))  # fmt: skip
    dist.destroy_process_group()


def _measure(config: ModelConfig, mesh: DeviceMesh, arguments, options: dict) -> dict:
    """GiB that the forward adds until the backward, GiB at most in the step, the last loss, on a GPU seconds."""
    device = torch.device(arguments.device)
    options = {"checkpointing": "none"} | options | ({"mlp_tile": arguments.tile} if "mlp_tile" in options else {})
    torch.manual_seed(0)
    with device:
        model = build_model(config)
    dtypes = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    over_ranks = partial(shard, mesh=mesh, **dtypes, offload=options.pop("offload_optimizer", False))
    model = parallelize(model, shard=over_ranks, compile=False, **options)
    optimizer = build_optimizer(model, OptimConfig())
    seq = SequenceParallel(device=device).context([arguments.tokens])
    stream = torch.randint(config.vocab_size, (arguments.tokens + 1,), device=device)
    memory = _Allocator() if device.type == "cuda" else _Storages()
    for _ in range(arguments.steps):
        gc.collect()
        memory.start()
        with memory:
            begin = time.perf_counter()
            loss = model(stream[:-1], stream[1:], seq) / arguments.tokens
            kept = memory.now() - memory.before
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            value = loss.item()  # waits for the device
            seconds = time.perf_counter() - begin
    row = {"kept_gib": kept / 2**30, "peak_gib": memory.peak() / 2**30, "loss": value}
    return row | ({"step_s": seconds} if device.type == "cuda" else {})  # counting takes longer than the step


class _Allocator:
    """Device memory as torch's allocator has given it out."""

    def start(self):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.before = self.now()

    def now(self):
        return torch.cuda.memory_allocated()

    def peak(self):
        return torch.cuda.max_memory_allocated()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class _Storages(TorchDispatchMode):
    """Bytes of all storages that operations under this mode returned and that still exist."""

    def start(self):
        self.alive, self.total, self.highest = WeakSet(), 0, 0
        self.before = self.now()

    def now(self):
        parked = {id(x.untyped_storage()) for p in gc.get_objects() if type(p) is Parcel for x in p._host}
        return sum(storage.nbytes() for storage in self.alive if id(storage) not in parked)

    def peak(self):
        return self.highest

    def _add(self, num_bytes):
        self.total += num_bytes
        self.highest = max(self.highest, self.total)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(cls, torch.Tensor) and cls.__name__ == "DTensor" for cls in types):
            return NotImplemented  # it first unwraps itself
        out = func(*args, **kwargs or {})
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            if storage not in self.alive:
                self.alive.add(storage)
                self._add(storage.nbytes())
                finalize(storage, self._add, -storage.nbytes())
        return out


if __name__ == "__main__":
    main()
