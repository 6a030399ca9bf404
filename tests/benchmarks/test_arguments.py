"""What cannot work is said before anything is measured: an output that cannot be written, a GPU that is not there."""

import pytest
import torch

from longspan.benchmarks import arguments as named
from longspan.benchmarks import attention_schemes, linear_ranks, planner, ring_attention
from longspan.benchmarks.head_parallel import HEAD_PARALLEL
from longspan.benchmarks.linear_cases import FAMILIES
from longspan.benchmarks.linear_peers import IMPLEMENTATIONS
from longspan.benchmarks.ranks import NCCL
from longspan.parallel.planner import STRATEGIES
from longspan.parallel.scan import TRANSPORTS


def refusal(capsys, parse, *words):
    with pytest.raises(SystemExit) as ended:
        parse(list(words))
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_an_output_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    line = refusal(capsys, planner.parse_planner, "--output", str(tmp_path / "file" / "x.json"))
    assert "argument --output" in line and "cannot be written (" in line and "name another" in line
    assert "it is a folder" in refusal(capsys, planner.parse_planner, "--output", str(tmp_path))


def test_a_trial_of_the_output_leaves_what_was_there(tmp_path):
    output = tmp_path / "results" / "x.json"
    output.parent.mkdir()
    output.write_text("kept")
    assert planner.parse_planner(["--output", str(output)]).output == str(output)
    assert output.read_text() == "kept" and list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize(
    "words, said",
    [
        ("--lengths 4K 0", "--lengths 0 must be greater than 0"),
        ("--lengths 1.5K", "argument --lengths"),
        ("--heads 3 --kv-heads 2", "--kv-heads 2 does not divide --heads 3"),
        ("--case-seconds 0", "--case-seconds 0.0 must be greater than 0"),
    ],
)
def test_sizes_that_cannot_be(words, said, capsys):
    assert said in refusal(capsys, ring_attention.parse_ring_attention, "--device", "cpu", *words.split())


def test_lengths_are_numbers_of_tokens(capsys):
    assert ring_attention.parse_ring_attention(["--device", "cpu", "--lengths", "1K", "2M"]).lengths == [1024, 2**21]
    assert "--tokens 0 must be" in refusal(capsys, linear_ranks.parse_linear_ranks, "--device", "cpu", "--tokens", "0")


def test_all_that_there_is_to_choose_from_is_named():
    assert named.FAMILIES == tuple(FAMILIES) and ("longspan", *named.LINEAR_PEERS) == tuple(IMPLEMENTATIONS)
    assert named.PASSING == (*TRANSPORTS, f"lasp2{NCCL}", HEAD_PARALLEL)
    assert named.STRATEGIES == tuple(STRATEGIES) and named.COSTS == tuple(planner.COSTS)
    assert named.SCHEMES == tuple(attention_schemes.SCHEMES)


def test_defaults_follow_the_device():
    parse = attention_schemes.parse_attention_schemes
    found = vars(parse(["--device", "cpu", "--long", "4K"]))
    assert found["tokens"] == [1024] and (found["heads"], found["megabytes"], found["short"]) == (8, 1, 64)
    assert found["long"] == 4096
    if not torch.cuda.is_available():
        assert parse([]).device == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(capsys):
    for parse in (linear_ranks.parse_linear_ranks, ring_attention.parse_ring_attention):
        assert "torch sees no GPU for cuda; use cpu" in refusal(capsys, parse, "--device", "cuda")
