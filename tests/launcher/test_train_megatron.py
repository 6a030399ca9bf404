"""The example with Megatron: its losses do not depend on how ranks are used, and fall; on GPUs as well."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from corpora import write_megatron
from spawn import run_ranks

from longspan.parallel import Topology

pytest.importorskip("megatron.core")

ROOT = Path(__file__).resolve().parents[2]
PATTERN = ["linear:gated_delta", "softmax", "sla"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Documents that count up, without a PREFIX.json."""
    folder = tmp_path_factory.mktemp("megatron")
    documents = [[[(start + step) % 120 for step in range(90)]] for start in range(40)]
    return write_megatron(folder / "counting", documents)


def arguments(corpus, tp, cp, *more):
    sizes = "--vocab-size 120 --layers 3 --hidden-size 32 --heads 4 --seq-len 64 --steps 4 --lr 0.003".split()
    return ["--data", corpus, "--tp", str(tp), "--cp", str(cp), *sizes, "--pattern", *PATTERN, *more]


def train_in_all_ways(rank, world_size, corpus):
    from longspan.launcher.errors import UserError
    from longspan.launcher.train_megatron import main

    for tp, cp, more, message in [
        (3, 1, [], "--tp 3 times --cp 1 does not divide the 2 ranks"),
        (0, 1, [], "--tp 0: use 1 or more"),
        (1, 2, ["--seq-len", "62"], "--seq-len 62 must be a multiple of 2 --cp, 4"),
        (1, 1, ["--sequence", "64"], "train_megatron: unknown option --sequence: did you mean --seq-len"),
        (2, 1, ["--data", "none"], "corpus none: there is no such corpus"),
    ]:
        with pytest.raises(UserError, match=message):
            main(arguments(corpus, tp, cp, *more))
    losses = [main(arguments(corpus, tp, cp)) for tp, cp in ((1, 1), (2, 1), (1, 2))]
    return [*losses, through_windows(corpus)]


def through_windows(corpus):
    """Losses with states in shared memory, in the place of what GPUs share."""
    from shared_windows import shared_windows

    from longspan.launcher.train_megatron import main
    from longspan.models.megatron import contexts

    opened = []

    def open_peer_memory(group, topology, device, kernels, wanted):
        opened.append(shared_windows(dist.get_rank(group), dist.get_world_size(group)))
        assert (topology, device, wanted) == (Topology(1, 2), torch.device("cpu"), "auto")
        return opened[-1]

    contexts.open_peer_memory, real = open_peer_memory, contexts.open_peer_memory
    losses = main(arguments(corpus, 1, 2))
    contexts.open_peer_memory = real
    (peers,) = opened
    assert peers.received > 0
    with pytest.raises(ValueError, match="parallel.peer_memory=on cannot be honoured"):
        main(arguments(corpus, 1, 2, "--peer-memory", "on"))
    return losses


def test_losses_do_not_depend_on_how_ranks_are_used(corpus):
    results = run_ranks(train_in_all_ways, 2, corpus)
    (alone, *others) = results[0]
    assert results == [results[0]] * 2
    assert alone[-1] < alone[0] - 0.3
    for losses in others:
        assert losses == pytest.approx(alone, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.slow
def test_gpus_agree_with_one(corpus):
    def losses(ranks, *given):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command += [ROOT / "launcher" / "train_megatron.py", *arguments(corpus, *given)]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
        assert done.returncode == 0, done.stdout + done.stderr
        return [float(loss) for loss in re.findall(r"loss (\S+)", done.stdout)]

    alone = losses(1, 1, 1)
    assert len(alone) == 4 and alone[-1] < alone[0] - 0.3
    assert losses(1, 1, 1, "--dtype", "bfloat16") == pytest.approx(alone, rel=0.05)
    ways = [(2, 1), (1, 2)] if torch.cuda.device_count() > 1 else []
    ways += [(2, 2), (1, 4)] if torch.cuda.device_count() > 3 else []
    for tp, cp in ways:
        assert losses(tp * cp, tp, cp) == pytest.approx(alone, rel=5e-4), (tp, cp)
