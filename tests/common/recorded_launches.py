"""Runs sparse attention on a GPU that is not there and checks that what was recorded launches what the code launches:
the same kernels with the same arguments, addresses of the same memory, of which none is used for something else before
its last launch. Prints the numbers of launches. Triton's interpreter must be off."""

import gc
import sys
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longspan.attention import Hierarchical, LinearBranch, TopBlocks, sparse_attention
from longspan.benchmarks.host_time import absent_gpu
from longspan.kernels import launch, recorded
from longspan.parallel import SequenceParallel

TOP = TopBlocks(4, query_block=128, key_block=64)
SELECTIONS = {"top": TOP, "sla": TOP, **{f"llsa{n}": Hierarchical(16, 4, n) for n in (1, 2, 3)}}
CASES = [(name, causal, heads, 64) for name in SELECTIONS for causal in (False, True) for heads in ((4, 4), (4, 2))]
CASES += [("llsa2", False, (2, 2), 128), ("top", True, (4, 2), 128)]


class Kept(TorchDispatchMode):
    """Keeps all memory that is made, so that no address is used twice."""

    def __init__(self):
        super().__init__()
        self.pieces = {}

    def add(self, *tensors):
        for x in tensors:
            storage = x.untyped_storage()
            self.pieces.setdefault(storage.data_ptr(), (len(self.pieces), storage.nbytes(), x))

    def __torch_dispatch__(self, operation, types, args=(), options=None):
        result = operation(*args, **(options or {}))
        self.add(
            *(x for x in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(x, torch.Tensor))
        )
        return result

    def of(self, address):
        """(piece, bytes behind its start) or None."""
        found = [(n, address - at) for at, (n, size, _) in self.pieces.items() if 0 <= address - at < size]
        return found[0] if found else None


def run(case, seq, launches):
    """Launches of a call with its gradients, the memory that is used, and the numbers of results."""
    name, causal, heads, width = case
    inputs = [torch.randn(14000, n, width, dtype=torch.bfloat16) for n in (heads[0], *[heads[1]] * 2, heads[0])]
    branch = [torch.randn(width, width), torch.randn(width)] if name == "sla" else []
    with Kept() as kept:
        kept.add(*inputs, *branch)
        *wanted, d_out = [x.requires_grad_() for x in inputs[:3]] + [x.requires_grad_() for x in branch] + inputs[3:]
        launches.clear()
        linear = LinearBranch(*branch) if branch else None
        out = sparse_attention(*inputs[:3], selection=SELECTIONS[name], linear=linear, causal=causal, seq=seq)
        results = [out, *torch.autograd.grad(out, wanted, d_out)]
    return [*launches], kept, [x.data_ptr() for x in results], [weakref.ref(x) for x in inputs]


def values(args):
    """Of what goes to C: sizes of the grid and arguments; TMA descriptors as addresses and the rest of them."""
    passed = args[-1] if isinstance(args[-1], tuple) else args[13:]
    for x in (*args[:7], *passed):
        if isinstance(x, launch.TensorDescriptor):
            yield x.base.data_ptr()
            yield {name: value for name, value in vars(x).items() if name != "base"}
        else:
            yield x.data_ptr() if isinstance(x, torch.Tensor) else x


def check(plain, again):
    (launches, kept, results, _), (others, others_kept, others_results, _) = plain, again
    assert [name for name, _ in launches] == [name for name, _ in others]
    places, used = {}, {}  # of pieces of memory: address in the other run, launches
    for turn, ((name, args), (_, other)) in enumerate(zip(launches, others)):
        for x, y in zip(values(args), values(other), strict=True):
            place = kept.of(x) if type(x) is int and x > 1 << 20 else None
            if place is None:
                assert x == y, (name, x, y)
                continue
            piece, offset = place
            assert places.setdefault(piece, y - offset) == y - offset, (name, piece)
            assert others_kept.of(y), (name, "memory from elsewhere")
            used.setdefault(piece, []).append(turn)
    for x, y in zip(results, others_results, strict=True):
        piece, offset = kept.of(x)
        assert places.get(piece, y - offset) == y - offset
        used.get(piece, []).append(len(launches))
    sizes = {n: size for n, size, _ in kept.pieces.values()}
    for one in used:
        for two in used:
            apart = places[one] + sizes[one] <= places[two] or places[two] + sizes[two] <= places[one]
            assert one == two or apart or used[one][-1] < used[two][0] or used[two][-1] < used[one][0], (one, two)


def main():
    with absent_gpu() as launches:
        for case in CASES:
            seq = SequenceParallel(device=torch.device("cpu")).context((9000, 5000))
            recorded.MOST = 0
            run(case, seq, launches)
            plain = run(case, seq, launches)
            recorded.MOST, played, play = 64, [], recorded._Tape.play
            inputs = [*run(case, seq, launches)[3], *run(case, seq, launches)[3]]
            launches.clear(), gc.collect()
            assert not any(x() is not None for x in inputs), "a tape keeps inputs"
            recorded._Tape.play = lambda tape, *args: played.append(len(tape.launches)) or play(tape, *args)
            check(plain, run(case, seq, launches))
            recorded._Tape.play = play
            print(*case[:2], f"{sum(played)} of {len(plain[0])}")
            # Lists of plans with gaps are made where the plans are.
            assert sum(played) >= (len(plain[0]) - 2 if case[0].startswith("llsa") else 1), case


if __name__ == "__main__":
    sys.exit(main())
