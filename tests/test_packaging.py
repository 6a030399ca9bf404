"""The wheel holds all of longspan, other packages stay importable, and train.py starts from a bare clone."""

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Every folder of the root that holds Python files, whoever made it.
ROOMS = sorted(
    folder.name
    for folder in ROOT.iterdir()
    if folder.name not in ("longspan", "tests", "build", "dist", "data", "runs")
    and not folder.name.startswith(".")
    and not (folder / "pyvenv.cfg").exists()
    and any(folder.rglob("*.py"))
)


def run_python(*arguments):
    """What Python prints when started outside the repository; fails if it exits non-zero."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory):
    """The paths inside a wheel built from a copy of the tree, offline."""
    folder = tmp_path_factory.mktemp("wheel")
    junk = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (*ROOMS, "longspan"):
        shutil.copytree(ROOT / name, folder / "tree" / name, symlinks=True, ignore=junk)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "tree")
    offline = ["--no-build-isolation", "--no-deps", "--no-index"]
    run_python("-m", "pip", "wheel", "--quiet", *offline, "--wheel-dir", folder, folder / "tree")
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_every_file_of_every_room_is_in_the_wheel(wheel_names):
    expected = {"longspan/__init__.py", "longspan/py.typed"}
    assert {"launcher", "parallel", "attention", "kernels", "models", "configs", "benchmarks"} <= set(ROOMS)
    for room in ROOMS:
        files = [path for suffix in ("*.py", "*.yaml") for path in (ROOT / room).rglob(suffix)]
        expected |= {f"longspan/{path.relative_to(ROOT)}" for path in files}
    assert expected <= wheel_names, f"missing from the wheel: {sorted(expected - wheel_names)}"


def test_the_wheel_holds_nothing_but_the_package(wheel_names):
    assert {name.split("/")[0].split("-")[0] for name in wheel_names} == {"longspan"}
    assert any(name.endswith("LICENSE") for name in wheel_names)


def test_every_room_is_linked_into_the_package_by_a_relative_link():
    for room in ROOMS:
        link = ROOT / "longspan" / room
        assert link.is_symlink() and str(link.readlink()) == f"../{room}"


def test_the_folders_shadow_no_other_package():
    for room in ROOMS:  # Hugging Face's `kernels` above all: transformers imports it when it can be found
        spec = importlib.util.find_spec(room)
        found = [spec.origin, *(spec.submodule_search_locations or [])] if spec else []
        assert not any(Path(place).resolve().is_relative_to(ROOT / room) for place in found if place), found


def test_no_launcher_file_hides_a_module_of_python_or_of_a_dependency():
    # torchrun puts launcher/ first on the module path of every rank.
    dependencies = {re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in requires("longspan")}
    imported = {
        name.lower()
        for name, owners in packages_distributions().items()
        if dependencies & {owner.lower().replace("_", "-") for owner in owners}
    }
    tempting = {"datasets", "evaluate", "transformers", "triton", "wandb", "deepspeed", "einops", "flash_attn"}
    taken = sys.stdlib_module_names | imported | tempting | {"torch", "longspan"}
    assert "yaml" in taken and "tokenizers" in taken
    names = {path.stem for path in (ROOT / "launcher").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not names & taken


@pytest.fixture
def clone(tmp_path):
    for name in (*ROOMS, "longspan"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_train_py_starts_in_a_clone_where_longspan_is_not_installed(clone):
    # -S leaves out site-packages, where an editable install lives; the dependencies are added back by path.
    site = Path(importlib.util.find_spec("yaml").origin).parents[1]
    code = (
        f"import sys, runpy; sys.path.append({str(site)!r}); sys.argv = ['train.py', '--help'];"
        f"runpy.run_path({str(clone / 'launcher' / 'train.py')!r}, run_name='__main__')"
    )
    shown = run_python("-S", "-c", code)
    assert f"from {clone / 'longspan'}" in shown and "warning" not in shown


def test_train_py_warns_when_another_longspan_is_installed(clone):
    shown = run_python(clone / "launcher" / "train.py", "--help")
    assert f"from {ROOT / 'longspan'}" in shown and f"warning: this is not {clone / 'longspan'}" in shown
