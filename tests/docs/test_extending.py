"""docs/extending.md: its examples, put where it says in a copy of the source, pass the tests that it says they do."""

import os
import re
import shutil
import subprocess
import sys
from textwrap import dedent

import pytest
from pages import ROOT, blocks

PAGE = ROOT / "docs" / "extending.md"
ON_RANKS = dedent("""
    import pytest
    from test_sparse_parity import Case, expected, parity, run_cases
    from spawn import run_ranks

    CASES = [Case("cosine", "mixed", "zigzag", "fetch"), Case("cosine", "few", "random", "ring")]


    @pytest.mark.parametrize("world_size", [1, 3])
    def test_cosine_over_ranks(world_size):
        ranks = run_ranks(run_cases, world_size, CASES)
        parity.check_cases(ranks, world_size, CASES, lambda case: expected(case.variant, case.lengths, case.dtype))
""")
TRAINS = dedent("""
    import sys, torch, yaml
    from longspan.launcher.config import Config
    from longspan.models.build import build_model
    from longspan.parallel import SequenceParallel

    given = ["data.corpora=[{path: x}]", "model.num_layers=2", "model.hidden_size=32", "model.num_heads=2"]
    lists = yaml.safe_load(sys.argv[1])["model"]["sparse_selection"]
    for selection in (lists, {"name": "cosine", "keep": 0.05}):
        settings = [*given, "model.pattern=[linear:mild, sparse]", f"model.sparse_selection={selection}"]
        model, seq = build_model(Config.load(None, settings).model), SequenceParallel().context([300, 77])
        model(torch.zeros(377, dtype=torch.int64), torch.arange(377) % 257, seq).backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
        print(selection["name"], "trains")
""")


def place(root, block):
    """Puts a block where its first line says: into a table, before a line, or into a file of its own."""
    where, code = block.split("\n", 1)
    path, _, spot = where.removeprefix("# ").partition(", ")
    file = root / path
    if not spot:
        assert not file.exists(), f"{path} is there"
        file.write_text(code)
        return
    lines = file.read_text().splitlines(keepends=True)
    table, before = re.fullmatch(r"in (\w+)|before `(.*)`", spot).groups()
    found = [n for n, line in enumerate(lines) if line.strip().startswith(f"{table} = {{" if table else before)]
    found += [n for n, line in enumerate(lines) if table and line.strip() == f"{table} |= {{"]
    assert len(found) == 1, f"{where}: {len(found)} places"
    lines.insert(found[0] + bool(table), code)
    file.write_text("".join(lines))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    root = tmp_path_factory.mktemp("copy")
    for folder in ("longspan", *(link.name for link in (ROOT / "longspan").iterdir() if link.is_symlink()), "tests"):
        shutil.copytree(
            ROOT / folder, root / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "results")
        )
    shutil.copy(ROOT / "pyproject.toml", root)
    for block in blocks(PAGE, "python"):
        place(root, block)
    return root


def run(copy, *arguments):
    """What Python prints in the copy; fails if it exits non-zero."""
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_tests_that_the_page_names_pass_in_a_copy(copy):
    for path in re.findall(r"tests/\S+\.py", PAGE.read_text()):
        assert (ROOT / path).exists(), path
    (copy / "tests" / "attention" / "test_new.py").write_text(ON_RANKS)
    files = ["tests/models/test_decoder.py", "tests/attention/test_sparse_parity.py", "tests/attention/test_new.py"]
    options = ["-v", "-p", "no:cacheprovider", "-k", "mild or cosine", "-o", "pythonpath=tests/common tests/attention"]
    shown = run(copy, "-m", "pytest", *options, *files)
    tests = "equals_the_reference[mild]", "no_token_reaches_an_earlier_one[cosine]", "pairs_are_counted[cosine]"
    for test in (*tests, "cosine_over_ranks[1]", "cosine_over_ranks[3]"):
        assert f"test_{test} PASSED" in shown, shown


def test_models_of_the_examples_train(copy):
    (config,) = blocks(PAGE, "yaml")
    assert run(copy, "-c", TRAINS, config) == "lists trains\ncosine trains\n"
