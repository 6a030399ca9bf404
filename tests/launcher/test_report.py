"""`longspan report`: medians and efficiencies by hand, runs that were cut short or continued, and what it writes."""

import json
import math
import subprocess
import sys

import pytest
from report_runs import MODEL, report, row, write_run

from longspan.launcher import cli
from longspan.launcher.errors import UserError
from longspan.launcher.report.document import plot_of, table
from longspan.launcher.report.results import Run, read, settings_of_command, steps_of
from longspan.launcher.report.series import groups, median, profiles, settings_that_differ, summarize


def run(name, *, gpus=1, sp=None, seq_len=1024, samples=1, speed=1000.0, mfu=0.25, settings=(), **environment):
    """A run of three steps whose last one is steady, at `speed` tokens/s/GPU."""
    tokens = seq_len * samples
    rows = [row(step, tokens / speed / gpus * (10 if step < 3 else 1), tokens=tokens, gpus=gpus) for step in (1, 2, 3)]
    for item in rows:
        item["mfu"] = mfu
    known = {"model.num_layers": 4, "data.seq_len": seq_len, "train.global_batch": samples, "parallel.sp": sp or 0}
    environment = {"world_size": gpus, "sp": sp or gpus, "device": "H200"} | environment
    return Run(name, None, rows, environment, known | dict(settings) | {"run.name": name})


def test_medians_leave_warm_up_out():
    seconds = [50.0, 20.0, 4.0, 1.0, 2.0, 9.0]
    rows = [row(step, s, peak_mem_gb=m) for step, (s, m) in enumerate(zip(seconds, [1, 7, 3, 3, 3, 3]), 1)]
    summary = summarize(Run("a", None, rows), 2)
    assert summary.medians["step_time_s"] == 3.0  # of 4, 1, 2, 9
    assert summary.medians["tokens_per_s"] == 1024 * (1 / 4 + 1 / 2) / 2
    assert (summary.counted, summary.steps) == ([3, 4, 5, 6], "3..6 (4)")
    assert summary.peak_mem_gb == 7  # memory has no warm-up
    assert summarize(Run("a", None, rows), 0).medians["step_time_s"] == 6.5


def test_warm_up_counts_from_the_first_step_that_is_there():
    summary = summarize(Run("a", None, [row(step, float(step)) for step in (11, 12, 13, 14)]), 2)
    assert summary.counted == [13, 14]


def test_a_run_of_warm_up_alone_has_the_speed_of_its_last_step_if_it_is_not_its_first():
    summary = summarize(Run("a", None, [row(1, 9.0), row(2, 4.0)], notes=["x"]), 2)
    assert summary.medians["step_time_s"] == 4.0 and summary.counted == [2] and summary.first_loss == 8.0
    assert summary.notes == ["x", "2 steps, none after the warm-up: speeds are those of the last"]
    summary = summarize(Run("a", None, [row(1)], notes=["x"]), 2)
    assert summary.medians == {} and summary.steps == "none" and summary.first_loss == 8.0
    assert summary.notes == ["x", "1 step, none after the warm-up: no speeds"]
    assert groups([summary]) == []


def test_losses_and_times_beside():
    rows = [row(step, 4.0, attention_s=float(step), attention_imbalance=1.0) for step in range(1, 14)]
    rows[5]["val_loss"], rows[8]["val_loss"] = 7.0, 6.0
    rows[12]["loss"] = math.nan
    summary = summarize(Run("a", None, rows), 2)
    assert summary.first_loss == 8.0 and summary.val_loss == 6.0
    assert summary.last_loss == pytest.approx(sum(8.0 / step for step in range(3, 13)) / 10)
    assert summary.seconds == {"attention_s": median(range(3, 14))}


def test_ranks_are_known_from_speeds_where_nothing_says_them():
    assert summarize(Run("a", None, [row(1, gpus=4)]), 0).gpus == 4
    assert summarize(Run("a", None, [{"step": 1}]), 0).gpus is None


def test_strong_scaling_is_relative_to_the_fewest_gpus():
    runs = [
        run("four", gpus=4, speed=600.0, mfu=0.1),
        run("one", speed=1000.0, mfu=0.2),
        run("two", gpus=2, speed=900.0),
    ]
    (group,) = groups(summarize(each, 2) for each in runs)
    assert group.kind == "strong" and "1 x 1,024 tokens a step" in group.fixed
    assert [(point.x, point.summary.run.name) for point in group.points] == [(1, "one"), (2, "two"), (4, "four")]
    assert [point.efficiency for point in group.points] == pytest.approx([1.0, 0.9, 0.6])
    assert [point.mfu_efficiency for point in group.points] == pytest.approx([1.0, 1.25, 0.5])


def test_repeated_runs_of_the_fewest_gpus_count_by_their_median():
    runs = [run("a", speed=800.0), run("b", speed=1000.0), run("c", speed=900.0), run("d", gpus=2, speed=450.0)]
    (group,) = groups(summarize(each, 2) for each in runs)
    assert [point.efficiency for point in group.points][-1] == pytest.approx(0.5)


def test_weak_scaling_by_longer_and_by_more_sequences():
    longer = [run("1", seq_len=1024), run("2", gpus=2, seq_len=2048), run("4", gpus=4, seq_len=4096)]
    (group,) = groups(summarize(each, 2) for each in longer)
    assert group.kind == "weak, longer sequences" and [point.x for point in group.points] == [1, 2, 4]
    more = [run("1", sp=1, samples=2), run("2", gpus=2, sp=1, samples=4)]
    (group,) = groups(summarize(each, 2) for each in more)
    assert group.kind == "weak, more sequences" and "2 x 1,024 tokens per GPU, 1 to a sequence" == group.fixed


def test_length_is_a_group_on_the_same_gpus_alone():
    runs = [run("a"), run("b", seq_len=2048), run("c", gpus=8, seq_len=4096)]
    (group,) = groups(summarize(each, 2) for each in runs)
    assert group.kind == "length" and [point.x for point in group.points] == [1024, 2048]
    assert [point.efficiency for point in group.points] == [None, None]


@pytest.mark.parametrize(
    "other",
    [
        {"settings": {"model.num_layers": 5}},
        {"settings": {"parallel.softmax": "ring"}},
        {"settings": {"optim.offload": "cpu"}},
        {"device": "H100"},
        {"sp": 1, "gpus": 4},  # neither all of 4 GPUs nor the same number as before
    ],
    ids=str,
)
def test_what_makes_another_series(other):
    runs = [run("a", gpus=2), run("b", **({"gpus": 4} | other))]
    assert groups(summarize(each, 2) for each in runs) == []


def test_what_does_not_make_another_series():
    settings = {"optim.lr": 1.0, "train.steps": 9, "run.dir": "x", "checkpoint.interval": 5, "log.interval": 3}
    runs = [run("a", gpus=2), run("b", gpus=4, settings=settings)]
    assert len(groups(summarize(each, 2) for each in runs)) == 1


def test_settings_that_auto_chose_by_the_length_do_not_make_another_series():
    none, full = {"train.checkpointing": "none"}, {"train.checkpointing": "full", "train.mlp_tile": 16384}
    runs = [run("a", settings=none), run("b", seq_len=2048, settings=full)]
    assert groups(summarize(each, 2) for each in runs) == []
    for each in runs:
        each.environment["chosen"] = ["train.checkpointing", "train.mlp_tile"]
    (group,) = groups(summarize(each, 2) for each in runs)
    assert group.kind == "length" and [point.x for point in group.points] == [1024, 2048]


def test_runs_of_unknown_settings_are_in_no_series():
    runs = [run("a", gpus=2), run("b", gpus=4)]
    for each in runs:
        each.settings = {}
        each.environment["sequence_tokens"] = 1024
    summaries = [summarize(each, 2) for each in runs]
    assert summaries[0].seq_len == 1024 and groups(summaries) == []


def test_settings_that_differ():
    runs = [run("a"), run("b", settings={"model.num_layers": 5}), Run("c", None, [])]
    assert settings_that_differ(runs) == {"model.num_layers": [4, 5, None]}


def test_steps_of_a_killed_run():
    lines = [json.dumps(row(1)) + "\n", json.dumps(row(2)) + "\n", '{"step": 3, "lo']
    rows, notes = steps_of(lines)
    assert [item["step"] for item in rows] == [1, 2]
    assert notes == ["line 3 is cut off (the run was killed while writing it) and left out"]


def test_steps_of_a_continued_and_damaged_run():
    rows = [row(1), row(2, loss=5.0), row(2, loss=4.0), row(5)]
    lines = ["\n", *(json.dumps(item) + "\n" for item in rows), "[]\n", "\0\0\n", '{"step": "6"}\n']
    found, notes = steps_of(lines)
    assert [item["step"] for item in found] == [1, 2, 5] and found[1]["loss"] == 4.0
    assert notes == [
        "3 lines without a step's object left out: 6, 7, 8",
        "1 step written more than once: the last one counts",
        "2 steps before step 5 missing",
    ]


def test_missing_fields_are_named(tmp_path):
    rows = [row(1, mfu=None), row(2, mfu=None), row(3, mfu=None, loss=math.nan)]
    del rows[0]["peak_mem_gb"]
    for item in rows:
        del item["tokens_per_s"]
    folder = write_run(tmp_path / "run", rows)
    (folder / "config.yaml").unlink()
    (folder / "environment.json").write_text("{")
    ((found,), _) = read([folder])
    assert found.notes == [
        "environment.json cannot be read",
        "no config.yaml",
        "`loss` is no finite number in 1 of 3 steps",
        "`tokens_per_s` is missing in all steps",
        "`mfu` is null in all steps",
        "`peak_mem_gb` is missing in 1 of 3 steps",
    ]


def test_settings_of_a_recorded_command():
    command = "launcher/train.py --config x.yaml --seq-len 128K --steps=7 optim.lr=1e-3 model.pattern=[linear,softmax]"
    assert settings_of_command(command.split()) == {
        "--config": "x.yaml", "data.seq_len": 2**17, "train.steps": 7, "optim.lr": "1e-3",
        "model.pattern": ["linear", "softmax"],
    }  # fmt: skip
    assert settings_of_command(["run.name=2026-02-30"]) == {"run.name": "2026-02-30"}  # no day: as it stands


def test_profiles_are_means_over_ranks_beside_the_plan(tmp_path):
    ranks = [
        {"rank": n, "components": {"loss": {"total": n + 1.0, "forward": 9}, "idle": {"total": 0.5}}} for n in (0, 1)
    ]
    ranks[1]["components"]["other"] = {"total": 0.25}
    folder = write_run(tmp_path / "run", [row(1, profile={"components": {"loss": 3.0}}), row(2)])
    (folder / "profile" / "step-1").mkdir(parents=True)
    (folder / "profile" / "step-2").mkdir()
    record = {"steps": [1, 1], "planned_s": {"loss": 1.25}, "note": "", "ranks": ranks}
    (folder / "profile" / "step-1" / "profile.json").write_text(json.dumps(record))
    (folder / "profile" / "step-2" / "profile.json").write_text("{")
    ((found,), _) = read([folder])
    assert profiles([summarize(found, 0)]) == {
        "run, profile/step-1": {"loss": 1.5, "idle": 0.5, "other": 0.125},
        "run, profile/step-1, planned": {"loss": 1.25},
        "run, step 1": {"loss": 3.0},
    }
    assert "profile/step-2/profile.json cannot be read" in found.notes


def test_records_that_stand_in_one_file_are_read_each(tmp_path):
    rows = {"benchmark": "speed", "rows": [{"tokens": 1, "ms": 2.0}]}
    (tmp_path / "both.json").write_text(json.dumps({"note": "x", "one, first": rows, "more": {"two": rows}}))
    for path in (tmp_path, tmp_path / "both.json"):
        _, records = read([path])
        assert [record.name for record in records] == ["both/one, first", "both/more/two"]
    assert plot_of(records[0]) == "bench-both-one-first"
    (tmp_path / "both.json").write_text('{"note": {"x": [1]}}')
    with pytest.raises(UserError, match="no record of a benchmark"):
        read([tmp_path / "both.json"])


def test_steps_unlike_the_others_are_named(tmp_path, capsys):
    for name, seconds, said in (("slow", 2.5, True), ("like", 2.3, False)):
        folder = write_run(tmp_path / name, [row(step, 9.0, step_time_s=2.25) for step in range(1, 5)])
        (folder / "profile" / "step-2").mkdir(parents=True)
        parts = {"MLP": 0.5, "projections": 0.25, "idle": seconds - 0.75, "validation and saving": 7.0}
        ranks = [{"rank": 0, "components": {part: {"total": value} for part, value in parts.items()}}]
        (folder / "profile" / "step-2" / "profile.json").write_text(json.dumps({"ranks": ranks}))
        assert report(capsys, folder, "--output", tmp_path / "r.md")[0] == 0
        text = (tmp_path / "r.md").read_text()
        assert ("2.5 s, 11.1 % more than the median" in text) is said and ("more than the median" in text) is said
        assert "| projections and MLP | 750 (" in text and "| of which MLP | 500 (" in text


def test_names_are_told_apart_and_runs_are_read_once(tmp_path):
    a, b = (write_run(tmp_path / place / "run", [row(1)]) for place in "ab")
    runs, _ = read([a, b, a / "metrics.jsonl", tmp_path / "b"])
    assert [found.name for found in runs] == ["a/run", "b/run"]


def test_the_whole_report(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pip install 'longspan[plots]'")
    runs = []
    for gpus, seq_len in ((1, 1024), (2, 1024), (2, 2048)):
        rows = [row(step, 9.0 / step, tokens=seq_len, gpus=gpus) for step in range(1, 6)]
        settings = MODEL | {"data": {"seq_len": seq_len}, "train": {"global_batch": 1}}
        environment = {
            "world_size": gpus,
            "sp": gpus,
            "device": "H200",
            "commit": f"c{seq_len}",
            "command": ["train.py", "x"],
        }
        folder = tmp_path / "runs" / f"{gpus}-{seq_len}"
        runs.append(write_run(folder, rows, settings=settings, environment=environment))
    with open(runs[0] / "metrics.jsonl", "a") as file:
        file.write('{"step": 6')
    (runs[1] / "profile").mkdir()
    (runs[1] / "profile" / "profile.json").write_text(
        '{"ranks": [{"components": {"loss": 0.5, "idle": {"total": 1.5}}}]}'
    )
    record = {"benchmark": "speed", "commit": "abc", "date": "today", "rows": [
        {"strategy": "ring", "tokens": 1024, "ms": {"forward+backward": 2.0}},
        {"strategy": "ring", "tokens": 2048, "ms": {"forward+backward": 3.5}, "list": [1]},
    ]}  # fmt: skip
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "speed.json").write_text(json.dumps(record))
    output = tmp_path / "out" / "all.md"
    code, said = report(capsys, tmp_path / "runs", tmp_path / "a" / "speed.json", tmp_path / "b", "--output", output)
    assert code == 0
    text = output.read_text()
    written = {line.removeprefix("wrote ") for line in said.splitlines()}
    plots = {f"all-{name}.svg" for name in ("loss", "length", "gpus", "breakdown", "bench-a-speed", "bench-b-speed")}
    assert written == {str(output), *(str(output.parent / name) for name in plots)}
    for name in plots:
        assert f"({name})" in text and (output.parent / name).read_text().rstrip().endswith("</svg>")
    # medians over steps 3 to 5: 2.25 s
    assert "| 1-1024 | 1 | 1 x 1 | 1,024 | 1 | 3..5 (3) | 455.1 | 25.0 % | 2.25 | 1.5 | 8 | 3.653 | - |" in text
    assert "| 2-1024 | 2 | 1 x 2 | 1,024 | 1 | 50.0 % | 100.0 % | 227.6 |" in text
    assert "left out: 1-1024\n" in text
    assert "| component | 2-1024, profile |" in text and "| loss | 500 (25.0 %) |" in text and "| sum | 2,000 |" in text
    assert "**weak, longer sequences**" in text and "These runs differ in commit." in text
    assert "| data.seq_len | 1024 | 1024 | 2048 |" in text and "device H200" in text
    assert "- 2-2048: `train.py x`" in text
    assert "| strategy | tokens | ms.forward+backward |" in text and "| ring | 2,048 | 3.5 |" in text


def test_the_report_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("longspan.launcher.report.find_spec", lambda name: None)
    folder = write_run(tmp_path / "run", [row(1), row(2), row(3)])
    assert report(capsys, folder, "--output", tmp_path / "r.md")[0] == 0
    assert "pip install 'longspan[plots]'" in (tmp_path / "r.md").read_text()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["r.md"]


def test_records_of_this_repository_can_be_shown(tmp_path, capsys):
    from pathlib import Path

    results = Path(cli.__file__).resolve().parents[1] / "benchmarks" / "results"
    code, said = report(capsys, results, "--output", tmp_path / "r.md")
    assert code == 0, said
    text = (tmp_path / "r.md").read_text()
    assert "| train_hybrid_0.4b_128k_2xH200 | 2 | 1 x 2 | 131,072 | - | 3..24 (22) | 24,365 | 22.1 % |" in text


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda folder: folder / "nowhere", "there is no such file or folder"),
        (lambda folder: folder, "neither it nor a folder in it has a metrics.jsonl"),
        (lambda folder: written(folder / "x.json", "{"), "no JSON"),
        (lambda folder: written(folder / "x.json", "[]"), "no record of a benchmark"),
        (lambda folder: written(folder / "x.txt", ""), "name run directories"),
        (lambda folder: written(folder / "metrics.jsonl", '{"st'), "no training step"),
    ],
)
def test_what_cannot_be_read_is_one_line(make, expected, tmp_path, capsys):
    code, said = report(capsys, make(tmp_path), "--output", tmp_path / "r.md")
    assert code == 1 and said.startswith("longspan: error: report: ") and said.count("\n") == 1
    assert expected in said and str(tmp_path) in said and not (tmp_path / "r.md").exists()


@pytest.mark.parametrize("words", [["--output", "x.txt"], ["--output", "."], ["--warmup", "-1"], ["--warmup", "x"], []])
def test_arguments_that_do_not_fit_are_one_line(words, tmp_path, capsys):
    code, said = report(capsys, *([write_run(tmp_path / "run", [row(1)]), *words] if words else []))
    assert code == 1 and said.startswith("longspan: error: report: ") and said.count("\n") == 1


def test_tables():
    rows = [["a|b", 1234567, 0.123456, None], ["c", 1, 1234.5, "12.5 %"]]
    assert table(["name", "n", "x", "share"], rows).splitlines() == [
        "| name | n | x | share |", "| --- | ---: | ---: | ---: |", r"| a\|b | 1,234,567 | 0.1235 | - |",
        "| c | 1 | 1,234 | 12.5 % |",
    ]  # fmt: skip


def test_help_does_not_wait_for_torch_or_matplotlib():
    code = (
        "import sys\nfrom longspan.launcher.cli import main\ntry: main(['report', '--help'])\nexcept SystemExit: pass\n"
        "import longspan.launcher.report\nprint('torch' in sys.modules, 'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "usage: longspan report" in done.stdout and done.stdout.endswith("False False\n"), done.stdout + done.stderr


def written(path, text):
    path.write_text(text)
    return path
