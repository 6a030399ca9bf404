"""What ranks must have in common, and how a run ends where they have not: the same line on every rank, before they wait
for each other."""

from dataclasses import replace

import pytest
from spawn import run_ranks
from tiny_runs import start, tiny_config, write_corpus

from longspan.launcher import facts, trainer
from longspan.launcher.agreement import agree_on, listed
from longspan.launcher.errors import UserError
from longspan.parallel import Layout, planner


def _refusal(action):
    with pytest.raises(UserError) as error:
        action()
    return str(error.value)


def _different(rank, world_size):
    agree_on({"numpy": "2.0", "model.window": "0"})
    one = {"numpy": "2.0" if rank == 2 else "1.26", "model.window": "0", **({"extra": "1"} if rank else {})}
    many = {f"setting {n}": f"{rank // 2}" for n in range(7)}
    return [_refusal(lambda: agree_on(found)) for found in (one, many)]


def test_what_differs_is_named_with_its_ranks_on_all_of_them():
    found = run_ranks(_different, 4)
    assert all(texts == found[0] for texts in found)
    one, many = found[0]
    assert one.startswith(
        "ranks differ: numpy is 1.26 on ranks 0-1, 3 and 2.0 on rank 2; extra is unknown on rank 0 and 1 on ranks 1-3. "
    )
    assert (
        "setting 3 is 0 on ranks 0-1 and 1 on ranks 2-3; and 3 more. Start the same" in many and "setting 4" not in many
    )


def test_ranks_are_listed_as_runs():
    assert [listed(ranks) for ranks in ([4], [0, 1], [0, 2, 3, 4, 9])] == ["rank 4", "ranks 0-1", "ranks 0, 2-4, 9"]


def test_facts_are_settings_versions_code_and_corpora(tmp_path, monkeypatch):
    config = tiny_config(write_corpus(tmp_path), tmp_path / "run")
    found = facts.facts_of(config)
    assert found == facts.facts_of(config) and found["model.hidden_size"] == "16"
    assert {"longspan", "python", "torch", "numpy", "triton", f"{tmp_path}/corpus.idx"} <= found.keys()

    def changed(config=config):
        again = facts.facts_of(config)
        return [name for name in found if found[name] != again[name]]

    assert changed(replace(config, parallel=replace(config.parallel, token_cap=2.0))) == ["parallel.token_cap"]
    with open(tmp_path / "corpus.bin", "ab") as file:
        file.write(b"1")
    assert changed() == [f"{tmp_path}/corpus.bin"]
    monkeypatch.setattr(facts, "ROOMS", facts.ROOMS[1:])
    assert changed() == ["longspan", f"{tmp_path}/corpus.bin"]


def test_files_of_corpora_are_found_as_they_are_opened(tmp_path, monkeypatch):
    write_corpus(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    files = facts.sizes([f"{tmp_path}/corpus"])
    assert len(files) == 2 and all(size.endswith(" bytes") for size in files.values())
    assert files == facts.sizes(["~/corpus"]) == facts.sizes([f"{tmp_path}/corpus.bin"])


def _other_setting(rank, world_size, corpus, folder):
    """Of the number of ranks that share a sequence, with which they would form other groups."""
    config = tiny_config(corpus, folder / "run", f"parallel.sp={rank + 1}", "run.device=cpu")
    return _refusal(lambda: trainer.run(config))


def test_a_run_whose_ranks_have_other_settings_ends_before_its_groups_are_made(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = run_ranks(_other_setting, 2, write_corpus(tmp_path), tmp_path)
    assert found[0] == found[1]
    assert found[0].startswith("ranks differ: parallel.sp is 1 on rank 0 and 2 on rank 1. Start the same")


def _other_plan(rank, world_size, corpus, folder, layout):
    given = f"parallel.layout={layout}", "model.pattern=[softmax]"
    settings = "parallel.softmax=zeppelin", "data.packing=documents", "data.seq_len=512", "train.global_batch=1", *given
    if rank == 1:  # as of another version: ranks change places
        balanced = planner.balanced
        planner.STRATEGIES["zeppelin"] = lambda batch: batch.planned(
            Layout(batch.lengths, balanced(batch.lengths, world_size).spans[::-1])
        )
    run = start(tiny_config(corpus, folder / "run", *settings))
    return _refusal(run.train)


@pytest.mark.parametrize("layout", ["auto", "contiguous"])
def test_ranks_that_plan_otherwise_are_noticed_before_tokens_move(tmp_path, layout):
    """Where all layers follow the plan, and where softmax attention alone does."""
    found = run_ranks(_other_plan, 2, write_corpus(tmp_path), tmp_path, layout)
    assert found[0] == found[1]
    assert found[0].startswith("rank 1 placed the tokens of step 1 elsewhere than rank 0 of the same SP group: ")
