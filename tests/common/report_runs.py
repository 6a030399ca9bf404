"""Run directories for tests of `longspan report`, and the command itself."""

import json

import yaml

from longspan.launcher import cli

MODEL = {"model": {"num_layers": 4}, "optim": {"lr": 0.1}}


def row(step, seconds=1.0, *, tokens=1024, gpus=1, **others):
    speed = tokens / seconds
    found = {
        "step": step,
        "loss": 8.0 / step,
        "tokens": tokens,
        "step_time_s": seconds,
        "mfu": 0.25,
        "peak_mem_gb": 1.5,
    }
    return found | {"tokens_per_s": speed, "tokens_per_s_per_gpu": speed / gpus} | others


def write_run(folder, rows, *, settings=MODEL, environment=None, end="\n"):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + end)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "environment.json").write_text(
        json.dumps({"world_size": 1, "sp": 1} if environment is None else environment)
    )
    return folder


def report(capsys, *argv):
    """Code, and what is printed; the report is the last argument's file."""
    try:
        cli.main(["report", *map(str, argv)])
    except SystemExit as ended:
        return ended.code, capsys.readouterr().err
    return 0, capsys.readouterr().out
