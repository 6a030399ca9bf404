"""Memory options change no loss and no gradient: checkpointing by mode and kind, tiles, offload of either sort."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import longspan.attention.offload as offload
from longspan.launcher.engines.fsdp2 import shard
from longspan.models.build import build_model
from longspan.models.checkpointing import CHECKPOINTING, checkpoint_blocks
from longspan.models.config import LAYER_KINDS, ModelConfig
from longspan.models.decoder import Block
from longspan.models.parallelize import parallelize
from longspan.parallel import SequenceParallel, zigzag

COMMON = dict(
    hidden_size=8, num_heads=2, mlp_size=12, init_std=0.3, norm_eps=1e-3, sla_keep=2, sla_query_block=8,
    sla_key_block=4, llsa_block=4, llsa_keep=2,
)  # fmt: skip
TEXT = ModelConfig(
    vocab_size=29, num_layers=len(LAYER_KINDS), pattern=list(LAYER_KINDS), window=3, state_size=5, gate_rank=3,
    feature_map="elu1", sparse_selection={"name": "tokens", "keep": 2, "query_block": 8, "key_block": 4}, **COMMON,
)  # fmt: skip
FEW = replace(
    TEXT, sparse_selection={}, num_layers=4, window=0, pattern=["linear:gla", "softmax", "linear:mamba2", "llsa"]
)
IMAGES = ModelConfig(task="images", num_layers=3, pattern=["softmax", "sla", "llsa"], **COMMON)
LENGTHS = (37, 1, 16, 64, 5)
OPTIONS = {
    "full": {"checkpointing": "full"},
    "selective": {"checkpointing": "selective"},
    "linear only": {"checkpointing": "full", "checkpoint_layers": ["linear"]},
    "softmax, selective": {"checkpointing": "selective", "checkpoint_layers": ["softmax", "linear:gla"]},
    "offload": {"checkpointing": "full", "offload_activations": True},
    "offload, selective": {"checkpointing": "selective", "offload_activations": True},
    "optimizer": {"offload_optimizer": True},
    "one tile": {"mlp_tile": 1000},
    "tiles": {"mlp_tile": 7},
    "tiles, full": {"checkpointing": "full", "mlp_tile": 7},
    "all": {
        "checkpointing": "selective", "mlp_tile": 16, "offload_activations": True, "offload_optimizer": True,
    },
}  # fmt: skip
# Tiles sum gradients of weights in another order, and matrix products of few rows may be summed in another order.
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5}


def make_model(config, dtype, mesh=None, *, checkpointing="none", compile=False, **options):
    """Without a mesh: not sharded, and only the options of checkpoint_blocks and mlp_tile."""
    torch.manual_seed(1)
    model = build_model(config).to(dtype)
    for parameter in model.parameters():
        if not parameter.any():  # modulation, head, SLA's projection
            torch.nn.init.normal_(parameter, std=0.3)
    if mesh is not None:
        over_ranks = partial(
            shard,
            mesh=mesh,
            param_dtype=options.pop("param_dtype", None),
            reduce_dtype=options.pop("reduce_dtype", None),
            offload=options.pop("offload_optimizer", False),
        )
        return parallelize(model, shard=over_ranks, checkpointing=checkpointing, compile=compile, **options)
    for block in model.blocks:
        block.mlp_tile = options.get("mlp_tile", 0)
    if checkpointing != "none":
        offloaded = offload.Offload() if options.get("offload_activations") else None
        checkpoint_blocks(model, checkpointing, options.get("checkpoint_layers", ()), offloaded)
    return model


def make_inputs(config, dtype, layout, rank):
    """This rank's part of the batch."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.from_numpy(layout.global_indices(rank))
    if config.task == "images":
        image, noise = torch.randn(2, sum(LENGTHS), 3, generator=generator, dtype=torch.float64).to(dtype)
        return image[rows], noise[rows], torch.rand(len(LENGTHS), generator=generator, dtype=torch.float64).to(dtype)
    tokens = torch.randint(29, (sum(LENGTHS),), generator=generator)
    labels = tokens.roll(-1)
    labels[:3] = -100
    return tokens[rows], labels[rows]


def results(model, inputs, seq):
    """The loss and all gradients of two micro-batches whose graphs live side by side."""
    losses = [model(*inputs, seq), model(*inputs, seq)]
    for loss in losses:
        (0.5 * loss).backward()
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return {"loss": losses[0].detach()} | gradients


def compare_options(rank, world_size, dtype):
    """Lines of what differs from the run without options."""
    offload.LEAST_BYTES = 0
    problems = []
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("shard",))
    layout = zigzag(LENGTHS, world_size)
    seq = SequenceParallel(dist.group.WORLD).context(layout)
    for config, names in ((TEXT, ["all"]), (FEW, OPTIONS), (IMAGES, ["full", "selective", "tiles", "all"])):
        inputs = make_inputs(config, dtype, layout, rank)
        wanted = results(make_model(config, dtype, mesh), inputs, seq)
        for name in names:
            options = OPTIONS[name]
            limit = LIMITS[dtype] if options.get("mlp_tile", 1000) < 1000 else 0.0
            for key, found in results(make_model(config, dtype, mesh, **options), inputs, seq).items():
                error = ((found - wanted[key]).norm() / wanted[key].norm()).item()
                if not error <= limit:
                    problems.append(f"{config.task} {config.num_layers}, {name}: {key} is off by {error:.1e}")
    return problems


@pytest.mark.parametrize("world_size, dtype", [(1, torch.float32), (2, torch.float64)], ids=["fp32", "fp64, 2 ranks"])
def test_options_change_nothing(world_size, dtype):
    for problems in run_ranks(compare_options, world_size, dtype, timeout=300):
        assert not problems, "\n".join(problems)


SOFTMAX = ModelConfig(vocab_size=29, num_layers=4, pattern=["softmax"], **COMMON | {"mlp_size": 13})


class Calls(TorchDispatchMode):
    """Matrix products; of tensors inside SOFTMAX's MLP the most rows, and how many are left after a forward."""

    def __init__(self):
        super().__init__()
        self.products = self.rows = self.left = 0
        self.inside = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        if isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[1] == 13 and len(out) != 8:
            self.rows = max(self.rows, len(out))
            self.inside.append(StorageWeakRef(out.untyped_storage()))
        return out


def calls_of(pattern=("softmax",), **options):
    config = replace(SOFTMAX, pattern=list(pattern))
    seq = SequenceParallel().context(LENGTHS)
    with Calls() as calls:
        inputs = make_inputs(config, torch.float64, seq.layout, 0)
        model = make_model(config, torch.float64, **options)
        loss = model(*inputs, seq)
        calls.left = sum(not storage.expired() for storage in calls.inside)
        loss.backward()
    return calls


def test_selective_repeats_no_product():
    products = {mode: calls_of(checkpointing=mode).products for mode in CHECKPOINTING}
    assert products["none"] == products["selective"] < products["full"]


def test_checkpointing_of_some_kinds_leaves_the_others():
    """Recomputation is counted in products."""
    none, full, linear, softmax = (
        calls_of(pattern=["softmax", "linear:scalar", "linear:fixed"], **options).products
        for options in (
            {},
            {"checkpointing": "full"},
            {"checkpointing": "full", "checkpoint_layers": ["linear"]},
            {"checkpointing": "full", "checkpoint_layers": ["softmax", "linear:fixed"]},
        )
    )
    assert none < softmax < full and none < linear < full


@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_the_inside_of_an_mlp_exists_for_one_tile(mode):
    whole, tiles = calls_of(checkpointing=mode), calls_of(checkpointing=mode, mlp_tile=20)
    assert whole.rows == sum(LENGTHS) and tiles.rows == 20
    assert tiles.left == 0 and (whole.left > 0) == (mode != "full")


@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_tiles_are_computed_once_in_each_direction(mode, monkeypatch):
    feed, tiles = Block.feed, []
    monkeypatch.setattr(Block, "feed", lambda self, x: (tiles.append(len(x)), feed(self, x))[1])
    calls_of(checkpointing=mode, mlp_tile=50)
    assert tiles == [50, 50, 23] * 4 * 2


def blocks_left(model, inputs, seq):
    """The loss, and of every block whether its input still takes memory after the forward."""
    storages = []
    for block in model.blocks:
        forward = block.forward

        def recording(x, *others, forward=forward):
            storages.append(StorageWeakRef(x.untyped_storage()))
            return forward(x, *others)

        block.forward = recording
    loss = model.logits(inputs[0], seq).square().sum()
    return loss, [not storage.expired() for storage in storages]


def test_offloaded_inputs_leave_and_return_for_every_backward(monkeypatch):
    monkeypatch.setattr(offload, "LEAST_BYTES", 0)
    seq = SequenceParallel().context(LENGTHS)
    inputs, found = make_inputs(SOFTMAX, torch.float64, seq.layout, 0), {}
    for offloaded in (False, True):
        model = make_model(SOFTMAX, torch.float64, checkpointing="full", offload_activations=offloaded)
        loss, there = blocks_left(model, inputs, seq)
        assert there == ([False, False, True, True] if offloaded else [True] * 4)
        parameters = list(model.parameters())
        found[offloaded] = [torch.autograd.grad(loss, parameters, retain_graph=True) for _ in range(2)]
    for gradients in zip(*found[True], *found[False]):
        assert all(torch.equal(x, gradients[0]) for x in gradients[1:])


def test_evaluation_offloads_nothing(monkeypatch):
    monkeypatch.setattr(offload, "LEAST_BYTES", 0)
    monkeypatch.setattr(offload.Parcel, "store", None)
    seq = SequenceParallel().context(LENGTHS)
    model = make_model(SOFTMAX, torch.float64, checkpointing="full", offload_activations=True)
    with torch.no_grad():
        model(*make_inputs(SOFTMAX, torch.float64, seq.layout, 0), seq)


def run_compiled(rank, world_size):
    """With tiles and kept products, layers of one kind still share their graphs (without the slow code generation)."""
    torch.compile = partial(torch.compile, backend="eager")
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
    seq = SequenceParallel().context(LENGTHS)
    inputs, graphs = make_inputs(TEXT, torch.float64, seq.layout, 0), []
    for num_layers in (3, 6):
        config = replace(
            TEXT,
            num_layers=num_layers,
            window=0,
            sparse_selection={},
            pattern=["linear:fixed", "linear:fixed", "softmax"],
        )
        wanted = results(make_model(config, torch.float64, mesh), inputs, seq)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = make_model(config, torch.float64, mesh, compile=True, mlp_tile=50, checkpointing="selective")
        found = results(model, inputs, seq)
        for key in wanted:
            torch.testing.assert_close(found[key], wanted[key], rtol=1e-10, atol=1e-10)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    seq = SequenceParallel().context(LENGTHS)
    config, inputs = replace(IMAGES, pattern=["softmax"]), make_inputs(IMAGES, torch.float64, seq.layout, 0)
    wanted = results(make_model(config, torch.float64, mesh), inputs, seq)
    for tile in (0, 50):
        torch._dynamo.reset()
        found = results(make_model(config, torch.float64, mesh, compile=True, mlp_tile=tile), inputs, seq)
        for key in wanted:
            torch.testing.assert_close(found[key], wanted[key], rtol=1e-10, atol=1e-10)
    assert graphs[0] == graphs[1] > 0, graphs


def test_compiled():
    run_ranks(run_compiled, 1, timeout=300)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"mlp_tile": 1024}], ids=["whole", "tiles"])
def test_offload_on_the_gpu(options):
    """Equal gradients, but for the order in which attention's kernels add up, and less memory before the backward."""
    lengths = [20000, 12768]
    config = ModelConfig(vocab_size=64, num_layers=8, hidden_size=256, num_heads=4, pattern=["linear", "softmax"])
    seq = SequenceParallel(device=torch.device("cuda")).context(lengths)
    tokens = torch.randint(64, (sum(lengths),)).cuda()
    found, kept = {}, {}
    for offloaded in (False, True):
        model = make_model(
            config, torch.bfloat16, checkpointing="full", offload_activations=offloaded, **options
        ).cuda()
        for _ in range(3):  # so that memory is reused while copies are under way
            model.zero_grad()
            before = torch.cuda.memory_allocated()
            loss = model(tokens, tokens, seq)
            kept[offloaded] = torch.cuda.memory_allocated() - before
            loss.backward()
        found[offloaded] = [p.grad.clone() for p in model.parameters()]
    for a, b in zip(found[True], found[False]):
        assert (a.double() - b.double()).norm() <= 1e-2 * b.double().norm()
    input_bytes = sum(lengths) * 256 * 2
    assert kept[False] - kept[True] > 5 * input_bytes
