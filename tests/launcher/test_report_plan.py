"""`longspan report`: runs kept as one record, what `longspan plan` says beside them, and the table of recipes."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from report_runs import report, row, write_run

import longspan
from longspan.launcher.config import Config
from longspan.launcher.errors import UserError
from longspan.launcher.estimate import Job, estimate
from longspan.launcher.gpus import GIB, Cluster
from longspan.launcher.report.planned import config_of, plan
from longspan.launcher.report.recipes import BEGIN, END, recipes
from longspan.launcher.report.results import Run, read, settings_of_command
from longspan.launcher.report.series import summarize
from longspan.models.flops import num_parameters

ROOT = Path(longspan.__file__).parent.parent
SETTINGS = [
    "data.corpora=[{path: x}]", "model.num_layers=4", "model.hidden_size=256", "model.vocab_size=1000", "run.name=tiny",
    "train.dtype=bfloat16", "train.checkpointing=full", "train.mlp_tile=4K", "optim.lr=1e-3",
]  # fmt: skip
GPU = {"world_size": 2, "sp": 2, "dp": 1, "device": "NVIDIA H200", "machines": {"vm": 2}}


def config(seq_len, *settings):
    return Config.load(None, [*SETTINGS, f"data.seq_len={seq_len}", *settings])


def two_runs(folder):
    """Of 16K and 64K tokens on two GPUs, the first profiled, with documents of 8K."""
    for seq_len in (2**14, 2**16):
        rows = [row(step, 9.0 / step, tokens=seq_len, gpus=2, peak_mem_gb=2.5) for step in (1, 2, 3)]
        environment = GPU | {"command": ["train.py", f"data.seq_len={seq_len}"], "started": f"day {seq_len}"}
        write_run(
            folder / str(seq_len), rows, settings=yaml.safe_load(config(seq_len).to_yaml()), environment=environment
        )
    profile = folder / str(2**14) / "profile" / "step-2"
    profile.mkdir(parents=True)
    components = {"idle": {"total": 0.5}, "MLP": {"total": 0.2}, "projections": {"total": 0.1}}
    rank = {"rank": 0, "document": 2**13, "components": components}
    (profile / "profile.json").write_text(json.dumps({"planned_s": {"loss": 1.0}, "note": "", "ranks": [rank]}))
    return [folder / str(seq_len) for seq_len in (2**14, 2**16)]


def test_a_record_is_the_runs(tmp_path, capsys):
    folders, record = two_runs(tmp_path / "runs"), tmp_path / "kept.json"
    code, said = report(capsys, *folders, "--output", tmp_path / "r.md", "--record", record)
    assert code == 0 and f"wrote {record}" in said
    (found, _), (kept, _) = read(folders), read([record])
    assert [run.name for run in kept] == [f"kept/{run.name}" for run in found]
    for one, other in zip(found, kept, strict=True):
        assert replace(other, name=one.name, path=one.path) == one
    content = json.loads(record.read_text())
    assert content["environment"]["device"] == "NVIDIA H200" and content["settings"]["model.num_layers"] == 4
    assert content["runs"]["65536"]["settings"] == {"data.seq_len": 2**16}  # what is shared stands once
    one, other = (tmp_path / name for name in ("1.md", "2.md"))
    assert report(capsys, *folders, "--output", one)[0] == report(capsys, record, "--output", other)[0] == 0
    differing = set(one.read_text().splitlines()) ^ set(other.read_text().replace("kept/", "").splitlines())
    assert not [line for line in differing if ".svg" not in line and "---" not in line]


def test_the_plan_stands_beside_what_was_measured(tmp_path, capsys):
    folders = two_runs(tmp_path / "runs")
    assert report(capsys, *folders, "--output", tmp_path / "r.md", "--plan")[0] == 0
    text = (tmp_path / "r.md").read_text()
    for seq_len, document in ((2**14, 2**13), (2**16, 0)):
        found = estimate(Job(config(seq_len), Cluster("H200", 2, 2), document))
        cells = re.search(rf"^\| {seq_len} \| 2 \| {seq_len:,} \| (.*) \|$", text.split("## Plan")[1], re.M)[1]
        peak, planned, peak_off, step, seconds, step_off = cells.split(" | ")
        assert (float(peak), float(step)) == (2.5, 3.0)
        assert float(planned) == pytest.approx(found.peak / GIB, rel=1e-3)
        assert float(seconds) == pytest.approx(found.step_s, rel=1e-3)
        assert peak_off == f"{100 * (found.peak / GIB / 2.5 - 1):+.1f} %"
        assert step_off == f"{100 * (found.step_s / 3.0 - 1):+.1f} %"


def test_components_are_compared_row_by_row(tmp_path):
    (run, _), _ = read(two_runs(tmp_path / "runs"))
    found = plan(summarize(run, 2))
    ((where, rows),) = found.components.items()  # not what was planned when it ran
    assert where == "profile/step-2"
    seconds = estimate(Job(config(2**14), Cluster("H200", 2, 2), 2**13)).seconds
    rows = {row: (measured, planned) for row, measured, planned in rows}
    assert rows["idle"] == (0.5, seconds.get("waiting for the host", 0.0))
    assert rows["softmax attention"] == (0.0, seconds["softmax attention"])  # of documents of 8K
    assert rows["projections and MLP"][0] == pytest.approx(0.2 + 0.1)
    assert sum(planned for _, planned in rows.values()) == pytest.approx(found.step_s)


def test_what_has_no_plan_says_why(tmp_path, capsys):
    folders = two_runs(tmp_path / "runs")
    (folders[0] / "environment.json").write_text(json.dumps(GPU | {"device": "x86_64 CPU"}))
    (folders[1] / "config.yaml").write_text("model: {layers: 4}")
    assert report(capsys, *folders, "--output", tmp_path / "r.md", "--plan")[0] == 0
    text = (tmp_path / "r.md").read_text()
    assert (
        "- 16384: longspan plan knows no x86_64 CPU" in text and "- 65536: 65536: " in text and "model.layers" in text
    )


def test_a_run_of_a_command_has_the_shipped_config():
    command = [
        "launcher/train.py",
        "--config",
        "elsewhere/configs/hybrid-0.4b.yaml",
        "--seq-len",
        "128K",
        "optim.lr=1e-3",
    ]
    run = Run("a", None, [], {"command": command}, {"--config": "x"})
    settings = ["data.seq_len=128K", "optim.lr=1e-3", "parallel.head_groups=1"]
    assert config_of(run) == Config.load("hybrid-0.4b", [*settings, "train.checkpointing=full"])  # which it had then
    for chosen in ("train.checkpointing=selective", "train.checkpointing=auto"):
        run = replace(
            run, environment={"command": [*command, chosen]}, settings=settings_of_command([*command, chosen])
        )
        assert config_of(run) == Config.load("hybrid-0.4b", [*settings, chosen])
    run = replace(run, environment={"command": ["train.py", "--config", "quickstart"]})
    assert config_of(run) == Config.load("quickstart", ["parallel.head_groups=1"])
    with pytest.raises(UserError, match="not known"):
        config_of(Run("a", None, []))


def test_recipes_go_between_two_lines_of_a_page(tmp_path, capsys):
    folders, page = two_runs(tmp_path / "runs"), tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    arguments = [*reversed(folders), "--output", tmp_path / "r.md", "--recipes", page]
    assert report(capsys, *arguments)[0] == 0
    before, begin, *lines, end, after = page.read_text().splitlines()
    assert (before, begin, end, after) == ("before", BEGIN, END, "after") and "old" not in lines
    count = num_parameters(config(2**14).model)
    first = (
        f"| tiny, {count / 1e9:.2f}B, 3 linear : 1 softmax | 16K | 2 x H200 | `train.checkpointing=full`"
        " `train.mlp_tile=4096` | 2.5 | 2,731 | 5,461 | 25.0 % | 3 |"
    )
    assert lines[2] == first and "| 64K |" in lines[3] and lines[-1].startswith("Measured: `metrics.jsonl`")
    assert report(capsys, *arguments)[0] == 0 and page.read_text().count("16K") == 1  # the same again
    page.write_text(f"before\n{BEGIN}\n")
    code, said = report(capsys, *arguments)
    assert code == 1 and f"name a page that has the lines {BEGIN} and {END}" in said


def test_the_guide_has_the_recipes_of_its_records():
    page = (ROOT / "docs" / "long-context.md").read_text()
    table = page.split(BEGIN)[1].split(END)[0].strip()
    names = re.findall(r"`(\w[\w.-]*\.json)`", table.splitlines()[-1])
    runs, _ = read([ROOT / "benchmarks" / "results" / name for name in names])
    assert names and recipes([summarize(run, 2) for run in runs]) == table


def test_measured_runs_are_as_planned():
    """Steps within 15 %, peaks within 10 %, of every record of runs on GPUs whose config is known. Since the one with
    llsa was measured, layers lay a rank's own blocks in front of those that arrive, 2.0 GiB and a copy of those (0.7
    GiB by the same arithmetic), and give less of the buffer back (0.9 GiB): it holds more today."""
    files = sorted((ROOT / "benchmarks" / "results").glob("runs_*xH*.json"))
    runs, _ = read(files)
    assert len(runs) >= 6 and len({run.name.split("/")[0] for run in runs}) == len(files)
    for run in runs:
        measured, planned = summarize(run, 2), plan(summarize(run, 2))
        near = 0.105 if "llsa" in run.settings["model.pattern"] else 0.1
        assert planned.peak_gib == pytest.approx(measured.peak_mem_gb, rel=near), run.name
        assert planned.step_s == pytest.approx(measured.medians["step_time_s"], rel=0.15), run.name


def test_components_of_measured_steps_are_as_planned():
    """What computes within a tenth, but for linear attention and the loss, which took 14 and 16 % more and less in one
    run than in another. What shows of communication in a profiled step is mostly what starts once."""
    runs, _ = read([ROOT / "benchmarks" / "results" / f"runs_{gpus}xH200.json" for gpus in (2, 4)])
    compared = 0
    for run in runs:
        for rows in plan(summarize(run, 2)).components.values():
            for name, measured, planned in rows:
                if name not in ("communication, exposed", "data", "other", "idle"):
                    near = 0.2 if name in ("linear attention", "loss") else 0.1
                    assert planned == pytest.approx(measured, rel=near), (run.name, name)
                    compared += 1
    assert compared >= 27 + 60
