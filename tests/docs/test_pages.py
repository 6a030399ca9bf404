"""Links of the guide lead somewhere; its commands are understood; settings that it names are there."""

import re
import shlex
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from pages import ROOT, blocks, pages

from longspan.launcher import cli
from longspan.launcher.config import Config
from longspan.launcher.parsing import settings_of

PAGES = {str(page.relative_to(ROOT)): page for page in pages()}
SECTIONS = "|".join(dict.fromkeys(setting.path.partition(".")[0] for setting in settings_of(Config())))
SETTINGS = {setting.path for setting in settings_of(Config())}
MADE = ("qwen3-8b.yaml", "hybrid.yaml")  # by another command of the page
MISSING = re.compile("arguments are required|data.corpora is empty")
ENDINGS = ("py", "md", "json", "safetensors")  # of files
# What commands hand their arguments to: module of longspan.launcher and function.
RUNS = {
    "prepare": ("corpus", "prepare"), "plan": ("estimate_report", "report"), "train": ("trainer", "run"),
    "verify": ("checkpoint", "verify"), "evaluate": ("evaluation", "evaluate_run"), "export": ("export", "export_run"),
    "sample": ("sampling", "sample_run"), "import": ("weights", "import_model"), "report": ("report", "write_report"),
    "generate": ("generation", "generate_run"), "profile": ("profile_report", "show"),
}  # fmt: skip


@pytest.fixture
def parsed(monkeypatch):
    """What commands ask for, by name, instead of doing it."""
    calls = []
    for name, (module, function) in RUNS.items():
        module = import_module(f"longspan.launcher.{module}")
        monkeypatch.setattr(module, function, lambda *given, name=name, **named: calls.append(name) or [])
    monkeypatch.setattr(cli, "set_allocator", lambda: None)
    monkeypatch.chdir(ROOT)
    return calls


def text_of(page):
    """A page without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page):
    """The commands of a page, as lists of words, and whether they are whole: those of blocks, not those in prose."""
    lines = [(line, True) for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    lines += [(line, False) for line in re.findall(r"`(longspan \w[^`]*)`", text_of(page).replace("\n", " "))]
    parts = ((part, whole) for line, whole in lines for part in re.split(r";|\|\||\| ", line))
    return [(shlex.split(part, comments=True), whole) for part, whole in parts]


def longspan_arguments(words):
    """What follows `longspan`; of launcher/train.py and the script of SLURM as if they were `longspan train`."""
    for number, word in enumerate(words):
        if word == "longspan":
            return words[number + 1 :]
        if word == "launcher/train.py":
            return ["train", *words[number + 1 :]]
        if word.endswith("train.sbatch"):
            return ["train", "--config", *words[number + 1 :]]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = PAGES[name]
    links = re.findall(r"\]\(([^)\s]+)\)", text_of(page))
    for link in links:
        path, _, anchor = link.partition("#")
        if re.match(r"https?:", path):
            continue
        target = page.parent / path if path else page
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("name", PAGES)
def test_settings_are_there(name):
    named = set(re.findall(rf"(?<![\w/.])((?:{SECTIONS})\.[a-z_]++)(?![\w(/*]|\.\w)", text_of(PAGES[name])))
    for setting in named:
        assert setting in SETTINGS or setting.partition(".")[2] in ENDINGS, setting


@pytest.mark.parametrize("name", PAGES)
def test_commands_are_understood(name, parsed, capsys):
    for words, whole in commands(PAGES[name]):
        argv = longspan_arguments(words)
        module = next((word.split(".")[-1] for word in words if word.startswith("longspan.benchmarks.")), None)
        if argv and argv[0] in RUNS:
            understood(argv, whole, parsed, capsys)
        elif argv and argv[0] == "bench" and len(argv) > 1:
            assert argv[1] in cli.BENCHMARKS, words
            module = cli.BENCHMARKS[argv[1]]
        elif argv and whole:  # what prose has is not always a command
            assert argv[0].startswith("-") or argv[0] in cli.COMMANDS, words
        if module:
            source = Path(find_spec(f"longspan.benchmarks.{module}").origin).read_text()
            for option in (word for word in words if word.startswith("--") and f"benchmarks.{module}" in words):
                assert f'"{option}"' in source, words


def understood(argv, whole, parsed, capsys):
    """Fails where a command refuses its words; in prose it may leave out those that it needs."""
    argv = [re.sub(r"\$\w+", "4", word) for word in argv if word != "..."]
    for number, word in enumerate(argv):
        if word in MADE and argv[number - 1] == "--config":
            argv[number] = "hybrid-0.4b"
    try:
        cli.main(argv)
    except SystemExit as ended:
        said = capsys.readouterr()
        assert not ended.code or (not whole and MISSING.search(said.err)), f"{argv}: {said.err}"
    else:
        assert parsed.pop() == argv[0], argv
