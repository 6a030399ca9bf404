"""Perplexity of a checkpoint: that of the trainer's own validation, the same on any ranks, by length and position."""

import json
import math
import re

import numpy as np
import pytest
import torch
from devices import DEVICES
from spawn import run_ranks
from tiny_runs import tiny_config, train, write_corpus

from longspan.launcher import checkpoint, cli
from longspan.launcher.batches import TextBuilder
from longspan.launcher.corpus import open_corpus, prepare
from longspan.launcher.errors import UserError
from longspan.launcher.evaluation import cut, evaluate, evaluation_config, report, row_ends
from longspan.launcher.export import export_run
from longspan.launcher.samples import Piece, Sample, SampleStream
from longspan.launcher.stored_models import open_model
from longspan.launcher.tasks import open_corpora
from longspan.launcher.weights import check_tokenizer
from longspan.models.build import build_model
from longspan.parallel import SequenceParallel
from longspan.parallel.mesh import build_mesh

LENGTHS = (96, 30, 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The rows of a trained run, what it evaluates to on 1 and on 2 ranks, and its folder and corpus."""
    folder = tmp_path_factory.mktemp("runs")
    corpus = write_corpus(folder)
    results = {"folder": folder, "corpus": corpus}
    for world_size in (1, 2):
        results |= run_ranks(_runs_on, world_size, folder, corpus, timeout=300)[0]
    return results


def _runs_on(rank, world_size, folder, corpus):
    results = {}
    if world_size == 1:
        for name, settings in (("run", ()), ("stream", ("data.respect_documents=false", "parallel.engine=ddp"))):
            config = tiny_config(corpus, folder / name, "log.validation_interval=6", *settings)
            results[f"{name} rows"] = train(config)
            results[name] = _evaluate(folder / name, LENGTHS)
        results["corpus"] = corpus
        export_run(str(folder / "run"), str(folder / "weights"), "longspan", "float32")
    results[f"on {world_size}"] = _evaluate(folder / "run", LENGTHS)
    for name in ("run", "weights"):
        results[f"{name} on {world_size}, corpus"] = _evaluate(folder / name, LENGTHS, corpora=[str(corpus)])
    return results


def _evaluate(run, lengths, *overrides, corpora=()):
    stored = open_model(str(run))
    config = evaluation_config(stored, overrides, corpora)
    mesh = build_mesh(sp=0, sharding="fsdp", device=torch.device("cpu"), timeout_s=60)
    return evaluate(stored, config, mesh, lengths, samples=4)


@pytest.mark.parametrize("name", ["run", "stream"])
def test_the_length_of_training_gives_the_validation_loss_of_the_trainer(runs, name):
    assert runs[name]["lengths"][-1]["length"] == 96
    assert runs[name]["lengths"][-1]["loss"] == pytest.approx(runs[f"{name} rows"][-1]["val_loss"], rel=1e-6)
    assert runs[name]["step"] == 6


def test_ranks_change_nothing(runs):
    for one, two in zip(runs["on 1"]["lengths"], runs["on 2"]["lengths"], strict=True):
        assert two["labels"] == one["labels"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        for row, other in zip(one["by_position"], two["by_position"], strict=True):
            assert other["loss"] == (row["loss"] and pytest.approx(row["loss"], rel=1e-5))
            assert (other["start"], other["stop"], other["labels"]) == (row["start"], row["stop"], row["labels"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["run", "weights"])
def test_devices_change_nothing(runs, tmp_path, name, device):
    """Of the command, which sees to the device itself."""
    output, limit = tmp_path / "found.json", 1e-6 if device == "cpu" else 1e-4
    cli.main(["evaluate", str(runs["folder"] / name), f"run.device={device}", "--samples", "4", "--corpora",
              str(runs["corpus"]), "--lengths", *map(str, LENGTHS), "--output", str(output)])  # fmt: skip
    found = json.loads(output.read_text())["lengths"]
    for one, other in zip(found, runs["run on 1, corpus"]["lengths"], strict=True):
        assert (one["length"], one["labels"]) == (other["length"], other["labels"])
        assert one["loss"] == pytest.approx(other["loss"], rel=limit)
        for row, same in zip(one["by_position"], other["by_position"], strict=True):
            assert row["labels"] == same["labels"]
            assert row["loss"] == (same["loss"] and pytest.approx(same["loss"], rel=limit))


def test_every_length_predicts_the_same_tokens_in_every_row(runs):
    columns = runs["run"]["lengths"]
    assert [column["length"] for column in columns] == [1, 30, 96]
    rows = [[(row["start"], row["stop"], row["labels"]) for row in column["by_position"]] for column in columns]
    assert rows[0] == rows[1] == rows[2] and rows[0][0][:2] == (0, 1)


def test_rows_of_positions_add_up(runs):
    for column in runs["run"]["lengths"]:
        rows = column["by_position"]
        assert sum(row["labels"] for row in rows) == column["labels"]
        mean = sum(row["loss"] * row["labels"] for row in rows if row["labels"]) / column["labels"]
        assert mean == pytest.approx(column["loss"], rel=1e-12)
        assert column["perplexity"] == pytest.approx(math.exp(column["loss"]))


def test_losses_are_those_of_logits_document_by_document(runs):
    """An oracle of its own: every piece of every sample by itself, its logits and torch's cross-entropy, in fp64."""
    folder, corpus = runs["folder"], open_corpus(runs["corpus"])
    info = checkpoint.named(folder / "run")
    config = evaluation_config(open_model(str(folder / "run")), [], [])
    model = build_model(config.model)
    checkpoint.fill(info, {"model": model.state_dict()}, alone=True)
    model = model.double()
    stream = SampleStream([corpus], config.data, config.run.seed, "validation")
    length, losses = 30, {}
    for sample in (stream.sample(index) for index in range(4)):
        for start in range(0, 96, length):
            offset = 0
            for piece in sample.pieces:
                first, last = max(start - offset, 0), min(start + length - offset, len(piece))
                offset += len(piece)
                if first >= last:
                    continue
                whole = corpus.read(piece.document, 0, int(corpus.lengths[piece.document]))
                tokens = torch.from_numpy(np.array(whole[piece.start + first : piece.start + last]))
                labels = torch.from_numpy(np.array(whole[piece.start + first + 1 : piece.start + last + 1]))
                with torch.no_grad():
                    logits = model.logits(tokens, SequenceParallel(device="cpu").context([len(tokens)]))
                each = torch.nn.functional.cross_entropy(logits[: len(labels)], labels, reduction="none")
                for position, loss in enumerate(each.tolist(), start=first):  # in the piece as it is uncut
                    losses.setdefault(position, []).append(loss)
    column = next(column for column in runs["run"]["lengths"] if column["length"] == length)
    every = [loss for several in losses.values() for loss in several]
    assert column["labels"] == len(every)
    assert column["loss"] == pytest.approx(np.mean(every), rel=1e-5)
    for row in column["by_position"]:
        expected = [loss for position in range(row["start"], row["stop"]) for loss in losses.get(position, [])]
        assert row["labels"] == len(expected)
        assert row["loss"] == (pytest.approx(np.mean(expected), rel=1e-5) if expected else None)


class _Lengths:
    lengths = np.array([10, 1, 7])


def test_cut_covers_a_sample_once_and_leaves_out_what_predicts_nothing():
    pieces = (Piece(0, 0, 4, 10), Piece(0, 1, 0, 1), Piece(0, 2, 0, 5))
    wanted = [
        (Piece(0, 0, 4, 7),),
        (Piece(0, 0, 7, 10),),
        (Piece(0, 1, 0, 1), Piece(0, 2, 0, 2)),
        (Piece(0, 2, 2, 5),),
    ]
    parts = list(cut([Sample(pieces)], 3, [_Lengths], apart=False))
    assert [part.sample.pieces for part in parts] == wanted
    assert [part.origins for part in parts] == [(0,), (3,), (6,), (9,)]
    (whole,) = cut([Sample(pieces)], 3, [_Lengths], apart=True)
    assert (whole.sample.pieces, whole.origins) == (sum(wanted, ()), (0, 3, 0, 0, 2))
    alone = Sample((Piece(0, 1, 0, 1),))  # a document of one token
    assert alone not in [part.sample for part in cut([Sample(pieces)], 1, [_Lengths], apart=False)]
    assert list(cut([alone], 4, [_Lengths], apart=True)) == []


def test_rows_end_at_the_first_at_doubles_and_at_the_length():
    assert row_ends(1000, 256) == [256, 512, 1000]
    assert row_ends(512, 256) == [256, 512]
    assert row_ends(3, 256) == [3]


def test_the_command_prints_a_table_and_writes_json(runs, tmp_path, capsys):
    output = tmp_path / "folder" / "out.json"
    cli.main(["evaluate", str(runs["folder"] / "run"), "--lengths", "30", "96", "--samples", "2",
              "--output", str(output)])  # fmt: skip
    result = json.loads(output.read_text())
    printed = capsys.readouterr().out
    assert report(result) in printed and "2 samples of 96 tokens" in printed
    loss = result["lengths"][-1]["loss"]
    assert f"{loss:.4f}" in printed and f"{math.exp(loss):.3f}" in printed


def test_a_loss_without_bounds_is_strict_json(runs, tmp_path, monkeypatch):
    output = tmp_path / "out.json"
    monkeypatch.setattr("longspan.launcher.evaluation._perplexity", lambda loss: math.inf)
    cli.main(["evaluate", str(runs["folder"] / "run"), "--samples", "1", "--output", str(output)])
    assert "Infinity" not in output.read_text()
    assert json.loads(output.read_text())["lengths"][0]["perplexity"] is None


def test_samples_are_drawn_one_by_one(runs, capsys, monkeypatch):
    """So that it does not matter how many are asked for: here until the third is done, of which there is a line."""

    class Enough(Exception):
        pass

    drawn, draw = [], SampleStream.sample
    monkeypatch.setattr(SampleStream, "sample", lambda self, index: drawn.append(index) or draw(self, index))
    monkeypatch.setattr("longspan.launcher.evaluation.PROGRESS_SECONDS", 0.0)
    evaluated, to_device = [], TextBuilder.to_device

    def count(self, batches):
        evaluated.append(len(drawn))
        if len(evaluated) == 4:
            raise Enough
        return to_device(self, batches)

    monkeypatch.setattr(TextBuilder, "to_device", count)
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(runs["folder"] / "run"), "--lengths", "96", "192", "--samples", str(10**6)])
    assert evaluated == [1, 2, 3, 4]
    assert re.search(r"^ +0% of 2,000,000 samples, at length 96; [\d,]+ s left$", capsys.readouterr().out, re.M)
    torch.distributed.destroy_process_group()


def test_other_corpora_and_settings(runs, capsys):
    run, corpus = str(runs["folder"] / "run"), str(runs["corpus"])
    cli.main(["evaluate", run, "model.rope_scaling=4", "--lengths", "200", "--samples", "1", "--corpora", corpus])
    assert f"on {corpus}: 1 samples of 200 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--samples", "0"], "--samples 0: use 1 or more"),
        (["--lengths", "0"], "--lengths 0: use 1 or more"),
        (["--lengths", "4Q"], "'4Q' is no number of tokens"),
        (["--lengths", "2M"], "--lengths 2097152: .*is longer than the validation documents"),
        (["--corpora", "nowhere"], "corpus nowhere: there is no such corpus"),
        (["model.num_layers=3"], "model.num_layers is 2 there and 3 here"),
        (["parallel.tp=2"], "parallel.tp is for training: all ranks share every sequence and the parameters"),
        (["parallel.engine=ddp"], "parallel.engine is for training"),
        (["--output", "/proc/none/x.json", "--samples", "1"], "--output: /proc/none/x.json cannot be written"),
    ],
)
def test_what_does_not_fit_is_one_line(runs, capsys, arguments, said):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(runs["folder"] / "run"), *arguments])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("longspan: error: ")
    assert re.search(said, error)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_samples_in_which_nothing_follows_are_refused(runs, tmp_path, capsys):
    """The first of one token each is the last token of the only document."""
    (tmp_path / "text.txt").write_text("a\n")
    prepare([tmp_path / "text.txt"], tmp_path / "one", progress=lambda line: None)
    arguments = ["evaluate", str(runs["folder"] / "run"), "--corpora", str(tmp_path / "one"), "--lengths", "1"]
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--samples", "1"])
    assert capsys.readouterr().err.strip() == (
        "longspan: error: --lengths 1, --samples 1: nothing follows any of these tokens in its document; use longer or"
        " more samples"
    )
    cli.main([*arguments, "--samples", "3"])
    assert re.search(r"^labels +2$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("ranks", [1, 2])
def test_exported_weights_are_the_run(runs, ranks):
    run, weights = (runs[f"{name} on {ranks}, corpus"] for name in ("run", "weights"))
    assert weights["lengths"] == run["lengths"] and weights["corpora"] == run["corpora"]
    assert weights["step"] is None and run["step"] == 6


@pytest.mark.parametrize("device", DEVICES)
def test_the_command_takes_a_folder_of_weights(runs, capsys, device):
    folder, corpus = str(runs["folder"] / "weights"), str(runs["corpus"])
    settings = "train.dtype=bfloat16", f"run.device={device}"
    cli.main(["evaluate", folder, *settings, "--lengths", "96", "--samples", "4", "--corpora", corpus])
    printed = capsys.readouterr().out
    assert f"{folder}, on {corpus}: 4 samples of 96 tokens" in printed
    loss = float(re.search(r"^loss +([\d.]+)$", printed, re.MULTILINE)[1])
    exact = runs["weights on 1, corpus"]["lengths"][-1]["loss"]
    assert loss != pytest.approx(exact, abs=1e-6) and loss == pytest.approx(exact, rel=0.01)


def test_layers_of_other_kinds_are_evaluated_too(runs, tmp_path, capsys):
    """SLA that chooses every block, in the place of softmax."""
    folder, corpus = str(runs["folder"] / "weights"), str(runs["corpus"])
    losses = []
    for pattern in ("softmax", "sla"):
        output = str(tmp_path / f"{pattern}.json")
        settings = [f"model.pattern=[linear:scalar, {pattern}]", "model.sla_keep=1000"]
        cli.main(["evaluate", folder, *settings, "--lengths", "96", "--samples", "2", "--corpora", corpus,
                  "--output", output])  # fmt: skip
        losses.append(json.loads(open(output).read())["lengths"][0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert "1 layer of sla: initialised, without counterpart in the weights: mixer.linear_weight" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "weights come without documents: name some with --corpora"),
        (
            ["model.num_layers=3", "--corpora", "CORPUS"],
            "weights holds another model: model.num_layers is 2 there and 3",
        ),
    ],
)
def test_what_weights_do_not_have_is_one_line(runs, capsys, arguments, said):
    arguments = [str(runs["corpus"]) if word == "CORPUS" else word for word in arguments]
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(runs["folder"] / "weights"), *arguments, "--lengths", "96", "--samples", "1"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("longspan: error: ") and re.search(said, error)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_a_corpus_of_more_ids_than_the_model_has(runs):
    with pytest.raises(UserError, match="model.vocab_size=200 is smaller than the 257 .*: prepare it with the model's"):
        open_corpora([str(runs["corpus"])], 200)


def write_tokenizer(path, words):
    tokenizers = pytest.importorskip("tokenizers")
    path.parent.mkdir(exist_ok=True)
    vocabulary = {word: number for number, word in enumerate(["<|endoftext|>", *words])}
    model = tokenizers.models.WordLevel(vocabulary, unk_token=words[-1])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(path))


def test_corpora_of_another_tokenizer_are_refused(tmp_path):
    (tmp_path / "text.txt").write_text("a b c a b c")
    weights, own, same, other = (tmp_path / name / "tokenizer.json" for name in ("weights", "own", "same", "other"))
    write_tokenizer(weights, ["a", "b", "c"])
    write_tokenizer(own, ["a", "b", "c"])
    same.parent.mkdir()
    same.write_text(json.dumps(json.loads(own.read_text()), indent=7))  # other bytes
    write_tokenizer(other, ["b", "a", "c"])
    prefixes = {}
    for name in ("bytes", own, same, other):
        prefixes[name] = str(tmp_path / f"corpus-{len(prefixes)}")
        prepare([tmp_path / "text.txt"], prefixes[name], str(name), progress=lambda line: None)
    check_tokenizer(weights.parent, [prefixes[own], prefixes[same]])
    check_tokenizer(tmp_path / "nowhere", list(prefixes.values()))  # has none to compare with
    for name in ("bytes", other):
        with pytest.raises(
            UserError, match=f"was prepared with --tokenizer {name}, whose tokens are not those of {weights}"
        ):
            check_tokenizer(weights.parent, [prefixes[own], prefixes[name]])
    other.unlink()
    check_tokenizer(weights.parent, [prefixes[other]])  # nothing is left to compare


def test_a_run_without_held_out_documents_needs_corpora(runs):
    stored = open_model(str(runs["folder"] / "run"))
    stored.config.data.validation_fraction = 0.0
    stored.config.log.validation_interval = 0
    with pytest.raises(UserError, match="the run kept no documents.*: name some with --corpora"):
        evaluation_config(stored, [], [])
    assert evaluation_config(stored, [], ["x"]).data.corpora[0].path == "x"
