"""The numbers of a step: counted once per SP group, MFU from model FLOPs, imbalance from attention pairs."""

import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from full_disk import files_of_at_most
from spawn import run_ranks

from longspan.launcher import metrics
from longspan.launcher.errors import UserError
from longspan.launcher.progress import TrainingProgress
from longspan.models.config import ModelConfig
from longspan.models.flops import model_flops
from longspan.parallel import SequenceParallel, contiguous, zigzag
from longspan.parallel.mesh import build_mesh

MODEL = ModelConfig(num_layers=2, hidden_size=16, num_heads=2, pattern=["linear", "softmax"])


@pytest.fixture(scope="module")
def gathered():
    return run_ranks(_gather, 4, timeout=60)


def _gather(rank, world_size):
    """Two micro-batches each: dp 2 x sp 2, what rank 0 would write, and what a step with a NaN says; dp 2 x tp 2."""
    losses = torch.tensor(1.0 + rank), torch.tensor(math.nan if rank == 2 else 1.0)
    return _rows(losses, sp=2) + _rows([torch.tensor(2.0 + rank // 2)], sp=1, tp=2)


def _rows(losses, sp, tp=1):
    mesh = build_mesh(sp=sp, sharding="fsdp", device=torch.device("cpu"), timeout_s=60, tp=tp)
    parallel = SequenceParallel(mesh.sp_group, mesh.sp_state_group)
    documents = [[(8,), (4, 4)], [(6,), (2,)]][mesh.dp_rank]
    batches = [SimpleNamespace(seq=parallel.context(contiguous(lengths, sp))) for lengths in documents]
    meter = metrics.StepMeter(MODEL, mesh)
    meter._peak_tflops = 1e-6  # as if this CPU were in the table
    rows = []
    for loss_sum in losses:
        table = meter.gather(loss_sum, batches)
        pending = meter.pending(7, 0.5, table, table[:, 0].sum() / 10, torch.tensor(2.0), 1.0, 3.0)
        try:
            rows.append(meter.resolve(pending))
        except UserError as error:
            rows.append(str(error))
    return rows


def _places(rank, world_size):
    """dp 2 x sp 2 with other documents each; then a rank of the second group has them elsewhere in its second batch."""
    mesh = build_mesh(sp=2, sharding="fsdp", device=torch.device("cpu"), timeout_s=60)
    parallel, meter, found = SequenceParallel(mesh.sp_group), metrics.StepMeter(MODEL, mesh), []
    for odd in (None, 3):
        layouts = [contiguous((8, 4 + mesh.dp_rank), 2), (zigzag if rank == odd else contiguous)((8,), 2)]
        batches = [SimpleNamespace(seq=parallel.context(layout)) for layout in layouts]
        table = meter.gather(torch.tensor(math.nan if odd else 1.0), batches)
        pending = meter.pending(7, 0.5, table, table[:, 0].sum(), torch.tensor(2.0), 1.0, 3.0)
        for compare in (lambda: meter.check_places(7, batches), lambda: meter.resolve(pending)):
            try:
                found.append(compare() and None)
            except UserError as error:
                found.append(str(error))
    return found


def test_ranks_that_have_placed_tokens_otherwise_are_named():
    """Also behind a loss that it has made NaN."""
    found = run_ranks(_places, 4, timeout=60)
    assert all(texts == found[0] for texts in found) and found[0][:2] == [None, None]
    for text in found[0][2:]:
        assert text.startswith("rank 3 placed the tokens of step 7 elsewhere than rank 2 of the same SP group: "), text


def test_counts(gathered):
    row = gathered[0][0]
    flops = sum(model_flops(MODEL, lengths) for lengths in ((8,), (4, 4), (6,), (2,)))
    assert row["step"] == 7 and row["lr"] == 0.5 and row["grad_norm"] == 2.0
    assert row["loss"] == pytest.approx((1 + 2 + 3 + 4) / 10)
    assert row["tokens"] == 8 + 8 + 6 + 2
    assert row["step_time_s"] == 2.0
    assert row["tokens_per_s"] == 12.0 and row["tokens_per_s_per_gpu"] == 3.0
    assert row["mfu"] == pytest.approx(flops / 2.0 / 4 / 1e6)
    assert 0 < row["peak_mem_gb"] < 100
    # Pairs by rank, contiguous halves: (10 + 10, 26 + 10), (6 + 1, 15 + 2).
    assert row["imbalance"] == pytest.approx(36 / ((20 + 36 + 7 + 17) / 4))


def test_ranks_that_share_layers_count_once(gathered):
    one, _, shared = gathered[0]
    assert shared["loss"] == pytest.approx((2 + 3) / 10)
    for name in ("tokens", "tokens_per_s_per_gpu", "mfu"):
        assert shared[name] == pytest.approx(one[name]), name
    # Pairs by group: (20 + 36, 7 + 17) as above.
    assert shared["imbalance"] == pytest.approx(56 / ((56 + 24) / 2))


def test_imbalance_is_that_of_all_softmax_layers():
    """Of one rank, so that it is 1; what counts is the pairs it is made of."""
    mesh = SimpleNamespace(sp=1, tp=1, sp_rank=0, world_size=1, device=torch.device("cpu"))
    found = []
    for pattern in (["softmax:window"], ["softmax"], ["softmax", "softmax:window"], ["linear"]):
        window = 3 * ("softmax:window" in pattern)
        config = ModelConfig(num_layers=2, hidden_size=16, num_heads=2, pattern=pattern, window=window)
        found.append(metrics.StepMeter(config, mesh).pairs(SequenceParallel().context([10, 2])))
    windowed, full = 6 + 7 * 3 + 3, 55 + 3
    assert found == [2 * windowed, 2 * full, full + windowed, full]
    for pattern, layers in ((["softmax"], 2), (["llsa"], 1)):  # looking both ways
        config = ModelConfig(task="images", num_layers=2, hidden_size=16, num_heads=2, pattern=pattern)
        assert metrics.StepMeter(config, mesh).pairs(SequenceParallel().context([10, 2])) == layers * (100 + 4)


@pytest.mark.parametrize("behind", [0, 2])
def test_attention_time_is_that_of_steps_that_are_done(behind, monkeypatch):
    """Marks of a step, in pairs, without what was evaluated before it; a GPU's are read two steps later."""
    mesh = SimpleNamespace(sp=1, tp=1, sp_rank=0, world_size=1, device=torch.device("cpu"))
    meter = metrics.StepMeter(MODEL, mesh)
    meter._steps_behind, now = behind, iter([0.0, 5.0, 9.0, 10.0, 11.0, 13.0, 20.0, 24.0, 40.0, 60.0, 61.0, 80.0])
    monkeypatch.setattr(meter, "mark", lambda: next(now))
    found = []
    for evaluated, calls in ((2, 2), (0, 1), (0, 0)):
        for _ in range(evaluated):
            meter.mark_attention()
        begin = meter.begin()
        for _ in range(2 * calls):
            meter.mark_attention()
        found.append(meter._attention_seconds())
    seconds = [(11.0 - 10.0) + (20.0 - 13.0), 60.0 - 40.0, 0.0]
    assert found[behind:] == seconds[: 3 - behind] and all(map(math.isnan, found[:behind])) and begin == 61.0


def test_every_rank_gets_the_same_numbers(gathered):
    assert all(rows == gathered[0] for rows in gathered)


def test_not_finite_names_rank_and_step(gathered):
    assert gathered[3][1].startswith(
        "the loss is nan (from rank 2) at step 7, whose update was left out: lower optim.lr"
    )


def test_peak_rates(monkeypatch):
    assert metrics.peak_tflops(torch.device("cpu")) is None
    names = {"NVIDIA H200": 989, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA B200": 2250,
             "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A100 80GB PCIe": 312, "NVIDIA GH200 480GB": 989,
             "NVIDIA GB200": None, "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
             "NVIDIA GeForce RTX 4090": None}  # fmt: skip
    for name, rate in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert metrics.peak_tflops(torch.device("cuda", 0)) == rate


def test_resuming_drops_what_is_to_come_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)) + '{"step": 6, "lo')
    writer = metrics.MetricsWriter(tmp_path, first_step=4, tensorboard=False)
    writer.write({"step": 4, "loss": 0.5})
    writer.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "loss": 0.5}\n'


def test_a_last_row_without_its_end_of_line_stays_a_row(tmp_path):
    """The disk was full just before it, or the process was killed there."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    writer = metrics.MetricsWriter(tmp_path, first_step=3, tensorboard=False)
    writer.write({"step": 3})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


@pytest.mark.parametrize("line", [b"hello", b"\xff\x00", b'{"step": "x"}'])
def test_a_foreign_metrics_file_is_refused(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: not a step's JSON object"):
        metrics.MetricsWriter(tmp_path, first_step=4, tensorboard=False)


def test_progress_lines(capsys):
    progress = TrainingProgress(first_step=1, steps=200, interval=10)
    row = {
        "loss": 3.25,
        "tokens": 4096,
        "step_time_s": 0.5,
        "grad_norm": 1.5,
        "lr": 1e-3,
        "mfu": None,
        "peak_mem_gb": 2.0,
    }
    for step in range(1, 21):
        progress.report({"step": step} | row | ({"val_loss": 3.0} if step == 15 else {}))
    progress.report({"step": 200} | row | {"mfu": 0.415})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/200", "10/200", "15/200", "20/200", "200/200"]
    assert (
        lines[1] == "step  10/200   5% | eta 0:00:00 | loss 3.2500 | grad 1.50 | lr 1.00e-03 | 8.2K tokens/s | 2.0 GB"
    )
    assert "val loss 3.0000" in lines[2]
    assert "MFU 41.5%" in lines[4]


@pytest.mark.parametrize("room", ["none", "for what was kept"])
def test_a_full_disk_is_one_line_and_costs_no_row_that_was_there(tmp_path, room):
    path, kept = tmp_path / "metrics.jsonl", "".join(json.dumps({"step": step}) + "\n" for step in range(1, 50))
    path.write_text(kept)
    with pytest.raises(UserError, match=f"run.dir={tmp_path}: cannot be written .*; free its disk"):
        with files_of_at_most(20 if room == "none" else len(kept)):
            metrics.MetricsWriter(tmp_path, first_step=50, tensorboard=False).write({"step": 50})
    assert path.read_text().startswith(kept) and os.listdir(tmp_path) == ["metrics.jsonl"]


def _events(folder):
    """[(step, what it is, values)] of all files, as TensorBoard's own reader gives them."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        for event in LegacyEventFileLoader(str(path)).Load():
            values = {value.tag: value.simple_value for value in event.summary.value}
            found.append((event.step, event.WhichOneof("what"), values))
    return found


def test_tensorboard_reads_the_steps_and_what_a_resumed_run_drops(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first in (1, 3):
        writer = metrics.MetricsWriter(tmp_path, first_step=first, tensorboard=True)
        for step in range(first, first + 3):
            writer.write({"step": step, "loss": first + step / 4, "mfu": None, "tokens": 2**20})
        writer.close()
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    assert sorted(shown.Tags()["scalars"]) == ["loss", "tokens"]
    found = [(event.step, event.value) for event in shown.Scalars("loss")]
    assert found == [(1, 1.25), (2, 1.5), (3, 3.75), (4, 4.0), (5, 4.25)]
    assert {event.value for event in shown.Scalars("tokens")} == {2.0**20}


@pytest.mark.parametrize("room", [10, 300])
def test_tensorboards_full_disk_is_one_warning_and_the_run_goes_on(tmp_path, caplog, capfd, room):
    rows = [{"step": step, "loss": 0.5, "lr": 0.25, "mfu": None} for step in range(1, 6)]
    with caplog.at_level("WARNING", logger="longspan"), files_of_at_most(room):
        writer = metrics.MetricsWriter(tmp_path, first_step=1, tensorboard=True)
        if room > 10:
            for row in rows:
                writer.write(row)
        writer.close()
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith(f"{tmp_path}/tensorboard cannot be written (File too large): TensorBoard gets no more")
    assert "log.tensorboard=false" in said and "Traceback" not in "".join(capfd.readouterr())
    if room > 10:
        assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == rows
        steps = [step for step, kind, _ in _events(tmp_path) if kind == "summary"]
        assert 0 < len(steps) < 5 and steps == list(range(1, len(steps) + 1))
