"""What `measure` counts on tensors without data is what the real model keeps, holds and multiplies on a CPU."""

import gc
from weakref import finalize

import pytest
import torch
from spawn import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import longspan.attention.offload as offload
from longspan.attention.host_buffers import buffer_size
from longspan.models.activations import GRADIENTS, LOSS, NORMS, measure
from longspan.models.build import build_model
from longspan.models.checkpointing import checkpoint_blocks
from longspan.models.config import LAYER_KINDS, SPARSE_KINDS, ModelConfig
from longspan.models.decay import Gate
from longspan.models.flops import model_flops_by_kind
from longspan.models.tensor_parallel import split_model
from longspan.parallel import SequenceParallel, Topology

SIZES = dict(
    vocab_size=29, num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, mlp_size=48, state_size=16, loss_chunk=64
)
BATCH_NAME, TWO = "batch", SequenceParallel(rank=0, topology=Topology(1, 2))


def config_of(kind, **change):
    extra = {"window": 7} if kind == "softmax:window" else {}
    if kind == "sparse":
        extra = {"sparse_selection": {"name": "top", "query_block": 32, "key_block": 16}}
    return ModelConfig(**SIZES | dict(pattern=[kind]) | extra | change)


def fully(model, offload):
    checkpoint_blocks(model, "full")


def real_model(config, dtype, checkpointing="none", mlp_tile=0):
    torch.manual_seed(0)
    model = build_model(config)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            wanted = torch.float32 if isinstance(module, Gate) else dtype
            setattr(module, name, torch.nn.Parameter(parameter.detach().to(wanted)))
    for block in model.blocks:
        block.mlp_tile = mlp_tile
    if checkpointing != "none":
        checkpoint_blocks(model, checkpointing)
    return model


def text_inputs(config, tokens):
    return torch.randint(config.vocab_size, (tokens,)), torch.randint(config.vocab_size, (tokens,))


def existing_storages():
    gc.collect()
    found = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    return found, {x.untyped_storage()._cdata for x in found}


def saved_bytes(run):
    """Bytes of the storages that autograd saves while `run` runs, those apart that were there before."""
    holders, before = existing_storages()
    seen = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage._cdata not in before:
            seen[storage._cdata] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = run()
    del holders
    return sum(seen.values()) + loss.element_size()  # the loss itself, which `measure` counts as well


class Alive(TorchDispatchMode):
    """Bytes of storages that operations made and that nobody has freed."""

    def __init__(self):
        super().__init__()
        self.holders, before = existing_storages()
        self.known, self.bytes = before, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                self.known.add(storage._cdata)
                self.bytes += storage.nbytes()
                finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return result

    def _freed(self, key, size):
        self.known.discard(key)
        self.bytes -= size


def alive_bytes(run):
    with Alive() as alive:
        loss = run()
    found = alive.bytes
    del loss
    return found


def kept(config, lengths, **options):
    found = measure(config, lengths, gpu=False, **options).kept
    return sum(size for name, size in found.items() if name != BATCH_NAME)


def step_of(config, lengths, dtype, checkpointing="none", mlp_tile=0):
    model, seq = real_model(config, dtype, checkpointing, mlp_tile), SequenceParallel().context(lengths)
    inputs = text_inputs(config, sum(lengths))
    model(*inputs, seq)  # derives tables, which are no activations
    return lambda: model(*inputs, seq)


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_saved_bytes_are_those_of_saved_tensors_hooks(kind):
    config, lengths = config_of(kind), [211, 90]
    for dtype in (torch.bfloat16, torch.float32):
        assert kept(config, lengths, dtype=dtype) == saved_bytes(step_of(config, lengths, dtype))


@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_with_checkpointing_what_lives_is_counted(kind):
    config, lengths, dtype = config_of(kind), [211, 90], torch.bfloat16
    found = kept(config, lengths, dtype=dtype, prepare=fully)
    wanted = alive_bytes(step_of(config, lengths, dtype, "full"))
    assert found == wanted
    assert found < kept(config, lengths, dtype=dtype) / 3


@pytest.mark.parametrize("kind", ["softmax", "linear:gla", "sla", "llsa"])
@pytest.mark.parametrize("checkpointing, tile", [("selective", 0), ("none", 100), ("full", 100), ("selective", 100)])
def test_memory_options_are_counted(kind, checkpointing, tile):
    config, lengths, dtype = config_of(kind), [211, 90], torch.bfloat16

    def prepare(model, offload):
        for block in model.blocks:
            block.mlp_tile = tile
        if checkpointing != "none":
            checkpoint_blocks(model, checkpointing)

    found = kept(config, lengths, dtype=dtype, prepare=prepare)
    step = step_of(config, lengths, dtype, checkpointing, tile)
    wanted = saved_bytes(step) if checkpointing == "none" else alive_bytes(step)
    assert found == wanted


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_what_waits_in_host_memory_is_counted_there(mode, monkeypatch):
    """What stays, and the copies; the last two blocks have not left yet."""
    monkeypatch.setattr(offload, "LEAST_BYTES", 1000)
    config, lengths, away = config_of("softmax", pattern=["softmax", "linear:gla"], num_layers=5), [211, 90], []

    def checkpointed(model, traffic):
        checkpoint_blocks(model, mode, offload=traffic)

    counted = measure(config, lengths, gpu=False, prepare=checkpointed)
    plain = measure(config, lengths, gpu=False, prepare=lambda model, _: checkpointed(model, None))

    class Recording(offload.Offload):
        def host_like(self, tensor):
            away.append(tensor.nbytes)
            return super().host_like(tensor)

    model, seq = real_model(config, torch.bfloat16), SequenceParallel().context(lengths)
    traffic = Recording()
    checkpointed(model, traffic)
    inputs = text_inputs(config, sum(lengths))
    model(*inputs, seq)
    away.clear()
    wanted = alive_bytes(lambda: model(*inputs, seq))
    assert sorted(counted.put_away) == sorted(away)
    if mode == "full":  # inputs of five blocks and results of three softmax layers; not the angles that all share
        assert away.count(301 * 32 * 2) == 5 + 3
    assert sum(size for name, size in counted.kept.items() if name != BATCH_NAME) == wanted
    assert traffic.memory.held == sum(map(buffer_size, counted.put_away))
    left = 301 * 32 * 2 * 3  # inputs of three blocks
    assert sum(plain.kept.values()) - sum(counted.kept.values()) >= left
    assert counted.peak < plain.peak


@pytest.mark.parametrize(
    "change",
    [
        dict(qk_norm=True, tie_embeddings=True, num_kv_heads=4),
        dict(pattern=["linear:gla", "linear:delta", "softmax"], num_layers=3),
        dict(pattern=["linear:none"], linear_normalize=True),
        dict(pattern=["linear:scalar"], feature_map="silu+l2norm", conv_width=3, output_norm="simple_rmsnorm"),
        dict(pattern=["linear:none"], feature_map="hedgehog", linear_value_dim=12),
    ],
)
def test_settings_and_long_sequences_change_the_count_as_the_model(change):
    config, lengths = config_of("softmax", **change), [4500]  # blocks of chunks whose states are kept
    assert kept(config, lengths, dtype=torch.float32) == saved_bytes(step_of(config, lengths, torch.float32))


SLA_CASES = [
    dict(sla_linear="rest"),
    dict(sla_feature_map="elu1", sla_query_block=32),
    dict(sla_feature_map="hedgehog", num_kv_heads=4),
]


@pytest.mark.parametrize("change", SLA_CASES)
def test_the_linear_branch_of_sla_is_counted(change):
    config, lengths = config_of("sla", **dict(sla_query_block=64, sla_key_block=16) | change), [211, 90]
    for dtype in (torch.bfloat16, torch.float32):
        assert kept(config, lengths, dtype=dtype) == saved_bytes(step_of(config, lengths, dtype))


@pytest.mark.parametrize("over", ["all", "rest"])
@pytest.mark.parametrize("pattern", [["softmax", "linear:none"], ["sla", "llsa"]])
def test_images_are_counted_too(pattern, over):
    change = dict(task="images", pattern=pattern, num_kv_heads=0, head_dim=8, sla_linear=over)
    config = ModelConfig(**SIZES | change)
    lengths = [64] * 3
    model, seq = real_model(config, torch.float32), SequenceParallel().context(lengths)
    inputs = torch.randn(192, 3), torch.randn(192, 3), torch.rand(3)
    model(*inputs, seq)
    assert kept(config, lengths, dtype=torch.float32) == pytest.approx(
        saved_bytes(lambda: model(*inputs, seq)), rel=2e-3
    )


@pytest.mark.parametrize("tile", [0, 100])
def test_memory_of_images_grows_with_their_pixels_alone(tile):
    """Small images, so that a matrix of tokens by images would be most of it."""
    config = ModelConfig(**SIZES | dict(task="images", pattern=["softmax"]))
    model, parallel, held, counted = real_model(config, torch.float32, mlp_tile=tile), SequenceParallel(), [], []

    def prepare(model, offload):
        for block in model.blocks:
            block.mlp_tile = tile

    for images in (300, 600):
        seq, tokens = parallel.context([4] * images), 4 * images
        inputs = torch.randn(tokens, 3), torch.randn(tokens, 3), torch.rand(images)
        model(*inputs, seq)
        held.append(saved_bytes(lambda: model(*inputs, seq)))
        measured = measure(config, [4] * images, dtype=torch.float32, prepare=prepare, gpu=False)
        counted.append(measured.peak)
        kept_bytes = sum(size for name, size in measured.kept.items() if name != BATCH_NAME)
        assert kept_bytes == pytest.approx(held[-1], rel=0.02)
    for once, twice in (held, counted):
        assert 1.9 * once < twice < 2.05 * once


def shared_config(kind):
    """All keys are chosen: what is counted."""
    return config_of(kind, sla_keep=1000, sla_query_block=32, sla_key_block=16, llsa_block=4, llsa_keep=1000)


def rank_counts(rank, world_size, kinds, length):
    import torch.distributed as dist

    parallel, found = SequenceParallel(dist.group.WORLD), {}
    for kind in kinds:
        config = shared_config(kind)
        model, seq = real_model(config, torch.bfloat16), parallel.context([length])
        inputs = text_inputs(config, seq.num_tokens_local)
        model(*inputs, seq)
        found[kind] = saved_bytes(lambda: model(*inputs, seq))
        if kind == "sla":
            fully(model, None)
            found["checkpointed"] = alive_bytes(lambda: model(*inputs, seq))
    return found


def test_ranks_of_a_group_keep_what_is_counted_for_them():
    kinds, length = ["softmax", "linear:scalar", "linear:mamba2", "linear:gated_delta", "sla", "llsa"], 512
    found = run_ranks(rank_counts, 2, kinds, length)
    for kind in kinds:
        counted = kept(shared_config(kind), [length], parallel=TWO, dtype=torch.bfloat16)
        # The second rank has one span. Of sparse layers the rank that asks for all keys is counted.
        for rank in range(1 if kind in SPARSE_KINDS else 2):
            near = pytest.approx(counted, rel=0.02) if kind.startswith("linear") else counted
            assert found[rank][kind] == near, (kind, rank)
    counted = kept(shared_config("sla"), [length], parallel=TWO, dtype=torch.bfloat16, prepare=fully)
    assert found[0]["checkpointed"] == counted


WAYS = {"softmax": "ulysses"}, {"softmax": "zeppelin", "layout": "contiguous"}, {"layout": "contiguous"}


def way_counts(rank, world_size, config, length):
    """Saved bytes of softmax layers, and what lives with checkpointing, in each of WAYS."""
    import torch.distributed as dist

    from longspan.parallel.exchange import Done

    dist.all_to_all_single = lambda *_, **__: Done()  # threads of gloo hold what they sent for a while
    found = []
    for way in WAYS:
        model, seq = real_model(config, torch.bfloat16), SequenceParallel(dist.group.WORLD, **way).context([length])
        inputs = text_inputs(config, seq.num_tokens_local)
        model(*inputs, seq)
        saved = saved_bytes(lambda: model(*inputs, seq))
        fully(model, None)
        found.append((saved, alive_bytes(lambda: model(*inputs, seq))))
    return found


def test_ranks_keep_what_is_counted_where_tokens_or_heads_move():
    """Both have as many tokens in attention."""
    config, length = shared_config("softmax"), 512
    for way, *found in zip(WAYS, *run_ranks(way_counts, 2, config, length), strict=True):
        given = {"parallel": SequenceParallel(rank=0, topology=TWO.topology, **way), "dtype": torch.bfloat16}
        counted = kept(config, [length], **given), kept(config, [length], **given, prepare=fully)
        assert found == [counted, counted], way


def shared_counts(rank, world_size, configs, length):
    """Of ranks that share memory, for each config: what is saved, and the sizes of windows that were allocated."""
    import torch.distributed as dist
    from shared_windows import shared_windows

    found = []
    for config in configs:
        peers, sizes = shared_windows(rank, world_size), []
        allocate = peers._allocate
        peers._allocate = lambda words: (sizes.append(4 * words), allocate(words))[1]
        seq = SequenceParallel(dist.group.WORLD, peers=peers).context([length])
        model, inputs = real_model(config, torch.bfloat16), text_inputs(config, seq.num_tokens_local)
        model(*inputs, seq).backward()
        found.append((saved_bytes(lambda: model(*inputs, seq)), sizes))
    return found


@pytest.mark.parametrize("world_size, length", [(2, 128)])
def test_windows_that_ranks_share_are_counted_as_they_are_allocated(world_size, length):
    """A window for all layers, room for all that lists name where nothing can be cut off it; heads whose rows are no
    whole number of 16 bytes go by the group."""
    pytest.importorskip("triton", reason="memory is shared by Triton kernels")
    configs = [shared_config("llsa"), shared_config("sla"), config_of("sparse", num_heads=8)]
    found = run_ranks(shared_counts, world_size, configs, length)
    for number, config in enumerate(configs):
        given = {"parallel": TWO, "dtype": torch.bfloat16, "gpu": False}
        by_group = measure(config, [length], **given)
        measured = measure(config, [length], **given, peer_blocks=True)
        assert by_group.window == 0
        for rank in range(world_size):
            assert sum(found[rank][number][1]) == measured.window, (config.pattern, rank)
        assert (measured.window > 0) == (config.head_size * 2 % 16 == 0)
        if world_size == 2 and measured.window:  # the rank that asks for all keys
            kept = sum(size for name, size in measured.kept.items() if name != BATCH_NAME)
            assert found[0][number][0] == kept, config.pattern
    ring = SequenceParallel(rank=0, topology=TWO.topology, sparse="ring")
    off = measure(configs[0], [length], **given | {"parallel": ring}, peer_blocks=True)
    assert off.window == 0


def parts_counts(rank, world_size, kinds, length):
    """Of two ranks that share layers: what is saved, bytes that come from the other, and parameters that are held."""
    import torch.distributed as dist
    from traffic import Traffic

    from longspan.parallel.tensor import TensorParallel

    ranks, found = TensorParallel(dist.device_mesh.init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))), {}
    for kind in kinds:
        config = config_of(kind, hidden_size=64)
        model, seq = real_model(config, torch.bfloat16), SequenceParallel().context([length])
        split_model(model, ranks)
        inputs = text_inputs(config, length)
        model(*inputs, seq)
        saved = saved_bytes(lambda: model(*inputs, seq))
        with Traffic() as traffic:
            model(*inputs, seq).backward()
        received = sum(size / (2 if "scatter" in name else 1) for name, size in traffic.bytes.items())
        found[kind] = saved, received, sum(parameter.to_local().numel() for parameter in model.parameters())
    return found


def test_ranks_that_share_layers_keep_what_is_counted_for_them():
    kinds, length = ["softmax", "linear:scalar", "linear:mamba2", "linear:gated_delta", "linear:gla", "sla"], 211
    found = run_ranks(parts_counts, 2, kinds, length)
    for kind in kinds:
        config = config_of(kind, hidden_size=64)
        counted = measure(config, [length], gpu=False, dtype=torch.bfloat16, tp=2)
        saved, received, parameters = found[0][kind]
        assert kept(config, [length], dtype=torch.bfloat16, tp=2) == saved, kind
        assert counted.num_parameters == parameters, kind
        assert counted.exchanged == received - 2 * 4 * (length - config.loss_chunk), (
            kind
        )  # one chunk of the loss is run


def test_products_are_the_model_flops_and_recomputation_adds_a_forward():
    config = config_of("softmax", pattern=["softmax", "linear:fixed"])
    wanted = model_flops_by_kind(config, [128])
    flops = measure(config, [128]).flops
    assert sum(flops.values()) == wanted["matmul"] + wanted["head"]
    again = measure(config, [128], prepare=fully).flops
    # The last product of a block is not needed to recompute what it saves.
    last = 2 * 128 * 2 * config.mlp_width * config.hidden_size
    assert sum(again.values()) == wanted["matmul"] * 4 / 3 + wanted["head"] - last


def test_a_tile_counts_for_all():
    config = config_of("softmax")

    def tiled(tile):
        def prepare(model, offload):
            for block in model.blocks:
                block.mlp_tile = tile

        return measure(config, [512], prepare=prepare)

    whole, one, four = tiled(0), tiled(512), tiled(128)
    assert one.flops == four.flops and four.launches > one.launches > whole.launches
    forward = 2 * 512 * config.num_layers * 3 * config.mlp_width * config.hidden_size
    assert sum(four.flops.values()) == sum(whole.flops.values()) + forward


def test_peak_holds_the_logits_of_one_chunk_and_gradients_stay_by_share():
    def peak(chunk):
        return measure(config_of("softmax", vocab_size=5000, loss_chunk=chunk), [512], prepare=fully).at_peak

    small, large = peak(128), peak(256)
    # fp32 logits and their gradient in bf16, while both exist.
    assert large[LOSS] - small[LOSS] >= 128 * 5000 * (4 + 2)
    assert large[LOSS] - small[LOSS] <= 128 * 5000 * (4 + 4 + 2) + 128 * 32 * 8
    measured = measure(config_of("softmax"), [64], gradient_bytes=0.5)
    assert 0 < measured.at_peak.get(GRADIENTS, 1) <= 0.5 * measured.num_parameters


def test_norms_are_one_operation_each():
    def count(**change):
        return measure(config_of("softmax", **change), [64])

    plain = count()
    # A norm reads and writes a stream, the second of a layer two; there is one more behind the last layer.
    assert plain.traffic[NORMS] == (2 * (2 + 4) + 2) * 64 * 32 * 2 + 5 * 32 * 2
    assert count(qk_norm=True).launches == plain.launches  # it is part of the rotation
