"""What is written for others: strict JSON, whole files, and both where numbers are not finite or the disk refuses."""

import json
import math

import pytest
from full_disk import files_of_at_most

from longspan.benchmarks.common import save
from longspan.launcher.files import replace_bytes, strict_json
from longspan.launcher.metrics import MetricsWriter, _rows_before
from longspan.launcher.report.results import read


def strictly(text):
    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_json_does_not_have_are_null():
    given = {"a": math.inf, "b": [1.5, math.nan, (2, -math.inf)], "c": {"d": None, "e": True, 3: "Infinity"}}
    wanted = {"a": None, "b": [1.5, None, [2, None]], "c": {"d": None, "e": True, "3": "Infinity"}}
    assert strictly(strict_json(given)) == strictly(strict_json(given, indent=1)) == wanted


def test_records_of_benchmarks_are_strict(tmp_path):
    save({"benchmark": "x", "rows": [{"error": math.nan, "ms": 1.0}]}, tmp_path / "x.json")
    assert strictly((tmp_path / "x.json").read_text())["rows"] == [{"error": None, "ms": 1.0}]
    assert read([tmp_path / "x.json"])[1][0].name == "x"


def test_metrics_are_strict_and_read_again(tmp_path):
    writer = MetricsWriter(tmp_path, first_step=1, tensorboard=True)
    for step, value in enumerate((2.0, math.nan), 1):
        writer.write({"step": step, "loss": 1.0, "val_loss": value})
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [strictly(line)["val_loss"] for line in lines] == [2.0, None]
    assert len(_rows_before(tmp_path / "metrics.jsonl", 3)) == 2
    assert [row["val_loss"] for row in read([tmp_path])[0][0].rows] == [2.0, None]


def test_the_folder_of_a_file_is_made(tmp_path):
    replace_bytes(tmp_path / "new" / "pictures" / "picture.png", b"new")
    assert (tmp_path / "new" / "pictures" / "picture.png").read_bytes() == b"new"


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "picture.png"
    replace_bytes(path, b"old")
    with files_of_at_most(10), pytest.raises(OSError):
        replace_bytes(path, b"x" * 100)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
