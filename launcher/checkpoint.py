"""Checkpoints that any number of ranks can resume from, and that are either complete or ignored.

RUN/checkpoints/step-00000100/ holds torch.distributed.checkpoint's shards of model and optimizer, each rank's random
state (`rng-*.pt`), `info.json` (step, data position, config, sizes and digests of files) and the file `complete`, with
the digest of info.json. A save is written to `.saving-step-00000100` and renamed when it is whole, so one that was
interrupted is never read.
"""

import io
import json
import logging
import shutil
import socket
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from longspan.launcher.agreement import agree_on_none, decide
from longspan.launcher.config import Config
from longspan.launcher.digests import DigestingWriter, digest, first_difference, share
from longspan.launcher.engines import Engine
from longspan.launcher.errors import UserError
from longspan.launcher.files import naming, write_through
from longspan.models.config import ModelConfig

log = logging.getLogger(__name__)

MARKER = "complete"
MOST_NAMED = 3  # parameters in a line
# Model settings that the stored parameters do not depend on; all others must be those of the checkpoint.
FREE_MODEL_SETTINGS = (
    "embedding_std", "init_std", "loss_chunk", "rope_base", "rope_scaling", "rope_trained", "rope_type", "window",
)  # fmt: skip
DATA_ORDER_SETTINGS = (
    "data.corpora", "data.packing", "data.seq_len", "data.image_size", "data.validation_fraction", "run.seed",
)  # fmt: skip


@dataclass(frozen=True)
class Info:
    """What a checkpoint says about itself: `step` optimizer steps are done, `data` is the position after them."""

    path: Path
    step: int
    data: dict[str, Any]
    config: dict[str, Any]
    world_size: int
    sizes: dict[str, int]  # bytes of every file, to notice truncated ones before they are loaded
    digests: dict[str, str] = field(default_factory=dict)  # of every file; none in checkpoints of earlier releases


def find(run_dir: Path, resume: str) -> Info | None:
    """The checkpoint that `checkpoint.resume` means for this run directory; None to start anew.

    "auto": the newest complete one of the run directory. "none": none. Otherwise a path: a checkpoint, or a run
    directory whose newest one is taken. Raises UserError when it is missing, damaged or not readable, and when the run
    directory holds later checkpoints than the start, which the run would mix with its own. Looks at the file system:
    call it on one rank.
    """
    with _reading(run_dir):
        return _find(run_dir, resume)


def _find(run_dir: Path, resume: str) -> Info | None:
    own = _complete(run_dir / "checkpoints")
    if resume == "auto":
        newest = read_info(own[-1]) if own else None
        if newest and newest.step != _step_of(newest.path):  # where later saves would find their places taken
            raise UserError(f"{newest.path} holds step {newest.step}: call the folder that, or move it elsewhere")
        return newest
    start = None if resume == "none" else named(Path(resume), "checkpoint.resume=")
    if own and (start is None or _step_of(own[-1]) > start.step):
        raise UserError(
            f"{own[-1]} is later than the start asked for by checkpoint.resume={resume}: resume with "
            "checkpoint.resume=auto, or choose another run.name or run.dir"
        )
    return start


def named(path: Path, setting: str = "") -> Info:
    """The checkpoint `path`, or the newest one of that run directory. UserError, which repeats what `setting` asked for
    it, when it is missing, damaged or not readable."""
    with _reading(path):
        if _is_complete(path):
            return read_info(path)
        complete = _complete(path / "checkpoints") or _complete(path)
    if not complete:
        raise UserError(
            f"{setting}{path}: no complete checkpoint there; name a folder step-*, or a run directory with one"
        )
    return read_info(complete[-1])


def read_info(path: Path) -> Info:
    """What `path` says about itself; UserError when the checkpoint is damaged or cannot be read."""
    try:
        content, written = (_content(path / name) for name in ("info.json", MARKER))
        if written and digest(content) != written.decode():
            raise ValueError("info.json has other bytes than were written")
        stored = json.loads(content)
        if written and (unknown := set(stored) - {known.name for known in fields(Info)}):
            raise UserError(f"{path} is of a later release, by its {', '.join(sorted(unknown))}: use that release")
        info = Info(path=path, **stored)
        for name, size in info.sizes.items():
            found = (path / name).stat().st_size
            if found != size:
                raise ValueError(f"{name} has {found} bytes instead of {size}")
    except (FileNotFoundError, TypeError, ValueError) as error:
        raise UserError(_damaged(path, error)) from None
    except OSError as error:
        raise UserError(_unreadable(path, error)) from None
    return info


def _content(path: Path) -> bytes:
    with naming(path):
        return path.read_bytes()


ANEW = "start anew in another run.name with checkpoint.resume=none"


def check_model(info: Info, model: ModelConfig, otherwise: str = ANEW) -> None:
    """Raises UserError naming the settings in which `model` differs from the checkpoint's model, and what else to
    do."""
    stored, wanted = asdict(ModelConfig()) | info.config["model"], asdict(model)  # defaults: settings of later releases
    names = [name for name in {**stored, **wanted} if stored.get(name) != wanted.get(name)]
    differences = {name: f"model.{name} is {stored.get(name)} there and {wanted.get(name)} here" for name in names}
    fatal = [text for name, text in differences.items() if name not in FREE_MODEL_SETTINGS]
    if fatal:
        raise UserError(
            f"{info.path} holds another model: {'; '.join(fatal)}. Use the checkpoint's settings, or {otherwise}"
        )
    for text in differences.values():
        log.warning("changed since the checkpoint: %s", text)


def warn_about_data(info: Info, config: Config) -> None:
    """Says which settings of the data order have changed since: the position is kept, but counts other samples."""
    stored, wanted, default = info.config, asdict(config), asdict(Config())  # defaults: settings of later releases
    paths = [path.split(".") for path in DATA_ORDER_SETTINGS]
    changed = [
        f"{section}.{name}"
        for section, name in paths
        if stored[section].get(name, default[section][name]) != wanted[section][name]
    ]
    if changed:
        log.warning("the data order is another one than the checkpoint's, since %s changed", ", ".join(changed))


def load(info: Info, engine: Engine) -> None:
    """Loads parameters, optimizer state and random state into `engine`, sharded as they are now.

    Collective. Settings of the optimizer (rates, betas, decay) stay as they are. Where a parameter is trained that the
    checkpoint's run did not train, all states of the optimizer begin anew: their steps, from which Adam corrects its
    averages, are the same for all parameters. The random state returns on the same number of ranks only; on another it
    is drawn from the step. Raises UserError on all ranks when it fails, and before anything is loaded when a file has
    other bytes than were written.
    """
    same_ranks, random_state = info.world_size == dist.get_world_size(), None
    state = engine.state_dict()
    _check(info)
    stored, moments = _stored_names(info), state["optimizer"]["state"]
    new = [name for name in moments if f"optimizer.state.{name}.step" not in stored]
    if new:
        log.warning(
            "trained now, but not in the checkpoint: %s%s; the optimizer's states of all parameters begin anew",
            ", ".join(new[:MOST_NAMED]),
            f" and {len(new) - MOST_NAMED} more" if len(new) > MOST_NAMED else "",
        )
        state = {"model": state["model"]}
    _read(info, {"model": state["model"]} | ({} if new else {"optimizer": {"state": moments}}))
    if same_ranks:
        with _whole(info):
            random_state = torch.load(info.path / _rng_file(dist.get_rank()), weights_only=True)
    engine.load_state_dict(state)
    if same_ranks:
        _set_random_state(random_state)
    else:
        torch.manual_seed(info.config["run"]["seed"] + info.step)


def _check_bytes(info: Info, rank: int, world_size: int) -> str | None:
    """What is wrong with those of the files that `rank` checks; None for nothing."""
    mine = share(list(info.digests), rank, world_size)
    try:
        difference = first_difference(info.path, {name: info.digests[name] for name in mine})
    except OSError as error:
        return _unreadable(info.path, error)
    return difference and _damaged(info.path, difference)


def verify(path: Path) -> Iterator[tuple[str, bool]]:
    """Of the checkpoint `path`, or of every complete one of that run directory: a line about its bytes, and whether
    they are right. UserError where there is none."""
    with _reading(path):
        single = [path] if _is_complete(path) else []
        folders = single or _complete(path / "checkpoints") or _complete(path) or [named(path).path]
    for found in folders:
        try:
            info = read_info(found)
            problem = _check_bytes(info, 0, 1)
        except UserError as error:
            problem = str(error)
        if problem:
            yield problem, False
        elif info.digests:
            yield f"{found}: all files are as they were written", True
        else:
            yield f"{found}: files have their sizes; it is of an earlier release, without digests", True


def fill(info: Info, state: dict[str, Any], *, alone: bool = False) -> None:
    """Loads into the tensors of `state` what the checkpoint has under their names. alone: for this process, without the
    others. Raises UserError, on all ranks, when it fails."""
    _check(info, alone=alone)
    _stored_names(info)  # dcp.load would log tracebacks of its own first
    _read(info, state, alone=alone)


def _check(info: Info, *, alone: bool = False) -> None:
    """UserError, on all ranks, where a file has other bytes than were written."""
    if not info.digests:
        log.warning("%s is of an earlier release, without digests: of its files only the sizes are checked", info.path)
    rank, world_size = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    problem = _check_bytes(info, rank, world_size)
    if alone and problem:
        raise UserError(problem)
    if not alone:
        agree_on_none(problem)


def _stored_names(info: Info) -> Container[str]:
    with _whole(info):
        return dcp.FileSystemReader(info.path).read_metadata().state_dict_metadata


def _read(info: Info, state: dict[str, Any], *, alone: bool = False) -> None:
    try:
        dcp.load(state, checkpoint_id=info.path, no_dist=alone)
    except CheckpointException as error:
        rank, failure = _first_failure(error)
        if isinstance(failure, OSError):
            raise UserError(_unreadable(info.path, failure)) from None
        if isinstance(failure, Exception) and not info.digests:
            raise UserError(_damaged(info.path, failure)) from None
        raise _stopped(rank, failure, f"{info.path} was loaded") from error  # whose bytes are right


def save(run_dir: Path, config: Config, engine: Engine, *, step: int, data: dict[str, Any]) -> Path:
    """Saves the state after `step` optimizer steps and deletes what checkpoint.keep_last no longer covers.

    Collective; `run_dir` is the same folder for every rank. Raises UserError on all ranks when it cannot be written.
    """
    final = run_dir / "checkpoints" / f"step-{step:08d}"
    partial = final.with_name(f".saving-{final.name}")
    decide(lambda: _prepare(partial))
    state, writer = engine.state_dict(), DigestingWriter(partial)
    try:
        dcp.save(state, checkpoint_id=partial, storage_writer=writer)
    except CheckpointException as error:
        rank, failure = _first_failure(error)
        if "inline_container" in str(failure):  # what torch's zip writer says when the file did not take all of it
            failure = OSError("a file is shorter than what was written to it, as on a full disk")
        if not isinstance(failure, OSError):
            raise _stopped(rank, failure, f"{final} was saved") from error
        raise UserError(_unwritable(partial, failure)) from None
    problem = None
    try:
        content = io.BytesIO()  # torch.save hides the reason when a file cannot be written
        torch.save(_random_state(), content)
        own = _rng_file(dist.get_rank())
        write_through(partial / own, content.getvalue())
        writer.digests[own] = digest(content.getvalue())
    except OSError as error:
        problem = _unwritable(partial, error)
    agree_on_none(problem)
    digests = [None] * dist.get_world_size()
    dist.all_gather_object(digests, writer.digests)
    info = {"step": step, "data": data, "config": asdict(config), "world_size": dist.get_world_size()}
    info["digests"] = {name: value for of_rank in digests for name, value in of_rank.items()}
    decide(lambda: _publish(partial, final, info, config.checkpoint.keep_last))
    return final


def try_folder(run_dir: Path) -> None:
    """UserError where no checkpoint can be written: before the first step, not after the last. On one rank. Whatever a
    save, a deletion or a trial that was cut short has left is removed."""
    partial = run_dir / "checkpoints" / ".saving-step-trial"
    _prepare(partial)
    partial.rmdir()


def _prepare(partial: Path) -> None:
    try:
        partial.parent.mkdir(exist_ok=True)  # in the run directory, which is there
        for leftover in partial.parent.glob(".*-step-*"):
            shutil.rmtree(leftover)
        partial.mkdir()
    except OSError as error:
        raise UserError(_unwritable(partial, error)) from None


def _publish(partial: Path, final: Path, info: dict[str, Any], keep_last: int) -> None:
    """Makes the finished save visible under its final name, then deletes old ones."""
    try:
        if len(list(partial.glob("rng-*.pt"))) != info["world_size"]:
            raise UserError(
                f"{partial} holds the files of some ranks only: run.dir must be on a disk that all machines share"
            )
        info["sizes"] = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        content = json.dumps(info, indent=1).encode()
        write_through(partial / "info.json", content)
        write_through(partial / MARKER, digest(content).encode())
        if final.exists() and not _is_complete(final):
            shutil.rmtree(final)
        partial.rename(final)
        for old in _complete(final.parent)[:-keep_last]:
            # Renamed first: a deletion that is cut short leaves nothing to be read, and the next save removes it.
            shutil.rmtree(old.rename(old.with_name(f".deleting-{old.name}")))
    except OSError as error:
        raise UserError(_unwritable(final, error)) from None


def _complete(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    try:
        paths = list(folder.iterdir())  # unlike `glob`, which takes a folder that cannot be read for an empty one
    except (FileNotFoundError, NotADirectoryError):
        return []
    steps = sorted((path for path in paths if path.match("step-*") and path.name[5:].isdigit()), key=_step_of)
    complete = [path for path in steps if _is_complete(path)]
    for path in steps:
        if path not in complete:
            log.warning("%s is not complete and is ignored", path)
    return complete


def _is_complete(path: Path) -> bool:
    """Whether `path` is a checkpoint. OSError where that cannot be known, for which `exists` has no word."""
    try:
        (path / MARKER).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _step_of(path: Path) -> int:
    return int(path.name[5:])


def _rng_file(rank: int) -> str:
    return f"rng-{rank:05d}.pt"


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])


def _first_failure(error: CheckpointException) -> tuple[int, BaseException]:
    rank = min(error.failures)
    return rank, error.failures[rank][0]


def _stopped(rank: int, failure: BaseException, doing: str) -> Exception:
    """What all ranks raise for a failure of one in dcp, whose own exception passes by what catches `Exception`."""
    if isinstance(failure, KeyboardInterrupt):
        return UserError(f"interrupted on rank {rank} while {doing}")
    return RuntimeError(f"rank {rank} failed while {doing}: {type(failure).__name__}: {failure}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """UserError in place of an OSError of what is read in `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(_unreadable(path, error)) from None


@contextmanager
def _whole(info: Info) -> Iterator[None]:
    """UserError when reading a file of the checkpoint fails: damaged ones raise whatever unpickling comes across, and
    so do those whose bytes are right of another torch."""
    with _reading(info.path):
        try:
            yield
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001
            if not info.digests:
                raise UserError(_damaged(info.path, error)) from None
            raise UserError(
                f"{info.path} has the bytes that were written, but torch {torch.__version__} cannot read them"
                f" ({_reason(error)}): use the versions that environment.json of its run names"
            ) from None


def _damaged(path: Path, error: BaseException | str) -> str:
    return f"{path} is damaged ({_reason(error)}): delete that folder to resume from the checkpoint before it"


def _unreadable(path: Path, error: OSError) -> str:
    """Of a file in `path` that may be as good as ever: a disk that does not answer, permissions, a disk that is not
    shared."""
    return (
        f"{error.filename or path}: cannot be read on {socket.gethostname()} ({error.strerror or error}); it may be"
        " good, so keep it: look at that disk and at permissions, then give the same command again"
    )


def _reason(error: BaseException | str) -> str:
    reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return " ".join(reason.split())[:300]


def _unwritable(path: Path, error: OSError) -> str:
    return f"{path}: the checkpoint cannot be written ({error}); free or change the disk of run.dir, then resume"
