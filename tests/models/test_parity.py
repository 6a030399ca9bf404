"""The model on 1, 2, 3, 4 and 8 ranks against one rank: the loss and the gradient of every parameter.

Covers every linear family x layout x strategy, one long document and mixed lengths, ranks without tokens included.
"""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.distributed as dist
from cases import layouts
from spawn import run_ranks

from longspan.models.config import ModelConfig
from longspan.models.decoder import Decoder
from longspan.parallel import SequenceParallel

WORLD_SIZES = [1, 2, 3, 4, 8]
# Positive features and a large norm_eps keep the RMSNorm of linear layers from dividing by nearly nothing: what fp32
# has to hold to 1e-5 is then the arithmetic and not the condition of a tiny random model.
TINY = dict(
    vocab_size=29, hidden_size=8, num_heads=2, mlp_size=12, init_std=0.3, loss_chunk=7, feature_map="elu1",
    norm_eps=1e-3, state_size=5, gate_rank=3,
)  # fmt: skip
MODELS = {
    "families": dict(
        pattern=["linear:none", "linear:fixed", "linear:scalar", "softmax"],
        num_layers=4, decay_slopes="retention", num_kv_heads=1, qk_norm=True,
    ),
    "gates": dict(
        pattern=["linear:mamba2", "linear:gla", "linear:hgrn2", "linear:delta", "linear:gated_delta",
                 "linear:kda"], num_layers=6,
        linear_value_dim=5,
    ),
    "normalized": dict(
        pattern=["linear:scalar", "softmax"], num_layers=2, linear_normalize=True, tie_embeddings=True,
    ),
    "sparse": dict(
        pattern=["sla", "linear:scalar", "llsa", "sparse"], num_layers=4, num_kv_heads=1, sla_keep=2,
        sla_query_block=8, sla_key_block=4, llsa_block=4, llsa_keep=2,
        sparse_selection={"name": "tokens", "keep": 2, "query_block": 8, "key_block": 4}, sla_feature_map="hedgehog",
    ),
    "rest": dict(
        pattern=["sla", "softmax"], num_layers=2, num_kv_heads=1, sla_keep=2, sla_query_block=8, sla_key_block=4,
        sla_linear="rest",
    ),
    "windows": dict(pattern=["linear:fixed", "softmax:window", "softmax"], num_layers=3, window=11, num_kv_heads=1),
}  # fmt: skip
LENGTHS = {"one": (83,), "mixed": (1, 17, 2, 40, 5, 1, 16)}
LAYOUTS = ["contiguous", "zigzag", "balanced", "holes"]
STRATEGIES = [("lasp2", "ring"), ("lasp", "all_gather")]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@dataclass(frozen=True)
class Case:
    model: str
    lengths: str
    layout: str
    linear: str
    softmax: str
    dtype: torch.dtype


def all_cases():
    """Everything with the first model in fp64; the other models and fp32 take turns."""
    for i, lengths in enumerate(LENGTHS):
        for j, layout in enumerate(LAYOUTS):
            for k, strategies in enumerate(STRATEGIES):
                yield Case("families", lengths, layout, *strategies, torch.float64)
                if (i + j + k) % 2:
                    yield Case("normalized", lengths, layout, *strategies, torch.float64)
                    yield Case("families", lengths, layout, *strategies, torch.float32)
                else:
                    yield Case("gates", lengths, layout, *strategies, torch.float64)
                    if lengths == "mixed":
                        yield Case("gates", lengths, layout, *strategies, torch.float32)
        yield Case("families", lengths, "balanced", "lasp2", "zeppelin", torch.float64)
        yield Case("normalized", lengths, "contiguous", "lasp2", "zeppelin_even", torch.float64)
        for layout, softmax in zip(LAYOUTS, ("zeppelin", "ring", "usp", "all_gather")):
            yield Case("windows", lengths, layout, "lasp2", softmax, torch.float64)
            yield Case("sparse", lengths, layout, "lasp2", softmax, torch.float64)
            yield Case("rest", lengths, layout, "lasp", softmax, torch.float64)
        yield Case("windows", lengths, "balanced", "lasp2", "ring", torch.float32)


def make_model(name, dtype):
    torch.manual_seed(0)
    model = Decoder(ModelConfig(**TINY | MODELS[name]))
    for name, parameter in model.named_parameters():
        if ".linear_" in name:  # of sla; starts at zero
            torch.nn.init.normal_(parameter)
    return model.to(dtype)


def make_batch(lengths):
    tokens = torch.randint(29, (sum(lengths),), generator=torch.Generator().manual_seed(2))
    labels = tokens.roll(-1)
    labels[::9] = -100
    return tokens, labels


def loss_and_gradients(model, tokens, labels, seq):
    """{"loss", parameter name...: gradient}; a parameter without a gradient would let ranks fall out of step."""
    model.zero_grad()
    loss = model(tokens, labels, seq)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


@cache
def one_rank(model, lengths, dtype):
    tokens, labels = make_batch(LENGTHS[lengths])
    seq = SequenceParallel().context(LENGTHS[lengths])
    return loss_and_gradients(make_model(model, dtype), tokens, labels, seq)


def run_all(rank, world_size):
    """This rank's part of every case's loss and gradients, in the order of all_cases."""
    return [run_one(case, rank, world_size) for case in all_cases()]


def run_one(case, rank, world_size):
    parallel = SequenceParallel(dist.group.WORLD, linear=case.linear, softmax=case.softmax)
    layout = layouts(LENGTHS[case.lengths], world_size)[case.layout]
    held = torch.from_numpy(layout.global_indices(rank))
    tokens, labels = (x[held] for x in make_batch(LENGTHS[case.lengths]))
    return loss_and_gradients(make_model(case.model, case.dtype), tokens, labels, parallel.context(layout))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_equals_one_rank(world_size):
    ranks = run_ranks(run_all, world_size)
    problems = []
    for case, *shares in zip(all_cases(), *ranks, strict=True):
        for name, wanted in one_rank(case.model, case.lengths, case.dtype).items():
            found = sum(share[name].double() for share in shares)
            error = ((found - wanted.double()).norm() / wanted.double().norm()).item()
            if not error <= TOLERANCE[case.dtype]:
                problems.append(f"{case}: {name} is off by {error:.1e}")
    assert not problems, f"{len(problems)} differences on {world_size} ranks\n" + "\n".join(problems)


def test_fp32_gradients_are_right_on_one_rank():
    """The reference of the fp32 cases against fp64 on the same parameters."""
    for model in MODELS:
        found, wanted = one_rank(model, "mixed", torch.float32), one_rank(model, "mixed", torch.float64)
        for name, exact in wanted.items():
            assert (found[name].double() - exact).norm() <= 2e-5 * exact.norm(), (model, name)
