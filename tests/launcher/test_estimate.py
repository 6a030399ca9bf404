"""`longspan plan`: against measured runs and counted parameters, and what it says about jobs that do not fit."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

import longspan
from longspan.attention.expected_requests import expected_requests
from longspan.attention.selections import TopBlocks
from longspan.launcher import cli
from longspan.launcher.config import Config
from longspan.launcher.errors import UserError
from longspan.launcher.estimate import WINDOWS, Job, countable, estimate
from longspan.launcher.estimate_report import lines
from longspan.launcher.fitting import largest, refuse
from longspan.launcher.gpus import GIB, GPUS, Cluster, cluster_of, parse_gpus
from longspan.launcher.step_time import activations_exposed
from longspan.launcher.validation import LARGEST_SEQ_LEN
from longspan.models.flops import num_parameters
from longspan.parallel.balanced import balanced

RESULTS = Path(longspan.__file__).parent / "benchmarks" / "results"
SMALL = [
    "data.corpora=[{path: x}]", "model.num_layers=4", "model.hidden_size=256", "model.vocab_size=1000",
    "train.dtype=bfloat16",
]  # fmt: skip


def job_of(*settings, gpus="2xH200", **options):
    return Job(Config.load(None, [*SMALL, *settings]), parse_gpus(gpus), **options)


def test_peaks_of_older_runs_are_not_far_above():
    """Their code of a week before held more. Newer ones: test_report_plan.py."""
    for name, tokens in (("train_hybrid_0.4b_128k_2xH200", 2**17), ("train_hybrid_0.4b_512k_2xH200", 2**19)):
        measured = json.loads((RESULTS / f"{name}.json").read_text())["summary"]["peak_mem_gb"]
        settings = [f"data.seq_len={tokens}", "train.checkpointing=full", "parallel.head_groups=1"]
        found = estimate(Job(Config.load("hybrid-0.4b", settings), parse_gpus("2xH200")))
        assert found.peak / GIB == pytest.approx(0.93 * measured, rel=0.05)


def test_times_of_measured_layers_are_not_far_above():
    """They were measured when norms, gates and rotations took more operations, so they are an upper bound today."""
    layers = {"fixed": "linear:fixed", "scalar": "linear:scalar", "gated_delta": "linear:gated_delta"}
    rows = json.loads((RESULTS / "linear_layer_4xH200.json").read_text())["rows"]
    alone = [row for row in rows if row["strategy"] == "alone"]
    assert len(alone) >= 3
    for row in alone:
        settings = [
            "model.num_layers=1", "model.hidden_size=2048", "model.num_heads=16", "model.vocab_size=256",
            f"model.pattern=[{layers[row['family']]}]", f"data.seq_len={row['tokens_per_gpu']}",
        ]  # fmt: skip
        seconds = estimate(job_of(*settings, gpus="H200")).seconds
        layer = sum(seconds.get(name, 0) for name in LAYER)
        assert 0.75 <= layer * 1000 / row["ms"]["forward+backward"] <= 1, row["family"]


LAYER = ("projections and MLP", "norms, gates, rotations", "linear attention", "short convolutions")


def test_states_are_those_of_the_parameters_over_the_ranks_that_share_them():
    config = job_of().config
    count = num_parameters(config.model)
    ddp = ["parallel.engine=ddp"]
    cases = ("2xH200", [], 2), ("16xH200", ["parallel.sharding=hsdp"], 8), ("H100", [], 1), ("2xH200", ddp, 1)
    for gpus, settings, shards in cases:
        found = estimate(job_of("data.seq_len=16K", *settings, gpus=gpus))
        assert found.num_parameters == count
        assert found.memory["parameters"] == 4 * count / shards
        assert found.memory["optimizer state"] == 8 * count / shards


def test_memory_options_and_engines_change_what_they_are_for():
    def found(*settings):
        return estimate(job_of("data.seq_len=16K", *settings))

    plain, sharding = found(), "gathered parameters, reduced gradients"
    offloaded = found("optim.offload=cpu")
    assert [offloaded.memory[name] for name in ("parameters", "optimizer state", "gradients")] == [0, 0, 0]
    assert offloaded.seconds["optimizer"] > 4 * plain.seconds["optimizer"]
    assert offloaded.seconds["communication, exposed"] > plain.seconds["communication, exposed"]
    halves = found("train.reduce_dtype=bfloat16")
    assert plain.memory[sharding] == halves.memory[sharding]  # in the last block, before any gradient travels
    assert halves.seconds["communication, exposed"] < plain.seconds["communication, exposed"]
    copies = found("parallel.engine=ddp")
    assert copies.memory["optimizer state"] == 2 * plain.memory["optimizer state"]
    assert copies.seconds["communication, exposed"] > 0
    tiled, whole = (found("data.seq_len=64K", f"train.mlp_tile={tile}") for tile in (1000, 0))
    assert tiled.peak < 0.8 * whole.peak
    assert sum(tiled.kept.values()) < 0.8 * sum(whole.kept.values())
    one = found("train.checkpointing=full", "train.checkpoint_layers=[softmax]")
    both, half = found("train.checkpointing=full"), found("train.checkpointing=selective")
    assert both.peak < one.peak < plain.peak and both.peak < half.peak < plain.peak


def test_offload_takes_host_memory_and_time_where_it_is_not_hidden():
    def found(*settings, gpus="2xH200", **options):
        return estimate(job_of("data.seq_len=48K", "train.checkpointing=full", *settings, gpus=gpus, **options))

    plain, away = found(), found("train.offload_activations=true")
    assert away.peak < plain.peak and [*plain.host] == ["processes"]
    # Of four blocks the input, 12 MiB of 24K tokens on a rank; of one the attention's result and its fp32 sums per
    # query (4 heads, below 1 MiB).
    assert away.host["what layers keep"] == 2 * 5 * 12 * 2**20
    assert away.step_s >= plain.step_s
    moments = found("optim.offload=cpu")
    assert moments.host["optimizer state"] == 8 * plain.num_parameters  # of both ranks
    pinned = moments.host["parameters, gradients"] / plain.num_parameters
    assert 8 < pinned < 16
    narrow = job_of("data.seq_len=48K", "train.checkpointing=full", "train.offload_activations=true")
    measured = narrow.measure()
    assert activations_exposed(measured, 0.0, 0.0) == pytest.approx(2 * sum(measured.put_away) / 50e9)
    assert activations_exposed(measured, 1e9, 1e9) == 0


def test_a_job_can_be_too_large_for_its_machine_alone(capsys):
    settings = ["data.seq_len=1M", "train.checkpointing=full", "train.offload_activations=true"]
    config = job_of(*settings).config
    large, small = (Job(config, parse_gpus("2xH200", host_gib=size)) for size in (64, 13))
    assert estimate(large).fits and not estimate(small).fits
    with pytest.raises(UserError, match="a machine needs .* GiB of host memory, .* of it for .*, and has 13") as caught:
        refuse(small, estimate(small))
    tokens = int(re.search(r"data.seq_len=(\d+) or less", str(caught.value))[1])
    assert 0 < tokens < 2**20
    fitting, failing = (
        Job(job_of(*settings, f"data.seq_len={n}").config, small.cluster) for n in (tokens, tokens + tokens // 32)
    )
    assert estimate(fitting).fits and not estimate(failing).fits
    assert str(parse_gpus("2xH200", host_gib=64)) == "2xH200" and parse_gpus("2xH200").host_memory == 256 * GIB
    with pytest.raises(UserError, match="--host-memory -1"):
        parse_gpus("H200", host_gib=-1)


def test_tensor_parallel_ranks_share_weights_heads_and_tokens_between_layers():
    def found(tp, *settings, gpus="8xH200"):
        return estimate(
            job_of("data.seq_len=256K", "model.hidden_size=1024", f"parallel.tp={tp}", *settings, gpus=gpus)
        )

    one, two = found(1), found(2)
    assert two.num_parameters == one.num_parameters
    # Sharded over fewer ranks, of which each has half; vectors are whole on both.
    assert one.memory["parameters"] < two.memory["parameters"] < 1.01 * one.memory["parameters"]
    sharding = "gathered parameters, reduced gradients"
    assert two.memory[sharding] == pytest.approx(one.memory[sharding] / 2, rel=0.01)
    for name in ("softmax attention", "linear attention", "projections and MLP"):
        assert two.seconds[name] == pytest.approx(one.seconds[name], rel=0.02), name
    # The residual stream is not copied; what products save of their input is.
    assert two.kept["residual stream"] == one.kept["residual stream"]
    assert one.kept["softmax"] < two.kept["softmax"] < 2 * one.kept["softmax"]
    # Two gathers and two scatters per layer in each direction, and one around the layers, of the tokens of four ranks,
    # of which half come; and the loss of 16 chunks.
    moved = 36 * 2**16 * 1024 * 2 / 2 / 326e9 + (36 + 16) * 5e-5
    more = two.seconds["communication, exposed"] - one.seconds["communication, exposed"]
    assert more == pytest.approx(moved, rel=0.05)
    copies = found(2, "parallel.engine=ddp")
    assert copies.memory["parameters"] == 4 * two.memory["parameters"]
    across = found(2, "parallel.sharding=hsdp", gpus="32xH200")
    assert across.memory["parameters"] == two.memory["parameters"]
    with pytest.raises(UserError, match="parallel.tp=8 makes GPUs of different machines share layers, with 4 in each"):
        Job(job_of("parallel.tp=8", gpus="8xH200").config, Cluster("H200", 8, 4))


@pytest.mark.parametrize(
    "settings, part",
    [
        (["parallel.engine=deepspeed"], "parallel.engine=deepspeed"),
        (["model.pattern=[sparse]", "model.sparse_selection={name: window, window: 512}"], "name=window"),
        (["parallel.backend=math"], "parallel.backend=math"),
        (["parallel.backend=cpu"], "parallel.backend=cpu"),
    ],
)
def test_what_is_not_counted_is_refused(settings, part):
    with pytest.raises(UserError, match=f"{part} is not counted by longspan plan: plan with"):
        job_of(*settings)


def test_what_a_back_end_takes_on_gpus_matters_to_softmax_layers_there():
    assert countable(job_of("parallel.backend=math", "model.pattern=[linear]").config)
    config = Config.load(None, [*SMALL, "parallel.backend=math"])
    assert countable(config, gpu=False) and not countable(config)
    notes = [note for note in estimate(job_of("train.dtype=float32")).notes if "softmax attention" in note]
    assert len(notes) == 1 and "float32 is plain PyTorch" in notes[0]


def test_a_sparse_layer_with_top_blocks_is_sla_without_its_branch():
    def found(*settings):
        return estimate(job_of("data.seq_len=64K", *settings))

    top = found("model.pattern=[sparse]", "model.sparse_selection={name: top, keep: 0.05}")
    sla = found("model.pattern=[sla]", "model.sla_keep=0.05")
    assert sla.seconds["sparse attention"] == top.seconds["sparse attention"]
    assert "linear attention" not in top.seconds and sla.seconds["linear attention"] > 0
    assert top.kept["sparse"] < sla.kept["sla"]


def test_a_gpu_keeps_some_memory_for_itself():
    for gpus, memory in (("H100", 79.1), ("H200", 139.8)):
        limit = estimate(job_of("data.seq_len=16K", gpus=gpus)).limit / GIB
        assert 0.92 * memory < limit < memory - 2.5


def test_time_follows_the_work():
    def seconds(*settings, **options):
        return estimate(job_of("data.seq_len=256K", *settings, **options)).seconds

    one, once = seconds(gpus="1xH200"), seconds()
    assert once["softmax attention"] == pytest.approx(one["softmax attention"] / 2)
    twice = seconds("train.global_batch=2")
    assert twice["softmax attention"] == pytest.approx(2 * once["softmax attention"])
    assert twice["optimizer"] == once["optimizer"]
    # Attention is not recomputed, linear layers and products are.
    again = seconds("train.checkpointing=full")
    assert again["softmax attention"] == once["softmax attention"]
    assert again["linear attention"] > 1.2 * once["linear attention"]
    assert again["projections and MLP"] == pytest.approx(once["projections and MLP"] * 4 / 3, rel=0.1)
    # Short documents: pairs fall, the rest stays.
    short = seconds(document=2**12)
    assert short["softmax attention"] == pytest.approx(once["softmax attention"] / 64, rel=0.01)
    assert short["projections and MLP"] == once["projections and MLP"]
    across = seconds("model.pattern=[softmax]", "data.seq_len=64K", gpus="16xH200")
    assert across["communication, exposed"] > seconds("data.seq_len=64K", gpus="8xH200")["communication, exposed"]


def test_every_gpu_and_kind_of_layer_has_rates():
    kinds = "[softmax, llsa, sla, linear:none, linear:gla, linear:hgrn2, linear:mamba2, linear:gated_delta, linear:kda]"
    for name in GPUS:
        found = estimate(job_of("model.num_layers=9", f"model.pattern={kinds}", "data.seq_len=32K", gpus=f"4x{name}"))
        assert 0 < found.mfu < 1 and sum(found.seconds.values()) == found.step_s
        assert {"softmax attention", "sparse attention", "linear attention", "short convolutions"} <= {*found.seconds}


def test_no_longer_sequence_is_planned_than_settings_take():
    job = job_of(
        "train.checkpointing=full",
        "model.pattern=[linear]",
        "model.hidden_size=64",
        "data.seq_len=64G",
        gpus="4096xH200",
    )
    assert largest(job) == (LARGEST_SEQ_LEN, LARGEST_SEQ_LEN)


def test_the_largest_sequence_fits_and_a_larger_one_does_not():
    tokens, power = largest(job_of("train.checkpointing=full"))
    assert power <= tokens < 2 * power
    assert estimate(job_of("train.checkpointing=full", f"data.seq_len={tokens}")).fits
    assert not estimate(job_of("train.checkpointing=full", f"data.seq_len={tokens + tokens // 64}")).fits


def test_what_does_not_fit_is_refused_with_settings_that_do():
    job = job_of("data.seq_len=32M", "train.checkpointing=none")
    found = estimate(job)
    assert not found.fits
    with pytest.raises(UserError, match="data.seq_len=33554432 does not fit on 2xH200") as caught:
        refuse(job, found)
    remedies = re.findall(r"(train\.\w+=\w+|--gpus \w+|data\.seq_len=\d+)", str(caught.value).split("what does:")[1])
    assert len(remedies) >= 2
    for remedy in remedies:
        gpus = remedy.removeprefix("--gpus ") if remedy.startswith("--gpus") else "2xH200"
        setting = [] if remedy.startswith("--gpus") else [remedy]
        assert estimate(job_of("data.seq_len=32M", "train.checkpointing=none", *setting, gpus=gpus)).fits, remedy


def test_gpus_are_read_and_mistakes_named():
    assert parse_gpus("64xh200") == Cluster("H200", 64, 8)
    assert parse_gpus("B200") == Cluster("B200", 1, 1)
    for text, part in (("4xV100", "V100 is not in the tables"), ("0xH100", "such as 4xH200"), ("12xH100", "fill")):
        with pytest.raises(UserError, match=part):
            parse_gpus(text)


@pytest.mark.parametrize("device, kind", [("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"),
                                          ("NVIDIA B200", "B200"), ("NVIDIA A100-SXM4-80GB", "A100")])  # fmt: skip
def test_gpus_are_known_by_the_names_of_their_drivers(device, kind):
    assert cluster_of(device, 4, 8) == Cluster(kind, 4, 4)


@pytest.mark.parametrize(
    "device",
    [
        "NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA B300 SXM6 AC", "NVIDIA H100 PCIe", "NVIDIA H100 NVL",
        "NVIDIA H200 NVL", "NVIDIA A100-SXM4-40GB", "NVIDIA A100 80GB PCIe", "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
    ],
)  # fmt: skip
def test_gpus_like_them_are_not_taken_for_them(device):
    """Other clocks, memory or links, or a part of one."""
    with pytest.raises(UserError, match=f"longspan plan knows no {device}"):
        cluster_of(device, 4, 8)


@pytest.mark.parametrize(
    "text, meant",
    [
        ("8xH1OO", "8xH100"), ("8H200", "8xH200"), ("x8H200", "8xH200"), ("H200x16", "16xH200"),
        ("2x4xH100", "8xH100 --gpus-per-node 4"), ("2x4xV100", None), ("8xA100-80GB", "8xA100"),
        ("0xB200", "B200"), ("4xV100", None), ("H10", None), ("", None), ("8xGB200", None), ("GH200", None),
    ],
)  # fmt: skip
def test_gpus_that_were_meant_are_named(text, meant):
    with pytest.raises(UserError) as caught:
        parse_gpus(text)
    hint = f"did you mean {meant}? " if meant else ""
    assert str(caught.value).endswith(f"; {hint}kinds: H100, H200, A100, B200")


def test_mistakes_in_other_options_are_one_line_each(capsys):
    for argv, part in (
        (["--gpus-per-node", "0"], "--gpus-per-node 0: use 1 or more"),
        (["--host-memory", "nan"], "'nan' is no number of GiB; write it like 1024"),
        (["--host-memory", "1TB"], "'1TB' is no number of GiB; write it like 1024"),
        (["--config", "hybrid1b"], "did you mean hybrid-1b?"),
    ):
        code, out, err = printed(capsys, *argv)
        assert code == 1 and not out and len(err.strip().splitlines()) == 1 and part in err


@pytest.mark.parametrize("offload, most", [([], 10), (["train.offload_activations=true"], 14)])
def test_the_largest_sequence_is_found_in_few_estimates(offload, most, monkeypatch):
    """Also where host memory grows in jumps."""
    measured, measure = [], Job.measure
    monkeypatch.setattr(Job, "measure", lambda job: measured.append(job.config.data.seq_len) or measure(job))
    job = replace(
        job_of("data.seq_len=64K", "train.checkpointing=full", *offload), cluster=parse_gpus("2xH200", host_gib=20)
    )
    tokens, _ = largest(job)
    assert tokens > 2**20 and len(measured) <= most


def printed(capsys, *argv):
    code = 0
    try:
        cli.main(["plan", *argv, *SMALL])
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_prints_a_table_json_or_one_line_of_refusal(capsys):
    code, out, _ = printed(capsys, "--gpus", "2xH200", "--seq-len", "64K")
    assert code == 0 and "tokens/s/GPU" in out and "bound by" in out and "largest data.seq_len that fits" in out
    code, out, _ = printed(capsys, "--gpus", "2xH200", "--seq-len", "64K", "--json")
    found = json.loads(out)
    assert code == 0 and found["fits"] and found["peak_bytes"] == sum(found["memory_bytes"].values())
    code, out, err = printed(capsys, "--gpus", "1xH100", "--seq-len", "64M")
    assert code == 1 and "peak" in out and len(err.strip().splitlines()) == 1 and "does not fit on 1xH100" in err
    code, _, err = printed(capsys, "--gpu", "4xH200")
    assert code == 1 and "did you mean --gpus?" in err


def test_strategies_that_bring_more_keys_at_once_take_more_memory():
    """Of 8 ranks with a key head per query head, in units of q (test_softmax_memory.py follows them): keys and their
    gradients of all others at once, or of half of them. Over machines keys are passed on."""

    def peak(strategy, gpus="8xH200"):
        # MLPs and the loss, which come later, would hide it.
        settings = "model.pattern=[softmax]", "model.mlp_size=256", "model.loss_chunk=256"
        tokens = 2**13 * parse_gpus(gpus).count
        return job_of(f"parallel.softmax={strategy}", *settings, f"data.seq_len={tokens}", gpus=gpus).measure().peak

    unit = 2**13 * 256 * 2
    ring = peak("ring")
    assert peak("auto") == peak("zeppelin") == peak("double_ring") == ring
    assert peak("grouped_ring") - ring == 15 * unit
    assert peak("all_gather") - ring == 23.5 * unit
    assert peak("ring", "16xH200") == ring
    assert peak("auto", "16xH200") == peak("double_ring", "16xH200") == ring + 6 * unit


def test_groups_of_heads_take_less_memory_and_as_long():
    """Of one group fewer keys are on their way, and the same work is divided."""

    def found(groups, *settings, seq_len="1M"):
        plain = "model.pattern=[softmax]", "model.num_heads=8", "model.head_dim=128", "model.loss_chunk=1024"
        plain += "train.checkpointing=full", "train.mlp_tile=4K", f"data.seq_len={seq_len}"
        return estimate(job_of(*plain, *settings, f"parallel.head_groups={groups}"))

    once, two, all_apart = (found(groups) for groups in (1, 2, 8))
    assert (once.peak - two.peak, two.peak - all_apart.peak) == (2.5 * GIB, 4.125 * GIB)  # units of q, of 11 and 8.5
    for one in (two, all_apart):
        assert one.step_s == pytest.approx(once.step_s, rel=1e-3)
        assert one.seconds["softmax attention"] == pytest.approx(once.seconds["softmax attention"])
        assert one.kept == once.kept
    assert found(0).memory == found(8).memory  # 512K tokens of 8 heads a rank
    assert found(0, "model.num_kv_heads=2").memory == found(2, "model.num_kv_heads=2").memory
    assert found(0, seq_len="512K").memory == found(4, seq_len="512K").memory
    assert found(0, seq_len="511K").memory == found(1, seq_len="511K").memory
    near = "model.pattern=[softmax:window]", "model.window=4K"
    assert found(0, *near, seq_len="512K").memory == found(1, *near, seq_len="512K").memory


def test_layers_without_heads_to_divide_have_one_group():
    """Whatever parallel.head_groups says, and where fewer key heads are set than ranks that share layers."""
    settings = "model.pattern=[linear]", "data.seq_len=4M"
    for more in (
        ("parallel.head_groups=3",),
        ("model.num_kv_heads=1", "parallel.tp=2", "model.num_heads=8", "model.head_dim=64"),
    ):
        job = job_of(*settings, *more)
        assert job.head_groups == 1 and "groups" not in "\n".join(lines(job, estimate(job)))


def test_windows_that_gpus_share_are_held_once_for_all_layers():
    def found(*settings, gpus="4xH200"):
        return estimate(job_of("model.pattern=[llsa]", "data.seq_len=64K", *settings, gpus=gpus))

    off, on = found("parallel.peer_memory=off"), found()
    window = 2 * 2**16 * 256 * 2  # on any number of ranks keys and values of all tokens, in bf16
    assert off.memory[WINDOWS] == 0 and on.memory[WINDOWS] == window
    assert on.peak == sum(on.memory.values()) and on.other_peak == off.other_peak + window
    assert found("parallel.peer_memory=on").memory == on.memory
    assert found("data.seq_len=4M", "train.checkpointing=full").memory[WINDOWS] == 4 * 2**30
    for setting in ("data.seq_len=5M", "parallel.sparse=ring", "model.pattern=[linear]"):
        assert found(setting).memory[WINDOWS] == 0, setting
    assert found(gpus="16xH200").memory[WINDOWS] == 0
    for gpus, part in (("16xH200", "are on 2 machines"), ("H200", "1 ranks share a sequence; it takes 2 to 8")):
        with pytest.raises(UserError, match=f"parallel.peer_memory=on cannot be honoured: .*{part}; use auto or off"):
            found("parallel.peer_memory=on", gpus=gpus)


def test_sparse_layers_keep_what_their_way_brings():
    """By request what is expected of the rank with most of it, and all of its own; in a ring all keys of others. `auto`
    takes, as training does, requests where ranks share a node. What lists could name has room; where most of it comes,
    nothing is given back."""
    arrived = 4 * 2 * 256 * 2  # of 4 layers: bytes of a token
    for selection, auto in (("keep: 0.3", "fetch"), ("keep: 2", "fetch"), ("keep: 4", "fetch")):
        kept = {}
        for way in ("fetch", "ring", "auto"):
            settings = ["model.pattern=[sparse]", "data.seq_len=64K", f"parallel.sparse={way}"]
            selected = f"model.sparse_selection={{name: top, {selection}}}"
            kept[way] = job_of(selected, *settings, gpus="8xH200").measure().kept["sparse"]
        assert kept["auto"] == kept[auto] != kept["ring"]
        if selection == "keep: 2":  # and the 2 blocks around them, of 64 keys, for each of 64 blocks of queries
            assert kept["ring"] - kept["fetch"] == (2**16 * 7 / 8 - 64 * 4 * 64) * arrived
    asked = expected_requests(TopBlocks(4), balanced([2**16], 8), True, alike=True)[0]
    fewer = 2**16 * 6 / 8 - asked[(2 * asked.sum(1) + asked.sum(0)).argmax()].sum()
    assert fewer > 2**12 and kept["ring"] - kept["fetch"] == pytest.approx(fewer * arrived, rel=1e-3)
