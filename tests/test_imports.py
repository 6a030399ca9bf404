"""The import rules of the rooms, read from the source: who may import whom, and who may touch torch.distributed."""

import ast
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A room imports itself and the rooms named here.
MAY_IMPORT = {
    "benchmarks": {"launcher", "models", "attention", "parallel", "kernels", "configs"},
    "launcher": {"models", "attention", "parallel", "kernels", "configs"},
    "models": {"attention", "parallel", "kernels"},
    "attention": {"parallel", "kernels"},
    "parallel": set(),
    "kernels": set(),
    "configs": set(),
}
MAX_LINES = 600
ROOMS = set(MAY_IMPORT) - {"benchmarks"}


def python_files(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_names(path):
    """Every dotted name that the file imports, anywhere in it; `from a import b` counts as a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write longspan.<room>..."
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def uses_torch_distributed(path):
    """Whether the file imports torch.distributed or reaches it as an attribute of torch."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    attributes = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    return any(name.startswith("torch.distributed") for name in imported_names(path) | attributes)


def within(names, *packages):
    return {name for name in names if any(name == package or name.startswith(package + ".") for package in packages)}


@cache
def defined_names(path):
    """What a module gives to whoever imports from it: all that is bound at its top level, in branches too."""
    names, nodes = set(), list(ast.parse(path.read_text(encoding="utf-8")).body)
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        else:
            names |= {found.id for found in ast.walk(node) if isinstance(found, ast.Name)}
            nodes += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return names


def test_names_that_are_imported_exist():
    """Also in files that only some machines load."""
    for path in python_files(*MAY_IMPORT, "tests"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or node.module.partition(".")[0] != "longspan":
                continue
            module = ROOT.joinpath("longspan", *node.module.split(".")[1:])
            source = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
            for alias in node.names:
                is_module = (module / alias.name).is_dir() or (module / f"{alias.name}.py").exists()
                assert is_module or alias.name in defined_names(source), (
                    f"{path.relative_to(ROOT)} imports {alias.name} from {node.module}, which has none"
                )


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_the_rooms_below_them(room):
    for path in python_files(room):
        used = {name.split(".")[1] for name in within(imported_names(path), "longspan") if "." in name}
        forbidden = (used & set(MAY_IMPORT)) - MAY_IMPORT[room] - {room}
        assert not forbidden, f"{path.relative_to(ROOT)} imports {forbidden}"


def test_rooms_are_imported_as_parts_of_longspan():
    for path in python_files(*MAY_IMPORT, "tests"):
        bare = within(imported_names(path), *MAY_IMPORT)
        assert not bare, f"{path.relative_to(ROOT)} imports {bare}; write longspan.<room>..."


def test_only_parallel_launcher_and_parallelize_touch_torch_distributed():
    allowed = {ROOT / "models" / "parallelize.py", *python_files("parallel", "launcher")}
    for path in set(python_files(*ROOMS)) - allowed:
        assert not uses_torch_distributed(path), f"{path.relative_to(ROOT)} uses torch.distributed"


def test_only_kernels_import_triton():
    for path in set(python_files(*ROOMS)) - set(python_files("kernels")):
        assert not within(imported_names(path), "triton"), f"{path.relative_to(ROOT)} imports triton"


def test_no_file_is_too_long_to_read():
    for path in python_files(*MAY_IMPORT, "tests"):
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        assert num_lines <= MAX_LINES, f"{path.relative_to(ROOT)} has {num_lines} lines, more than {MAX_LINES}"


def test_ruff_has_nothing_to_say():
    ruff = find_ruff()
    if ruff is None:
        pytest.skip("ruff is not installed")
    command = [ruff, "check", "--quiet", "--no-cache", "--output-format=concise", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def find_ruff():
    try:
        from ruff import find_ruff_bin
    except ImportError:
        return shutil.which("ruff")
    return find_ruff_bin()


def test_training_and_plans_on_machines_without_triton():
    imports = "import longspan.launcher.trainer, longspan.launcher.estimate_report"
    code = f"import sys; sys.modules['triton'] = None; {imports}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=120)
    assert done.returncode == 0, done.stderr
