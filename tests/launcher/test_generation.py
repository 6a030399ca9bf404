"""Text that a checkpoint continues: the tokens that its logits ask for, the same for the same seed."""

import pytest
import torch
from devices import DEVICES
from spawn import run_ranks
from tiny_runs import tiny_config, train, write_corpus

from longspan.launcher import cli, generation, stored_models
from longspan.launcher.export import export_run
from longspan.launcher.generation import continuation, draw
from longspan.launcher.stored_models import cast, load_model, stored
from longspan.launcher.tokenizer import ByteTokenizer
from longspan.models.decay import Gate
from longspan.parallel import SequenceParallel


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(_train, 1, folder, write_corpus(folder), timeout=300)
    return folder / "run"


def _train(rank, world_size, folder, corpus):
    train(tiny_config(corpus, folder / "run", "train.steps=30", "checkpoint.interval=0"))


@pytest.mark.parametrize("device", DEVICES)
def test_the_likeliest_tokens_follow_one_another(run, device):
    """By logits of the CPU."""
    model, ids = load_model(*stored(str(run))), list(17 * b"abc def ")
    there = load_model(*stored(str(run))).to(device)
    tokens = continuation(there, ids, torch.device(device), temperature=0, top_p=1.0, seed=0)
    for _ in range(5):
        with torch.no_grad():
            logits = model.logits(torch.tensor(ids), SequenceParallel(device="cpu").context([len(ids)]))
        ids.append(next(tokens))
        assert ids[-1] == int(logits[-1].argmax())


def test_a_seed_repeats_its_text_and_another_has_another(run, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        cli.main(["generate", str(run), "--prompt", "abc", "--tokens", "40", "--temperature", "1", "--seed", seed])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("abc") and len(text) > 5 for text in texts)


def test_a_prompt_of_a_file_goes_before_the_words(run, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("é ab")
    cli.main(["generate", str(run), "--prompt-file", str(tmp_path / "prompt.txt"), "--tokens", "1"])
    assert capsys.readouterr().out.startswith("é ab")


def test_draw_follows_temperature_and_top_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).log()
    chance = torch.Generator().manual_seed(0)

    def shares(temperature, top_p, times=4000):
        drawn = torch.tensor([draw(logits, temperature, top_p, chance) for _ in range(times)])
        return torch.bincount(drawn, minlength=4) / times

    torch.testing.assert_close(shares(1, 1), logits.exp().float(), atol=0.03, rtol=0)
    torch.testing.assert_close(shares(1, 0.6), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03, rtol=0)
    torch.testing.assert_close(shares(0.5, 1)[0], torch.tensor(0.25 / 0.365), atol=0.03, rtol=0)
    assert shares(1, 1e-9, 20)[0] == shares(0, 1, 20)[0] == shares(1e-310, 1, 20)[0] == 1
    torch.testing.assert_close(shares(float("inf"), 1), torch.full((4,), 0.25), atol=0.03, rtol=0)


def test_bytes_come_back_as_text():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode_batch(["aé\u2603"])[0].tolist()) == "aé\u2603"
    assert tokenizer.decode([97, 0xC3]) == "a\N{REPLACEMENT CHARACTER}"


def test_cast_leaves_gates_as_they_are(run):
    model = cast(load_model(*stored(str(run))), torch.bfloat16)
    gates = {parameter for module in model.modules() if isinstance(module, Gate) for parameter in module.parameters()}
    assert gates and all(parameter.dtype == torch.float32 for parameter in gates)
    assert {p.dtype for p in model.parameters() if p not in gates} == {torch.bfloat16}
    assert next(continuation(model, [1, 2], torch.device("cpu"), temperature=0, top_p=1.0, seed=0)) < 257


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--temperature", "-1"], "--temperature -1.0: use 0 or more"),
        (["--top-p", "0"], "--top-p 0.0: use a share above 0"),
        (["--tokens", "0"], "--tokens 0: use 1 or more"),
        (["--seed", "-1"], "--seed -1: use 0 to 9223372036854775807"),
        (["--seed", str(2**64)], "--seed 18446744073709551616: use 0 to 9223372036854775807"),
        (["--prompt-file", "x.txt", "--prompt", "x"], "--prompt and --prompt-file are both given: give one of them"),
        (["--prompt", "caf\udce9"], "--prompt: is not UTF-8 text"),
        (["--prompt-file", "nowhere.txt"], "--prompt-file nowhere.txt: cannot be read"),
        (["--tokenizer", "nowhere.json"], "tokenizer nowhere.json: no such file"),
    ],
)
def test_what_does_not_fit_is_one_line(run, capsys, arguments, said):
    with pytest.raises(SystemExit):
        cli.main(["generate", str(run), *arguments])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("longspan: error: ") and said in error


@pytest.mark.parametrize("bos, start", [(None, [97, 98]), (7, [7, 97, 98])])
def test_prompts_begin_as_documents_do(bos, start, run, monkeypatch):
    encoder, given = ByteTokenizer(), []
    encoder.bos = bos
    monkeypatch.setattr(stored_models, "load_tokenizer", lambda *names: given.append(names) or encoder)
    monkeypatch.setattr(generation, "continuation", lambda model, ids, device, **_: given.append(ids) or iter([256]))
    cli.main(["generate", str(run), "--prompt", "ab"])
    assert given == [("bytes", 256, None), start]


@pytest.mark.parametrize("device", DEVICES)
def test_exported_weights_continue_as_the_run(run, tmp_path, capsys, device):
    folder = tmp_path / "weights"
    export_run(str(run), str(folder), "longspan", "float32")
    capsys.readouterr()
    common = ["--prompt", "abc", "--tokens", "20", "--tokenizer", "bytes"]
    texts = []
    for model, place in ((run, "cpu"), (run, device), (folder, device)):
        cli.main(["generate", str(model), f"run.device={place}", *common])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) > 5
    with pytest.raises(SystemExit):
        cli.main(["generate", str(folder)])
    assert f"{folder} has no tokenizer.json: name the model's own with --tokenizer" in capsys.readouterr().err
    cli.main(["generate", str(folder), "train.dtype=bfloat16", f"run.device={device}", *common])
    assert capsys.readouterr().out.startswith("abc")


@pytest.mark.parametrize("template, start", [(None, [1, 2]), ("<s> $A", [3, 1, 2])])
def test_weights_with_their_tokenizer_begin_as_it_says(run, tmp_path, monkeypatch, template, start):
    tokenizers = pytest.importorskip("tokenizers")
    export_run(str(run), str(tmp_path / "weights"), "longspan", "float32")
    ids = {"<|endoftext|>": 0, "a": 1, "b": 2, "<s>": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<s>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if template:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 3)]
        )
    tokenizer.save(str(tmp_path / "weights" / "tokenizer.json"))
    given = []
    monkeypatch.setattr(generation, "continuation", lambda model, ids, device, **_: given.append(ids) or iter([0]))
    cli.main(["generate", str(tmp_path / "weights"), "--prompt", "a b"])
    assert given == [start]


def test_a_corpus_of_others_needs_a_named_tokenizer(run, capsys):
    (run.parent / "corpus.json").unlink()
    with pytest.raises(SystemExit):
        cli.main(["generate", str(run)])
    assert "name it with --tokenizer" in capsys.readouterr().err
    cli.main(["generate", str(run), "--tokenizer", "bytes", "--tokens", "2"])
