"""parallelize: gradients are sums over ranks, whatever combination of checkpointing, compilation and sharding."""

from collections import Counter
from functools import partial

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longspan.launcher.engines.fsdp2 import shard
from longspan.models.config import LAYER_KINDS, LINEAR_KINDS, ModelConfig
from longspan.models.decay import Gate
from longspan.models.decoder import Decoder
from longspan.models.parallelize import parallelize
from longspan.parallel import Layout, SequenceParallel, Span

# Positive features and a large norm_eps, as in test_parity: bf16 is judged by its rounding, not by tiny norms.
CONFIG = dict(
    vocab_size=29, num_layers=len(LAYER_KINDS), hidden_size=8, num_heads=2, mlp_size=12, state_size=5, gate_rank=3,
    init_std=0.3, loss_chunk=7, feature_map="elu1", norm_eps=1e-3, pattern=list(LAYER_KINDS), window=3,
    sparse_selection={"name": "window", "window": 3},
)  # fmt: skip
# name: (mesh axes, dtype of parameters, keyword arguments)
COMBINATIONS = {
    "fsdp": ("shard", torch.float64, {}),
    "hsdp": ("replicate shard", torch.float64, {}),
    "checkpointing": ("shard", torch.float64, {"checkpointing": "full"}),
    "mixed_precision": ("shard", torch.float32, {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}),
}


def make_model(dtype=torch.float32, **change):
    torch.manual_seed(1)
    return Decoder(ModelConfig(**CONFIG | change)).to(dtype)


def make_mesh(axes, world_size):
    axes = tuple(axes.split())
    shape = (world_size,) if len(axes) == 1 else (world_size // 2, 2)
    return init_device_mesh("cpu", shape, mesh_dim_names=axes)


def apply(model, mesh, *, checkpointing="none", compile=False, param_dtype=None, reduce_dtype=None):
    over_ranks = partial(shard, mesh=mesh, param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    return parallelize(model, shard=over_ranks, checkpointing=checkpointing, compile=compile)


def make_batch(data_rank):
    """Every data-parallel rank has its own documents and its own number of labels."""
    lengths = [9 + 4 * data_rank, 1, 6]
    tokens = torch.randint(29, (sum(lengths),), generator=torch.Generator().manual_seed(data_rank))
    labels = tokens.roll(-1)
    labels[: 3 * data_rank] = -100
    return tokens, labels, SequenceParallel().context(lengths)


def worst(found, wanted):
    """Largest relative error over parameters; NaN stays NaN."""
    return torch.stack([relative_error(f, w) for f, w in zip(found, wanted, strict=True)]).max().item()


def overall(found, wanted):
    """Relative error of all gradients as one vector, for bf16: single parameters may nearly cancel."""
    return relative_error(*(torch.cat([x.flatten() for x in gradients]) for gradients in (found, wanted))).item()


def relative_error(found, wanted):
    return (found.double() - wanted.double()).norm() / wanted.double().norm()


LIMITS = {torch.float64: (1e-12, worst), torch.bfloat16: (0.15, overall)}


def run_combinations(rank, world_size):
    wanted = {}
    for dtype in (torch.float64, torch.float32):
        plain = make_model(dtype)
        losses = [plain(*make_batch(data_rank)) for data_rank in range(world_size)]
        sum(losses).backward()
        wanted[dtype] = plain, losses
    for name, (axes, dtype, kwargs) in COMBINATIONS.items():
        if name == "hsdp" and world_size == 1:
            continue
        plain, losses = wanted[dtype]
        model = make_model(dtype)
        names = [n for n, _ in model.named_parameters()]
        apply(model, make_mesh(axes, world_size), **kwargs)
        assert [n for n, _ in model.named_parameters()] == names
        loss = model(*make_batch(rank))
        loss.backward()
        assert all(p.dtype == dtype and p.grad.dtype == dtype for p in model.parameters())
        gradients = [p.grad.full_tensor() for p in model.parameters()]
        limit, compare = LIMITS[kwargs.get("param_dtype") or dtype]
        error = compare(gradients, [p.grad for p in plain.parameters()])
        assert error <= limit, f"{name}: gradients are off by {error:.1e} (limit {limit:.0e})"
        assert abs(loss.item() - losses[rank].item()) <= limit * abs(losses[rank].item()), name
        tokens, _, seq = make_batch(rank)
        assert model.logits(tokens, seq).shape == (len(tokens), 29), name


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_gradients_are_sums_over_ranks(world_size):
    run_ranks(run_combinations, world_size)


def run_split_sequence(rank, world_size):
    """Sharded parameters and a split sequence over the same two ranks; the second rank has no tokens at all."""
    plain = make_model(torch.float64)
    tokens, labels, seq = make_batch(0)
    plain(tokens, labels, seq).backward()
    parallel = SequenceParallel(dist.group.WORLD)
    for held in (10, 16):
        spans = [Span(0, 0, 9), Span(1, 0, 1)], [Span(2, 0, 6)]
        spans = spans if held == 10 else (spans[0] + spans[1], [])
        layout = Layout(seq.layout.lengths, tuple(map(tuple, spans)))
        model = apply(make_model(torch.float64), make_mesh("shard", world_size), checkpointing="full")
        rows = slice(0, held) if rank == 0 else slice(held, None)
        model(tokens[rows], labels[rows], parallel.context(layout)).backward()
        error = worst([p.grad.full_tensor() for p in model.parameters()], [p.grad for p in plain.parameters()])
        assert error <= 1e-12, f"{held} tokens on rank 0: off by {error:.1e}"


def test_split_sequence_and_a_rank_without_tokens():
    run_ranks(run_split_sequence, 2)


def run_exact_gates(rank, world_size):
    """Gates take part in the bf16 model with their fp32 parameters, every other weight in bf16."""
    model = make_model()
    gates = {name: module for name, module in model.named_modules() if isinstance(module, Gate)}
    assert Counter(type(gate).__name__ for gate in gates.values()) == {"ScalarGate": 3, "ChannelGate": 2}
    exact = {name: [p.detach().clone() for p in gate.parameters()] for name, gate in gates.items()}
    apply(model, make_mesh("shard", world_size), param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    seen = {}

    def look(gate, args, output):
        log_decay = output[0] if isinstance(output, tuple) else output
        assert args[0].dtype == torch.bfloat16 and log_decay.dtype == torch.float32
        seen[gate] = [p.detach().clone() for p in gate.parameters()]

    for gate in gates.values():
        gate.register_forward_hook(look)
    model(*make_batch(rank)).backward()
    for name, gate in gates.items():
        assert all(torch.equal(found, wanted) for found, wanted in zip(seen[gate], exact[name], strict=True)), name


def test_gates_stay_exact_in_bf16():
    run_ranks(run_exact_gates, 2)


def run_compiled(rank, world_size):
    """Blocks are really compiled, inside checkpoints too, and layers of one kind share their graphs."""
    layers = {
        "num_layers": 6,
        "window": 0,
        "sparse_selection": {},
        "pattern": ["linear:fixed", "linear:fixed", "softmax"],
    }
    plain = make_model(**layers)
    plain(*make_batch(0)).backward()
    model = apply(make_model(**layers), make_mesh("shard", world_size), checkpointing="full", compile=True)
    model(*make_batch(0)).backward()
    error = worst([p.grad.full_tensor() for p in model.parameters()], [p.grad for p in plain.parameters()])
    assert error <= 1e-4, f"off by {error:.1e}"
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 8, graphs


def test_compiled():
    run_ranks(run_compiled, 1, timeout=300)


@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_linear_layers_compile(kind):
    """Traced by the compiler (without its slow code generation): equal results, and layers share their graphs."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    model = make_model(pattern=[kind], num_layers=10, window=0, sparse_selection={})
    tokens, labels, seq = make_batch(1)
    wanted = model(tokens, labels, seq)
    before = counters["unique_graphs"]
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend="eager")
    torch.testing.assert_close(model(tokens, labels, seq), wanted)
    assert 0 < counters["unique_graphs"] - before <= 8


def run_one_rank(rank, world_size, refusal):
    mesh = make_mesh("shard", 1)
    try:
        if refusal == "mesh":
            apply(make_model(), DeviceMesh("cpu", [[[0]]], mesh_dim_names=("a", "b", "c")))
        else:
            apply(make_model(), mesh, checkpointing="some")
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "refusal, message",
    [
        ("mesh", "fsdp_mesh has 3 axes ('a', 'b', 'c'); use 1 (FSDP) or 2 (HSDP)"),
        ("checkpointing", "train.checkpointing='some' is unknown; allowed: none, full, selective"),
    ],
)
def test_refusals(refusal, message):
    assert run_ranks(run_one_rank, 1, refusal) == [message]


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    from longspan.models.parallelize import compile_blocks

    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"train.compile=true needs a C\+\+ compiler on CPU; install g\+\+"):
        compile_blocks(make_model(), "cpu")
