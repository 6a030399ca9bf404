"""Sparse attention over ranks by the kernels for Hopper, emulated: tiles of theirs go past blocks, so that what lies
behind these shows, which is NaN where nobody has written."""

import pytest
import torch
import torch.distributed as dist
from cases import layouts
from oracles import with_gradients
from parity import relative_error
from sparse_oracle import sparse_attention as definition
from spawn import run_ranks

from longspan.attention import Hierarchical, TopBlocks, sparse, sparse_attention
from longspan.parallel import SequenceParallel

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs kernels in the interpreter")

TOP = TopBlocks(2, query_block=128, key_block=64)
# name: (selection, causal, document lengths, layout, whether through shared memory)
CASES = {
    "group": (TOP, False, (220,), "contiguous", False),
    "windows": (TOP, False, (220,), "contiguous", True),
    "windows, causal": (TOP, True, (130, 1, 100), "zigzag", True),
    "levels, windows": (Hierarchical(16, 2, 2), True, (150,), "zigzag", True),
}


def errors_of(rank, world_size, names):
    """By case relative errors of the output and of all gradients of this rank's tokens."""
    import gluon_emulator
    import interpreter_bf16
    from shared_windows import shared_windows

    from longspan.kernels.sparse import forms, fused, hopper

    interpreter_bf16.install()
    *_, run = gluon_emulator.load(
        *(f"longspan.kernels.sparse.hopper.{name}" for name in ("tiles", "attend", "queries", "keys", "run"))
    )
    gluon_emulator.SECONDS, found = 10.0, {}
    sparse.choose, forms.takes = lambda *given: (fused, None), lambda x: True
    hopper.on_hopper, hopper.processors, hopper.run = lambda x: True, lambda device: 3, run
    peers = shared_windows(rank, world_size)
    for name in names:
        selection, causal, lengths, layout, shared = CASES[name]
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(sum(lengths), heads, 64, generator=generator).bfloat16() for heads in (4, 2, 2, 4)]
        inputs, d_out = dict(zip("qkv", (x.double() for x in made))), made[3].double()
        wanted = with_gradients(definition, inputs, d_out, lengths, selection=selection, causal=causal)
        layout = layouts(lengths, world_size)[layout]
        rows = torch.from_numpy(layout.global_indices(rank))
        leaves = [x[rows].requires_grad_() for x in made[:3]]
        seq = SequenceParallel(dist.group.WORLD, peers=peers if shared else None, sparse="fetch").context(layout)
        out = sparse_attention(*leaves, selection=selection, causal=causal, seq=seq)
        given = out, *torch.autograd.grad(out, leaves, made[3][rows])
        found[name] = [relative_error(x, y[rows]) for x, y in zip(given, wanted.values(), strict=True)]
    return found


@pytest.mark.parametrize("world_size, names", [(2, ["windows"]), pytest.param(3, [*CASES], marks=pytest.mark.slow)])
def test_the_definition_over_ranks(world_size, names):
    for found in run_ranks(errors_of, world_size, names, timeout=300):
        assert all(error < 2e-2 for errors in found.values() for error in errors), found
