"""Costs for plans of softmax attention, from the file of `longspan bench calibrate`."""

import json
from dataclasses import fields
from pathlib import Path

from longspan.launcher.config import Config
from longspan.launcher.errors import UserError
from longspan.parallel import Costs

REMEDY = "write it with `longspan bench calibrate --output FILE`"


def load_costs(config: Config) -> Costs:
    """Those of the file `parallel.costs`, or of an H200 if it is empty. UserError for a file that cannot be read, or is
    of a model with other heads or of another dtype."""
    path, model = config.parallel.costs, config.model
    wanted = {"heads": model.num_heads, "kv_heads": model.kv_heads, "head_dim": model.head_size}
    wanted["bytes_per_number"] = 4 if config.train.dtype == "float32" else 2
    if not path:
        return Costs.h200(**wanted)
    costs, measured = _read(path, f"parallel.costs={path}")
    if measured != wanted:
        heads = " ".join(f"--{name.replace('_', '-')} {wanted[name]}" for name in ("heads", "kv_heads", "head_dim"))
        raise UserError(
            f"parallel.costs={path} is for a model with {_listed(measured)}, this one has {_listed(wanted)}; write"
            f" another with `longspan bench calibrate {heads} --output FILE`, in fp32 on CPUs and bf16 on GPUs"
        )
    return costs


def read_costs(path: str) -> Costs:
    """Those of the file `path`, whatever model they are for."""
    return _read(path, path)[0]


def _listed(model: dict) -> str:
    return ", ".join(f"{name}={value}" for name, value in model.items())


def _read(path, shown):
    try:
        found = json.loads(Path(path).read_text())
        missing = {field.name for field in fields(Costs)} - set(found["costs"])
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        return Costs(**found["costs"]), dict(found["model"])
    except OSError as error:
        raise UserError(f"{shown}: {error.strerror}; {REMEDY}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{shown} is no file of costs ({error}); {REMEDY}") from None
