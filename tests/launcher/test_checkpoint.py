"""Which checkpoint a run starts from, what is refused, and that only whole saves count."""

import binascii
import errno
import json
import logging
import os
import re
import shutil
import socket
from contextlib import nullcontext
from dataclasses import asdict, replace

import pytest
import torch
import torch.distributed as dist
from full_disk import files_of_at_most
from spawn import run_ranks
from tiny_runs import start, tiny_config, train, write_corpus
from unreadable import locked, open_folder

from longspan.launcher import checkpoint, cli, digests
from longspan.launcher.agreement import decide
from longspan.launcher.config import Config
from longspan.launcher.errors import UserError
from longspan.models.config import ModelConfig


def _fake(run_dir, step, complete=True):
    path = run_dir / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / "weights").write_bytes(b"12345")
    fields = {"step": step, "data": {"position": step}, "config": {}, "world_size": 1, "sizes": {"weights": 5}}
    (path / "info.json").write_text(json.dumps(fields))
    if complete:
        (path / "complete").touch()
    return path


def test_auto_takes_the_newest_complete_one(tmp_path):
    assert checkpoint.find(tmp_path, "auto") is None
    _fake(tmp_path, 9)
    newest = _fake(tmp_path, 10)
    _fake(tmp_path, 100_000_000, complete=False)
    (tmp_path / "checkpoints" / ".saving-step-00000011").mkdir()
    info = checkpoint.find(tmp_path, "auto")
    assert (info.path, info.step, info.data) == (newest, 10, {"position": 10})


def test_a_copy_under_the_name_of_another_step_is_refused(tmp_path):
    shutil.copytree(_fake(tmp_path, 3), copy := tmp_path / "checkpoints" / "step-00000005")
    with pytest.raises(UserError, match=f"{copy} holds step 3: call the folder that, or move it elsewhere"):
        checkpoint.find(tmp_path, "auto")
    assert checkpoint.find(tmp_path / "new", str(copy)).step == 3


def test_a_path_names_a_checkpoint_or_a_run(tmp_path):
    path = _fake(tmp_path / "old", 7)
    for name in (path, tmp_path / "old", tmp_path / "old" / "checkpoints"):
        assert checkpoint.find(tmp_path / "new", str(name)).step == 7
    assert checkpoint.find(tmp_path / "new", "none") is None


def test_missing(tmp_path):
    with pytest.raises(UserError, match=r"checkpoint.resume=.*nowhere: no complete checkpoint there; name a folder"):
        checkpoint.find(tmp_path, str(tmp_path / "nowhere"))
    incomplete = _fake(tmp_path / "old", 7, complete=False)
    with pytest.raises(UserError, match="no complete checkpoint there"):
        checkpoint.find(tmp_path, str(incomplete))


def test_a_run_is_never_mixed_with_its_own_later_checkpoints(tmp_path):
    early, late = _fake(tmp_path, 5), _fake(tmp_path, 10)
    for resume in ("none", str(early)):
        with pytest.raises(
            UserError, match=rf"{late} is later than the start .*resume=auto, or choose another run.name"
        ):
            checkpoint.find(tmp_path, resume)
    assert checkpoint.find(tmp_path, str(late)).step == 10


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda path: (path / "weights").write_bytes(b"123"), "weights has 3 bytes instead of 5"),
        (lambda path: (path / "weights").unlink(), "No such file"),
        (lambda path: (path / "info.json").write_text("{"), "JSONDecodeError"),
        (lambda path: (path / "info.json").write_text('{"step": 3}'), "missing"),
    ],
)
def test_damaged(tmp_path, damage, reason):
    path = _fake(tmp_path, 3)
    damage(path)
    with pytest.raises(UserError, match=rf"{path} is damaged \(.*{reason}.*delete that folder to resume from"):
        checkpoint.find(tmp_path, "auto")


def test_a_changed_digit_in_info_json_is_noticed(tmp_path):
    path = _fake(tmp_path, 3)
    content = (path / "info.json").read_bytes()
    (path / "complete").write_text(f"crc32 {binascii.crc32(content):08x}")
    assert checkpoint.find(tmp_path, "auto").step == 3
    (path / "info.json").write_bytes(content.replace(b'"position": 3', b'"position": 2'))
    with pytest.raises(UserError, match="info.json has other bytes than were written"):
        checkpoint.find(tmp_path, "auto")


def test_a_checkpoint_of_a_later_release_is_no_damage(tmp_path):
    path = _fake(tmp_path, 3)
    fields = json.loads((path / "info.json").read_text()) | {"epoch": 1}
    content = json.dumps(fields).encode()
    (path / "info.json").write_bytes(content)
    (path / "complete").write_text(digests.digest(content))
    with pytest.raises(UserError, match=f"{path} is of a later release, by its epoch: use that release"):
        checkpoint.find(tmp_path, "auto")


def _fake_with_digests(run_dir, step, content):
    path = _fake(run_dir, step)
    fields = json.loads((path / "info.json").read_text())
    fields["digests"] = {"weights": f"crc32 {binascii.crc32(content):08x}"}
    (path / "info.json").write_text(json.dumps(fields))
    return path


def test_verify_reads_all_checkpoints_of_a_run(tmp_path, capsys):
    old, whole = _fake(tmp_path, 1), _fake_with_digests(tmp_path, 2, b"12345")
    cli.COMMANDS["verify"]([str(tmp_path)])
    assert capsys.readouterr().out.splitlines() == [
        f"{old}: files have their sizes; it is of an earlier release, without digests",
        f"{whole}: all files are as they were written",
    ]
    damaged = _fake_with_digests(tmp_path, 3, b"12346")
    with pytest.raises(UserError, match=f"checkpoints in {tmp_path} that are damaged or cannot be read: 1"):
        cli.COMMANDS["verify"]([str(tmp_path)])
    assert f"{damaged} is damaged (weights has other bytes" in capsys.readouterr().out
    cli.COMMANDS["verify"]([str(whole)])
    assert capsys.readouterr().out == f"{whole}: all files are as they were written\n"
    with pytest.raises(UserError, match="no complete checkpoint there"):
        cli.COMMANDS["verify"]([str(tmp_path / "nowhere")])


@pytest.mark.filterwarnings("ignore")  # that there is one process
def test_digests_are_those_of_what_was_written(tmp_path):
    """Of tensors short and long, by which the digest is made beside the writing, and objects."""
    state = {"long": torch.randn(digests.LONG), "short": torch.randn(3), "object": {"a": 1}, "none": torch.empty(0)}
    writer = digests.DigestingWriter(tmp_path / "saved")
    checkpoint.dcp.save(state, storage_writer=writer, no_dist=True)
    files = {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}
    assert set(files) == {".metadata", "__0_0.distcp"} and len(files["__0_0.distcp"]) > 4 * digests.LONG
    assert writer.digests == {name: f"crc32 {binascii.crc32(content):08x}" for name, content in files.items()}
    assert digests.first_difference(tmp_path / "saved", writer.digests) is None
    (tmp_path / "saved" / ".metadata").unlink()
    with pytest.raises(FileNotFoundError, match=r"saved/\.metadata"):
        digests.first_difference(tmp_path / "saved", writer.digests)


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_every_file_is_checked_by_one_rank(world_size):
    names = [".metadata", *(f"__{n}_{m}.distcp" for n in range(12) for m in (0, 1)), "rng-00003.pt", "rng-00012.pt"]
    shares = [digests.share(names, rank, world_size) for rank in range(world_size)]
    assert sorted(sum(shares, [])) == sorted(names)
    assert {"__1_0.distcp", "__1_1.distcp"} <= set(shares[1 % world_size]) and "rng-00003.pt" in shares[3 % world_size]


def test_folders_that_may_not_be_read_are_named():
    with open_folder() as run:
        path = _fake(run, 3)
        for folder, own, resume in (
            (path, run, "auto"),
            (path.parent, run, "auto"),  # which holds no checkpoints that a run would not start anew beside
            (path.parent, run / "other", str(path)),
        ):
            with locked(folder), pytest.raises(UserError, match=f"{folder}.*: cannot be read.*Permission denied") as no:
                checkpoint.find(own, resume)
            assert "keep it" in str(no.value) and "damaged" not in str(no.value)


@pytest.mark.parametrize("name", ["info.json", "complete", "weights"])
def test_a_disk_that_does_not_answer_is_no_damage(tmp_path, name, capsys):
    path = _fake_with_digests(tmp_path, 3, b"")
    fields = json.loads((path / "info.json").read_text()) | {"sizes": {"weights": 0}}
    (path / "info.json").write_text(json.dumps(fields))
    (path / name).unlink()
    (path / name).symlink_to("/proc/self/mem")  # no bytes, and reading one is an OSError
    with pytest.raises(UserError, match="damaged or cannot be read: 1, see above"):
        cli.COMMANDS["verify"]([str(tmp_path)])
    line = capsys.readouterr().out
    assert line.startswith(f"{path / name}: cannot be read on ") and "(Input/output error); it may be good" in line
    assert "damaged" not in line and "delete" not in line
    if name != "weights":
        with pytest.raises(UserError, match=re.escape(line.strip())):
            checkpoint.find(tmp_path, "auto")


def test_right_bytes_that_this_torch_cannot_read_are_no_damage(tmp_path):
    content = b"cmodule_of_another_release\nName\n."  # a pickle
    path = _fake(tmp_path, 3)
    (path / ".metadata").write_bytes(content)
    info = checkpoint.find(tmp_path, "auto")
    for digests_of, said in (
        ({".metadata": digests.digest(content)}, "has the bytes that were written, but torch .* cannot read them"),
        ({}, "is damaged"),
    ):
        with pytest.raises(UserError, match=rf"{path} {said} .*module_of_another_release"):
            checkpoint.fill(replace(info, digests=digests_of), {}, alone=True)


def test_incompatible_model(tmp_path, caplog):
    config = Config()
    _fake(tmp_path, 3)
    info = checkpoint.find(tmp_path, "auto")
    info.config["model"] = json.loads(
        json.dumps({name: getattr(config.model, name) for name in config.model.__slots__})
    )
    checkpoint.check_model(info, config.model)
    with pytest.raises(UserError) as error:
        checkpoint.check_model(info, ModelConfig(hidden_size=256, pattern=["softmax"], loss_chunk=1))
    message = str(error.value)
    assert "model.hidden_size is 512 there and 256 here" in message and "model.pattern is" in message
    assert "loss_chunk" not in message and "\n" not in message
    checkpoint.check_model(info, ModelConfig(rope_scaling=4.0))
    assert "model.rope_scaling is 1.0 there and 4.0 here" in caplog.text


def test_a_setting_the_checkpoint_does_not_know_has_its_default(tmp_path, caplog):
    _fake(tmp_path, 3)
    info, config = checkpoint.find(tmp_path, "auto"), Config()
    info.config["model"] = json.loads(json.dumps(asdict(config.model)))
    del info.config["model"]["window"]
    checkpoint.check_model(info, config.model)
    assert not caplog.text
    info.config["model"]["pattern"] = ["softmax:window"]
    checkpoint.check_model(info, ModelConfig(pattern=["softmax:window"], window=64))
    assert "model.window is 0 there and 64 here" in caplog.text


def test_changes_of_the_data_order_are_named(tmp_path, caplog):
    _fake(tmp_path, 3)
    info, config = checkpoint.find(tmp_path, "auto"), Config()
    info.config.update(json.loads(json.dumps(asdict(config))))
    checkpoint.warn_about_data(info, config)
    assert not caplog.text
    config.data.seq_len, config.data.prefetch, config.run.seed = 512, 3, 1
    checkpoint.warn_about_data(info, config)
    assert "since data.seq_len, run.seed changed" in caplog.text


def test_saves_and_loads_on_two_ranks(tmp_path):
    corpus = write_corpus(tmp_path)
    found = run_ranks(_save_and_damage, 2, tmp_path, corpus, timeout=150)
    assert found[0] == found[1]
    steps, interrupted, unwritable, damaged, random, flipped, said, old, stopped = found[0]
    assert steps == ["step-00000003", "step-00000004"]  # keep_last=2
    assert interrupted == (["step-00000003", "step-00000004"], 4)
    assert all("cannot be written" in text and "disk of run.dir" in text and "\n" not in text for text in unwritable)
    assert all("step-00000004 is damaged" in text and "\n" not in text for text in damaged)
    assert random
    for name, text in flipped.items():
        place = rf"step-00000004 is damaged \({re.escape(name)} has other bytes than were written"
        assert re.search(place + ".*delete that folder to resume from the checkpoint before it$", text), text
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "rng-00000.pt", "rng-00001.pt"} == set(flipped) == set(said)
    assert all(text == f"crc32 {true:08x}" for text, true in said.values())
    assert old == [4, "is of an earlier release, without digests"]
    step = tmp_path / "run" / "checkpoints" / "step-0000000"
    assert stopped == [
        f"UserError: interrupted on rank 1 while {step}5 was saved",
        f"RuntimeError: rank 1 failed while {step}5 was saved: KeyError: 'lost'",
        f"UserError: interrupted on rank 1 while {step}4 was loaded",
        f"RuntimeError: rank 1 failed while {step}4 was loaded: KeyError: 'lost'",
        f"UserError: {step}4: cannot be read on {socket.gethostname()} (Stale file handle); it may be good, so keep it:"
        " look at that disk and at permissions, then give the same command again",
    ]


def _save_and_damage(rank, world_size, folder, corpus):
    run = folder / "run"
    settings = ("train.steps=4", "checkpoint.interval=1", "checkpoint.keep_last=2")
    config = tiny_config(corpus, run, *settings)
    train(config)
    names = _names(run)

    # A save that is interrupted before it is published leaves nothing that counts, and the next save removes it.
    trainer = start(config)
    publish, checkpoint._publish = checkpoint._publish, _interrupted
    with pytest.raises(RuntimeError, match="interrupted"):
        checkpoint.save(run, config, trainer.engine, step=5, data={})
    checkpoint._publish = publish
    interrupted = _names(run), decide(lambda: checkpoint.find(run, "auto").step)

    # A disk that is full for one rank stops all of them, wherever in its files that is.
    unwritable = [_refused_by_full_disk(run, config, trainer, rank, size) for size in (0, 1000, 8000)]
    dcp_save, checkpoint.dcp.save = checkpoint.dcp.save, lambda *arguments, **options: None
    unwritable.append(_refused_by_full_disk(run, config, trainer, rank, 1000))  # of the random state
    checkpoint.dcp.save = dcp_save

    # What ends one rank in the midst of a save, or of a load, ends all, and is no damage.
    stopped, newest = [], decide(lambda: checkpoint.find(run, "auto"))
    for place, action in (
        ("write_data", lambda: checkpoint.save(run, config, trainer.engine, step=5, data={})),
        ("read_data", lambda: checkpoint.load(newest, trainer.engine)),
    ):
        stopped += [_ended(place, failure, action) for failure in (KeyboardInterrupt(), KeyError("lost"))]
    stopped.append(_ended(place, OSError(errno.ESTALE, "Stale file handle"), action))

    torch.manual_seed(rank)
    (folder / "other").mkdir(exist_ok=True)
    path = checkpoint.save(folder / "other", config, trainer.engine, step=1, data={})
    expected = torch.rand(3)
    checkpoint.load(checkpoint.read_info(path), trainer.engine)
    random = torch.equal(torch.rand(3), expected)

    # Same size, other bytes: only loading finds out.
    logged = []
    logging.getLogger().addHandler(handler := logging.Handler())
    handler.emit = logged.append
    damaged = [_refused_damage(run, config, rank, name) for name in ("__1_0.distcp", ".metadata")]
    assert not logged  # dcp's tracebacks
    damaged += [_refused_damage(run, config, rank, f"rng-{rank:05d}.pt")]
    trainer.close()

    saved = run / "checkpoints" / "step-00000004"
    said = json.loads((saved / "info.json").read_text())["digests"]
    made = {name: (said[name], binascii.crc32((saved / name).read_bytes())) for name in said}
    flipped = {name: _refused_damage(run, config, rank, name, _flip) for name in said}
    old = _started_without_digests(run, config, rank, logged)
    return names, interrupted, unwritable, damaged, random, flipped, made, old, stopped


def _flip(content):
    """One bit of one byte, in the middle."""
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


def _started_without_digests(run, config, rank, logged):
    saved = run / "checkpoints" / "step-00000004"
    if rank == 0:
        fields = json.loads((saved / "info.json").read_text())
        del fields["digests"]
        (saved / "info.json").write_text(json.dumps(fields))
        (saved / "complete").write_text("")
    dist.barrier()
    logged.clear()
    logger = logging.getLogger("longspan")
    logger.propagate = True
    trainer = start(config)
    trainer.close()
    said = [record.getMessage() for record in logged]
    return [trainer.step, *(text[text.index("is of an") :][:41] for text in said if "without digests" in text)]


def _names(run):
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def _interrupted(*arguments):
    raise RuntimeError("interrupted")


def _ended(place, failure, action):
    """What every rank raises when dcp fails so on rank 1."""

    def fail(*_):
        raise failure

    dcp = digests.DigestingWriter if place == "write_data" else checkpoint.dcp.FileSystemReader
    with pytest.MonkeyPatch.context() as patch, pytest.raises((UserError, RuntimeError)) as error:
        if dist.get_rank() == 1:
            patch.setattr(dcp, place, fail)
        action()
    return f"{error.type.__name__}: {error.value}"


def _refused_by_full_disk(run, config, trainer, rank, size):
    with files_of_at_most(size) if rank == 1 else nullcontext():
        return _refusal(lambda: checkpoint.save(run, config, trainer.engine, step=5, data={}))


def _refused_damage(run, config, rank, name, change=lambda content: bytes(len(content))):
    file = run / "checkpoints" / "step-00000004" / name
    content = file.read_bytes()
    dist.barrier()
    file.write_bytes(change(content))
    dist.barrier()
    text = _refusal(lambda: start(config))
    dist.barrier()
    file.write_bytes(content)
    dist.barrier()
    return text


def _refusal(action):
    with pytest.raises(UserError) as error:
        action()
    return str(error.value)


def test_deleting_old_checkpoints_spares_the_rest(tmp_path):
    for step in (1, 2, 3):
        _fake(tmp_path, step)
    partial = tmp_path / "checkpoints" / ".saving-step-00000004"
    shutil.copytree(_fake(tmp_path / "made", 4, complete=False), partial)
    (partial / "info.json").unlink()
    (partial / "rng-00000.pt").touch()
    info = {"step": 4, "data": {}, "config": {}, "world_size": 1}
    checkpoint._publish(partial, tmp_path / "checkpoints" / "step-00000004", dict(info), keep_last=2)
    assert _names(tmp_path) == ["step-00000003", "step-00000004"]
    assert checkpoint.find(tmp_path, "auto").step == 4


def test_a_deletion_that_is_cut_short_leaves_nothing_to_be_read(tmp_path, monkeypatch, caplog):
    for step in (1, 2):
        _fake(tmp_path, step)
    partial = tmp_path / "checkpoints" / ".saving-step-00000003"
    checkpoint._prepare(partial)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.shutil, "rmtree", _killed)
        info = {"step": 3, "data": {}, "config": {}, "world_size": 0}
        checkpoint._publish(partial, tmp_path / "checkpoints" / "step-00000003", info, keep_last=1)
    assert checkpoint.find(tmp_path, "auto").step == 3
    checkpoint._prepare(tmp_path / "checkpoints" / ".saving-step-00000004")
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == [".saving-step-00000004", "step-00000002", "step-00000003"] and not caplog.text


def _killed(*_):
    raise KeyboardInterrupt


def test_a_trial_that_is_cut_short_is_in_nobodys_way(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.Path, "rmdir", _killed)
        checkpoint.try_folder(tmp_path)
    checkpoint.try_folder(tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_run_directory_is_not_made_anew(tmp_path):
    with pytest.raises(UserError, match="run/checkpoints/.saving-step-00000004: the checkpoint cannot be written"):
        checkpoint._prepare(tmp_path / "run" / "checkpoints" / ".saving-step-00000004")
    assert not (tmp_path / "run").exists()


def _on_the_disk(rank, world_size, folder, corpus):
    synced, fsync = [], os.fsync
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: fsync(file) or synced.append(os.readlink(f"/proc/self/fd/{file}")))
        train(tiny_config(corpus, folder / "run", "train.steps=1", "checkpoint.interval=1"))
    return [os.path.basename(name) for name in synced]


def test_all_is_on_the_disk_itself_before_a_checkpoint_counts(tmp_path):
    first, second = run_ranks(_on_the_disk, 2, tmp_path, write_corpus(tmp_path), timeout=60)
    assert first[:3] == [".config.yaml.partial", ".environment.json.partial", ".metrics.jsonl.partial"]
    assert first[3:] == ["metrics.jsonl", "__0_0.distcp", ".metadata.tmp", "rng-00000.pt", "info.json", "complete"]
    assert second == ["__1_0.distcp", "rng-00001.pt"]


def test_a_disk_that_machines_do_not_share_is_noticed(tmp_path):
    partial = tmp_path / "checkpoints" / ".saving-step-00000004"
    partial.mkdir(parents=True)
    (partial / "rng-00000.pt").touch()
    info = {"step": 4, "data": {}, "config": {}, "world_size": 2}
    with pytest.raises(UserError, match="run.dir must be on a disk that all machines share"):
        checkpoint._publish(partial, tmp_path / "checkpoints" / "step-00000004", info, keep_last=2)
