"""Seconds of a step: the timeline of stages by hand, transfers by counted bytes, and what measured steps leave."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import longspan
from longspan.attention.hierarchy import Hierarchical
from longspan.attention.outline import Call
from longspan.attention.schedules import softmax_schedule
from longspan.launcher.breakdown import DATA, EXPOSED, IDLE
from longspan.launcher.config import Config
from longspan.launcher.errors import UserError
from longspan.launcher.estimate import Job, estimate
from longspan.launcher.gpus import BLOCK_S, LATENCY_S, LAUNCH_S, extras_of, parse_gpus
from longspan.launcher.report.planned import plan
from longspan.launcher.report.results import read
from longspan.launcher.report.series import summarize
from longspan.launcher.step_time import (
    COPIES,
    WAITING,
    Part,
    activations_exposed,
    call_seconds,
    compute_seconds,
    per_parameter,
    request_transfer,
    ring_transfer,
    state_transfer,
    step_seconds,
    timeline,
)
from longspan.parallel.geometry import Mask
from longspan.parallel.layout import zigzag

RESULTS = Path(longspan.__file__).parent / "benchmarks" / "results"
SMALL = [
    "data.corpora=[{path: x}]", "model.num_layers=4", "model.hidden_size=256", "model.vocab_size=1000",
    "train.dtype=bfloat16",
]  # fmt: skip
NEAR, CROSS = 326e9, 45e9  # bytes per second of an H200


def job_of(*settings, gpus="2xH200", **options):
    return Job(Config.load(None, [*SMALL, *settings]), parse_gpus(gpus), **options)


def sharded(gather=3.0, reduce=4.0):
    """Embedding, two blocks, loss, and backward, in seconds."""
    block, back = Part(10.0, gather=gather), Part(20.0, gather=gather, reduce=reduce, backward=True)
    ends = Part(0.0, backward=True), Part(1.0, reduce=6.0, backward=True)
    return [Part(1.0, gather=5.0), block, block, Part(2.0), ends[0], back, back, ends[1]]


def test_what_has_nothing_to_hide_behind_shows():
    # The first gather (5); 2 of block 0's, which 1 of embedding hides; backward all of block 1's (3), which loss could
    # not; of block 0's reduction 3, which 1 of embedding hides; the last (6).
    assert timeline(sharded(), update=1.0) == (5 + 2 + 3 + 3 + 6, 0.0)
    # A gather that outlasts a block: forward those of both blocks run from the end of the first on (5 to 35), block 0
    # from 20 to 30; backward block 1's from its start (47 to 62) and block 0's (62 to 77) beside block 1.
    assert timeline(sharded(gather=15.0))[0] == 5 + (20 - 6) + (35 - 30) + 15 + 3 + 6
    # Forward a gather does not wait for the stage before it, of which the parameters may be on their way.
    late = [Part(10.0, gather=1.0), Part(10.0, gather=1.0), Part(10.0, gather=15.0)]
    assert timeline(late)[0] == 1
    # Reductions of 25 beside 20: block 0 is done when block 1's gradients are, 5 later, and the last two in turn.
    assert timeline(sharded(reduce=25.0))[0] == 5 + 2 + 3 + 5 + (25 - 1) + 6


def test_copies_are_summed_once_a_step_and_micro_batches_repeat_the_rest():
    parts = [replace(part, copies=2.0 * (part.reduce > 0)) for part in sharded()]
    once = 5 + 2 + 3 + 3 + 6
    # Of copies 2 longer for block 0 and 2 for the last; block 1's are hidden.
    assert timeline(parts)[0] == once + 4
    assert timeline(parts, micro_batches=3)[0] == 3 * once + 4
    alone = [Part(1.0), Part(20.0, backward=True, copies=2.0), Part(1.0, backward=True, copies=7.0)]
    assert timeline(alone)[0] == 1 + 7


def test_the_device_waits_for_a_host_that_takes_longer():
    quick, slow = Part(10.0, host=1.0), Part(1.0, host=4.0)
    assert timeline([quick, slow]) == (0.0, 0.0)  # 5 beside 11: the host is ahead
    assert timeline([slow, slow, quick]) == (0.0, 0.0)
    assert timeline([slow, slow, slow]) == (0.0, 12.0 - 3.0)
    # Where the host has waited it is no longer ahead: it queues for 4 what takes 1.
    assert timeline([quick, replace(slow, waits=True), quick]) == (0.0, 3.0)
    assert timeline([quick, replace(slow, waits=True, computing=9.0), quick]) == (0.0, 0.0)
    # What is shown of transfers is time that the host has, too.
    assert timeline([replace(slow, shown=2.0)] * 3) == (6.0, 12.0 - 9.0)


def call_of(kind, detail, **sizes):
    return Call(kind, detail, False, 4, 4, 64, 64, **sizes)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_last_keys_of_a_ring_go_home_beside_nothing(ranks):
    job, tokens = job_of("data.seq_len=64K", gpus=f"{ranks}xH200"), 2**16
    forward, backward = (replace(call_of("softmax", Mask()), backward=back) for back in (False, True))
    layout = zigzag([tokens], ranks)
    last = max(softmax_schedule(layout, rank, "ring", Mask()).backward[-1].num_keys for rank in range(ranks))
    one = last * 2 * 4 * 64 * 2 / NEAR  # keys and values of 4 heads of 64 in bf16
    assert last == tokens / ranks
    assert ring_transfer(job, forward, 1.0) == pytest.approx(LATENCY_S)
    assert ring_transfer(job, backward, 1.0) == pytest.approx(LATENCY_S + one)
    # Beside nothing: forward once, backward twice, but that nothing returns in the first step, and alone in the end.
    assert ring_transfer(job, forward, 0.0) == pytest.approx(LATENCY_S + (ranks - 1) * one)
    assert ring_transfer(job, backward, 0.0) == pytest.approx(LATENCY_S + 2 * (ranks - 1) * one)
    gathered = job_of("data.seq_len=64K", "parallel.softmax=all_gather", gpus=f"{ranks}xH200")
    assert ring_transfer(gathered, backward, 1.0) == pytest.approx(LATENCY_S)  # local keys are left for then
    short = job_of("data.seq_len=64K", gpus=f"{ranks}xH200", document=tokens // ranks)
    assert ring_transfer(short, backward, 0.0) == 0.0
    window = replace(backward, detail=Mask(window=101))
    assert ring_transfer(job, window, 1.0) == pytest.approx(LATENCY_S + 200 * 2 * 4 * 64 * 2 / NEAR)


def test_keys_cross_between_machines_once_over_all_links():
    job = job_of("data.seq_len=64K", gpus="16xH200")
    one = 2**16 / 16 * 2 * 4 * 64 * 2
    backward = replace(call_of("softmax", Mask()), backward=True)
    assert ring_transfer(job, backward, 1.0) == pytest.approx(LATENCY_S + one / NEAR + one / CROSS / 8)


def test_heads_are_exchanged_there_and_back_and_again_where_layers_are_recomputed():
    settings = "model.pattern=[softmax]", "model.num_heads=4", "model.num_kv_heads=2", "parallel.softmax=ulysses"

    def arrives(*more, gpus="4xH200", tokens=2**14):
        stages = [s for s in job_of(f"data.seq_len={tokens}", *settings, *more, gpus=gpus).measure().stages if s.calls]
        assert {s.exchanges for s in stages if not s.backward} == {2} and len(stages) == 8
        return {s.backward: (s.exchanged, s.crossed) for s in stages}

    # One of four heads of the tokens of three others, its keys and its values, repeated for them; then the output.
    one = 3 * 2**12 * (3 + 1) * 64 * 2
    assert arrives() == {False: (one, 0), True: (one, 0)}
    assert arrives("train.checkpointing=full") == {False: (one, 0), True: (2 * one, 0)}
    pairs = "model.num_heads=16", "model.head_dim=64", "model.num_kv_heads=16"
    one = 2**12 * (3 + 1) * 64 * 2
    assert arrives(*pairs, gpus="16xH200", tokens=2**16) == {back: (7 * one, 8 * one) for back in (False, True)}
    assert arrives(*pairs, "parallel.softmax=usp", gpus="16xH200", tokens=2**16)[False] == (14 * one, 0)


def test_ranks_that_exchange_heads_have_a_ring_of_the_others():
    """With usp over machines by one link each, in as many steps as there are other machines; with ulysses there is
    none. Tokens of a plan move where its layout is another, here for a window."""
    job = job_of("data.seq_len=64K", "parallel.softmax=usp", "model.num_heads=8", gpus="16xH200")
    one = 2**16 / 16 * 2 * 4 * 64 * 2 * (1 / NEAR + 1 / CROSS)
    backward = replace(call_of("softmax", Mask()), backward=True)
    assert ring_transfer(job, backward, 1.0) == pytest.approx(LATENCY_S + one)
    assert ring_transfer(job, backward, 0.0) == pytest.approx(LATENCY_S + 2 * one)
    assert ring_transfer(job_of("data.seq_len=64K", "parallel.softmax=ulysses"), backward, 0.0) == 0.0
    ring, planned = (job_of("data.seq_len=64K", f"parallel.softmax={name}") for name in ("ring", "hybrid"))
    assert ring_transfer(planned, backward, 0.0) == pytest.approx(ring_transfer(ring, backward, 0.0))
    cut = job_of("data.seq_len=64K", "parallel.softmax=hybrid", "parallel.layout=contiguous", "model.pattern=[softmax]")
    half = 2**15 / 2 * (4 + 2 * 4 + 4) * 64 * 2  # tokens of the second rank that it gets, and gives
    assert {s.exchanged for s in cut.measure().stages if s.calls} == {half}


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_rank_with_most_pairs_is_counted(ranks):
    """Cut in a row a causal document leaves the last rank nearly twice the mean; states come of one part of each."""

    def found(layout, *settings):
        job = job_of("data.seq_len=64K", f"parallel.layout={layout}", *settings, gpus=f"{ranks}xH200")
        calls = {c.kind: c for stage in job.measure().stages for c in stage.calls if not c.backward}
        return job, {kind: call_seconds(job, call) for kind, call in calls.items()}

    (balanced, even), (cut, uneven) = found("auto"), found("contiguous")
    assert uneven["softmax"] == pytest.approx((2 - 1 / ranks) * even["softmax"], rel=1e-3)
    assert uneven["linear"] == even["linear"]
    assert found("contiguous", "parallel.softmax=usp")[1]["softmax"] == pytest.approx(even["softmax"], rel=1e-3)
    states = [state_transfer(job, call_of("linear", "none"), 1.0) - LATENCY_S for job in (balanced, cut)]
    assert states == pytest.approx([2 * states[1], (ranks - 1) * 4 * 64 * 64 * 4 / NEAR])


def test_requests_wait_for_flags_and_means():
    job = job_of("model.pattern=[llsa]", "data.seq_len=64K", "parallel.peer_memory=off")
    (call,) = {c for stage in job.measure().stages for c in stage.calls if not c.backward}
    assert 0 < call.asked < 2**15
    row = 2 * 4 * 64 * 2 / NEAR
    means = 2**15 * (1 / 16 + 1 / 256) * row  # of the other rank, of two levels
    assert request_transfer(job, call, 1.0) == pytest.approx(3 * LATENCY_S + means)
    assert request_transfer(job, call, 0.0) == pytest.approx(3 * LATENCY_S + means + call.asked * row)
    assert request_transfer(job, replace(call, backward=True), 1.0) == pytest.approx(LATENCY_S)
    ring = job_of("model.pattern=[llsa]", "data.seq_len=64K", "parallel.sparse=ring").measure()
    assert not any(c.asked for stage in ring.stages for c in stage.calls)
    waits = [stage.block for stage in job.measure().stages if stage.waits]
    assert waits == [0, 1, 2, 3] and not any(stage.waits for stage in ring.stages)
    # Through shared memory no host waits, and 24 of 132 processors move blocks.
    shared = job_of("model.pattern=[llsa]", "data.seq_len=64K").measure()
    (through,) = {c for stage in shared.stages for c in stage.calls if not c.backward}
    assert through.window and through.asked == call.asked and not any(stage.waits for stage in shared.stages)
    lent = call.asked * row * 24 / 132
    assert request_transfer(job, through, 1.0) == pytest.approx(3 * LATENCY_S + means + lent)


def test_softmax_attention_takes_as_long_as_its_back_end():
    heads = "model.hidden_size=256", "model.num_heads=2", "model.pattern=[softmax]"

    def seconds(*settings, gpus="2xH200", **options):
        job = job_of(*heads, *settings, gpus=gpus, **options)
        return {c.backward: call_seconds(job, c) for stage in job.measure().stages for c in stage.calls}

    fastest, cudnn = seconds(), seconds("parallel.backend=cudnn")
    assert cudnn[False] / fastest[False] == pytest.approx(1 / 0.95)
    assert cudnn[True] / fastest[True] == pytest.approx(1 / 0.86)
    assert seconds(extras=extras_of({"flash-attn-4": None})) == cudnn
    assert seconds(extras=extras_of({"flash-attn-4": "4.0"})) == fastest
    assert seconds("parallel.backend=fa4", extras=()) == fastest
    assert seconds("parallel.backend=cudnn", gpus="2xA100") == seconds(gpus="2xA100")


@pytest.mark.parametrize(
    "head_dim, gpus, extras, backend",
    [
        (128, "2xH200", ("fa4", "cudnn_ragged"), "fa4"),
        (256, "2xH200", ("cudnn_ragged",), "cudnn_ragged"),
        (80, "2xH200", ("fa4",), "cudnn"),  # of whose gradients FlashAttention-4 gets some wrong
        (80, "2xB200", ("fa4",), "fa4"),
        (128, "2xA100", ("fa4", "cudnn_ragged"), "cudnn"),
        (160, "2xA100", ("fa4",), "flash"),
    ],
)
def test_the_first_back_end_that_takes_the_heads(head_dim, gpus, extras, backend):
    settings = "model.pattern=[softmax]", f"model.head_dim={head_dim}"
    assert job_of(*settings, gpus=gpus, extras=extras).backend == backend
    repeats = job_of(*settings, "train.deterministic=true", gpus=gpus, extras=extras).backend
    assert repeats == (backend if backend == "fa4" else "flash")


@pytest.mark.parametrize(
    "head_dim, gpus, reason",
    [(80, "2xH200", "gets gradients wrong for heads of 80"), (128, "2xA100", "needs a Hopper")],
)
def test_a_back_end_that_does_not_take_the_heads_is_refused(head_dim, gpus, reason):
    with pytest.raises(UserError, match=f"^parallel.backend=fa4 {reason}.*: use auto$"):
        job_of("model.pattern=[softmax]", f"model.head_dim={head_dim}", "parallel.backend=fa4", gpus=gpus)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("length", [1, 15, 64, 101])
def test_pairs_with_all_of_the_last_level(length, levels, causal):
    size, selection = 4**levels, Hierarchical(4, 2, levels)
    last = [(row * size, min(length, row * size + size)) for row in range(-(-length // size))]
    seen = sum(not causal or begin + size <= token - token % size for token in range(length) for begin, _ in last)
    assert selection.pairs_above(length, causal) == seen <= selection.pairs(length, causal)


def test_blocks_are_packed_and_added_by_request():
    job = job_of("model.pattern=[llsa]", "data.seq_len=64K")
    calls = {c.backward: c for stage in job.measure().stages for c in stage.calls}
    own = 2**15 * 2 * 4 * 64 * 2  # keys and values of a rank
    for backward, times in ((False, 4), (True, 3)):
        alone = call_seconds(job, replace(calls[backward], asked=None))
        assert call_seconds(job, calls[backward]) - alone == pytest.approx(times * own / 4.27e12)


@pytest.mark.parametrize("case, keep", [("llsa2", "llsa_levels=2"), ("llsa3", "llsa_levels=3")])
def test_layers_over_two_ranks_take_as_long_as_measured(case, keep):
    """What a call takes longer than alone, forward and backward, with 256K tokens, 16 heads and 4 of keys: a third to
    twice. Kernels with half of the queries are slower besides, which is not planned."""
    rows = json.loads((RESULTS / "sparse_ranks_2xH200_variants.json").read_text())["rows"]
    variants = {"peers": "auto", "nccl": "off"}
    for row in rows:
        if row["case"] == case and row["variant"] in variants:
            settings = "model.hidden_size=2048", "model.num_heads=16", "model.num_kv_heads=4", f"model.{keep}"
            shared = f"parallel.peer_memory={variants[row['variant']]}"
            job = job_of("model.pattern=[llsa]", "data.seq_len=256K", "model.num_layers=1", shared, *settings)
            planned = 0.0
            for stage in job.measure().stages:
                for call in stage.calls:
                    seconds = call_seconds(job, call)
                    alone = call_seconds(job, replace(call, asked=None))
                    planned += seconds - alone + request_transfer(job, call, seconds)
            measured = row["exposed_ms"]["forward+backward"] / 1000
            assert measured / 3 < planned < 2 * measured, (row["variant"], planned, measured)


@pytest.mark.parametrize("kind", ["softmax", "llsa"])  # of llsa a block's forward is two stages
def test_copies_of_sharding_by_hand(kind):
    job = job_of("data.seq_len=16K", f"model.pattern=[{kind}]")
    measured = job.measure()
    blocks, root = sum(measured.block_parameters), measured.root_parameters
    # Read in fp32 and written in bf16, packed, unpacked; gradients read in bf16 and written in fp32.
    gathered, reduced = (4 + 2 + 2 + 2) / 2 + (2 + 2), 2 + 4
    size = blocks * (2 * gathered + reduced) + root * (gathered + reduced)
    assert step_seconds(job, measured)[COPIES] == pytest.approx(size / (0.55 * 4.27e12))
    twice = step_seconds(job.with_settings(train={"global_batch": 2}), measured)
    assert twice[COPIES] == pytest.approx(2 * size / (0.55 * 4.27e12))


def test_parameters_travel_by_shards_copies_and_from_host_memory():
    def moved(*settings, gpus="2xH200"):
        return pytest.approx(per_parameter(job_of(*settings, gpus=gpus)))

    assert moved() == (2 / 2 / NEAR, 4 / 2 / NEAR, 0)
    assert moved("train.reduce_dtype=bfloat16") == (1 / NEAR, 1 / NEAR, 0)
    assert moved(gpus="1xH200") == (0, 0, 0)
    # Sums of 8 GPUs' gradients cross a ring twice, but for the rank's own.
    assert moved("parallel.engine=ddp", gpus="8xH200") == (0, 0, 2 * 4 * 7 / 8 / NEAR)
    hsdp = moved("parallel.sharding=hsdp", gpus="32xH200")
    assert hsdp == (2 * 7 / 8 / NEAR, 4 * 7 / 8 / NEAR, 2 * 4 * 3 / 4 / 8 / CROSS)
    # Between machines over the links of all eight, which are more than NVLink gives one.
    assert moved(gpus="16xH200") == (2 * 15 / 16 / NEAR, 4 * 15 / 16 / NEAR, 0)
    assert moved("optim.offload=cpu") == (1 / NEAR + 4 / 2 / 50e9, 2 / NEAR + 4 / 2 / 50e9, 0)


def test_the_host_updates_in_one_thread_of_each_rank():
    away, count = job_of("optim.offload=cpu", "data.seq_len=16K"), job_of().measure().num_parameters
    assert estimate(away).seconds["optimizer"] == pytest.approx(40 * count / 2 / 9e9)
    assert any("OMP_NUM_THREADS" in note for note in estimate(away).notes)


def test_what_layers_keep_crosses_beside_either_pass():
    job = job_of("data.seq_len=48K", "train.checkpointing=full", "train.offload_activations=true")
    measured, passes = job.measure(), [1.0, 3.0]
    # Of four blocks the input, of one the result of attention (its sums per query are too few to be put away).
    assert sum(measured.put_away) == 5 * 24 * 2**10 * 256 * 2
    measured = replace(measured, put_away=(int(4 * 50e9),))
    assert activations_exposed(measured, *passes) == pytest.approx(3 + 1)
    assert activations_exposed(measured, *passes[::-1]) == pytest.approx(1 + 3)
    assert activations_exposed(measured, 9.0, 1.0) == pytest.approx(3)


def test_exposed_communication_of_long_steps_by_hand():
    """Two ranks that share a long document: keys of every softmax layer, in groups of heads, and four transfers of
    parameters."""
    job = job_of("model.pattern=[softmax]", "data.seq_len=1M", "train.checkpointing=full")
    measured = job.measure()
    block, root = measured.block_parameters[0], measured.root_parameters
    assert job.head_groups == 8
    keys = 4 * (8 * 2 * LATENCY_S + 2**19 * 2 * 4 * 64 * 2 / NEAR)
    first = root * 2 / 2 / NEAR + LATENCY_S
    again = block * 2 / 2 / NEAR + LATENCY_S  # of the last block, backward
    last = root * 4 / 2 / NEAR + LATENCY_S
    least = keys + first + last + 2 * LATENCY_S  # sums of losses and of the norm
    block_last = block * 4 / 2 / NEAR + LATENCY_S
    found = step_seconds(job, measured)[EXPOSED]
    assert least < found < least + 2 * again + block_last


def test_states_do_not_travel_again_where_layers_are_recomputed():
    shown = [
        estimate(job_of("model.pattern=[linear]", "data.seq_len=1M", f"train.checkpointing={mode}")).seconds[EXPOSED]
        for mode in ("none", "full")
    ]
    assert shown[0] == pytest.approx(shown[1], abs=LATENCY_S)  # of four layers


def test_the_host_is_what_short_steps_take():
    job = job_of("data.seq_len=1K", gpus="H200")
    measured = job.measure()
    found = estimate(job)
    host = LAUNCH_S * (measured.launches + 8 * sum(sum(stage.calls.values()) for stage in measured.stages))
    host += 4 * 2 * BLOCK_S
    computing = sum(sum(compute_seconds(job, stage).values()) for stage in measured.stages)
    assert found.seconds[WAITING] > 0.8 * host > computing and EXPOSED not in found.seconds
    assert found.step_s == pytest.approx(host, rel=0.02) and any("the host" in note for note in found.notes)
    long = estimate(job_of("data.seq_len=1M", gpus="H200"))
    assert WAITING not in long.seconds and not any("the host" in note for note in long.notes)


def test_plans_show_no_more_communication_than_measured_steps_have_room_for():
    """The third step of a run: what it took above what the profile of the second saw computed. The second itself was
    longer by what starts once."""
    runs, _ = read([RESULTS / "runs_2xH200.json"])
    left = {}
    for run in runs:
        ((_, rows),) = plan(summarize(run, 2)).components.items()
        computed = sum(measured for name, measured, _ in rows if name not in (EXPOSED, IDLE, DATA))
        planned = sum(planned for name, _, planned in rows if name in (EXPOSED, IDLE))
        left[run.name] = planned, run.rows[2]["step_time_s"] - computed
    assert len(left) == 4 and all(0 < planned < measured < 0.07 for planned, measured in left.values())
    keys = [x - y for x, y in zip(left["runs_2xH200/h512K"], left["runs_2xH200/l512K"], strict=True)]
    assert keys[0] == pytest.approx(keys[1], rel=0.35)  # of softmax layers, which the other has not


def test_short_steps_are_as_long_as_their_hosts_took():
    """300 steps of 16K tokens on one H200, of which no kernel is long."""
    runs, _ = read([RESULTS / "loss_parity_sparse_H200.json"])
    assert len(runs) == 4
    for run in runs:
        found = summarize(run, 2)
        assert plan(found).step_s == pytest.approx(found.medians["step_time_s"], rel=0.15), run.name
