"""No, fixed and scalar decay by their sweeps for Hopper, emulated, against the recurrence in fp64."""

import forms
import gluon_emulator
import poison
import pytest
import torch

from longspan.kernels.linear.form import Spans
from longspan.kernels.linear.splits import Splits

MODULES = "sweep", "sweep_reverse", "sweep_sum", "at_once"
SPANS = Spans((0, 1, 2, 66, 67, 690), (1, 3, 4), (3, 4), (1, 3))


@pytest.fixture(scope="module")
def emulated():
    pytest.importorskip("triton", reason="Triton is not installed")
    names = [f"longspan.kernels.linear.hopper.{name}" for name in ("tiles", "decays", "flags", "chain", *MODULES)]
    modules = gluon_emulator.load("longspan.kernels.sparse.hopper.tiles", *names)
    return dict(zip(("chain", *MODULES), modules[4:], strict=True))


@pytest.fixture
def launched(emulated, monkeypatch):
    """Which of the kernels for Hopper, emulated, have run; all others are interpreted."""
    from longspan.kernels.linear import hopper
    from longspan.kernels.sparse import hopper as sparse_hopper

    def recording(name, launch):
        return lambda *args, **options: names.append(name) or launch(*args, **options)

    names = []
    monkeypatch.setattr(sparse_hopper, "on_hopper", lambda x: True)
    monkeypatch.setattr(emulated["sweep_sum"], "STAGES", 3)  # fewer than chunks
    monkeypatch.setattr(emulated["at_once"], "SUM_STAGES", 3)
    for name in MODULES:
        module = emulated[name]
        monkeypatch.setattr(module, "launch", recording(name, module.launch))
        monkeypatch.setattr(hopper, name, module, raising=False)
    reverse = emulated["at_once"].launch_reverse
    monkeypatch.setattr(emulated["at_once"], "launch_reverse", recording("reverse_at_once", reverse))
    return names


def run(given):
    from longspan.kernels.linear.fused import Fused

    return forms.run_form(Fused, Splits.of(SPANS, 384, 64), *given, 0.3)


@pytest.mark.parametrize("decay", [None, "fixed", "fixed_closed", "medium", "weak", "strong", "spiky", "closed"])
def test_equals_the_recurrence(launched, decay):
    given = forms.random_inputs(SPANS, 1, 128, 128, decay, 0, dtype=torch.bfloat16)
    found = run(given)
    assert launched == ["sweep_sum", "sweep", "sweep_sum", "sweep", "sweep_reverse"]
    wanted = forms.expected(SPANS, *given, 0.3)
    forms.assert_within(forms.errors(found, wanted), dict.fromkeys(wanted, 5e-3))


def test_documents_do_not_see_each_other(launched):
    """TMA fetches what lies beyond the end of a document with its last chunk."""
    inputs, entry, d_out, exit_grad = forms.random_inputs(SPANS, 1, 128, 128, "medium", 0, dtype=torch.bfloat16)
    clean = run((inputs, entry, d_out, exit_grad))
    poison = {name: x if x is None else x.clone() for name, x in inputs.items()} | {"d_out": d_out.clone()}
    for x in poison.values():
        if x is not None:
            x[67:] = torch.nan  # the last document
    poisoned = run((poison, entry, poison.pop("d_out"), exit_grad))
    for name in ("out", "dq", "dk", "dv", "dlog_decay"):
        assert torch.equal(clean[name][:67], poisoned[name][:67]), name
    for name in ("state", "d_state"):
        assert torch.equal(clean[name][:2], poisoned[name][:2]), name


def test_heads_and_strides(launched, monkeypatch):
    """Several heads, whose tokens lie apart, and every kernel beside those of Triton."""
    from longspan.kernels.linear.fused import Fused
    from longspan.kernels.sparse import hopper

    spans = Spans((0, 70, 80), (0,), (0,), (0,))
    inputs, *states = forms.random_inputs(spans, 2, 128, 128, "medium", 0, dtype=torch.bfloat16)
    wide = torch.zeros(80, 2, 3 * 128, dtype=torch.bfloat16)
    for n, name in enumerate("qkv"):  # heads apart, so that descriptors take a copy
        wide[:, :, n * 128 : (n + 1) * 128] = inputs[name]
        inputs[name] = wide[:, :, n * 128 : (n + 1) * 128]
    tables = Splits.of(spans, 64, 64)
    found = forms.run_form(Fused, tables, inputs, *states, 0.3)
    monkeypatch.setattr(hopper, "on_hopper", lambda x: False)
    launched.clear()
    others = forms.run_form(Fused, tables, inputs, *states, 0.3)
    assert not launched
    for name, x in others.items():
        if x is not None:
            assert (found[name] - x).norm() <= 4e-3 * x.norm().clamp(min=1e-3), name


@pytest.mark.parametrize("slopes, most", [((-3.0, 0.0, -3.0), False), ((-3.0, -0.2, 0.0), True), ((-0.1,), True)])
def test_a_head_that_remembers_more_is_summed_in_parts(emulated, launched, monkeypatch, slopes, most):
    """By the programs of other heads; `most`: every head in as many as there may be."""
    module, parts = emulated["sweep_sum"], []
    monkeypatch.setattr(module, "MIN_PART", 1)
    if most:
        monkeypatch.setattr(module, "_num_parts", lambda kept, mean, PARTS: kept.clamp(max=PARTS))
    launch = module.launch
    monkeypatch.setattr(module, "launch", lambda *args, **options: parts.append(args[7]) or launch(*args, **options))
    spans = Spans((0, 70, 550), (1,), (1,), (1,))
    inputs, *states = forms.random_inputs(spans, len(slopes), 128, 128, "fixed", 0, dtype=torch.bfloat16)
    inputs["log_decay"] = torch.tensor(slopes)
    found = forms.run_form(_fused(), Splits.of(spans, 256, 64), inputs, *states, 0.3)
    for counts in parts:
        assert counts.tolist() == [[4] if len(slopes) == 1 else [2, 4, 4] if most else [1, 2, 1]] * 2
    wanted = forms.expected(spans, inputs, *states, 0.3)
    forms.assert_within(forms.errors(found, wanted), dict.fromkeys(wanted, 5e-3))


def test_the_first_chunk_may_be_done_with_before_the_warp_that_fetches_begins(emulated, launched, monkeypatch):
    """It is sent before warps part."""
    module = emulated["sweep_sum"]
    fetch = module._fetch

    def late(place, feed, tiles_of, *sizes):
        _, _, _, _, _, free, _ = tiles_of
        free.index(0).memory.wait(0)  # both warpgroups have freed its place
        fetch(place, feed, tiles_of, *sizes)

    monkeypatch.setattr(module, "_fetch", late)
    monkeypatch.setattr(gluon_emulator, "SECONDS", 2.0)
    spans = Spans((0, 50), (0,), (0,), (0,))
    given = forms.random_inputs(spans, 1, 128, 128, None, 0, dtype=torch.bfloat16)
    found = forms.run_form(_fused(), Splits.of(spans, 64, 64), *given, 0.3)
    wanted = forms.expected(spans, *given, 0.3)
    forms.assert_within(forms.errors(found, wanted), dict.fromkeys(wanted, 5e-3))


ALONE = Spans((0, 1, 2, 66, 67, 690, 755))  # of 1, 1, 1, 1, 10 and 2 splits of a chunk


@pytest.mark.parametrize("decay", [0.0, -0.01, "medium", "weak", "strong", "spiky", "closed"])
def test_one_launch_each_way(launched, monkeypatch, decay):
    """Where nothing travels. Programs run one after another, so that none can wait for a later one."""
    monkeypatch.setattr(gluon_emulator, "SECONDS", 2.0)
    same = isinstance(decay, float)  # of -0.01 half of a state is left after a split
    given = forms.random_inputs(ALONE, 1, 128, 128, "medium" if same else decay, 0, dtype=torch.bfloat16)
    if same:
        given[0]["log_decay"].fill_(decay)
    undo = poison.install()
    try:
        found = forms.run_form(_fused(), Splits.of(ALONE, 64, 64), *given, 0.3, states_travel=False)
    finally:
        undo()
    assert launched == ["at_once", "sweep", "reverse_at_once"]
    wanted = forms.expected(ALONE, *given, 0.3)
    forms.assert_within(forms.errors(found, wanted), dict.fromkeys(wanted, 5e-3))


def test_one_launch_does_what_three_do(emulated, launched, monkeypatch):
    """With heads that remember none, one and all of 8 splits, and four programs at work."""
    from longspan.kernels.linear import hopper

    monkeypatch.setattr(gluon_emulator, "TOGETHER", 4)
    spans = Spans((0, 70, 1900))
    inputs, *states = forms.random_inputs(spans, 4, 128, 128, "medium", 0, dtype=torch.bfloat16)
    inputs["log_decay"] *= torch.tensor([5.0, 1.2, 0.025, 10.0])
    tables = Splits.of(spans, 256, 64)
    module, waits = emulated["chain"], []
    wait_for = module.wait_for
    monkeypatch.setattr(module, "wait_for", lambda flags, index: waits.append(int(index)) or wait_for(flags, index))
    found = forms.run_form(_fused(), tables, inputs, *states, 0.3, states_travel=False)
    assert launched == ["at_once", "sweep", "reverse_at_once"]
    waits_of_heads = [sum(index % 4 == head for index in waits) for head in range(4)]
    assert waits_of_heads == [4 * 7, 4 * 10, 4 * 12, 4 * 7]  # of two warpgroups each way
    launched.clear()
    monkeypatch.setattr(hopper, "takes_at_once", lambda call, name: False)
    others = forms.run_form(_fused(), tables, inputs, *states, 0.3, states_travel=False)
    assert launched == ["sweep_sum", "sweep", "sweep_sum", "sweep", "sweep_reverse"]
    wanted = forms.expected(spans, inputs, *states, 0.3)
    forms.assert_within(forms.errors(found, wanted), dict.fromkeys(wanted, 5e-3))
    for name in wanted:  # sums of sums are rounded, and then, to 16 bits, states: in one product of some
        assert (found[name].float() - others[name].float()).norm() <= 1e-3 * others[name].float().norm(), name


@pytest.mark.parametrize("decay, waits", [(-3.0, 8), (-0.3, 11), (0.0, 13)])
def test_programs_wait_for_what_is_remembered(emulated, launched, monkeypatch, decay, waits):
    """One node where a split forgets, at most two where two do, else one for each one in the binary number of a split:
    for 0 to 8 these are 13. Nothing beyond is read."""
    chain, seen = emulated["chain"], []
    wait_for = chain.wait_for
    monkeypatch.setattr(chain, "wait_for", lambda flags, index: seen.append(index) or wait_for(flags, index))
    spans = Spans((0, 9 * 64))
    inputs, entry, *_ = forms.random_inputs(spans, 1, 128, 128, "medium", 0, dtype=torch.bfloat16)
    inputs["log_decay"].fill_(decay)
    if decay < -1:
        inputs["v"][:64] = torch.nan
    work = _fused()(Splits.of(spans, 64, 64), *inputs.values(), 0.3)
    work.ahead()
    out, _ = work.output(entry, torch.bfloat16)
    assert len(seen) == 2 * waits  # of two warpgroups
    assert out[128:].isfinite().all()


def test_flags_serve_launch_after_launch(emulated, launched, monkeypatch):
    """Flags of launches before, of other shapes, are not taken for those of this one."""
    module, words = emulated["at_once"], torch.zeros(200, dtype=torch.int32)
    monkeypatch.setattr(gluon_emulator, "SECONDS", 2.0)
    monkeypatch.setattr(module, "memory", lambda count, device: words[: count + 8])
    chain, raised = emulated["chain"], []
    raise_flag = chain.raise_flag

    def raising(flags, index):
        raised.append(words[8 + int(index)] != flags[1])
        raise_flag(flags, index)

    monkeypatch.setattr(chain, "raise_flag", raising)
    for size in (64, 128, 64):
        given = forms.random_inputs(ALONE, 1, 128, 128, "weak", 0, dtype=torch.bfloat16)
        found = forms.run_form(_fused(), Splits.of(ALONE, size, 64), *given, 0.3, states_travel=False)
        wanted = forms.expected(ALONE, *given, 0.3)
        forms.assert_within(forms.errors(found, wanted), dict.fromkeys(wanted, 5e-3))
    assert words[:2].tolist() == [6, 0] and len(raised) == 2 * 2 * (10 + 4 + 10) and all(raised)


@pytest.mark.gpu
def test_flags_are_of_a_stream_or_of_a_launch_in_a_graph():
    from longspan.kernels.linear.hopper.flags import memory

    x, side = torch.zeros(1, device="cuda"), torch.cuda.Stream()
    device = x.device
    seen = [memory(10, device)]
    assert memory(10, device).data_ptr() == seen[0].data_ptr()
    with torch.cuda.stream(side):
        seen.append(memory(10, device))
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        seen += [memory(10, device), memory(10, device)]
        x += 1
    ends = sorted((words.data_ptr(), words.data_ptr() + 4 * len(words)) for words in seen)
    assert all(stop <= start for (_, stop), (start, _) in zip(ends, ends[1:]))
    assert all(words.data_ptr() % 16 == 0 and len(words) >= 18 and not words.any() for words in seen)


def test_sums_stay_apart_where_states_travel_or_there_is_no_gate(launched):
    """Also where those of other ranks travel, and none of this one."""
    alone = Spans((0, 128))
    cases = (SPANS, "medium", False), (alone, "medium", True), (alone, None, False), (alone, "fixed", False)
    for spans, decay, travel in cases:
        given = forms.random_inputs(spans, 1, 128, 128, decay, 0, dtype=torch.bfloat16)
        forms.run_form(_fused(), Splits.of(spans, 384 if spans is SPANS else 64, 64), *given, 0.3, states_travel=travel)
    assert launched == 4 * ["sweep_sum", "sweep", "sweep_sum", "sweep", "sweep_reverse"]


def _fused():
    from longspan.kernels.linear.fused import Fused

    return Fused
