"""The benchmark of training steps: other systems train the very model that longspan's decoder is, on 2 CPU ranks."""

import importlib.metadata
import json
import sys
from unittest import mock

import pytest
import torch
from spawn import run_ranks

from longspan.benchmarks import training_peers
from longspan.benchmarks.plain_decoder import Attention, PlainDecoder
from longspan.benchmarks.training_peers import read_lines
from longspan.benchmarks.training_systems import SYSTEMS, causal
from longspan.launcher.config import OptimConfig
from longspan.launcher.engines.optimizer import build_optimizer
from longspan.models.config import ModelConfig
from longspan.models.decoder import Decoder
from longspan.models.flops import model_flops
from longspan.parallel import SequenceParallel

MODEL = {
    "vocab_size": 300, "num_layers": 2, "hidden_size": 64, "num_heads": 4, "mlp_size": 96, "loss_chunk": 24,
    "pattern": ["softmax"], "init_std": 0.3,  # attention that is far from uniform
}  # fmt: skip
TOKENS, STEPS = 96, 3


def batches():
    generator = torch.Generator().manual_seed(1)
    streams = [torch.randint(MODEL["vocab_size"], (1, TOKENS + 1), generator=generator) for _ in range(STEPS)]
    return [(stream[:, :-1].contiguous(), stream[:, 1:].contiguous()) for stream in streams]


def losses_of(rank, world_size, name):
    version = importlib.metadata.version
    # DeepSpeed asks for the version of transformers and uses nothing of it.
    with mock.patch("importlib.metadata.version", lambda name: "5.0.0" if name == "transformers" else version(name)):
        system = SYSTEMS[name](ModelConfig(**MODEL), torch.device("cpu"))
    return [system.step(*batch) for batch in batches()]


@pytest.fixture(scope="module")
def expected():
    """Losses of the decoder of models/ in a training loop of its own, on one rank."""
    config = ModelConfig(**MODEL)
    torch.manual_seed(0)
    plain = PlainDecoder(config, lambda: Attention(config, causal))
    model = Decoder(config)
    model.load_state_dict(plain.state_dict())
    optimizer, seq, losses = build_optimizer(model, OptimConfig()), SequenceParallel().context((TOKENS,)), []
    for tokens, labels in batches():
        loss = model(tokens[0], labels[0], seq) / TOKENS
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["torch_cp", "deepspeed_ulysses"])
def test_systems_train_the_decoder_over_ranks(name, expected):
    for losses in run_ranks(losses_of, 2, name):
        assert losses == pytest.approx(expected, rel=1e-5)


def test_steps_are_timed_and_what_fails_is_recorded(tmp_path, capsys):
    path = tmp_path / "record.json"
    given = ["--device", "cpu", "--gpus", "2", "--tokens", "128", "--steps", "2", "--output", str(path)]
    given += ["--model", json.dumps(MODEL), "--systems", "longspan", "torch_cp", "fla_linear"]
    assert training_peers.main(given) == 0
    record = json.loads(path.read_text())
    ours, torch_cp = record["rows"]
    for row in (ours, torch_cp):
        assert row["tokens_per_s_per_gpu"] == pytest.approx(128 / row["step_s"] / 2) and row["peak_GiB"] > 0
        assert row["tflops_per_gpu"] * 2e12 * row["step_s"] == pytest.approx(model_flops(ModelConfig(**MODEL), (128,)))
        assert len(row["steps_s"]) == 2 and row["step_s"] == row["steps_s"][1] and 5 < row["loss"] < 50
    assert "fla" in record["not_measured"]["fla_linear"] and "torch_cp" in capsys.readouterr().out


def test_a_system_that_fails_or_takes_too_long_says_so(tmp_path):
    bad = json.dumps(MODEL | {"hidden_size": 66})  # its heads are not whole
    given = [
        "--device",
        "cpu",
        "--gpus",
        "1",
        "--tokens",
        "32",
        "64",
        "--systems",
        "torch_cp",
        "--output",
        str(tmp_path / "a.json"),
    ]
    assert training_peers.main([*given, "--model", bad]) == 0
    first, second = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert "Error" in first["error"] and second["error"] == "skipped: a shorter sequence failed"
    assert training_peers.main([*given, "--model", json.dumps(MODEL), "--limit", "0.1"]) == 0
    first, second = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert "took longer than" in first["error"] and "skipped" in second["error"]


def test_a_system_that_ends_after_its_first_length_has_one_row_of_it(tmp_path, monkeypatch):
    def ends(worker, model, runs, device, folder):
        output = folder / "rows.jsonl"
        row = json.dumps({"tokens": runs[0][0], "step_s": 1.0, "peak_GiB": 1.0})
        command = [sys.executable, "-c", f"open({str(output)!r}, 'a').write({row!r} + chr(10))"]
        return command, lambda: read_lines(output)

    monkeypatch.setattr(training_peers, "theirs", ends)
    given = ["--device", "cpu", "--gpus", "1", "--tokens", "32", "64", "--systems", "torch_cp"]
    assert training_peers.main([*given, "--model", json.dumps(MODEL), "--output", str(tmp_path / "a.json")]) == 0
    first, second = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert (first["tokens"], first["step_s"]) == (32, 1.0) and second["tokens"] == 64
    assert "a rank ended" in second["error"]
