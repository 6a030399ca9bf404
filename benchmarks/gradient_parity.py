"""Gradient parity on real hardware: bf16 over N ranks against bf16 on one rank, both measured from fp64 on one rank.

    torchrun --nproc-per-node 4 benchmarks/gradient_parity.py --config configs/hybrid-0.4b.yaml --tokens 16K \
        --output benchmarks/results/gradient_parity.json

Every rank computes both one-rank runs for itself. The error of a gradient is |g - g64| / |g64|; N ranks may have at
most 1.5 times the error of one, for every parameter. Exits with 1 if a parameter breaks the rule. The table shows kinds
of parameters over all layers beside it: over eight numbers the ratio of two rounding errors scatters widely.
"""

import argparse
import re
import sys
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from longspan.benchmarks.arguments import device_name, writable
from longspan.benchmarks.common import format_table, new_record, save
from longspan.benchmarks.ranks import join
from longspan.launcher.arguments import num_tokens
from longspan.launcher.config import Config
from longspan.launcher.engines.fsdp2 import shard
from longspan.launcher.parsing import parse_tokens
from longspan.models.checkpointing import checkpoint_blocks
from longspan.models.decoder import Decoder
from longspan.models.parallelize import parallelize
from longspan.parallel import SequenceParallel

LIMIT = 1.5


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file; its model section is what is compared")
    parser.add_argument("--tokens", type=num_tokens, default=parse_tokens("16K"), help="tokens of the one document")
    parser.add_argument("--output", type=writable, required=True, help="JSON file to write")
    parser.add_argument("--device", type=device_name, choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    mesh = join(arguments.device, timeout_s=600.0)
    device = mesh.device
    alone = init_device_mesh(device.type, (mesh.world_size, 1), mesh_dim_names=("copies", "alone"))["alone"]
    config = Config.load(arguments.config, []).model
    batch = _batch(config, arguments.tokens, device)

    exact = _gradients(config, batch, SequenceParallel(device=device), lambda model: _exact(model), device)
    one = _gradients(config, batch, SequenceParallel(device=device), lambda model: _sharded(model, alone), device)
    group = SequenceParallel(mesh.sp_group, mesh.sp_state_group, device=device)
    many = _gradients(config, batch, group, lambda model: _sharded(model, mesh.fsdp_mesh), device)

    kinds, parameters = {}, {}
    for name in exact.gradients:
        kinds.setdefault(re.sub(r"blocks\.\d+\.", "", name), []).append(name)
        parameters[name] = [name]
    rows, single = (_errors(groups, exact, one, many) for groups in (kinds, parameters))
    worst = max(single, key=lambda row: row["ratio"])
    broken = sum(row["ratio"] > LIMIT for row in single)
    if dist.get_rank() == 0:
        record = new_record("gradient_parity", {**vars(arguments), "world_size": mesh.world_size})
        record |= {
            "loss": {"fp64": exact.loss, "bf16_one_rank": one.loss, "bf16_ranks": many.loss},
            "all_gradients": _errors({"all": list(exact.gradients)}, exact, one, many)[0],
            "limit": LIMIT,
            "worst_parameter": worst,
            "parameters_above_limit": broken,
            "kinds": rows,
            "parameters": single,
        }
        save(record, arguments.output)
        shown = [{**row, **{k: f"{row[k]:.2e}" for k in ("one", "many", "ratio")}} for row in rows]
        print(format_table(sorted(shown, key=lambda row: -float(row["ratio"])), list(rows[0])))
        print(f"loss {record['loss']}; {record['all_gradients']}")
        print(f"worst parameter {worst['name']}: {worst['ratio']:.3f} times the error of one rank")
        print(f"{broken} of {len(single)} parameters above the limit of {LIMIT}")
    dist.destroy_process_group()
    sys.exit(0 if worst["ratio"] <= LIMIT else 1)


class _Run:
    def __init__(self, loss, gradients):
        self.loss, self.gradients = loss, gradients


def _batch(config, num_tokens, device):
    stream = torch.randint(config.vocab_size, (num_tokens + 1,), generator=torch.Generator().manual_seed(1))
    return stream[:-1].to(device), stream[1:].to(device)


def _exact(model):
    checkpoint_blocks(model, "full")
    return model.double()


def _sharded(model, mesh):
    over_ranks = partial(shard, mesh=mesh, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return parallelize(model, shard=over_ranks, checkpointing="full", compile=False)


def _gradients(config, batch, sequence_parallel, prepare, device):
    torch.manual_seed(0)
    model = prepare(Decoder(config).to(device))
    seq = sequence_parallel.context([len(batch[0])])
    local = torch.from_numpy(seq.layout.global_indices(seq.rank)).to(device)
    loss = model(batch[0][local], batch[1][local], seq) / len(batch[0])
    loss.backward()
    total = loss.detach().double()
    if sequence_parallel.group is not None:
        dist.all_reduce(total, group=sequence_parallel.group)
    return _Run(total.item(), {name: _full(parameter.grad) for name, parameter in model.named_parameters()})


def _full(gradient):
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).double().cpu()


def _errors(groups, exact, one, many):
    rows = []
    for label, names in groups.items():
        reference, *found = (torch.cat([run.gradients[name].flatten() for name in names]) for run in (exact, one, many))
        errors = [((gradient - reference).norm() / reference.norm()).item() for gradient in found]
        rows.append({"name": label, "numbers": len(reference), "one": errors[0], "many": errors[1],
                     "ratio": errors[1] / errors[0]})  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
