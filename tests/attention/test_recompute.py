"""Activation checkpointing around the attention functions repeats neither communication nor softmax attention."""

import gc

import pytest
import torch
import torch.distributed as dist
from cases import layouts
from spawn import run_ranks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from traffic import Traffic

from longspan.attention import (
    Hierarchical,
    LinearBranch,
    TopBlocks,
    linear_attention,
    softmax_attention,
    sparse_attention,
)
from longspan.attention.recompute import checkpoint_contexts
from longspan.parallel import SequenceParallel

WIDTH, NUM_HEADS = 12, 2
LENGTHS = (1, 61, 7, 120, 2)


# `where` is what names the ranks: {"seq": ...} as models do, or {"layout": ..., "group": ..., "strategy": ...}.


def linear_layer(x, weights, where):
    """Two attention calls in one checkpointed block, so that what is kept must be matched in order."""
    for weight in weights:
        qkvg = x @ weight
        q, k, v = (part.unflatten(-1, (NUM_HEADS, -1)) for part in qkvg[:, : 3 * WIDTH].split(WIDTH, -1))
        log_decay = torch.nn.functional.logsigmoid(qkvg[:, -NUM_HEADS:])
        o = linear_attention(q, k, v, log_decay=log_decay, **where)
        x = x + o.flatten(1).tanh()
    return x


def softmax_layer(x, weights, where):
    for weight in weights:
        q, k, v = (part.unflatten(-1, (NUM_HEADS, -1)) for part in (x @ weight)[:, : 3 * WIDTH].split(WIDTH, -1))
        x = x + softmax_attention(q, k, v, **where).flatten(1).tanh()
    return x


def hybrid_layer(x, weights, where):
    return softmax_layer(linear_layer(x, weights[:1], where), weights[1:], where)


def sparse_layer(x, weights, where):
    """Chosen blocks, and blocks with means of blocks, which are gathered."""
    for weight, selection in zip(weights, (TopBlocks(2, 16, 8), Hierarchical(8, 2, 2))):
        q, k, v = (part.unflatten(-1, (NUM_HEADS, -1)) for part in (x @ weight)[:, : 3 * WIDTH].split(WIDTH, -1))
        x = x + sparse_attention(q, k, v, selection=selection, **where).flatten(1).tanh()
    return x


def sla_layer(x, weights, where):
    """Chosen blocks beside linear attention to the rest, and to all."""
    for weight, over in zip(weights, ("rest", "all")):
        q, k, v = (part.unflatten(-1, (NUM_HEADS, -1)) for part in (x @ weight)[:, : 3 * WIDTH].split(WIDTH, -1))
        linear = LinearBranch(weight[:6, :6], weight[0, :6], over)
        x = x + sparse_attention(q, k, v, selection=TopBlocks(2, 16, 8), linear=linear, **where).flatten(1).tanh()
    return x


LAYERS = [
    (linear_layer, "lasp2"),
    (linear_layer, "lasp"),
    (softmax_layer, "ring"),
    (softmax_layer, "all_gather"),
    (softmax_layer, "zeppelin"),
    (hybrid_layer, "auto"),
    (sparse_layer, "fetch"),
    (sparse_layer, "ring"),
    (sla_layer, "fetch"),
]


def places(layout, layer, strategy):
    """The ways of saying where `layer` runs, by name."""
    kinds = {linear_layer: "linear", softmax_layer: "softmax", sparse_layer: "sparse", sla_layer: "sparse"}
    names = {kinds[layer]: strategy} if layer in kinds else {}
    return {
        "seq": {"seq": SequenceParallel(dist.group.WORLD, **names).context(layout)},
        "group": {"layout": layout, "group": dist.group.WORLD, "strategy": strategy},
    }


def plain(layer, *args):
    return layer(*args)


def checkpointed(layer, *args):
    return checkpoint(layer, *args, use_reentrant=False, context_fn=checkpoint_contexts)


PLACES = {"zigzag": "seq", "holes": "group"}  # by layout


def recompute_everything(rank, world_size):
    """Lines of what differs between a checkpointed and a plain run."""
    generator = torch.Generator().manual_seed(1)
    width = 3 * WIDTH + NUM_HEADS
    weights = [torch.randn(WIDTH, width, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    problems = []
    for layout_name, place in PLACES.items():
        layout = layouts(LENGTHS, world_size)[layout_name]
        x = torch.randn(sum(LENGTHS), WIDTH, generator=generator, dtype=torch.float64)
        x = x[torch.from_numpy(layout.global_indices(rank))].requires_grad_()
        for layer, strategy in LAYERS:
            case = f"{layer.__name__} {strategy} {layout_name}"
            where = places(layout, layer, strategy)[place]
            results = []
            for run in (plain, checkpointed):
                with Traffic() as traffic:
                    # Two blocks, so that what one block keeps must not serve the other.
                    y = run(layer, run(layer, x, weights, where), weights, where)
                    gradients = torch.autograd.grad(y.square().sum(), [x, *weights])
                results.append(([y, *gradients], traffic))
            (expected, once), (found, again) = results
            for name, a, b in zip(("y", "dx", "dw0", "dw1"), expected, found):
                if not torch.equal(a, b) or not torch.isfinite(a).all():
                    problems.append(f"{case}: {name} differs by {(a - b).abs().max():.1e}")
            if (once.calls, once.bytes) != (again.calls, again.bytes):
                problems.append(f"{case}: {dict(once.calls)} became {dict(again.calls)}")
    return problems


@pytest.mark.parametrize("world_size", [1, 4])
def test_recomputation_repeats_no_communication(world_size):
    for rank, problems in enumerate(run_ranks(recompute_everything, world_size)):
        assert not problems, f"rank {rank}:\n" + "\n".join(problems)


class Products(TorchDispatchMode):
    """Counts matrix products and fused attention calls."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += any(word in func.name() for word in ("mm", "dot_product", "attention"))
        return func(*args, **kwargs or {})


def count_softmax_work(rank, world_size):
    """Matrix products and fused attention calls, plain and checkpointed, of a block that is only softmax attention."""
    layout = layouts(LENGTHS, world_size)["zigzag"]
    qkv = [
        torch.randn(layout.tokens_per_rank[rank], NUM_HEADS, 8, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    ]
    counts = []
    for run in (plain, checkpointed):
        with Products() as products:
            out = run(lambda q, k, v: softmax_attention(q, k, v, layout=layout, group=dist.group.WORLD).sin(), *qkv)
            out.sum().backward()
        counts.append(products.count)
    return counts


def test_recomputation_repeats_no_softmax_attention():
    for once, again in run_ranks(count_softmax_work, 2):
        assert once == again > 0


def without_gradients(rank, world_size):
    """A checkpointed block in evaluation keeps nothing that a later training step would pick up."""
    layout = layouts(LENGTHS, world_size)["zigzag"]
    x = torch.randn(layout.tokens_per_rank[rank], NUM_HEADS, 4, dtype=torch.float64)

    def block(x):
        return linear_attention(x, x, x, layout=layout, group=dist.group.WORLD)

    with torch.no_grad():
        checkpointed(block, 3 * x)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(checkpointed(block, leaf).sum(), leaf)
    (expected,) = torch.autograd.grad(block(leaf).sum(), leaf)
    return torch.equal(grad, expected)


def test_evaluation_leaves_nothing_behind():
    assert all(run_ranks(without_gradients, 2))


@pytest.mark.parametrize("with_backward", [True, False])
@pytest.mark.parametrize("attention", [linear_attention, softmax_attention])
def test_what_is_kept_is_freed_with_the_block(attention, with_backward):
    """Also when no backward pass follows, as after an error or in an evaluation that forgot no_grad."""
    seq = SequenceParallel().context(LENGTHS)
    x = torch.randn(sum(LENGTHS), NUM_HEADS, 4, requires_grad=True)
    storages = []

    def block(x):
        out = attention(x, x, x, seq=seq)
        storages.append(StorageWeakRef(out.untyped_storage()))
        return out.square()  # Needs `out` in the backward pass, so recomputation gets this far.

    loss = checkpointed(block, x).sum()
    if with_backward:
        loss.backward()
    del loss
    gc.collect()
    assert storages
    assert all(storage.expired() for storage in storages)


@pytest.mark.parametrize("attention", [linear_attention, softmax_attention])
def test_a_second_backward_recomputes_again(attention):
    seq = SequenceParallel().context(LENGTHS)
    x = torch.randn(sum(LENGTHS), NUM_HEADS, 4, requires_grad=True)
    loss = checkpointed(lambda x: attention(x, x, x, seq=seq).square(), x).sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
