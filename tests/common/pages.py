"""The pages of the documentation, and the code that stands in them."""

import re
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).resolve().parents[2]


def pages() -> list[Path]:
    """Front pages and the guide; the log says what was, not what is."""
    fronts = ROOT / "README.md", ROOT / "benchmarks" / "README.md"
    return [*fronts, *sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "log.md")]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language, in their order."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [dedent(block) if indented else block for indented, block in found]
