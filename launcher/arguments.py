"""Commands of `longspan` as data, and how their words are read: options, and settings written key=value."""

import argparse
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from difflib import get_close_matches
from os.path import expanduser
from pathlib import Path
from typing import Any

from longspan.launcher.config import Config, shipped_configs
from longspan.launcher.errors import UserError
from longspan.launcher.parsing import describe, parse_tokens, settings_of

SETTINGS = "key=value"
# Flags that set one setting: flag -> (setting, metavar).
FLAGS = {
    "--seq-len": ("data.seq_len", "TOKENS"),
    "--steps": ("train.steps", "N"),
    "--run-dir": ("run.dir", "DIR"),
    "--resume": ("checkpoint.resume", "auto|none|PATH"),
}

Argument = tuple[str, dict[str, Any]]  # of argparse: name or flag, and options


@dataclass(frozen=True)
class Command:
    """One thing to do: `summary` is its line in `longspan --help`, the rest is its own help. `run` gets the arguments
    by name, and of a command with `settings` also the `config` that the words ask for. An epilog that takes time to
    make is a function. ranks: whether several may run it together."""

    name: str
    summary: str
    description: str
    arguments: tuple[Argument, ...]
    run: Callable[..., None]
    epilog: str | Callable[[], str] = ""
    settings: bool = False
    ranks: bool = False

    def __call__(self, argv: list[str]) -> None:
        """Reads the arguments and runs. Raises UserError for whatever does not fit."""
        arguments, ranks = self.read(argv), os.environ.get("WORLD_SIZE", "1")
        if ranks != "1" and not self.ranks:
            raise UserError(f"longspan {self.name} is for one rank, and WORLD_SIZE={ranks}: start it without torchrun")
        self.run(**arguments)

    def read(self, argv: list[str]) -> dict[str, Any]:
        """What `run` gets. UserError where the arguments are wrong; asked for help, it prints that and exits."""
        epilog = self.epilog if isinstance(self.epilog, str) else self.epilog()
        parser = Parser(f"longspan {self.name}", self.description, epilog)
        for name, options in (*self.arguments, *(_settings() if self.settings else ())):
            parser.add_argument(name, **options)
        arguments = parser.read(argv)
        if not self.settings:
            return arguments
        flags = [f"{path}={value}" for path, _ in FLAGS.values() if (value := arguments.pop(path)) is not None]
        return {"config": Config.load(arguments.pop("file"), arguments.pop("settings") + flags)} | arguments


def option(name: str, metavar: str | None, help: str, value: Any = None, **more: Any) -> Argument:
    """An argument of a command. value: the default where it is to be seen in the help; the argument is of its type."""
    if value is not None:
        help, more = f"{help} (default {value})", {"type": type(value), "default": value} | more
    return name, {"metavar": metavar, "help": help} | more


def flag(name: str, help: str) -> Argument:
    """An argument that is true where it is given."""
    return name, {"action": "store_true", "help": help}


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are UserErrors: one line, printed by one rank."""

    def __init__(self, prog: str, description: str, epilog: str = ""):
        lines = argparse.RawDescriptionHelpFormatter if "\n" in epilog else argparse.HelpFormatter
        super().__init__(prog=prog, description=description, epilog=epilog, formatter_class=lines, allow_abbrev=False)

    def read(self, argv: list[str] | None) -> dict[str, Any]:
        """The arguments by name: options may stand between words, but for those left to another parser."""
        left = [action for action in self._actions if action.nargs == argparse.REMAINDER]
        for action in left:
            action.required = False  # Python 3.11 would name it beside what is missing
        return vars((self.parse_args if left else self.parse_intermixed_args)(argv))

    def error(self, message: str) -> None:
        command = self.prog.removeprefix("longspan").strip()  # the line starts with longspan as it is
        start = f"{command}: " if command else ""
        if unknown := re.match(r"unrecognized arguments: (-[^\s=]*)", message):
            known = [flag for action in self._actions for flag in action.option_strings]
            hint = f"see `{self.prog} --help`"
            if any(action.metavar == SETTINGS for action in self._actions):
                hint = "settings are written key=value, such as optim.lr=3e-4"
            if nearest := get_close_matches(unknown[1], known, n=1):
                hint = f"did you mean {nearest[0]}?"
            raise UserError(f"{start}unknown option {unknown[1]}: {hint}")
        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        nearest = get_close_matches(wrong[1], re.findall(r"[\w-]+", wrong[2]), n=1) if wrong else ()
        message += "".join(f", did you mean {name}?" for name in nearest)
        raise UserError(f"{start}{message}; see `{self.prog} --help`")


def choice(name: str, choices: Mapping[str, Any], prog: str) -> tuple[Argument, ...]:
    """`name`, one of the choices, and the `argv` behind it, which are left for it to read."""
    more = f"`{prog} {name.upper()} --help` says more"
    first = option(name, name.upper(), more, choices=list(choices))
    return first, option("argv", None, argparse.SUPPRESS, nargs=argparse.REMAINDER)


def listed(entries: Mapping[str, str]) -> str:
    """What there is to choose from, a line each."""
    width = max(map(len, entries)) + 2
    return "\n".join(f"  {name:<{width}}{text}" for name, text in entries.items())


def num_tokens(text: str) -> int:
    """A number of tokens, as the type of an argument."""
    try:
        return parse_tokens(text)
    except UserError as error:
        hint = "; settings stand in front of options" if "=" in text else ""
        raise argparse.ArgumentTypeError(f"{error}{hint}") from None


def gib(text: str) -> float:
    """A number of GiB, as the type of an argument."""
    try:
        if math.isfinite(number := float(text)):
            return number
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no number of GiB; write it like 1024")


def writable(text: str) -> str:
    """The path of a file to be written, as the type of an argument: rank 0, which will, tries before anything else,
    and leaves no trace. From the home folder where it says ~, as the shell has left it in --output=~/x."""
    text = expanduser(text)
    return _tried(text, Path(text))


def writable_folder(text: str) -> str:
    """The path of a folder for files, as the type of an argument: tried like `writable`."""
    text = expanduser(text)
    return _tried(text, Path(text) / "file")


def _tried(text: str, path: Path) -> str:
    if os.environ.get("RANK", "0") != "0":
        return text
    try:
        if path.is_dir():
            raise OSError(None, "it is a folder")
        if path.exists() and not path.is_file():  # what is written takes its place
            raise OSError(None, "it is no file but a device or the like")
        trial = next(folder for folder in path.absolute().parents if folder.exists()) / f".longspan-{os.getpid()}"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be written ({error.strerror}); name another") from None
    return text


def settings_help() -> str:
    """Every setting with its default, its type and its line of help, by section."""
    lines = ["settings (key=value, or by section in the file); K, M, G in token counts are 2^10, 2^20, 2^30:"]
    section = None
    for setting in settings_of(Config()):
        if setting.path.partition(".")[0] != section:
            section = setting.path.partition(".")[0]
            lines.append(f"\n {section}: {(getattr(Config(), section).__doc__ or '').splitlines()[0]}")
        lines.append(f"  {setting.path}={_shown(setting.default)}  ({describe(setting.kind)})")
        lines.append(f"      {setting.help}")
    return "\n".join(lines)


def _settings() -> tuple[Argument, ...]:
    """What names settings: a file, flags, and key=value words, in which the later are stronger."""
    shipped = ", ".join(shipped_configs())
    return (
        option("--config", "FILE", f"YAML file of settings, or a shipped one by name: {shipped}", dest="file"),
        *(
            option(flag, metavar, f"the same as {path}={metavar}, which it overrides", dest=path)
            for flag, (path, metavar) in FLAGS.items()
        ),
        option("settings", SETTINGS, "settings, in YAML: optim.lr=3e-4", nargs="*", default=[]),
    )


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(str(asdict(item)) if is_dataclass(item) else str(item) for item in value) + "]"
    return str(value)
