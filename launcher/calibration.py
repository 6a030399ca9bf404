"""Costs for plans of softmax attention, from the file of `longspan bench calibrate`."""

import json
from pathlib import Path

from longspan.launcher.errors import UserError
from longspan.models.config import ModelConfig
from longspan.parallel import Costs

REMEDY = "write it with `longspan bench calibrate --output FILE`"


def load_costs(path: str, config: ModelConfig) -> Costs:
    """Those of the file `path`, or of an H200 if it is empty. UserError for a file that cannot be read or is of a model
    with other heads."""
    wanted = {"heads": config.num_heads, "kv_heads": config.kv_heads, "head_dim": config.head_size}
    if not path:
        return Costs.h200(**wanted)
    costs, model = _read(path)
    if model != wanted:
        flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in wanted.items())
        raise UserError(f"parallel.costs={path} is for a model with {model}; calibrate with {flags}")
    return costs


def read_costs(path: str) -> Costs:
    """Those of the file `path`, whatever model they are for."""
    return _read(path)[0]


def _read(path):
    try:
        found = json.loads(Path(path).read_text())
        return Costs(**found["costs"]), found["model"]
    except OSError as error:
        raise UserError(f"parallel.costs={path}: {error.strerror}; {REMEDY}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"parallel.costs={path} is no file of costs ({error}); {REMEDY}") from None
