"""Engines: one run whichever of them stores the model, checkpoints that each continues, and what is refused."""

import copy
import importlib.util
import math
import shutil
import sys
import types

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks
from tiny_runs import rows, saved, start, tiny_config, write_corpus

from longspan.launcher.config import Config
from longspan.launcher.engines.zero import cast_parameters, import_deepspeed
from longspan.launcher.errors import UserError
from longspan.models.config import ModelConfig
from longspan.models.decay import Gate
from longspan.models.decoder import Decoder
from longspan.parallel import SequenceParallel

TOLERANCE = 1e-5
BF16_TOLERANCE = 5e-5  # a sum in another order may round one weight the other way
INSTALLED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not INSTALLED, reason="deepspeed is not installed: pip install '.[deepspeed]'")

# Three heads have gates of three parameters, which two ranks share unevenly. Every step is clipped.
COMMON = (
    "model.num_heads=3", "model.hidden_size=24", "optim.clip_grad_norm=0.5",
    "log.validation_interval=6", "log.validation_samples=2",
)  # fmt: skip
DDP = ("parallel.engine=ddp",)
ZERO = {stage: ("parallel.engine=deepspeed", f"parallel.zero_stage={stage}") for stage in (1, 2, 3)}
OFFLOAD = ("parallel.zero_offload_optimizer=true",)
BF16 = ("train.dtype=bfloat16",)
TIED = ("model.tie_embeddings=true",)
# name: settings. Two ranks and four samples a step, so that every step accumulates.
RUNS = {
    "fsdp2": (),
    "ddp": DDP,
    "ddp, sp 1": (*DDP, "parallel.sp=1"),
    "zero 1": ZERO[1],
    "zero 2, sp 1, offload": (*ZERO[2], "parallel.sp=1", *OFFLOAD),
    "zero 3": ZERO[3],
    "zero 3, sp 1, offload": (*ZERO[3], "parallel.sp=1", *OFFLOAD, "parallel.zero_offload_parameters=true"),
    "fsdp2, bf16": BF16,
    "zero 3, bf16": (*ZERO[3], *BF16),
    "fsdp2, tied": TIED,
    "zero 3, tied, recompute": (*ZERO[3], *TIED, "train.checkpointing=full"),
}
# (run that saved after step 3, run whose settings continue it)
RESUMED = [
    ("fsdp2", "ddp, sp 1"),
    ("ddp", "zero 3"),
    ("zero 1", "fsdp2"),
    ("zero 3", "zero 2, sp 1, offload"),
    ("zero 2, sp 1, offload", "zero 3, sp 1, offload"),
]


def _here(*names):
    """Whether these runs need nothing that is missing."""
    return INSTALLED or not any(name.startswith("zero") for name in names)


def _each(cases):
    return [pytest.param(*case, marks=() if _here(*case) else needs_deepspeed) for case in cases]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What each run and each continuation of one found, on two ranks; the last ones on one rank."""
    folder = tmp_path_factory.mktemp("engines")
    corpus = write_corpus(folder)
    results = run_ranks(_all_runs, 2, folder, corpus, timeout=300)[0]
    if INSTALLED:
        results |= run_ranks(_runs_on_one_rank, 1, folder, corpus)[0]
    return results


def _all_runs(rank, world_size, folder, corpus):
    results = {}
    for name in filter(_here, RUNS):
        results[name] = _run(corpus, folder / name, RUNS[name])
    for source, name in RESUMED:
        if _here(source, name):
            results[source, name] = _run(corpus, folder / f"{source} to {name}", RUNS[name], folder / source)
    return results


def _runs_on_one_rank(rank, world_size, folder, corpus):
    source, settings = folder / "zero 3", (*ZERO[3], *OFFLOAD)
    return {("zero 3", "one rank"): _run(corpus, folder / "one rank", settings, source)}


def _run(corpus, run_dir, settings, source=None):
    """A run, or the continuation of a copy of run `source` that lost all after step 3."""
    if source and dist.get_rank() == 0:
        shutil.copytree(source, run_dir)
        shutil.rmtree(run_dir / "checkpoints" / "step-00000006")
    dist.barrier()
    trainer = start(tiny_config(corpus, run_dir, *COMMON, *settings))
    first = trainer.step
    trainer.train()
    trainer.close()
    dist.barrier()
    return {"first": first, "rows": rows(run_dir), "dir": run_dir, "stored": _stored(trainer)}


def _stored(trainer):
    """Share of the optimizer state and of the parameters that this rank stores."""
    flats = [state["exp_avg"] for state in trainer.engine.optimizer.state.values()]
    moments = sum(getattr(flat, "_local_tensor", flat).numel() for flat in flats)
    if hasattr(trainer.model, "zero_optimization_stage"):
        weights = sum(p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in trainer.model.parameters())
    else:
        weights = sum(p.to_local().numel() for p in trainer.model.parameters())
    return moments / trainer.num_parameters, weights / trainer.num_parameters


def _agree(found, wanted, tolerance=TOLERANCE):
    assert [row["step"] for row in found["rows"]] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "grad_norm", "lr"):
        assert [row[key] for row in found["rows"]] == pytest.approx([row[key] for row in wanted["rows"]], rel=tolerance)
    assert found["rows"][-1]["val_loss"] == pytest.approx(wanted["rows"][-1]["val_loss"], rel=tolerance)
    found, wanted = saved(found["dir"], 6), saved(wanted["dir"], 6)
    assert found.keys() == wanted.keys()
    for part in ("model", "exp_avg", "exp_avg_sq", "step"):
        names = [name for name in found if name.startswith("model.") == (part == "model") and part in name]
        one, other = (torch.cat([state[name].double().flatten() for name in names]) for state in (found, wanted))
        assert ((one - other).norm() / other.norm()).item() <= 10 * tolerance, part


@pytest.mark.parametrize("name", _each((name,) for name in RUNS if not name.startswith("fsdp2")))
def test_engines_train_the_same_run(runs, name):
    assert runs[name]["first"] == 0
    assert all(row["grad_norm"] > 0.5 for row in runs[name]["rows"]), "nothing was clipped"
    if "bf16" in name:
        _agree(runs[name], runs["fsdp2, bf16"], BF16_TOLERANCE)
    else:
        _agree(runs[name], runs["fsdp2, tied" if "tied" in name else "fsdp2"])


def test_bf16_is_told_from_fp32(runs):
    bf16, fp32 = ([row["grad_norm"] for row in runs[name]["rows"]] for name in ("fsdp2, bf16", "fsdp2"))
    assert bf16 != pytest.approx(fp32, rel=BF16_TOLERANCE)


@pytest.mark.parametrize("source, name", _each([*RESUMED, ("zero 3", "one rank")]))
def test_engines_continue_each_others_checkpoints(runs, source, name):
    assert runs[source, name]["first"] == 3
    _agree(runs[source, name], runs["fsdp2"])


@pytest.mark.parametrize(
    "name, moments, weights",
    [
        pytest.param(*case, marks=() if _here(case[0]) else needs_deepspeed)
        for case in (("fsdp2", 0.5, 0.5), ("ddp", 1, 1), ("zero 1", 0.5, 1), ("zero 3", 0.5, 0.5))
    ],
)
def test_what_a_rank_stores(runs, name, moments, weights):
    assert runs[name]["stored"] == pytest.approx((moments, weights), abs=0.02)


POISONS = {
    "the loss is nan (from rank 1)": lambda loss: loss + math.nan,  # whose gradients are finite
    "the gradient norm is": lambda loss: loss + (loss * 0).sqrt(),  # equal, but for a derivative 0 * inf
}


def test_nan_on_one_rank_leaves_the_update_out(tmp_path):
    corpus = write_corpus(tmp_path)
    engines = {"ddp": DDP} | ({"zero 1": ZERO[1], "zero 3": ZERO[3]} if INSTALLED else {})
    for found in run_ranks(_nan_on_rank_one, 2, tmp_path, corpus, engines):
        for (name, problem), (message, updates) in found.items():
            assert message.startswith(problem) and "at step 2, whose update was left out" in message, name
            assert updates == [True, False], (name, problem)


def _nan_on_rank_one(rank, world_size, folder, corpus, engines):
    return {
        (name, problem): _poisoned(tiny_config(corpus, folder / f"{name} {number}", *settings), problem, rank)
        for name, settings in engines.items()
        for number, problem in enumerate(POISONS)
    }


def _poisoned(config, problem, rank):
    """How a run ends whose second step is poisoned on rank 1, and which of its steps changed the weights."""
    trainer, weights = start(config), []
    next_step = trainer.loader.next_step

    def look():
        shards = trainer.engine.state_dict()["model"].values()
        weights.append(torch.cat([shard.full_tensor().flatten() for shard in shards]))

    def observed():
        look()
        return next_step()

    def poison(module, inputs, output):
        return POISONS[problem](output) if rank == 1 and trainer.step == 2 else output

    trainer.loader.next_step = observed
    trainer.model.register_forward_hook(poison)
    with pytest.raises(UserError) as error:
        trainer.train()
    look()
    trainer.close()
    return str(error.value), [not torch.equal(before, after) for before, after in zip(weights, weights[1:])]


def test_parameters_cast_where_they_are_read():
    """Equal to a model whose weights are bf16 but for its gates, outputs and gradients; stored in fp32 all the same."""
    torch.manual_seed(0)
    model = Decoder(ModelConfig(vocab_size=29, num_layers=2, hidden_size=16, num_heads=2, mlp_size=12, init_std=0.3,
                                pattern=["linear:scalar", "softmax"], loss_chunk=7))  # fmt: skip
    rounded = copy.deepcopy(model).bfloat16()
    gates = [(name, module) for name, module in model.named_modules() if isinstance(module, Gate)]
    assert gates
    for name, gate in gates:
        rounded.get_submodule(name).load_state_dict(gate.state_dict(), assign=True)
    names = [name for name, _ in model.named_parameters()]
    cast_parameters(model, torch.bfloat16)
    tokens = torch.randint(29, (24,), generator=torch.Generator().manual_seed(1))
    losses = [m(tokens, tokens.roll(-1), SequenceParallel().context([15, 9])) for m in (model, rounded)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    assert [name for name, _ in model.named_parameters()] == names == list(model.state_dict())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, rounded.get_parameter(name).grad.float(), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize(
    "settings, message",
    [
        (["parallel.engine=ddp", "parallel.sharding=hsdp"], "parallel.sharding=hsdp is for parallel.engine=fsdp2"),
        ([*ZERO[3], "parallel.sharding=hsdp"], "parallel.sharding=hsdp is for parallel.engine=fsdp2, not deepspeed"),
        (["parallel.zero_stage=1"], "parallel.zero_stage is for parallel.engine=deepspeed, not fsdp2: leave it out"),
        ([*DDP, *OFFLOAD], "parallel.zero_offload_optimizer is for parallel.engine=deepspeed, not ddp"),
        (["parallel.engine=deepspeed", "parallel.zero_stage=0"], "parallel.zero_stage=0: use 1, 2 or 3"),
        ([*ZERO[2], "parallel.zero_offload_parameters=true"], "needs parallel.zero_stage=3, not 2"),
        ([*ZERO[3], "train.compile=true"], "train.compile=true cannot trace the hooks of parallel.zero_stage=3: use 1"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(UserError, match=message):
        Config.load(None, ["data.corpora=[{path: x}]", *settings])


def test_deepspeed_missing_or_untested(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"parallel.engine=deepspeed needs the package deepspeed: pip install"):
        import_deepspeed(torch.device("cpu"))
    old = types.ModuleType("deepspeed")
    old.__version__, old.__path__, old.ops = "0.14.5", [], types.ModuleType("deepspeed.ops")
    monkeypatch.setitem(sys.modules, "deepspeed", old)
    monkeypatch.setitem(sys.modules, "deepspeed.ops", old.ops)
    with pytest.raises(UserError, match=r"needs deepspeed 0.19.x, not 0.14.5: pip install 'longspan\[deepspeed\]'"):
        import_deepspeed(torch.device("cpu"))
