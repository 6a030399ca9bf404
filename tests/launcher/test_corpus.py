"""From text to token files and back, and the one line that each broken input or file gets."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from corpora import write_megatron
from unreadable import locked, open_folder

from longspan.launcher import corpus as corpus_module
from longspan.launcher.corpus import open_corpus, prepare, read_info
from longspan.launcher.errors import UserError
from longspan.launcher.tokenizer import load_tokenizer


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "b" / "z.txt").write_text("zürich\n")
    (folder / "b.txt").write_text("last")
    (folder / "a.py").write_text("print(1)\n")
    (folder / "binary.dat").write_bytes(b"ab\0cd")
    (folder / "latin.txt").write_bytes(b"\xfcber")
    (folder / "empty.txt").write_text("")
    (folder / "c.jsonl").write_text('{"text": "one", "id": 1}\n\n{"text": ""}\n{"text": "two \\ud800"}\n')
    (folder / ".git" / "HEAD").write_text("ref")
    return folder


def texts_of(corpus):
    tokens = [corpus.read(d, 0, int(n)) for d, n in enumerate(corpus.lengths)]
    assert all(t.dtype == np.int64 and t[-1] == 256 for t in tokens)
    return [bytes(t[:-1].astype(np.uint8)).decode() for t in tokens]


def test_documents_come_back_in_sorted_order(texts, tmp_path):
    lines = []
    info = prepare([texts], tmp_path / "data" / "corpus", progress=lines.append)
    corpus = open_corpus(tmp_path / "data" / "corpus")
    assert texts_of(corpus) == ["print(1)\n", "zürich\n", "last", "one", "two ?"]
    assert corpus.num_documents == info.documents == 5 and corpus.lengths.sum() == info.tokens
    assert corpus.vocab_size == info.vocab_size == 257 and info.tokenizer == "bytes"
    assert "5 documents" in lines[-1] and "2 binary or not UTF-8, 3 empty" in lines[-1]
    assert sorted(os.listdir(tmp_path / "data")) == ["corpus.bin", "corpus.idx", "corpus.json"]
    again = prepare([texts], tmp_path / "again", progress=lines.append)
    assert again == info
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "data" / "corpus.bin").read_bytes()


def test_spans_are_read_alone(texts, tmp_path):
    prepare([texts], tmp_path / "corpus", progress=lambda line: None)
    for path in ("corpus", "corpus.bin", "corpus.idx"):
        assert bytes(open_corpus(tmp_path / path).read(0, 2, 5).astype(np.uint8)) == b"int"


def test_suffixes_choose_in_folders_only(texts, tmp_path):
    prepare([texts, texts / "b.txt"], tmp_path / "corpus", suffixes=[".py"], progress=lambda line: None)
    assert texts_of(open_corpus(tmp_path / "corpus")) == ["print(1)\n", "last"]


def test_earlier_output_in_the_input_folder_is_no_input(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    for _ in range(2):
        assert prepare([tmp_path], tmp_path / "corpus", progress=lambda line: None).documents == 1


def test_progress_shows_percent(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(corpus_module, "ENCODE_BYTES", 1)
    lines = []
    prepare([texts], tmp_path / "corpus", progress=lines.append)
    assert [int(line.split("%")[0]) for line in lines[:-1]] == sorted(int(line.split("%")[0]) for line in lines[:-1])
    assert len(lines) == 6 and "MB, 4 documents" in lines[3]


def test_long_documents_are_stored_as_several_sequences(texts, tmp_path, monkeypatch):
    prepare([texts], tmp_path / "whole", progress=lambda line: None)
    monkeypatch.setattr(corpus_module, "MAX_SEQUENCE", 3)
    prepare([texts], tmp_path / "parts", progress=lambda line: None)
    whole, parts = open_corpus(tmp_path / "whole"), open_corpus(tmp_path / "parts")
    assert texts_of(parts) == texts_of(whole)
    assert len(parts._sequence_starts) > len(whole._sequence_starts)


def test_megatron_documents_of_several_sequences(tmp_path):
    prefix = write_megatron(tmp_path / "m", [[[1, 2], [], [3, 4, 5]], [], [[6]], [[7, 8], [9]]])
    corpus = open_corpus(prefix)
    assert corpus.lengths.tolist() == [5, 0, 1, 3] and corpus.vocab_size is None
    flat = [[1, 2, 3, 4, 5], [], [6], [7, 8, 9]]
    for document, tokens in enumerate(flat):
        for start in range(len(tokens)):
            for stop in range(start + 1, len(tokens) + 1):
                assert corpus.read(document, start, stop).tolist() == tokens[start:stop]


def test_interrupted_prepare_leaves_nothing(texts, tmp_path, monkeypatch):
    def interrupted(self, texts):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    monkeypatch.setattr("longspan.launcher.tokenizer.ByteTokenizer.encode_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare([texts], out / "corpus", progress=lambda line: None)
    assert os.listdir(out) == []


def test_interrupted_replacement_is_noticed(texts, tmp_path, monkeypatch):
    prepare([texts], tmp_path / "corpus", progress=lambda line: None)
    replaced = []

    def interrupted(source, target):
        if replaced:
            raise KeyboardInterrupt
        replaced.append(target)

    monkeypatch.setattr(corpus_module.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare([texts / "b.txt"], tmp_path / "corpus", progress=lambda line: None)
    with pytest.raises(UserError, match="corpus.idx is missing"):
        open_corpus(tmp_path / "corpus")


def make_tokenizer(path, tokens=("<|endoftext|>",)):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=list(tokens))
    tokenizer.train_from_iterator(["the cat sat on the mat"] * 3, trainer)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(path))
    return tokenizer


def test_hugging_face_tokenizer(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "tokenizer.json", ["<unk>", "<|endoftext|>"])
    text = "the cat sat on the <|endoftext|> mat"
    (tmp_path / "a.txt").write_text(text)
    info = prepare([tmp_path / "a.txt"], tmp_path / "corpus", tmp_path / "tokenizer.json", progress=lambda line: None)
    corpus = open_corpus(tmp_path / "corpus")
    ids = corpus.read(0, 0, int(corpus.lengths[0])).tolist()
    assert info.eod == ids[-1] == tokenizer.token_to_id("<|endoftext|>")
    assert info.eod not in ids[:-1] and len(ids) > 5, "text neither ends a document nor is it truncated"
    assert tokenizer.decode(ids[:-1]).replace("Ġ", "").replace(" ", "") == text.replace(" ", "")
    assert max(ids) < info.vocab_size
    assert load_tokenizer(tmp_path).name == str(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path, eod="<unk>").eod == 0


def test_documents_begin_and_end_with_tokens_of_ones_own(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "tokenizer.json", ["<start>", "<stop>"])
    (tmp_path / "a.txt").write_text("the cat")
    given = dict(eod="<stop>", bos="<start>", progress=lambda line: None)
    info = prepare([tmp_path / "a.txt"], tmp_path / "corpus", tmp_path / "tokenizer.json", **given)
    ids = open_corpus(tmp_path / "corpus").read(0, 0, info.tokens).tolist()
    assert [ids[0], ids[-1]] == [info.bos, info.eod] == [tokenizer.token_to_id(x) for x in ("<start>", "<stop>")]
    assert tokenizer.decode(ids[1:-1]).replace("Ġ", "").replace(" ", "") == "thecat"
    assert read_info(tmp_path / "corpus.json") == info
    again = load_tokenizer(info.tokenizer, info.eod, info.bos)  # as text is generated
    assert (again.eod, again.bos) == (info.eod, info.bos)


def test_tokenizer_errors(tmp_path):
    make_tokenizer(tmp_path / "tokenizer.json", ["<stop>"])
    (tmp_path / "broken.json").write_text("{}")
    for arguments, message in [
        ((tmp_path / "tokenizer.json",), "no end-of-document token .*--eod"),
        ((tmp_path / "tokenizer.json", "</s>"), r"no end-of-document token \(</s>\)"),
        ((tmp_path / "broken.json",), "not a Hugging Face tokenizer.json"),
        (("byte",), "tokenizer byte: no such file; give 'bytes' or"),
        ((tmp_path / "tokenizer.json", "<stop>", "<s>"), r"no beginning-of-document token \(<s>\) .*--bos"),
        (("bytes", "<eos>"), "drop --eod"),
        (("bytes", None, "<s>"), "drop --bos"),
    ]:
        with pytest.raises(UserError, match=message):
            load_tokenizer(*arguments)


def test_input_errors(texts, tmp_path):
    (tmp_path / "blocked").write_text("a file where a folder is needed")
    (tmp_path / "nothing").mkdir()
    for name, line in {"list": "[1]", "field": '{"txt": "a"}', "json": "{", "number": '{"text": 1}'}.items():
        (tmp_path / f"{name}.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    for inputs, output, message in [
        ([], "out", r"input \(none\): no files"),
        ([tmp_path / "missing"], "out", "missing: no such file or folder"),
        ([tmp_path / "nothing"], "out", "nothing: no files"),
        ([texts / "empty.txt", texts / "binary.dat"], "out", "no text in 2 files .1 binary or not UTF-8, 1 empty"),
        ([tmp_path / "list.jsonl"], "out", r"list.jsonl:2: needs a field \"text\".*found list"),
        ([tmp_path / "field.jsonl"], "out", "field.jsonl:2: .*found fields txt"),
        ([tmp_path / "number.jsonl"], "out", "number.jsonl:2: "),
        ([tmp_path / "json.jsonl"], "out", "json.jsonl:2: not a JSON object"),
        ([texts], "blocked/out", "output .*blocked/out: cannot be written"),
    ]:
        with pytest.raises(UserError, match=message):
            prepare(inputs, tmp_path / output, progress=lambda line: None)
    with pytest.raises(UserError, match="no files ending in .md"):
        prepare([texts], tmp_path / "out", suffixes=[".md"], progress=lambda line: None)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", ["m.idx", "m.bin", "."])
def test_files_that_may_not_be_read_are_named(name):
    with open_folder() as folder:
        prefix = write_megatron(folder / "m", [[[1, 2, 3]], [[4, 5]]])
        open_corpus(prefix)  # imports what could not be read below
        message = f"corpus {prefix}: .* cannot be read .Permission denied.; change its permissions"
        with locked(folder / name), pytest.raises(UserError, match=message):
            open_corpus(prefix)


def test_broken_files_are_named(tmp_path):
    prefix = write_megatron(tmp_path / "m", [[[1, 2, 3]], [[4, 5]]])
    idx, bin_ = tmp_path / "m.idx", tmp_path / "m.bin"
    whole_idx, whole_bin = idx.read_bytes(), bin_.read_bytes()

    def expect(message):
        with pytest.raises(UserError, match=message) as raised:
            open_corpus(prefix)
        assert "longspan prepare" in str(raised.value) and "\n" not in str(raised.value)
        idx.write_bytes(whole_idx)
        bin_.write_bytes(whole_bin)

    idx.unlink()
    expect("m.idx is missing")
    bin_.unlink()
    expect("m.bin is missing")
    for size in (0, 20, len(whole_idx) - 1):
        idx.write_bytes(whole_idx[:size])
        expect("m.idx is truncated")
    for size in (0, len(whole_bin) - 1):
        bin_.write_bytes(whole_bin[:size])
        expect("m.bin is truncated")
    idx.write_bytes(b"not an index at all, but long enough for its header")
    expect("m.idx is not a Megatron index")
    for code in (7, 99):
        idx.write_bytes(whole_idx[:17] + bytes([code]) + whole_idx[18:])
        expect(f"dtype code {code}")
    idx.write_bytes(whole_idx[:-8] + (5).to_bytes(8, "little"))
    expect("m.idx contradicts itself")
    write_megatron(tmp_path / "m", [[[]]])
    expect("m.idx holds no tokens")
    (tmp_path / "m.json").write_text(json.dumps({"tokenizer": "bytes"}))
    expect("m.json: not as")


def test_import_is_silent_and_late(tmp_path):
    prefix = write_megatron(tmp_path / "m", [[[1, 2, 3]]])
    code = (
        "import sys; from longspan.launcher import corpus, samples, batches; assert 'megatron' not in sys.modules;"
        f"print(corpus.open_corpus({prefix!r}).read(0, 1, 3))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("[2 3]\n", "")
