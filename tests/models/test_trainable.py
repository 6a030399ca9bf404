"""What patterns name; a frozen model has the gradients of the whole one, for what it trains, and keeps less."""

import re
from dataclasses import replace

import pytest
import torch
from devices import DEVICES

from longspan.attention import offload, recompute
from longspan.launcher.stored_models import cast
from longspan.models.activations import measure
from longspan.models.build import build_model
from longspan.models.config import LAYER_KINDS, ModelConfig
from longspan.models.flops import model_flops, model_flops_by_kind, num_trained
from longspan.models.parallelize import freeze, parallelize
from longspan.models.trainable import ALL, Trainable, table
from longspan.parallel import SequenceParallel

COMMON = dict(
    hidden_size=8, num_heads=2, mlp_size=12, init_std=0.3, norm_eps=1e-3, sla_keep=2, sla_query_block=8,
    sla_key_block=4, llsa_block=4, llsa_keep=2,
)  # fmt: skip
EVERY = ModelConfig(
    vocab_size=29, num_layers=len(LAYER_KINDS), pattern=list(LAYER_KINDS), window=3, state_size=5, gate_rank=3,
    qk_norm=True, loss_chunk=16, feature_map="elu1", sparse_selection={"name": "window", "window": 3}, **COMMON,
)  # fmt: skip
FEW = replace(EVERY, num_layers=4, pattern=["linear:gla", "softmax", "linear:scalar", "sla"], window=0,
              sparse_selection={})  # fmt: skip
IMAGES = ModelConfig(task="images", num_layers=3, pattern=["softmax", "sla", "llsa"], **COMMON)
TIED = replace(FEW, tie_embeddings=True)
LENGTHS = (37, 1, 16)


@pytest.mark.parametrize(
    ("train", "freeze", "wanted"),
    [
        (["linear"], [], r"blocks\.[02]\."),
        (["linear:gla"], [], r"blocks\.0\."),
        (["linear.mixer.*_proj"], [], r"blocks\.[02]\.mixer\..*_proj\."),
        (["sla.mixer.linear_*"], [], r"blocks\.3\.mixer\.linear_(weight|bias)$"),
        (["blocks.*.mlp"], [], r"blocks\.\d\.mlp\."),
        (["softmax", "head"], ["*.mlp"], r"blocks\.1\.(mixer|mlp_norm)|head"),
        (["blocks.1.mixer.q_proj.weight"], [], r"blocks\.1\.mixer\.q_proj"),
        ([], ["embedding", "head", "norm"], r"blocks\."),
        ([], ["blocks.[0-2]"], r"blocks\.3|embedding|norm\.weight$|head"),
        (["*"], ["blocks"], r"(?!blocks)"),
    ],
)
def test_patterns_name_modules_kinds_and_parameters(train, freeze, wanted):
    model = build_model(FEW)
    names = [name for name, _ in model.named_parameters()]
    expected = [name for name in names if re.match(wanted, name)]
    if freeze == ["blocks.[0-2]"]:
        expected = [name for name in names if not re.match(r"blocks\.[0-2]\.", name)]
    assert 0 < len(expected) < len(names)
    assert list(Trainable(tuple(train), tuple(freeze)).names(model)) == expected
    assert num_trained(FEW, Trainable(tuple(train), tuple(freeze))) == sum(
        parameter.numel() for name, parameter in model.named_parameters() if name in expected
    )


def test_a_number_of_a_block_is_no_beginning_of_another():
    model = build_model(replace(FEW, num_layers=12))
    assert {name.split(".")[1] for name in Trainable(("blocks.1",)).names(model)} == {"1"}


@pytest.mark.parametrize(
    ("config", "train", "freeze", "said"),
    [
        (FEW, ["linear.mixr"], [], "optim.train has linear.mixr, which names no parameter: did you mean linear.mixer?"),
        (FEW, [], ["llsa"], "optim.freeze has llsa, which names no parameter: names begin with embedding, blocks, "
                            "linear:gla, linear, softmax, linear:scalar, sla, norm, head"),
        (FEW, [], ["*"], "optim.freeze=[*]: nothing is left to train; freeze less"),
        (FEW, ["norm"], ["*norm*"], "optim.train=[norm] and optim.freeze=[*norm*]: nothing is left to train"),
        (TIED, ["head"], [], "with model.tie_embeddings=true the head is the embedding"),
    ],
)  # fmt: skip
def test_patterns_that_do_not_fit(config, train, freeze, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        Trainable(tuple(train), tuple(freeze)).names(build_model(config))


def test_the_table_counts_every_part():
    model = build_model(FEW)
    lines = table(model, Trainable(("linear.mixer", "head")).names(model))
    counts = [
        [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) of\s+([\d,]+)", line)[0]] for line in lines
    ]
    assert counts[0] == [sum(column) for column in zip(*counts[1:])]
    own = {line.split()[0]: count for line, count in zip(lines[1:], counts[1:])}
    assert own["head"] == [29 * 8] * 2 and own["embedding"] == [0, 29 * 8] and own["softmax.mlp"] == [0, 3 * 8 * 12]
    assert own["linear:gla.mixer"][0] == own["linear:gla.mixer"][1] > 0


def batch(config, lengths=LENGTHS):
    chance = torch.Generator().manual_seed(0)
    if config.task == "images":
        image, noise = (torch.randn(2 * 16, 3, dtype=torch.float64, generator=chance) for _ in range(2))
        return image, noise, torch.tensor([0.3, 0.7], dtype=torch.float64), SequenceParallel().context([16, 16])
    tokens = torch.randint(29, (sum(lengths),), generator=chance)
    return tokens, tokens.roll(-1), SequenceParallel().context(list(lengths))


def fresh(config):
    torch.manual_seed(1)
    model = build_model(config).double()
    for parameter in model.parameters():
        if not parameter.any():  # modulation, head, SLA's projection
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def gradients(config, trainable=ALL, **options):
    """The loss and every gradient, by name."""
    return gradients_of(fresh(config), batch(config), trainable, **options)


def gradients_of(model, given, trainable, **options):
    model = parallelize(
        model, shard=lambda model: model, trainable=trainable, compile=False, **{"checkpointing": "none"} | options
    )
    loss = model(*given)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


FROZEN = {
    "mixers": (EVERY, ["blocks.*.mixer"]),
    "queries": (EVERY, ["*.q_proj", "linear:mamba2.mixer.in_proj"]),
    "values": (EVERY, ["*.v_proj", "*.o_proj"]),
    "small ones": (EVERY, ["*norm", "*.decay", "*.gate", "*.conv", "*linear_*", "*.b_proj"]),
    "the last": (EVERY, [f"blocks.{len(LAYER_KINDS) - 1}"]),
    "the middle": (EVERY, ["blocks.4", "blocks.7.mlp"]),
    "the embedding": (EVERY, ["embedding"]),
    "the head": (EVERY, ["head"]),
    "tied": (TIED, ["embedding"]),
    "tied frozen": (TIED, ["linear.mixer"]),
    "images": (IMAGES, ["sla"]),
    "modulation": (IMAGES, ["blocks.1.modulation", "llsa.mlp"]),
    "time": (IMAGES, ["time"]),
}
OPTIONS = {
    "plain": {},
    "full": {"checkpointing": "full"},
    "selective": {"checkpointing": "selective"},
    "tiles": {"mlp_tile": 7},
    "all": {"checkpointing": "full", "mlp_tile": 16, "offload_activations": True},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", FROZEN)
def test_gradients_are_those_of_the_whole_model(name, options):
    config, patterns = FROZEN[name]
    loss, wanted = gradients(config)
    found_loss, found = gradients(config, Trainable(tuple(patterns)), **OPTIONS[options])
    assert found.keys() == set(Trainable(tuple(patterns)).names(build_model(config)))
    assert found_loss == pytest.approx(loss, rel=1e-12)
    for name, grad in found.items():
        assert wanted[name].norm() > 0 and (grad - wanted[name]).norm() <= 1e-10 * wanted[name].norm(), name


# As large as kernels for GPUs want it. What they compute goes by which inputs need a gradient.
WIDE = replace(
    EVERY, hidden_size=256, mlp_size=384, init_std=0.05, loss_chunk=128, window=100, state_size=64, gate_rank=16,
    sla_query_block=64, sla_key_block=64, llsa_block=16, llsa_keep=3,
    sparse_selection={"name": "top", "keep": 3, "query_block": 64, "key_block": 64},
)  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("train", "freeze", "options"),
    [
        (["blocks.*.mixer"], [], "plain"),
        (["*.q_proj", "*.v_proj", "linear:mamba2.mixer.in_proj"], [], "full"),
        (["*norm", "*.decay", "*.gate", "*.conv", "*linear_*", "*.b_proj"], [], "plain"),
        ([], ["*.decay", "*.k_proj", "embedding"], "all"),
        (["blocks.4", "blocks.7.mlp"], [], "all"),
    ],
)
def test_gradients_of_kernels_are_those_of_the_whole_model(train, freeze, options, device, monkeypatch):
    """In bf16, where kernels may add up in another order every time; on the CPU in fp32 and with fewer tokens."""
    monkeypatch.setattr(offload, "LEAST_BYTES", 0)
    cases = {"cuda": ((517, 1, 131), torch.bfloat16, 3e-2), "cpu": ((67, 1), torch.float32, 1e-4)}
    lengths, dtype, limit = cases[device]
    tokens, labels, _ = batch(WIDE, lengths)
    given = tokens.to(device), labels.to(device), SequenceParallel(device=device).context(list(lengths))

    def found(trainable):
        return gradients_of(cast(fresh(WIDE).float(), dtype).to(device), given, trainable, **OPTIONS[options])

    trainable = Trainable(tuple(train), tuple(freeze))
    (loss, wanted), (_, again), (some_loss, some) = map(found, (ALL, ALL, trainable))
    assert some.keys() == set(trainable.names(build_model(WIDE)))
    assert some_loss == pytest.approx(loss, rel=limit)
    noise, errors = ({name: difference(x[name], wanted[name]) for name in some} for x in (again, some))
    assert all(errors[name] <= max(limit, 4 * noise[name]) for name in some), (errors, noise)
    assert sum(noise[name] > limit for name in some) <= 0.1 * len(some), noise


def difference(x, wanted):
    return ((x - wanted).float().norm() / wanted.float().norm()).item()


def saved(config, trainable, **options):
    """Bytes that autograd keeps for the backward pass, parameters left out."""
    model = parallelize(
        fresh(config), shard=lambda model: model, trainable=trainable, compile=False,
        **{"checkpointing": "none"} | options,
    )  # fmt: skip
    own, kept = {parameter.untyped_storage()._cdata for parameter in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # alive, so that no other has its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(*batch(config))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("options", ["plain", "full", "tiles"])
def test_blocks_in_front_of_the_first_trained_one_keep_nothing(options):
    config = replace(FEW, num_layers=8)
    whole, half, head = (
        saved(config, trainable, **OPTIONS[options])
        for trainable in (ALL, Trainable(("blocks.[4-7]",)), Trainable(("head",)))
    )
    inside = saved(replace(FEW, num_layers=4), ALL, **OPTIONS[options])
    assert head < 0.35 * half and half <= inside < 0.75 * whole
    behind = saved(config, Trainable(("blocks.[0-3]",)), **OPTIONS[options])
    assert behind > half  # gradients pass blocks that are frozen


def test_blocks_in_front_are_not_computed_again(monkeypatch):
    replays, enter = [], recompute._Session.__enter__

    def entered(session):
        replays.append(session.replay)
        return enter(session)

    monkeypatch.setattr(recompute._Session, "__enter__", entered)
    gradients(replace(FEW, num_layers=8), Trainable(("blocks.[6-7]",)), checkpointing="full", offload_activations=True)
    assert replays == [False, False, True, True]


def test_model_flops_leave_out_what_is_not_computed():
    lengths, parts = [64, 32], {}
    for name, patterns in {
        "all": (),
        "half": ("blocks.[2-3]",),
        "head": ("head",),
        "embedding": ("embedding",),
    }.items():
        parts[name] = model_flops_by_kind(FEW, lengths, Trainable(patterns))
    forward = {name: flops / 3 for name, flops in parts["all"].items()}
    assert parts["head"] == pytest.approx(forward | {"head": 2 * forward["head"]})
    frozen = {name: 3 * flops for name, flops in forward.items()} | {
        "matmul": 2 * forward["matmul"], "head": 2 * forward["head"]
    }  # fmt: skip
    assert parts["embedding"] == pytest.approx(frozen)
    # Of blocks linear:gla, softmax, linear:scalar and sla the last two.
    assert parts["half"]["softmax"] == pytest.approx(forward["softmax"])
    assert parts["half"]["sparse"] == pytest.approx(3 * forward["sparse"])
    assert forward["linear"] < parts["half"]["linear"] < 3 * forward["linear"]
    model = build_model(FEW)
    products = [sum(p.numel() for p in block.parameters() if p.ndim > 1) for block in model.blocks]
    assert parts["half"]["matmul"] == 2 * 96 * (sum(products[:2]) + 3 * sum(products[2:]))
    assert parts["half"]["head"] == pytest.approx(2 * forward["head"])
    assert model_flops(TIED, lengths, Trainable(("embedding",))) == pytest.approx(
        sum(frozen.values()) + forward["head"]
    )


@pytest.mark.parametrize("options", ["plain", "full", "tiles"])
@pytest.mark.parametrize("patterns", [("blocks.[2-3]",), ("blocks.[0-1].mixer",), ("head",), ("*.q_proj",)])
def test_products_of_the_estimate_are_those_of_model_flops_at_most(patterns, options):
    """Counted on the model as it runs: no product for a gradient that nobody asks for."""

    def count(trainable):
        def prepare(model, offload):
            parallelize(model, shard=lambda m: m, trainable=trainable, compile=False,
                        **{"checkpointing": "none"} | OPTIONS[options])  # fmt: skip

        found = measure(
            replace(FEW, pattern=["softmax"], num_layers=4, loss_chunk=96), [96], prepare=prepare, gpu=False
        )
        return sum(found.flops.values()), found

    config = replace(FEW, pattern=["softmax"], num_layers=4)
    whole, _ = count(ALL)
    some, found = count(Trainable(patterns))
    wanted = [model_flops_by_kind(config, [96], trainable) for trainable in (ALL, Trainable(patterns))]
    spared = [flops["matmul"] + flops["head"] for flops in wanted]
    assert found.num_trained == num_trained(config, Trainable(patterns)) < found.num_parameters
    assert some < whole
    if options == "plain":  # what the first block spares of its input's gradient is not in model_flops
        assert 0.9 * spared[1] <= some <= spared[1] and whole == pytest.approx(spared[0])
    if patterns == ("blocks.[2-3]",):
        backward = {stage.block for stage in found.stages if stage.backward}
        assert backward == {None, 2, 3}


def test_freeze_leaves_values_alone():
    model = build_model(FEW)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    freeze(model, Trainable(("sla",)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        n for n in before if n[:8] == "blocks.3"
    }
