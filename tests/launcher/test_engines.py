"""Engines: the same run whichever stores the model, checkpoints that each continues, and what is refused."""
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks
from tiny_runs import rows, start, tiny_config, train, write_corpus

def go(rank, world_size, folder, corpus, cases):
    out = {}
    for name, s in cases.items():
        import time; t=time.time()
        out[name] = [(r["loss"], r["grad_norm"]) for r in train(tiny_config(corpus, folder / name, *s))], time.time()-t
    return out

def test_x(tmp_path):
    corpus = write_corpus(tmp_path)
    z = "parallel.engine=deepspeed"
    cases = {"fsdp2": (), "ddp": ("parallel.engine=ddp",)} | {f"z{n}": (z, f"parallel.zero_stage={n}") for n in (1,2,3)}
    for n, x in run_ranks(go, 2, tmp_path, corpus, cases)[0].items():
        print(n, x)
