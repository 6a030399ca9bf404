"""Which parameters a run trains: patterns over their names, in which a kind of layer may stand for its blocks.

What is not trained gets no gradient and no optimizer state, and stays as it is to the last bit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Trainable:
    """What a pattern of `train` names (without any: all parameters), without what one of `freeze` does.

    A pattern names a parameter, or the module with all that is in it: `embedding`, `blocks.0`, `blocks.*.mlp`. In the
    place of `blocks.N` may stand a kind of layer: `linear` for all blocks with linear attention, `linear:gla.mixer` for
    the mixers of one family. `*`, `?` and `[...]` are those of file names; `*` passes over dots.
    """

    train: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()

    def names(self, model) -> tuple[str, ...]:
        """Of the trained parameters of `model`. ValueError for a pattern that names none, and where none is left."""
        if not self.train and not self.freeze:
            return tuple(name for name, _ in model.named_parameters())
        aliases = {name: tuple(_aliases(name, model.config.layer_kinds)) for name, _ in model.named_parameters()}
        chosen = self._named("train", aliases, model.config) if self.train else set(aliases)
        chosen -= self._named("freeze", aliases, model.config)
        if not chosen:
            given = [f"optim.{name}=[{', '.join(patterns)}]" for name, patterns in vars(self).items() if patterns]
            raise ValueError(f"{' and '.join(given)}: nothing is left to train; freeze less")
        return tuple(name for name in aliases if name in chosen)

    def _named(self, setting, aliases, config) -> set[str]:
        found = set()
        for pattern in getattr(self, setting):
            matching = {name for name, known in aliases.items() if any(_fits(alias, pattern) for alias in known)}
            if not matching:
                raise ValueError(
                    f"optim.{setting} has {pattern}, which names no parameter: {_hint(pattern, aliases, config)}"
                )
            found |= matching
        return found


ALL = Trainable()


def table(model, names: Sequence[str]) -> list[str]:
    """How many numbers of each part of `model` are trained, where parameters `names` are: a line for all, and one for
    each part. Parts of blocks are counted by kind of layer."""
    trained, parts = set(names), {}
    for name, parameter in model.named_parameters():
        kind, _, inside = name.partition(".")
        if kind == "blocks":
            layer, module, *_ = inside.split(".")
            kind = f"{model.config.layer_kinds[int(layer)]}.{module}"
        part = parts.setdefault(kind, [0, 0])
        part[0] += parameter.numel() * (name in trained)
        part[1] += parameter.numel()
    found, whole = (sum(part[index] for part in parts.values()) for index in (0, 1))
    width = max(map(len, parts)) + 2
    lines = [f"  {part:<{width}}{own:>14,} of {of:>14,}" for part, (own, of) in parts.items()]
    return [f"trained: {found:,} of {whole:,} parameters ({100 * found / whole:.3g} %)", *lines]


def _aliases(name: str, kinds: tuple[str, ...]) -> Iterator[str]:
    """The names of a parameter."""
    yield name
    room, _, inside = name.partition(".")
    if room == "blocks":
        layer, _, inside = inside.partition(".")
        kind = kinds[int(layer)]
        yield from dict.fromkeys((f"{kind}.{inside}", f"{kind.partition(':')[0]}.{inside}"))


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _hint(pattern: str, aliases: dict[str, tuple[str, ...]], config) -> str:
    if pattern.partition(".")[0] == "head" and config.tie_embeddings:
        return "with model.tie_embeddings=true the head is the embedding"
    parts = [alias.split(".") for known in aliases.values() for alias in known]
    modules = dict.fromkeys(".".join(names[:depth]) for names in parts for depth in range(1, len(names) + 1))
    nearest = get_close_matches(pattern, modules, n=1)
    roots = ", ".join(dict.fromkeys(names[0] for names in parts))
    return f"did you mean {nearest[0]}?" if nearest else f"names begin with {roots}"
