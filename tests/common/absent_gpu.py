"""Compile kernels for a Hopper GPU that is not there: `install()`, then call forms on CPU tensors; nothing is launched.

As a script it compiles what the linear forms and sparse attention launch and prints a line of JSON per kernel:

    python tests/common/absent_gpu.py DTYPE WIDTH...          # such as bfloat16 64 128, or 16,64 for K, V
    python tests/common/absent_gpu.py --few DTYPE WIDTH...    # not every kind of decay and size of blocks
    python tests/common/absent_gpu.py choosing WIDTH...       # what chooses blocks, and makes lists of them
    python tests/common/absent_gpu.py layer WIDTH...          # what a layer does beside attention, and the loss
    python tests/common/absent_gpu.py hopper WIDTH...         # what is in Gluon, bfloat16
    python tests/common/absent_gpu.py branch WIDTH...         # the linear branch beside it, bfloat16
    python tests/common/absent_gpu.py peers WIDTH...          # what goes through memory that GPUs share, in which order

A change that should not touch the code shows in neither `sass` nor `ptx`, digests of both: run it before and after with
TRITON_DISABLE_LINE_INFO=1, as the assembler goes by line numbers too. One of the two is enough: equal PTX may get its
registers in another order.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile

SHARED_LIMIT = 227 * 1024  # bytes of shared memory that a program may have on Hopper
_INSTRUCTION = re.compile(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)\s*([^;]*);")
_UNIFORM = re.compile(r"(gdesc|desc)?\[?UR(\d+)")


def install() -> list:
    """From now on kernels are compiled for compute capability 9.0 and not launched. Returns the list that they go to.
    Triton's interpreter must be off (TRITON_INTERPRET)."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from longspan.kernels.launch import Launcher

    class Absent:
        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def map_python_to_cpp_type(self, kind):
            return "int"

    driver.set_active(Absent())
    compiled, launch = [], JITFunction.run

    def run(self, *args, grid, warmup, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        if all(kernel is not other for other in compiled):
            compiled.append(kernel)
        return kernel

    JITFunction.run = run
    Launcher.__getitem__ = lambda self, grid: self.kernel[grid]
    return compiled


def disassemble(kernel) -> str:
    """The machine code of a compiled kernel as text."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def memory_order(sass: str) -> list[str]:
    """What touches global memory, in its order, with barriers; once where the same follows itself."""
    names = re.findall(r"\b((?:LDG|STG|ATOMG|REDG|MEMBAR|BAR\.SYNC)[.A-Z0-9_]*)", sass)
    return [name for name, before in zip(names, ["", *names]) if name != before]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def undefined_registers(sass: str) -> dict[str, str]:
    """{uniform register that is read and never written: the instruction that reads it}. ptxas 12.8 has made such code:
    addresses of products' operands came from it, and gradients were wrong by a few percent."""
    written, read = set(), {}
    for match in _INSTRUCTION.finditer(sass):
        operation, operands = match[1], [operand.strip() for operand in match[2].split(",")]
        wide = 2 if ".64" in operation or "WIDE" in operation else 4 if ".128" in operation else 1
        if re.fullmatch(r"UR\d+", operands[0]) and operation.startswith(
            ("U", "R2UR", "S2UR", "REDUX", "VOTEU", "LDCU")
        ):
            first = int(operands.pop(0)[2:])
            written |= set(range(first, first + wide))
        if operation == "ELECT":  # what it gives comes second
            written |= {int(number) for _, number in _UNIFORM.findall(operands.pop(1))}
        for operand in operands:
            for kind, number in _UNIFORM.findall(operand):
                first, count = int(number), 1
                if kind == "gdesc":  # descriptors of both operands, or of the second if the first is in registers
                    first, count = (first + 2, 2) if re.fullmatch(r"R\d+", operands[1]) else (first, 4)
                elif kind == "desc" or (".64" in operation and operation.startswith("U")):
                    count = 2
                for register in range(first, first + count):
                    read.setdefault(register, f"{operation} {match[2].strip()}")
    return {f"UR{register}": text for register, text in read.items() if register not in written}


def overwritten_operands(sass: str) -> dict[str, str]:
    """{register that a product under way has its first operand in, and that is set before the product has been waited
    for: the instruction that sets it}. ptxas 12.9 and 13.3 set what is constant of an operand, such as ones below a
    diagonal, only after the first of the products that read it, which takes whatever was there before."""
    reading, found = set(), {}
    for match in _INSTRUCTION.finditer(sass):
        operation, operands = match[1], [operand.strip() for operand in match[2].split(",")]
        if operation.startswith("HGMMA"):
            if first := re.fullmatch(r"R(\d+)", operands[1]):
                reading |= set(range(int(first[1]), int(first[1]) + 4))
        elif operation.startswith(("WARPGROUP.DEPBAR", "EXIT")):
            reading = set()
        elif not operation.startswith("ST") and (first := re.fullmatch(r"R(\d+)", operands[0])):
            wide = 2 if ".64" in operation or "WIDE" in operation else 4 if ".128" in operation else 1
            for register in reading & set(range(int(first[1]), int(first[1]) + wide)):
                found.setdefault(f"R{register}", f"{operation} {match[2].strip()}")
    return found


def compile_linear(dtype, sizes, few):
    """What the fused forms launch for heads of these sizes (K, V), forward and backward, with all that states do."""
    import forms

    from longspan.kernels.linear.channel import Channel
    from longspan.kernels.linear.delta import Delta
    from longspan.kernels.linear.form import Spans
    from longspan.kernels.linear.fused import Fused
    from longspan.kernels.linear.kda import KDA

    spans = Spans((0, 65, 200), (0, 1), (0, 1), (0, 1))
    cases = [(Fused, "fixed", 0), (Fused, "medium", 0), (Delta, "medium", 1), (Channel, "channel_medium", 0)]
    cases += [] if few else [(Fused, None, 0), (Delta, None, 1), (Delta, "fixed", 1)]
    cases += [(KDA, "channel_medium", 1)] if max(sizes) <= 128 else []
    for form, decay, beta in cases:
        inputs, *states = forms.random_inputs(spans, 2, *sizes, decay, beta, dtype=dtype)
        forms.run_form(form, form.tables(spans, 2, *sizes), inputs, *states, 0.3)


def compile_sparse(dtype, head_dim, few):
    """What attention over lists of blocks launches: with the largest blocks, and with small ones, packed heads, a mask
    and weights; parts that go on from others, and shares in gradients of means; rules for single queries."""
    import torch

    from longspan.kernels.sparse import BlockPlan, Blocks, Shares, Tree, fused
    from longspan.kernels.sparse.rules import Boxes, Picks

    def numbers(*shape):
        return torch.zeros(shape, dtype=torch.int32)

    rules = Picks(numbers(300, 1, 3)), Boxes(numbers(300), numbers(300, 2), 1)
    # query block, key block, query heads, key heads, list heads, causal and weighted, rule
    cases = [(128, 128, 2, 1, 1, False, None), (16, 16, 8, 2, 2, True, None), (16, 16, 2, 2, 2, True, None)]
    cases += [(128, 16, 2, 2, 2, True, None), *((64, 16, 2, 1, 1, True, rule) for rule in rules)]
    if not few:
        cases += [(128, 64, 2, 1, 1, True, None), (64, 64, 2, 2, 1, False, None), (64, 16, 4, 2, 4, True, None)]
        cases += [(64, 64, 2, 1, 1, False, rule) for rule in rules]
    for query_block, key_block, heads, key_heads, lists, masked, rule in cases:
        queries, keys = Blocks.of((0, 300), query_block), Blocks.of((0, 300), key_block)
        chosen = torch.zeros(lists, len(queries), 1, dtype=torch.int64)
        weight = torch.zeros(len(keys)) if masked else None
        plan = BlockPlan.of(queries, keys, chosen, causal=masked, log_weight=weight, rule=rule)
        if fused.refusal(dtype, head_dim, plan.queries.size, plan.keys.size) is None:
            q, k, v = (torch.zeros(300, n, head_dim, dtype=dtype) for n in (heads, key_heads, key_heads))
            onto = (q.float(), torch.zeros(300, heads)) if masked else None
            out, lse = fused.forward(q, k, v, plan, 0.3, onto)
            tables = numbers(len(keys)), numbers(len(keys))
            shares = Shares(Tree(*tables, 3), k[: len(keys)], v[: len(keys)]) if masked else None
            fused.backward(q, lse, q, k, v, out, lse, plan, 0.3, onto=onto and onto[0], shares=shares)


def compile_hopper(head_dim):
    """What attention over whole blocks launches on Hopper."""
    import torch

    from longspan.kernels.sparse import BlockPlan, Blocks, fused, hopper
    from longspan.kernels.sparse.states import KeyStates

    hopper.on_hopper, hopper.processors = lambda x: True, lambda device: 132
    # query block, key block, query heads, key heads, list heads, causal and weighted
    cases = [(128, 64, 2, 2, 2, False), (64, 128, 4, 2, 1, True), (128, 64, 4, 1, 2, True), (128, 16, 2, 2, 2, True)]
    for query_block, key_block, heads, key_heads, lists, masked in cases:
        queries, keys = Blocks.of((0, 300), query_block), Blocks.of((0, 300), key_block)
        chosen = torch.zeros(lists, len(queries), 1, dtype=torch.int64)
        weight = torch.zeros(len(keys)) if masked else None
        plan = BlockPlan.of(queries, keys, chosen, causal=masked, log_weight=weight)
        q, k, v = (torch.zeros(300, n, head_dim, dtype=torch.bfloat16) for n in (heads, key_heads, key_heads))
        out, lse = fused.forward(q, k, v, plan, 0.3)
        fused.backward(q, lse, q, k, v, out, lse, plan, 0.3)
        if key_block >= 64 and not masked:
            states = torch.zeros(1, key_heads, 1, head_dim**2 + head_dim)
            states = KeyStates(states, torch.zeros(len(keys), dtype=torch.int32), "softmax")
            fused.backward(q, lse, q, k, v, out, lse, plan, 0.3, states=states)


def compile_branch(width):
    """What the linear branch over whole documents launches, and sums and gradients of keys of small blocks."""
    import torch

    from longspan.kernels.block_states import fused
    from longspan.kernels.sparse import Blocks, hopper

    hopper.on_hopper = lambda x: True
    q, k = (torch.zeros(300, heads, width, dtype=torch.bfloat16) for heads in (4, 2))
    states, rows = torch.zeros(1, 2, 1, width * width + width), torch.zeros(8, dtype=torch.int32)
    for feature_map in ("softmax", "elu1"):
        whole = Blocks.of((0, 300), 1024)
        fused.whole_output(q, q, states, rows, whole, torch.zeros(width), feature_map)
        fused.whole_query_gradients(q, q, states, rows, whole, feature_map, q.dtype)
        for blocks in (whole, Blocks.of((0, 300), 64)):
            fused.sums(k, k, None, blocks, feature_map, 2, k.dtype)
            fused.key_gradients(k, k, states, rows, blocks, feature_map, onto=(k.clone(), k.clone()))


def compile_hopper_delta(head_dim):
    """What the gated delta rule and KDA launch on Hopper."""
    import forms
    import torch

    from longspan.kernels.linear.delta import Delta
    from longspan.kernels.linear.form import Spans
    from longspan.kernels.linear.kda import KDA

    spans = Spans((0, 65, 200), (0, 1), (0, 1), (0, 1))
    for form, decay in ((Delta, "medium"), (KDA, "channel_medium")):
        inputs, *states = forms.random_inputs(spans, 2, head_dim, head_dim, decay, 1, dtype=torch.bfloat16)
        forms.run_form(form, form.tables(spans, 2, head_dim, head_dim), inputs, *states, 0.3)


def compile_hopper_sweeps(head_dim):
    """What no, fixed and scalar decay launch on Hopper."""
    import forms
    import torch

    from longspan.kernels.linear.form import Spans
    from longspan.kernels.linear.fused import Fused
    from longspan.kernels.linear.splits import Splits

    for decay in (None, "fixed", "medium"):
        for spans in (Spans((0, 65, 200), (0, 1), (0, 1), (0, 1)), Spans((0, 65, 2000))):  # between ranks, and not
            inputs, *states = forms.random_inputs(spans, 2, head_dim, head_dim, decay, 0, dtype=torch.bfloat16)
            forms.run_form(Fused, Splits.of(spans, 512, 64), inputs, *states, 0.3, states_travel=bool(spans.linked))


def compile_choosing(width):
    """What chooses blocks for heads of this width, asks other ranks for them, and the lists of plans."""
    from types import SimpleNamespace

    import numpy as np
    import torch

    from longspan.kernels.sparse import (
        Blocks,
        Families,
        Packing,
        Ranges,
        Shares,
        Tree,
        add_packed,
        ask,
        blocks_below,
        count,
        forms,
        mean_levels,
        pack,
        place,
        rename,
        sum_levels,
    )
    from longspan.kernels.sparse.descend_triton import descend_triton
    from longspan.kernels.sparse.lists_triton import columns_triton, rows_triton
    from longspan.kernels.sparse.pool_triton import pool_triton, spread_triton
    from longspan.kernels.sparse.top_few_triton import WIDTHS, top_few_triton
    from longspan.kernels.sparse.top_triton import top_triton

    def zeros(*shape):
        return torch.zeros(shape, dtype=torch.int32)

    def ranges(keys):
        return Ranges.of(np.zeros(128, int), np.full(128, keys), 0.1)

    families = Families(*(zeros(*n) for n in ((128,), (8,), (8,), (128,), (128,), (8, 16), (8,))), 16)
    means = torch.zeros(128, 2, width)
    top_triton(means, means, zeros(128), ranges(128), 0, 0, None)
    for keys, dtype in ((WIDTHS[0], torch.bfloat16), (WIDTHS[1], torch.float32), (WIDTHS[-1], torch.float32)):
        top_few_triton(means, torch.zeros(keys, 2, width, dtype=dtype), zeros(128), ranges(keys), 0, 0, None)
    blocks = Blocks.of((0, 128), 16)
    sums = pool_triton((means.bfloat16(),), blocks, 2, False)
    spread_triton(sums, blocks, means.shape, torch.bfloat16, False)
    forms.takes = lambda x: True
    levels = blocks, Blocks.of((0, 8), 4), Blocks.of((0, 2), 4)
    mean_levels((means.bfloat16(),) * 2, levels, zeros(11), torch.bfloat16)
    sum_levels(means.bfloat16(), levels[:2], 1)
    blocks_below(zeros(2, 8, 8), torch.zeros(16, dtype=torch.int64), zeros(9, 2), True)
    descend_triton(means, means, zeros(2, 8, 8), families, 8, True)
    for lists in (1, 2):
        packing, x = Packing(blocks, zeros(2, lists, 8)), (means.bfloat16(),) * 2
        pack(x, packing, 256 * lists)
        for shares, own in ((Shares(Tree(zeros(10), zeros(10), 2), means, means), x), (None, None)):
            add_packed(x, packing, [y[:, : 1 + lists % 2].contiguous() for y in x], shares, own, own is not None)
    columns = {name: zeros(8) for name in ("starts", "lengths", "positions", "steps")}
    keys = SimpleNamespace(width=4, size=16, local=range(4), **columns)
    for own in (True, False):
        wanted, shown = ask(zeros(2, 4, 2), zeros(8, 1).long(), 2, 4, listed=own)
        shown = shown.expand(2, -1).contiguous()
        table, _, _ = place(shown, count(shown, keys.lengths, 2), keys, 2, 0, own)
        rename(wanted, table)
    for columns in (8, 1 << 14):  # by bits, and too many for these
        row_ptr, row_idx = rows_triton(zeros(1, 1024, 4), columns)
        columns_triton(row_ptr, row_idx, columns, 64, 9)


def compile_layer(width):
    """Norms, rotations, gates, SwiGLU, convolutions, merges of partial results, sums over runs and the loss of a model
    of this width, heads of 128, in bf16."""
    import torch

    from longspan.kernels.channel_gates_triton import channel_gate_backward_triton, channel_gate_triton
    from longspan.kernels.convolution_triton import convolve_backward_triton, convolve_triton
    from longspan.kernels.elu_triton import elu1_backward_triton, elu1_triton
    from longspan.kernels.loss_triton import label_scores_triton, logits_gradient_triton
    from longspan.kernels.merge_triton import merge_triton
    from longspan.kernels.norm_triton import norm_backward_triton, norm_triton
    from longspan.kernels.rotation_triton import rotate_backward_triton, rotate_triton
    from longspan.kernels.scalar_gate_triton import scalar_gate_backward_triton, scalar_gate_triton
    from longspan.kernels.segment_rows_triton import LEAST, segment_sums_triton
    from longspan.kernels.swiglu_triton import swiglu_backward_triton, swiglu_triton

    def zeros(*shape, dtype=torch.bfloat16):
        return torch.zeros(shape, dtype=dtype)

    stream, heads, angles = zeros(64, width), zeros(64, width // 128, 128), zeros(64, 1, 64, dtype=torch.float32)
    for x, branch, weight, gate in [
        (stream, stream, zeros(width), None), (heads, None, zeros(128), heads), (heads, None, None, None)
    ]:  # fmt: skip
        norm_triton(x, branch, weight, gate, weight is not None, 1e-6)
        norm_backward_triton(x, branch, x, weight, gate, weight is not None, 1e-6)
    for weight in (None, zeros(128)):
        rotate_triton(heads, angles, angles, weight, 1e-6)
        rotate_backward_triton(heads, angles, angles, heads, weight, 1e-6)
    for bias in (None, zeros(width, dtype=torch.float32)):
        channel_gate_triton(stream, bias, 0.5)
        channel_gate_backward_triton(stream.float(), stream, stream, bias, 0.5)
    rates = zeros(16, dtype=torch.float32)
    for d_step in (None, stream[:, :16].float()):
        scalar_gate_triton(stream[:, :16], rates, rates)
        scalar_gate_backward_triton(stream[:, :16].float(), d_step, stream[:, :16], rates, rates)
    elu1_triton(heads)
    elu1_backward_triton(heads, heads)
    swiglu_triton(stream, stream)
    swiglu_backward_triton(stream, stream, stream)
    for taps, bias, activation in ((4, None, "silu"), (3, zeros(width), None)):
        weight, reach = zeros(width, taps), zeros(64, dtype=torch.int8)
        convolve_triton(stream, weight, bias, activation, reach)
        convolve_backward_triton(stream, stream, weight, bias, activation, reach, torch.bfloat16)
    for rows in (None, torch.arange(64)):
        lse = zeros(64, width // 128, dtype=torch.float32)
        merge_triton(heads.float(), lse, heads, lse.clone(), rows)
    first = zeros(1, dtype=torch.int64)
    for tokens in (64, 2 * LEAST):  # by one program, and by several
        segment_sums_triton(zeros(tokens, 3 * 128), first, first + tokens - 1)
    labels = zeros(64, dtype=torch.int64)
    lse, _ = label_scores_triton(stream.float(), labels)
    logits_gradient_triton(stream.float(), lse, labels, torch.bfloat16)


def compile_peers(width):
    """Gathers, signals, and blocks there and back, for heads of this width."""
    from types import SimpleNamespace

    import torch

    from longspan.kernels import peer_triton
    from longspan.kernels.sparse import peers_triton

    def zeros(*shape, dtype=torch.int32):
        return torch.zeros(shape, dtype=dtype)

    addresses, calls = zeros(2, dtype=torch.int64), zeros(2, 2, peer_triton.PARTS)
    given = addresses, addresses, calls, 1, peer_triton.ALIGNED * 2**18
    peer_triton.push(zeros(1000), zeros(64), *given)
    peer_triton.collect(zeros(2, 1000), zeros(2, 64), *given)
    peer_triton.signal(addresses, calls, 1, 2)
    peer_triton.wait(addresses, calls, 1, 2, 1)
    keys = SimpleNamespace(size=64, width=40, tokens=(2560, 2560), lengths=zeros(80), starts=zeros(80))
    buffer = zeros(400, 4, width, dtype=torch.bfloat16)
    buffers = buffer.chunk(2, 1)
    peers_triton.clear_behind(buffer, zeros(2, 2, 9, dtype=torch.int64), 1, True, 2)
    table, starts = zeros(2, 80), zeros(100)
    peers_triton.pull_blocks(*buffers, addresses, table, starts, keys, 1, 7, range(2), 24)
    peers_triton.push_blocks(*buffers, addresses, 4096, table, starts, keys, 1, 7, 24)


def main():
    import torch

    few, (dtype, *widths) = "--few" in sys.argv, (word for word in sys.argv[1:] if word != "--few")
    compiled = install()
    for width in widths:
        key_size, value_size = [int(size) for size in (*width.split(","), width)[:2]]
        others = {"choosing": compile_choosing, "layer": compile_layer, "hopper": compile_hopper}
        others |= {"branch": compile_branch, "peers": compile_peers}
        if dtype in others:
            others[dtype](key_size)
            if dtype == "hopper":
                compile_hopper_delta(key_size)
                compile_hopper_sweeps(key_size)
            continue
        compile_linear(getattr(torch, dtype), (key_size, value_size), few)
        if key_size == value_size:
            compile_sparse(getattr(torch, dtype), key_size, few)
    for kernel in compiled:
        sass = disassemble(kernel)
        record = {"name": kernel.name, "shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
        record |= {"spills": len(re.findall(r"\bSTL\b", sass)), "undefined": undefined_registers(sass)}
        record["overwritten"] = overwritten_operands(sass)
        # Where the assembler cannot let products run on, it waits after every one of them.
        waits = len(re.findall(r"WARPGROUP\.DEPBAR", sass)), kernel.asm["ptx"].count("wgmma.wait_group")
        record["serialized"] = waits[0] > waits[1]
        if dtype == "peers":
            record["order"] = memory_order(sass)
        record |= {"sass": digest(sass), "ptx": digest(re.sub(r"//.*", "", kernel.asm["ptx"]))}
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
