"""What cannot work is said before anything is measured: an output that cannot be written, a GPU that is not there."""

import pytest
import torch

from longspan.benchmarks import linear_ranks, planner, ring_attention


def refusal(capsys, parse, *words):
    with pytest.raises(SystemExit) as ended:
        parse(list(words))
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_an_output_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    line = refusal(capsys, planner.parse_arguments, "--output", str(tmp_path / "file" / "x.json"))
    assert "argument --output" in line and "cannot be written (" in line and "name another file" in line
    assert "it is a folder" in refusal(capsys, planner.parse_arguments, "--output", str(tmp_path))


def test_a_trial_of_the_output_leaves_what_was_there(tmp_path):
    output = tmp_path / "results" / "x.json"
    output.parent.mkdir()
    output.write_text("kept")
    assert planner.parse_arguments(["--output", str(output)]).output == str(output)
    assert output.read_text() == "kept" and list(output.parent.iterdir()) == [output]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(capsys):
    for parse in (linear_ranks.parse_arguments, ring_attention.parse_arguments):
        assert "torch sees no GPU for cuda; use cpu" in refusal(capsys, parse, "--device", "cuda")
