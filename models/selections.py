"""Selections of sparse layers by name and settings, as `model.sparse_selection` gives them."""

from dataclasses import MISSING, fields
from difflib import get_close_matches
from importlib import import_module

from longspan import attention

SELECTIONS = {
    "top": attention.TopBlocks,
    "hierarchical": attention.Hierarchical,
    "window": attention.Window,
    "radial": attention.Radial,
    "antidiagonal": attention.Antidiagonal,
    "tokens": attention.TokenTop,
    "compressed": attention.CompressedTop,
    "lists": attention.BlockLists,
}


def build_selection(settings):
    """The selection that a mapping such as {name: window, window: 4096} means: `name` is one of SELECTIONS, the rest
    are its arguments; `lists` is written module:function. Raises ValueError for what does not fit."""
    arguments = dict(settings)
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in SELECTIONS:
        raise ValueError(f"name={name!r} is unknown{_nearest(name, SELECTIONS)}; use {', '.join(SELECTIONS)}")
    known = [field.name for field in fields(SELECTIONS[name]) if field.init]
    for argument in arguments:
        if argument not in known:
            raise ValueError(f"{name} has no {argument!r}{_nearest(argument, known)}; it has {', '.join(known)}")
    if name == "lists":
        arguments["lists"] = _function(arguments.get("lists"))
    missing = [field.name for field in fields(SELECTIONS[name]) if field.default is MISSING and field.init]
    missing = [argument for argument in missing if argument not in arguments]
    if missing:
        raise ValueError(f"{name} needs {' and '.join(missing)}, such as {{name: {name}, {missing[0]}: ...}}")
    try:
        return SELECTIONS[name](**arguments)
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{name} with {arguments}: a value of another type is needed ({error})") from None


def _function(path):
    """The function that module:function names."""
    module, _, function = str(path).partition(":")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError):
        raise ValueError(f"lists={path!r} is no function that can be imported; write module:function") from None


def _nearest(name, known):
    near = get_close_matches(str(name), known, 1)
    return f", did you mean {near[0]!r}?" if near else ""
