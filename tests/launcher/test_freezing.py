"""Runs that train some parameters: against a loop of plain tensors that steps only them, on every engine; how they go
on with another choice; what is refused."""

import importlib.util
import json
import math
import re
import shutil

import pytest
import torch
import torch.distributed as dist
from devices import DEVICES, only_rank
from spawn import run_ranks
from tiny_runs import CPU, rows, saved, start, tiny_config, write_corpus

from longspan.launcher import cli
from longspan.launcher.config import Config
from longspan.launcher.errors import UserError
from longspan.launcher.estimate import Job, estimate
from longspan.launcher.gpus import parse_gpus
from longspan.launcher.schedule import learning_rate
from longspan.models.build import build_model

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install '.[deepspeed]'"
)
COMMON = (
    "model.num_layers=4", "model.init_std=0.3", "model.num_heads=2", "model.num_kv_heads=2", "optim.clip_grad_norm=0.5",
    "optim.weight_decay=0.5", "checkpoint.interval=3",
)  # fmt: skip
# Of linear:scalar, softmax, linear:scalar, softmax: gates and a norm are among what is trained, a frozen block stands
# in front, one behind.
SOME = ("optim.train=[blocks.1.mixer, linear.mixer, blocks.2.mlp_norm]", "optim.freeze=[blocks.0]")
TRAINED = r"blocks\.[12]\.mixer\.|blocks\.2\.mlp_norm"
ZERO = {stage: ("parallel.engine=deepspeed", f"parallel.zero_stage={stage}") for stage in (1, 2, 3)}
RUNS = {
    "fsdp2": SOME,
    "ddp, sp 1": (*SOME, "parallel.engine=ddp", "parallel.sp=1"),
    "tp": (*SOME, "parallel.tp=2"),
    "memory": (*SOME, "optim.offload=cpu", "train.checkpointing=full", "train.mlp_tile=16",
               "train.offload_activations=true"),
    "zero 1": (*SOME, *ZERO[1]),
    "zero 2, sp 1, offload": (*SOME, *ZERO[2], "parallel.sp=1", "parallel.zero_offload_optimizer=true"),
    "zero 3": (*SOME, *ZERO[3], "train.checkpointing=full"),
    "tied": ("model.tie_embeddings=true", "optim.train=[embedding]"),
    "norms": ("optim.train=['*norm*']", "optim.freeze=[blocks.0]"),
    "zero 3, norms": ("optim.train=['*norm*']", "optim.freeze=[blocks.0]", *ZERO[3]),
}  # fmt: skip
# name: (run that saved after step 3, settings of what goes on)
FEWER = ("optim.train=[blocks.1.mixer]",)
RESUMED = {
    "zero 3 on": ("fsdp2", RUNS["zero 3"]),
    "fsdp2 on": ("zero 2, sp 1, offload", SOME),
    "fewer": ("fsdp2", FEWER),
    "fewer, zero 2": ("fsdp2", (*FEWER, *ZERO[2])),
    "fewer, zero 3": ("fsdp2", (*FEWER, *ZERO[3])),
    "all": ("fsdp2", ()),
    "all, zero 3": ("fsdp2", ZERO[3]),
}
ALONE = "fsdp2", "ddp, sp 1", "memory", "norms", "fewer"  # on one rank of a device; the first is continued by the last
ZEROS = [name for name in (*RUNS, *RESUMED) if "zero" in name or "fsdp2 on" in name]


def _each(names):
    return [pytest.param(name, marks=needs_deepspeed if name in ZEROS else ()) for name in names]


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """By name what plain loops on one rank give, and where their corpus is."""
    folder = tmp_path_factory.mktemp("freezing")
    corpus = write_corpus(folder)
    return run_ranks(_references, 1, folder, corpus, timeout=300)[0] | {"folder": folder, "corpus": corpus}


@pytest.fixture(scope="module")
def runs(references):
    """By name the rows and saved states of each run on two ranks, and of the reference on one."""
    names = [name for name in (*RUNS, *RESUMED) if name not in ZEROS or importlib.util.find_spec("deepspeed")]
    return references | run_ranks(_run_all, 2, references["folder"], references["corpus"], names, timeout=540)[0]


@pytest.fixture(scope="module", params=DEVICES)
def alone(request, references, tmp_path_factory):
    """By name some of the runs on one rank of a device, the plain loops from its weights on the CPU, and how many times
    less exact it is."""
    folder, exactness, corpus = tmp_path_factory.mktemp(request.param), 1, references["corpus"]
    if request.param != "cpu":  # where other weights are drawn
        exactness, (references,) = 10, run_ranks(_references, 1, folder, corpus, request.param, timeout=300)
    with only_rank(request.param) as device:
        found = {name: _run(folder, corpus, name, device) for name in ALONE}
    return references | found | {"exactness": exactness}


def _run_all(rank, world_size, folder, corpus, names):
    return {name: _run(folder, corpus, name) for name in names}


def _run(folder, corpus, name, device=CPU):
    source, settings = RESUMED.get(name, (None, RUNS.get(name)))
    if source and dist.get_rank() == 0:
        shutil.copytree(folder / source, folder / name)
        shutil.rmtree(folder / name / "checkpoints" / "step-00000006")
    dist.barrier()
    trainer = start(tiny_config(corpus, folder / name, *COMMON, *settings), device)
    assert trainer.step == (3 if source else 0)
    held = sum(state["exp_avg"].numel() for state in trainer.engine.optimizer.state.values())
    trainer.train()
    trainer.close()
    held = held or sum(state["exp_avg"].numel() for state in trainer.engine.optimizer.state.values())
    dist.barrier()
    return {"rows": rows(folder / name), "held": held, **{step: saved(folder / name, step) for step in (3, 6)}}


def _references(rank, world_size, folder, corpus, device="cpu"):
    every, given = r".", (folder, corpus, device)
    found = {
        "reference": _reference(*given, TRAINED),
        "reference tied": _reference(*given, r"embedding", "model.tie_embeddings=true"),
        "reference norms": _reference(*given, r"(?!blocks\.0).*norm"),
    }
    first = found["reference"]
    found["reference fewer"] = _reference(*given, r"blocks\.1\.mixer\.", begin=first[3], moments=first["moments"])
    found["reference all"] = _reference(*given, every, begin=first[3])
    return found


def _reference(folder, corpus, device, trained, *settings, begin=None, moments=None):
    """Weights after steps 3 and 6 of a loop over the trainer's batches on one rank: autograd of the whole model, and
    the formulas of clipping and AdamW written out, for parameters whose names match alone. device: where weights are
    drawn; begin: weights at step 3, from which it goes on, with the moments of then or without any."""
    config = tiny_config(corpus, folder / "reference", *COMMON, *settings)
    trainer = start(config)
    batches = [trainer.loader.next_step() for _ in range(6)]
    trainer.close()
    torch.manual_seed(config.run.seed)
    with torch.device(device):
        model = build_model(config.model)
    model.to("cpu")
    if begin is not None:
        model.load_state_dict(begin)
    optim, result = config.optim, {"initial": _values(model), "losses": [], "norms": []}
    states = {} if moments is None else {name: [x.clone() for x in pair] for name, pair in moments.items()}
    own = {name: parameter for name, parameter in model.named_parameters() if re.match(trained, name)}
    updates = 0 if moments is None else 3
    for step in range(1 if begin is None else 4, 7):
        model.zero_grad()
        batch = batches[step - 1]
        loss = sum(model(*part.inputs, part.seq) for part in batch) / batch[0].num_labels_global
        loss.backward()
        norm = math.sqrt(sum(parameter.grad.double().square().sum().item() for parameter in own.values()))
        result["losses"].append(loss.item())
        result["norms"].append(norm)
        rate, updates = learning_rate(optim, step, 6), updates + 1
        with torch.no_grad():
            for name, parameter in own.items():
                grad = parameter.grad * min(1.0, optim.clip_grad_norm / norm)
                mean, square = states.setdefault(name, [torch.zeros_like(grad), torch.zeros_like(grad)])
                mean.lerp_(grad, 1 - optim.beta1)
                square.lerp_(grad.square(), 1 - optim.beta2)
                parameter *= 1 - rate * optim.weight_decay * (parameter.ndim > 1)
                root = (square / (1 - optim.beta2**updates)).sqrt() + optim.eps
                parameter -= rate * mean / (1 - optim.beta1**updates) / root
        if step in (3, 6):
            result[step] = _values(model)
        if step == 3:
            result["moments"] = {name: [x.clone() for x in pair] for name, pair in states.items()}
    return result


def _values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def _compare(found, wanted, trained, steps=(3, 6), exactness=1):
    first = 0 if 3 in steps else 3
    assert [row["loss"] for row in found["rows"]][first:] == pytest.approx(wanted["losses"], rel=1e-5 * exactness)
    assert [row["grad_norm"] for row in found["rows"]][first:] == pytest.approx(wanted["norms"], rel=1e-4 * exactness)
    if exactness == 1:  # of other weights norms are others
        assert all(norm > 0.5 for norm in wanted["norms"][:2]), "nothing was clipped"
    for step in steps:
        names = [name.removeprefix("model.") for name in found[step] if name.startswith("model.")]
        assert set(names) == set(wanted[step])
        for name in names:
            value, moved = found[step][f"model.{name}"], wanted[step][name] - wanted["initial"][name]
            if re.match(trained, name):
                assert moved.norm() > 0
                assert (value - wanted[step][name]).norm() <= 2e-3 * exactness * moved.norm(), (step, name)
            else:  # in what goes on it may have been trained until then
                before = wanted["initial"][name] if 3 in steps else found[3][f"model.{name}"]
                assert torch.equal(value, before), (step, name)
            assert (f"optimizer.state.{name}.exp_avg" in found[step]) == bool(re.match(trained, name)), (step, name)


@pytest.mark.parametrize("name", _each(name for name in RUNS if not name.startswith("tied") and "norms" not in name))
def test_what_is_trained_moves_as_in_a_plain_loop_and_the_rest_stays(runs, name):
    _compare(runs[name], runs["reference"], TRAINED)


@pytest.mark.parametrize("name", ALONE)
def test_one_rank_on_each_device(alone, name):
    reference, trained = {
        "norms": ("reference norms", r"(?!blocks\.0).*norm"),
        "fewer": ("reference fewer", r"blocks\.1\.mixer\."),
    }.get(name, ("reference", TRAINED))
    _compare(alone[name], alone[reference], trained, (6,) if name == "fewer" else (3, 6), alone["exactness"])


@pytest.mark.parametrize("name", _each(["norms", "zero 3, norms"]))
def test_what_does_not_decay_alone(runs, name):
    _compare(runs[name], runs["reference norms"], r"(?!blocks\.0).*norm")


def test_a_tied_embedding_alone(runs):
    _compare(runs["tied"], runs["reference tied"], "embedding")


def test_ranks_hold_states_of_what_is_trained(runs):
    trained = sum(value.numel() for name, value in runs["reference"][6].items() if re.match(TRAINED, name))
    assert runs["fsdp2"]["held"] == trained  # of DTensors, whole
    if "zero 3" in runs:
        assert trained / 2 <= runs["zero 3"]["held"] < trained / 2 + 100  # of this rank, padded


@pytest.mark.parametrize("name", _each(["zero 3 on", "fsdp2 on"]))
def test_engines_continue_each_others_choice(runs, name):
    _compare(runs[name], runs["reference"], TRAINED)


@pytest.mark.parametrize("name", _each(["fewer", "fewer, zero 2", "fewer, zero 3"]))
def test_fewer_parameters_go_on_with_their_states(runs, name):
    _compare(runs[name], runs["reference fewer"], r"blocks\.1\.mixer\.", steps=(6,))


@pytest.mark.parametrize("name", _each(["all", "all, zero 3"]))
def test_more_parameters_begin_with_new_states(runs, name):
    _compare(runs[name], runs["reference all"], ".", steps=(6,))


def test_the_line_of_a_run_that_trains_more(runs, caplog, tmp_path):
    shutil.copytree(runs["folder"] / "fsdp2", tmp_path / "run")
    said = run_ranks(_lines, 1, runs["folder"] / "corpus", tmp_path / "run")[0]
    assert [line for line in said if "trained now" in line] == [
        "trained now, but not in the checkpoint: blocks.3.mixer.q_proj.weight, blocks.3.mixer.k_proj.weight,"
        " blocks.3.mixer.v_proj.weight and 1 more; the optimizer's states of all parameters begin anew"
    ]
    table = said[said.index(next(line for line in said if line.startswith("trained: "))) :]
    assert re.match(r"trained: 2,048 of [\d,]+ parameters", table[0])
    assert any(re.fullmatch(r"  softmax\.mixer +2,048 of +2,048", line) for line in table)


def _lines(rank, world_size, corpus, run_dir):
    import logging

    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    for name in ("longspan", "longspan.launcher.checkpoint"):
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel("INFO")
    logging.getLogger("longspan").propagate = False
    trainer = start(tiny_config(corpus, run_dir, *COMMON, "optim.train=[softmax.mixer]", "train.steps=7"))
    trainer.train()
    trainer.close()
    return list(dict.fromkeys(said))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["optim.freeze=[blocks, embedding, head, norm]"], "nothing is left to train"),
        (["optim.train=[linear.mixr]"], "optim.train has linear.mixr, which names no parameter: did you mean"),
        (["optim.train=linear"], "optim.train: expected a list of text, in brackets: [one, other], found 'linear'"),
    ],
)
def test_what_does_not_fit_is_one_line_before_anything_starts(settings, said, capsys):
    base = ["data.corpora=[{path: x}]", "model.pattern=[linear, softmax]"]
    with pytest.raises(UserError, match=re.escape(said)) as error:
        Config.load(None, [*base, *settings])
    assert "\n" not in str(error.value)
    with pytest.raises(SystemExit):
        cli.main(["plan", "--config", "quickstart", *settings])
    assert said in capsys.readouterr().err


def test_plans_count_gradients_and_states_of_what_is_trained(capsys):
    base = ["data.corpora=[{path: x}]", "model.num_layers=8", "model.hidden_size=256", "model.vocab_size=1000",
            "train.dtype=bfloat16", "data.seq_len=64K"]  # fmt: skip

    def found(*settings):
        return estimate(Job(Config.load(None, [*base, *settings]), parse_gpus("2xH200")))

    whole, half, mixers = found(), found("optim.train=['blocks.[4-7]']"), found("optim.train=['blocks.*.mixer']")
    for some in (half, mixers):
        assert some.num_trained < some.num_parameters == whole.num_parameters == whole.num_trained
        assert some.memory["parameters"] == whole.memory["parameters"]
        assert some.memory["optimizer state"] == 8 * some.num_trained / 2
        assert some.other_peak == whole.other_peak - 12 * (whole.num_parameters - some.num_trained) / 2
        share = some.num_trained / whole.num_parameters
        assert some.seconds["optimizer"] == pytest.approx(share * whole.seconds["optimizer"])
        assert some.step_s < whole.step_s and some.peak < whole.peak
    assert sum(half.kept.values()) < 0.65 * sum(whole.kept.values())
    assert half.step_s < 0.75 * whole.step_s
    one = found("train.global_batch=4", "parallel.sp=1", "optim.train=[head]")
    assert one.memory["gradients"] == 4 * one.num_trained / 2  # of the micro-batch before
    away = [found("optim.offload=cpu", *more).host for more in ((), ("optim.train=[head]",))]
    assert (
        away[1]["optimizer state"] == 8 * 256 * 1000
        and away[1]["parameters, gradients"] < away[0]["parameters, gradients"]
    )
    cli.main(["plan", "--config", "quickstart", "optim.train=[softmax]", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert 0 < result["trained_parameters"] < result["parameters"]
