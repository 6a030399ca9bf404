"""Activation checkpointing around the attention functions repeats neither communication nor softmax attention."""

import pytest
import torch
import torch.distributed as dist
from cases import layouts
from spawn import run_ranks
from torch.utils.checkpoint import checkpoint
from traffic import Traffic

from longspan.attention import linear_attention, softmax_attention
from longspan.attention.recompute import checkpoint_contexts

WIDTH, NUM_HEADS = 12, 2
LENGTHS = (1, 61, 7, 120, 2)


def linear_layer(x, weights, layout, group, strategy):
    """Two attention calls in one checkpointed block, so that what is kept must be matched in order."""
    for weight in weights:
        qkvg = x @ weight
        q, k, v = (part.unflatten(-1, (NUM_HEADS, -1)) for part in qkvg[:, : 3 * WIDTH].split(WIDTH, -1))
        log_decay = torch.nn.functional.logsigmoid(qkvg[:, -NUM_HEADS:])
        o = linear_attention(q, k, v, log_decay=log_decay, layout=layout, group=group, strategy=strategy)
        x = x + o.flatten(1).tanh()
    return x


def softmax_layer(x, weights, layout, group, strategy):
    for weight in weights:
        q, k, v = (part.unflatten(-1, (NUM_HEADS, -1)) for part in (x @ weight)[:, : 3 * WIDTH].split(WIDTH, -1))
        x = x + softmax_attention(q, k, v, layout=layout, group=group, strategy=strategy).flatten(1).tanh()
    return x


def hybrid_layer(x, weights, layout, group, strategy):
    x = linear_layer(x, weights[:1], layout, group, "auto")
    return softmax_layer(x, weights[1:], layout, group, "auto")


LAYERS = [
    (linear_layer, "lasp2"),
    (linear_layer, "lasp"),
    (softmax_layer, "ring"),
    (softmax_layer, "all_gather"),
    (hybrid_layer, "auto"),
]


def recompute_everything(rank, world_size):
    """Lines of what differs between a checkpointed and a plain run."""
    group = dist.group.WORLD
    generator = torch.Generator().manual_seed(1)
    width = 3 * WIDTH + NUM_HEADS
    weights = [torch.randn(WIDTH, width, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    problems = []
    for layout_name, layout in layouts(LENGTHS, world_size).items():
        x = torch.randn(sum(LENGTHS), WIDTH, generator=generator, dtype=torch.float64)
        x = x[torch.from_numpy(layout.global_indices(rank))].requires_grad_()
        for layer, strategy in LAYERS:
            case = f"{layer.__name__} {strategy} {layout_name}"
            results = {}
            for kind in ("plain", "checkpointed"):
                with Traffic() as traffic:
                    y = x
                    for _ in range(2):  # Two blocks, so that one block's kept results do not serve the other.
                        if kind == "plain":
                            y = layer(y, weights, layout, group, strategy)
                        else:
                            y = checkpoint(
                                layer, y, weights, layout, group, strategy,
                                use_reentrant=False, context_fn=checkpoint_contexts,
                            )  # fmt: skip
                    gradients = torch.autograd.grad(y.square().sum(), [x, *weights])
                results[kind] = [y, *gradients], traffic
            for name, plain, again in zip(("y", "dx", "dw0", "dw1"), *(results[kind][0] for kind in results)):
                if not torch.equal(plain, again) or not torch.isfinite(plain).all():
                    problems.append(f"{case}: {name} differs by {(plain - again).abs().max():.1e}")
            plain, again = (results[kind][1] for kind in results)
            if (plain.calls, plain.bytes) != (again.calls, again.bytes):
                problems.append(f"{case}: {dict(plain.calls)} became {dict(again.calls)}")
    return problems


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_recomputation_repeats_no_communication(world_size):
    for rank, problems in enumerate(run_ranks(recompute_everything, world_size)):
        assert not problems, f"rank {rank}:\n" + "\n".join(problems)


def count_softmax_work(rank, world_size):
    """Matrix products and fused attention calls of a block that is nothing but softmax attention."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += any(word in func.name() for word in ("mm", "dot_product", "attention"))
            return func(*args, **kwargs or {})

    layout = layouts(LENGTHS, world_size)["zigzag"]
    qkv = [
        torch.randn(layout.tokens_per_rank[rank], NUM_HEADS, 8, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    ]
    counts = []
    for run in (lambda *x: x[0](*x[1:]), lambda *x: checkpoint(*x, use_reentrant=False, context_fn=checkpoint_contexts)):
        with Products() as products:
            out = run(lambda q, k, v: softmax_attention(q, k, v, layout=layout, group=dist.group.WORLD).sin(), *qkv)
            out.sum().backward()
        counts.append(products.count)
    return counts


def test_recomputation_repeats_no_softmax_attention():
    for plain, checkpointed in run_ranks(count_softmax_work, 2):
        assert plain == checkpointed
        assert plain > 0


def without_gradients(rank, world_size):
    """A checkpointed block in evaluation keeps nothing that a later training step would pick up."""
    layout = layouts(LENGTHS, world_size)["zigzag"]
    x = torch.randn(layout.tokens_per_rank[rank], NUM_HEADS, 4, dtype=torch.float64)

    def block(x):
        return linear_attention(x, x, x, layout=layout, group=dist.group.WORLD)

    def run(x):
        return checkpoint(block, x, use_reentrant=False, context_fn=checkpoint_contexts)

    with torch.no_grad():
        run(3 * x)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(run(leaf).sum(), leaf)
    (expected,) = torch.autograd.grad(block(leaf).sum(), leaf)
    return torch.equal(grad, expected)


def test_evaluation_leaves_nothing_behind():
    assert all(run_ranks(without_gradients, 2))
