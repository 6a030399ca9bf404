"""configs/slurm/train.sbatch on two nodes that are this machine: asked to stop, it saves, is requeued and goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import slurm_cluster
from tiny_runs import SETTINGS, rows, write_corpus

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "configs" / "slurm" / "train.sbatch"
STEPS = 40
SURROUNDINGS = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    with slurm_cluster.slurm_cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


def test_two_nodes_stopped_and_requeued_equal_an_uninterrupted_run(cluster, tmp_path):
    config = write_config(tmp_path)
    run_dir = tmp_path / "run"
    job = submit(cluster, tmp_path, config, "--run-dir", run_dir)
    logs = tmp_path / f"slurm-{job}"
    cluster.until(lambda: (run_dir / "metrics.jsonl").exists() and len(rows(run_dir)) > 1, "no step is done", 240)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@300 does before the time limit
    plain = start_plainly(config, tmp_path / "plain")  # while the job waits in the queue
    ended = cluster.wait(job, 240)
    said = (tmp_path / f"slurm-{job}.log").read_text() + "".join(path.read_text() for path in logs.glob("node-*.log"))
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), said
    stopped = [line for line in said.splitlines() if line.startswith("stopped by a signal after step ")]
    assert len(stopped) == 1, said
    step = int(stopped[0].split()[6])
    assert 0 < step < STEPS and f"resumed from {run_dir}/checkpoints/step-{step:08d}" in said
    assert "requeued" in said and f"finished {STEPS} steps" in said
    assert {path.name for path in logs.iterdir()} == {"node-0.log", "node-1.log"}
    environment = json.loads((run_dir / "environment.json").read_text())
    assert (environment["world_size"], environment["sp"]) == (2, 2)

    output, _ = plain.communicate(timeout=240)
    assert plain.returncode == 0, output
    found, expected = rows(run_dir), rows(tmp_path / "plain")
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", "lr"):
        assert [row[key] for row in found] == [row[key] for row in expected]  # bitwise: the same ranks


def test_a_run_that_fails_is_not_requeued(cluster, tmp_path):
    job = submit(cluster, tmp_path, write_config(tmp_path), "data.seq_len=nonsense")
    ended = cluster.wait(job, 240)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    said = "".join(path.read_text() for path in (tmp_path / f"slurm-{job}").glob("node-*.log"))
    assert "longspan: error: command line: data.seq_len: expected a number of tokens" in said


@pytest.mark.parametrize(
    "arguments, files, said",
    [
        ([], ["launcher/train.py"], "no config"),
        (["x.yaml"], [], "submit from the root of the clone"),
        (["x.yaml"], ["launcher/train.py"], "torchrun is not on PATH"),
        (["x.yaml"], ["launcher/train.py", "bin/torchrun"], "this is no SLURM job: sbatch configs/slurm/train.sbatch"),
    ],
)
def test_what_cannot_start_is_one_line(arguments, files, said, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch(mode=0o755)
    command, environment = ["/bin/bash", SCRIPT, *arguments], {"PATH": f"{tmp_path}/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("longspan: error: ") and said in done.stderr


def write_config(folder: Path) -> Path:
    """A config file for runs from `folder`, which gets what a clone has."""
    (folder / "launcher").symlink_to(ROOT / "launcher")
    corpus = write_corpus(folder)
    config = folder / "tiny.yaml"
    settings = [*SETTINGS, f"train.steps={STEPS}", "checkpoint.interval=0", f"data.corpora=[{{path: {corpus}}}]"]
    sections = {}
    for setting in settings:
        name, value = setting.split("=", 1)
        sections.setdefault(name.partition(".")[0], {})[name.partition(".")[2]] = value
    lines = [
        f"{section}:\n" + "".join(f"  {k}: {v}\n" for k, v in found.items()) for section, found in sections.items()
    ]
    config.write_text("".join(lines))
    return config


def submit(cluster, folder: Path, *arguments) -> str:
    path = f"{Path(sys.executable).parent}:{cluster.environment['PATH']}"
    one_rank_a_node = ("--nodes=2", "--time=10", SCRIPT)
    return cluster.submit(*one_rank_a_node, *arguments, cwd=folder, PATH=path, NPROC_PER_NODE="1", **SURROUNDINGS)


def start_plainly(config: Path, run_dir: Path) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, ROOT / "launcher" / "train.py", "--config", config, "--run-dir", run_dir]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=os.environ | SURROUNDINGS, **output)
