"""Host time of LLSA (two levels, B=2 H=4 D=64, N=65,536, no mask), eagerly and in a CUDA graph, of two trees on one GPU.

    python host.py BEFORE AFTER [--budget 85]

Prints one JSON object: per tree and round ms of a call, with autograd's threads and without (`one_thread`), what goes by
between autograd.grad and the layer's backward pass, and whether outputs and gradients of both trees have the same bits.
Without CUDA it runs a small case on the CPU, which tries out the script and says nothing of a GPU.
"""

import argparse
import gc
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time

CALLS, REPEATS, SLEEP = 20, 7, 100_000_000  # calls in a row; cycles that a GPU waits while the host goes ahead


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--budget", type=float, default=85.0, help="seconds in all; the second round is left out if short")
    given, start, rounds, longest = parser.parse_args(), time.monotonic(), [], 0.0
    for turn in range(2):
        found = {}
        for name in ("before", "after") if turn == 0 else ("after", "before"):
            left = given.budget - (time.monotonic() - start)
            if turn and left < longest + 5:
                break
            began, tree = time.monotonic(), os.path.abspath(getattr(given, name))
            path = os.pathsep.join([tree, *filter(None, [os.environ.get("PYTHONPATH")])])
            command = [sys.executable, os.path.abspath(__file__), "--worker", tree]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, cwd=tree, env=os.environ | {"PYTHONPATH": path},
                    timeout=max(left, 20),
                )  # fmt: skip
                lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
                found[name] = json.loads(lines[-1]) if lines else {"error": done.stderr[-2000:]}
            except subprocess.TimeoutExpired:
                found[name] = {"error": "out of time"}
            if turn:  # with compiled kernels
                longest = max(longest, time.monotonic() - began)
            else:
                longest = time.monotonic() - began
        if found:
            rounds.append(found)
    bits = [x["bits"] for found in rounds for x in found.values() if "bits" in x]
    both = all(any("bits" in found.get(name, {}) for found in rounds) for name in ("before", "after"))
    equal = all(x == bits[0] for x in bits) if both else None  # None: one of the two did not run
    print(json.dumps({"bits_equal": equal, "seconds": round(time.monotonic() - start, 1), "rounds": rounds}))
    return int(not equal)


def worker(tree):
    import torch

    import longspan
    from longspan.attention import Hierarchical, sparse, sparse_attention
    from longspan.parallel import SequenceParallel

    assert os.path.realpath(longspan.__file__).startswith(os.path.realpath(tree) + os.sep), longspan.__file__
    gpu = torch.cuda.is_available()
    device, tokens = torch.device("cuda" if gpu else "cpu"), 65_536 if gpu else 64
    dtype, calls = (torch.bfloat16, CALLS) if gpu else (torch.float32, 1)
    seq, selection = SequenceParallel(device=device).context((tokens, tokens)), Hierarchical(16, 8, 2)
    result = {"tree": tree, "torch": torch.__version__, "device": torch.cuda.get_device_name() if gpu else "cpu"}
    result |= {"cpus": len(os.sched_getaffinity(0)), "python": sys.version.split()[0]}

    def synchronize():
        if gpu:
            torch.cuda.synchronize()

    def inputs(seed):
        generator = torch.Generator(device).manual_seed(seed)
        made = [torch.randn(2 * tokens, 4, 64, generator=generator, device=device, dtype=dtype) for _ in range(4)]
        return [x.requires_grad_() for x in made[:3]] + made[3:]

    def forward(q, k, v, d_out):
        return sparse_attention(q, k, v, selection=selection, causal=False, seq=seq)

    def both(q, k, v, d_out):
        out = forward(q, k, v, d_out)
        return out, *torch.autograd.grad(out, [q, k, v], d_out)

    def bits(seed):
        found = [x.detach().float().cpu().numpy().tobytes() for x in both(*inputs(seed))]
        return [hashlib.sha256(x).hexdigest()[:16] for x in found]

    def timed(call):
        """ms: of a call among many; alone: of one after which the host waits; host: until all is queued, the GPU busy."""
        call()
        times = {"ms": [], "alone": [], "host": []}
        for _ in range(REPEATS if gpu else 1):
            synchronize()
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            synchronize()
            times["ms"].append((time.perf_counter() - begin) / calls * 1e3)
            for _ in range(3):
                begin = time.perf_counter()
                call()
                synchronize()
                times["alone"].append((time.perf_counter() - begin) * 1e3)
            if gpu:
                torch.cuda._sleep(SLEEP)
            begin = time.perf_counter()
            for _ in range(10):
                call()
            times["host"].append((time.perf_counter() - begin) / 10 * 1e3)
            synchronize()
        return {name: [round(min(x), 4), round(statistics.median(x), 4)] for name, x in times.items()}

    tensors = inputs(0)
    first = bits(0)  # as the code does it
    for _ in range(6):
        both(*tensors)
    again, others = bits(0), bits(1)  # as it is done from the third call on, and with other numbers in other memory
    result["bits"] = [first, others]
    result["bits_repeat"] = first == again

    def run_forward():
        return forward(*tensors)

    def run_both():
        return both(*tensors)

    result["forward"], result["both"] = timed(run_forward), timed(run_both)
    with torch.autograd.set_multithreading_enabled(False):
        result["both_one_thread"] = timed(run_both)
    gc.disable()
    result["both_no_gc"] = timed(run_both)
    gc.enable()
    with torch.no_grad():
        result["forward_no_grad"] = timed(run_forward)

    # An empty function: what autograd takes by itself.
    class Empty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            return q.detach()

        @staticmethod
        def backward(ctx, d_out):
            return d_out, d_out, d_out

    def empty():
        return torch.autograd.grad(Empty.apply(*tensors[:3]), tensors[:3], tensors[3])

    result["empty"] = timed(empty)
    with torch.autograd.set_multithreading_enabled(False):
        result["empty_one_thread"] = timed(empty)

    # From autograd.grad to the layer's backward pass, in it, and back, while the GPU is busy.
    backward, marks = sparse._Attention.backward, []

    def marked(ctx, d_out):
        begin = time.perf_counter()
        found = backward(ctx, d_out)
        marks.append((begin, time.perf_counter(), time.thread_time()))
        return found

    def hand_over():
        spans = []
        for _ in range(30 if gpu else 2):
            out = forward(*tensors)
            if gpu:
                torch.cuda._sleep(20_000_000)
            begin = time.perf_counter()
            torch.autograd.grad(out, tensors[:3], tensors[3])
            end = time.perf_counter()
            (first, last, _) = marks.pop()
            spans.append([(first - begin) * 1e3, (last - first) * 1e3, (end - last) * 1e3])
            synchronize()
        names = "ms_to_backward", "ms_in_backward", "ms_back"
        return {name: round(statistics.median(x), 4) for name, x in zip(names, zip(*spans))}

    sparse._Attention.backward = staticmethod(marked)
    result["hand_over"] = hand_over()
    with torch.autograd.set_multithreading_enabled(False):
        result["hand_over_one_thread"] = hand_over()
    sparse._Attention.backward = staticmethod(backward)

    # All threads on one CPU: nobody wakes another one, and caches stay warm.
    allowed = os.sched_getaffinity(0)
    threads = [int(x) for x in os.listdir("/proc/self/task")]
    one = {max(allowed)}
    for thread in threads:
        os.sched_setaffinity(thread, one)
    result["both_one_cpu"] = timed(run_both)
    for thread in threads:
        os.sched_setaffinity(thread, allowed)

    if gpu:
        for name, call in (("graph_forward", run_forward), ("graph_both", run_both)):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(4):
                    call()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = call()
            result[name] = timed(graph.replay)
            if name == "graph_both":
                graph.replay()
                found = [x.detach().float().cpu().numpy().tobytes() for x in captured]
                result["graph_bits_equal"] = [hashlib.sha256(x).hexdigest()[:16] for x in found] == first
            del captured, graph
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        worker(sys.argv[2])
    else:
        sys.exit(main())
