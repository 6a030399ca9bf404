"""Launches of kernels that were launched before, at a third of what they cost the host in Triton.

At every launch Triton binds arguments by name, describes each and calls what hooks there are, which takes it several
times as long as the launch itself. Here a launch is known by the few things that Triton compiles different code for,
and goes from them to the driver. The first of its kind goes through Triton, which compiles it, and so do all while
somebody has hooks.
"""

from functools import partial

import torch
from triton.compiler import CompiledKernel
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from longspan.kernels.compiler import knobs

# What of an argument {a} Triton compiles different code for, by its class: dtype and alignment of tensors, of integers
# their size, 1, and multiples of 16. Tensors go to the driver as addresses: then it is not asked whose they are.
TENSOR = "({a}.dtype, ({a}_at := {a}.data_ptr()) & 15 == 0)"
INTEGER, UNSPECIALIZED = "(-(1 << 31) <= {a} < 1 << 31, {a} == 1, {a} & 15 == 0)", "-(1 << 31) <= {a} < 1 << 31"
CLASSES = {
    torch.Tensor: TENSOR,
    torch.nn.Parameter: TENSOR,
    TensorDescriptor: "({a}.base.dtype, *{a}.block_shape, {a}.layout)",
    int: INTEGER,
    bool: "None",
    float: "None",
    type(None): "None",
}


def launched(kernel):
    """Decorates a jitted kernel: kernel[grid](*args, **options) as before. Others than NVIDIA's GPUs, and the
    interpreter, get the kernel as it is."""
    return Launcher(kernel) if isinstance(kernel, JITFunction) and not torch.version.hip else kernel


class Launcher:
    """A JITFunction in all but its launches. Switches of Triton that change from launch to launch (`triton.knobs`) are
    seen by what is not compiled yet."""

    def __init__(self, kernel: JITFunction):
        self.kernel, self._describing, self._known = kernel, {}, {}

    def __getattr__(self, name):
        return getattr(self.kernel, name)

    def __getitem__(self, grid):
        return partial(self._launch, grid)

    def _launch(self, grid, *args, **options):
        classes = tuple(map(type, args))
        describe = self._describing.get(classes)
        if describe is None:
            describe = self._describing[classes] = describing(self.kernel.params, classes)
        described, passed = describe(*args)
        device = driver.active.get_current_device()
        key = device, classes, described, *options, *options.values()
        known, enter, leave = self._known.get(key), knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        if known is None or (enter and enter.calls) or (leave and leave.calls):
            kernel = self.kernel[grid](*args, **options)
            if isinstance(kernel, CompiledKernel):
                no_hooks = None, None, None
                constants = self._constants(len(args), options)
                self._known[key] = kernel, kernel.run, (kernel.function, kernel.packed_metadata, *no_hooks), constants
            return kernel
        kernel, run, head, constants = known
        size_x, size_y, size_z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        run(size_x, size_y, size_z, driver.active.get_current_stream(device), *head, *passed, *constants)
        return kernel

    def _constants(self, count, options):
        """Of the parameters after the first `count`: all that is not given by position is constant to the compiler."""
        parameters = self.kernel.params[count:]
        assert all(parameter.is_constexpr for parameter in parameters), [parameter.name for parameter in parameters]
        return tuple(options.get(parameter.name, parameter.default) for parameter in parameters)


def describing(parameters, classes):
    """A function of arguments of these classes: (what Triton compiles different code for, what the driver gets)."""
    names, described, passed = [f"a{n}" for n in range(len(classes))], [], []
    for name, parameter, kind in zip(names, parameters, classes):
        form = CLASSES.get(kind)
        if parameter.is_constexpr:
            form = "{a}"
        elif kind is int and parameter.do_not_specialize:
            form = UNSPECIALIZED
        if form is None:
            raise TypeError(f"kernels take no {kind.__name__} as {parameter.name}")
        described.append(form.format(a=name))
        passed.append(f"{name}_at" if form is TENSOR else name)
    return eval(f"lambda {', '.join(names)}: (({', '.join(described)},), ({', '.join(passed)},))")
