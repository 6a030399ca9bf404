"""Kernels compile for Hopper, fit it, and the assembler has not left out half of what it wrote. No GPU is needed."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import absent_gpu
import pytest

pytest.importorskip("triton", reason="Triton is not installed")
REST = [("bfloat16", width) for width in ("16", "32", "64", "128", "256", "16,32", "16,64", "32,64", "64,16")]
REST += [("float32", width) for width in ("16", "64", "128")]


def compiled(cache, *words):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, absent_gpu.__file__, *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, env=environment | {"TRITON_CACHE_DIR": str(cache)}
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(kernels):
    names = {kernel["name"] for kernel in kernels}
    assert {"sweep_kernel", "reverse_kernel", "gate_kernel", "inputs_kernel", "gradients_kernel"} <= names
    for kernel in kernels:
        assert kernel["shared"] <= absent_gpu.SHARED_LIMIT, kernel
        assert not kernel["undefined"], kernel


@pytest.mark.slow  # a minute; those of the two below are compiled in any case
def test_kernels_compile(tmp_path):
    """Of the widest heads that both linear and sparse attention take: what needs most shared memory."""
    kernels = compiled(tmp_path, "--few", "bfloat16", "128")
    check(kernels)
    names = {kernel["name"] for kernel in kernels}
    assert {"forward_kernel", "queries_kernel", "keys_kernel", "add_kernel"} <= names
    assert {"kda_prepare_kernel", "kda_gradients_kernel"} <= names


def test_kernels_that_choose_blocks_compile(tmp_path):
    kernels = compiled(tmp_path, "choosing", "64")
    wanted = ["top", "top_few", "pool", "levels", "spread", "descend", "blocks_below"]
    wanted += ["list_rows", "mark_rows", "scan_columns", "list_columns", "scan", "place", "order"]
    wanted += ["ask", "count", "locate", "rename", "pack", "add_packed"]
    assert {f"{name}_kernel" for name in wanted} <= {kernel["name"] for kernel in kernels}
    for kernel in kernels:
        assert kernel["shared"] <= absent_gpu.SHARED_LIMIT and not kernel["undefined"], kernel


def test_kernels_of_a_layer_compile_without_spills(tmp_path):
    kernels = compiled(tmp_path, "layer", "8192")
    names = ["norm_kernel", "norm_backward_kernel", "rotate_kernel", "norm_rotate_backward_kernel", "scores_kernel"]
    names += ["channel_gate_kernel", "channel_gate_backward_kernel", "elu1_kernel", "gradient_kernel"]
    names += ["scalar_gate_kernel", "scalar_gate_backward_kernel", "sum_rows_kernel", "segment_sums_kernel"]
    assert {*names, "swiglu_kernel", "swiglu_backward_kernel"} <= {kernel["name"] for kernel in kernels}
    for kernel in kernels:
        assert not kernel["spills"] and not kernel["undefined"], kernel


def test_kernels_of_shared_memory_keep_their_order(tmp_path):
    """Flags are seen and set for the whole system; nothing of a window is read before, or written after, by any thread,
    nor read through caches that do not see what others write."""
    seen, flag, read = "LDG.E.STRONG.SYS", "ATOMG.E.EXCH.STRONG.SYS", re.compile(r"LDG\S*STRONG\.GPU")
    kernels, names = compiled(tmp_path, "peers", "128"), []
    for kernel in kernels:
        order, name = kernel["order"], kernel["name"]
        names.append(name)
        assert not any("CONSTANT" in x for x in order), kernel  # of memory that nobody writes to
        if name in ("peer_push_kernel", "peer_collect_kernel", "peer_wait_kernel"):
            met = order.index(seen)
            assert order[met + 1].startswith("BAR"), kernel
            assert not any(x.startswith("STG") or read.match(x) for x in order[:met]), kernel
        if name in ("peer_push_kernel", "peer_collect_kernel", "peer_signal_kernel"):
            ready = order.index(flag)
            assert order[ready - 1].startswith("MEMBAR") and order[ready - 1].endswith("SYS"), kernel
            assert order[ready + 1 :] == ["STG.E"], kernel  # the count of launches
            if name != "peer_signal_kernel":  # all threads have written what the one with the flag speaks for
                met = max(n for n in range(ready) if order[n].startswith("BAR"))
                assert not any(x.startswith("STG") for x in order[met:ready]), kernel
        if name in ("peer_push_kernel", "peer_collect_kernel"):
            assert any(map(read.match, order)), kernel
    assert {f"peer_{name}_kernel" for name in ("push", "collect", "signal", "wait", "blocks")} <= set(names)
    pulls = [any(map(read.match, kernel["order"])) for kernel in kernels if kernel["name"] == "peer_blocks_kernel"]
    assert sorted(pulls) == [False, True]  # gradients, which this GPU made, and keys
    assert "clear_behind_kernel" in names


@pytest.mark.slow
def test_kernels_for_hopper_compile(tmp_path):
    """And their products overlap with the rest: the assembler does not wait for each."""
    kernels = compiled(tmp_path, "hopper", "64", "128")
    names = {kernel["name"] for kernel in kernels}
    assert {"forward_kernel", "queries_kernel", "keys_kernel", "rows_kernel"} <= names  # sparse attention
    assert {"backward_kernel", "delta_reverse_kernel"} <= names  # the delta rule
    assert {"hopper_kda_prepare_kernel", "hopper_kda_gradients_kernel"} <= names
    assert {"hopper_sum_kernel", "hopper_sweep_kernel", "hopper_reverse_kernel"} <= names  # decays per head
    assert {"hopper_at_once_kernel", "hopper_reverse_at_once_kernel"} <= names
    for kernel in kernels:
        assert kernel["shared"] <= absent_gpu.SHARED_LIMIT and not kernel["undefined"], kernel
        assert not kernel["serialized"] and not kernel["overwritten"], kernel


@pytest.mark.gpu
@pytest.mark.slow  # minutes, and what matters is the assembler that comes with the GPU machine's Triton
@pytest.mark.parametrize(("dtype", "width"), REST)
def test_all_widths_compile(dtype, width, tmp_path):
    check(compiled(tmp_path, dtype, width))


def test_undefined_registers_are_found():
    sass = """
        /*0010*/                   ULDC.64 UR4, c[0x0][0x208] ;
        /*0020*/                   UMOV UR8, 0x400 ;
        /*0030*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0040*/              @!UP0 UIADD3 UR9, UR8, UR17, URZ ;
        /*0050*/                   HGMMA.64x64x16.F32 R24, R60, gdesc[UR20].tnspB, R24 ;
        /*0060*/                   UMOV UR22, UR8 ;
        /*0070*/                   HGMMA.64x32x16.F32 R24, gdesc[UR20].tnspA.tnspB, RZ, !UPT ;
        /*0080*/                   UMOV UR20, UR9 ;
    """
    assert sorted(absent_gpu.undefined_registers(sass)) == ["UR17", "UR21", "UR23"]


def test_overwritten_operands_are_found():
    sass = """
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R88, R32, gdesc[UR20].tnspB, RZ, !UPT ;
        /*0020*/                   STG.E.64 desc[UR4][R2.64], R34 ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R88, R40, gdesc[UR4].tnspB, R88, gsb0 ;
        /*0040*/              @!P0 IMAD.MOV.U32 R33, RZ, RZ, 0x3f803f80 ;
        /*0050*/                   IADD3 R36, R42, R32, RZ ;
        /*0060*/                   LDS.64 R42, [R2] ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/                   IADD3 R32, R42, R36, RZ ;
    """
    assert sorted(absent_gpu.overwritten_operands(sass)) == ["R33", "R42", "R43"]


def test_an_old_ptxas_is_not_used(monkeypatch):
    from longspan.kernels import compiler

    def with_versions(default, newer, driver=None):
        tools = {"ptxas": (default, "/default"), "ptxas_blackwell": (newer, "/newer")}
        tools = {name: SimpleNamespace(version=version, path=path) for name, (version, path) in tools.items()}
        knobs = SimpleNamespace(runtime=SimpleNamespace(interpret=False), nvidia=SimpleNamespace(**tools))
        monkeypatch.setattr(compiler, "knobs", knobs)
        monkeypatch.setattr(compiler, "_driver_version", lambda: driver)
        compiler.require_ptxas()
        return os.environ.get("TRITON_PTXAS_PATH")

    monkeypatch.setenv("TRITON_PTXAS_PATH", "")  # so that whatever is set below is undone
    monkeypatch.delenv("TRITON_PTXAS_PATH")
    assert with_versions("13.0", "12.9") is None
    for versions in [("12.8", "12.8"), ("12.8", "13.1", (12, 8))]:
        with pytest.raises(RuntimeError, match="name a ptxas 12.9 in TRITON_PTXAS_PATH"):
            with_versions(*versions)
    assert with_versions("12.8", "13.1", (13, 0)) == "/newer"
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/mine")
    with pytest.raises(RuntimeError, match="TRITON_PTXAS_PATH=/mine is no ptxas 12.9 or newer; unset it"):
        with_versions("12.8", "12.9")
    assert with_versions("12.10", "12.9") == "/mine"


def test_the_driver_says_what_it_runs(monkeypatch):
    from longspan.kernels import compiler

    class Driver:
        def __init__(self, name):
            assert name == "libcuda.so.1"

        def cuDriverGetVersion(self, version):
            version._obj.value = 12080
            return 0

    monkeypatch.setattr(compiler.ctypes, "CDLL", Driver)
    assert compiler._driver_version() == (12, 8)
    monkeypatch.setattr(Driver, "cuDriverGetVersion", lambda self, version: 100)  # no device
    assert compiler._driver_version() is None
    monkeypatch.setattr(compiler.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    assert compiler._driver_version() is None


def test_a_ptxas_that_does_not_run_is_named(monkeypatch, tmp_path):
    from longspan.kernels import compiler

    monkeypatch.setattr(compiler.knobs.runtime, "interpret", False)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tmp_path))  # a folder
    with pytest.raises(RuntimeError, match=f"TRITON_PTXAS_PATH={tmp_path} is no ptxas 12.9 or newer"):
        compiler.require_ptxas()
