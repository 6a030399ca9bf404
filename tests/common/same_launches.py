"""Runs layers on a GPU that is not there, and of every launch that does without Triton checks that Triton would have
given the driver the same kernel and the same arguments. Prints the kernels' names. Triton's interpreter must be off."""

import torch

from longspan.benchmarks.host_time import absent_gpu
from longspan.benchmarks.pointwise import layer_step
from longspan.benchmarks.pointwise_cases import Sizes
from longspan.kernels.launch import Launcher

KINDS = ("softmax", "linear:fixed", "linear:scalar", "linear:gated_delta", "linear:gla", "linear:mamba2", "sla", "llsa")


def main():
    sizes, names = Sizes(300, 256, 2, 128, 192, 100), set()
    steps = [layer_step(kind, "longspan", 300, sizes, torch.bfloat16, torch.device("cpu")) for kind in KINDS]
    with absent_gpu() as launches:
        launch = Launcher._launch

        def checked(self, grid, *args, **options):
            known, start = len(self._known), len(launches)
            kernel = launch(self, grid, *args, **options)
            if len(self._known) == known:
                assert self.kernel[grid](*args, **options) is kernel, self._fn_name
                (name, direct), (_, through_triton) = launches[start:]
                assert what_counts(direct) == what_counts(through_triton), (name, direct, through_triton)
                names.add(name.rpartition(".")[2])
            return kernel

        Launcher._launch = checked
        for step in 2 * steps:
            step()
    print(*sorted(names))


def what_counts(args):
    """Of what Triton gives to C: grid, stream and function, and the kernel's arguments, tensors as addresses."""
    passed = args[-1] if isinstance(args[-1], tuple) else args[13:]  # a tuple from Triton 3.7 on
    return [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in (*args[:7], *passed)]


if __name__ == "__main__":
    main()
