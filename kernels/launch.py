"""Launches of kernels that were launched before, at a third of what they cost the host in Triton.

At every launch Triton binds arguments by name, describes each and calls what hooks there are, which takes it several
times as long as the launch itself. Here a launch is known by the few things that Triton compiles different code for,
and goes from them to the driver. The first of its kind goes through Triton, which compiles it, and so do all while
somebody has hooks.
"""

import threading
from copy import copy
from functools import partial

import torch
from triton.compiler import CompiledKernel
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from longspan.kernels.compiler import knobs

# What of an argument {a} Triton compiles different code for, by its class, beside alignment of tensors to 16 bytes and
# the size of integers: of most launches all tensors are aligned and all integers small, so these are compared at once.
# Tensors go to the driver as addresses: then it is not asked whose they are.
TENSORS = torch.Tensor, torch.nn.Parameter
ALIGNED, SMALL = "{a}_at & 15 == 0", "-(1 << 31) <= {a} < 1 << 31"
CLASSES = {
    **dict.fromkeys(TENSORS, "{a}.dtype"),
    TensorDescriptor: "{a}.base.dtype, *{a}.block_shape, id({a}.layout)",  # whose hash takes long
    int: "{a} == 1, {a} & 15 == 0",
    **dict.fromkeys((bool, float, type(None)), ""),
}


class _Thread(threading.local):
    """launches: a list for those of this thread where somebody takes them down: grid, what launches, what it takes
    besides, arguments; None for one that Triton has made."""

    launches, has_context = None, False


thread = _Thread()


def hooked() -> bool:
    """Whether somebody wants to know of launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool((enter and enter.calls) or (leave and leave.calls))


def describe_again(kind, fields, base):
    """A TMA descriptor of its kind, of other memory. base: what has a data_ptr()."""
    if not thread.has_context and torch.cuda.is_initialized():
        torch.cuda.Event().record()  # to describe memory needs a context, which a thread of autograd may not have yet
        thread.has_context = True
    made = object.__new__(kind)
    made.__dict__.update(fields, base=base)
    return made


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
            describe = describing(self.kernel.params, classes, len(self._describing))
            self._describing[classes] = describe
        described, passed = describe(*args)
        active = driver.active
        device = active.get_current_device()
        key = device, described, *options, *options.values()
        known = self._known.get(key)
        if known is None or hooked():
            kernel = self.kernel[grid](*args, **options)
            if thread.launches is not None:
                thread.launches.append(None)
            if isinstance(kernel, CompiledKernel):
                layouts = [
                    x.layout for x in args if isinstance(x, TensorDescriptor)
                ]  # so that their numbers stay theirs
                self._known[key] = *straight(kernel), self._constants(args, options), kernel, layouts
            return kernel
        run, head, constants, kernel, _ = known
        size_x, size_y, size_z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        run(size_x, size_y, size_z, active.get_current_stream(device), *head, (*passed, *constants))
        if thread.launches is not None:
            thread.launches.append(((size_x, size_y, size_z), run, head, (*args, *constants)))
        return kernel

    def _constants(self, args, options):
        """Of the parameters after `args`: all that is not given by position is constant to the compiler."""
        parameters = self.kernel.params[len(args) :]
        assert all(parameter.is_constexpr for parameter in parameters), [parameter.name for parameter in parameters]
        return tuple(options.get(parameter.name, parameter.default) for parameter in parameters)


def straight(kernel: CompiledKernel):
    """(what takes the sizes of a grid, a stream, head and a tuple of arguments to the driver, head). Where a kernel has
    no scratch memory, Triton's own launcher does nothing but call its `launch` with more: taken down once."""
    run, seen, mark = kernel.run, [], object()
    head = kernel.function, kernel.packed_metadata, None, None, None  # no hooks
    more = (getattr(run, name, None) for name in ("global_scratch_size", "profile_scratch_size", "gsan_enabled"))
    if not hasattr(run, "launch") or any(more):
        return _spread(run), head
    probe = copy(run)
    probe.launch = lambda *args: seen.append(args)
    probe(1, 1, 1, 0, *head, mark)
    ((*_, last),) = seen
    return run.launch if last == (mark,) else _spread(run.launch), seen[0][4:-1]  # a tuple from Triton 3.7 on


def _spread(run):
    return lambda *args: run(*args[:-1], *args[-1])


def describing(parameters, classes, number=0):
    """A function of arguments of these classes: (what Triton compiles different code for, what the driver gets).
    number: of these classes among those of a kernel."""
    names, described, passed, tensors, integers = [f"a{n}" for n in range(len(classes))], [str(number)], [], [], []
    for name, parameter, kind in zip(names, parameters, classes):
        form = CLASSES.get(kind)
        if parameter.is_constexpr:
            form = "{a}"
        elif kind in TENSORS:
            tensors.append(name)
        elif kind is int:
            integers.append(name)
            form = "" if parameter.do_not_specialize else form
        if form is None:
            raise TypeError(f"kernels take no {kind.__name__} as {parameter.name}")
        described += [form.format(a=name)] if form else []
        passed.append(f"{name}_at" if name in tensors[-1:] else name)
    addresses = " | ".join(f"({name}_at := {name}.data_ptr())" for name in tensors)
    small = " and ".join(SMALL.format(a=name) for name in integers)
    for usual, form, some in ((f"({addresses}) & 15 == 0", ALIGNED, tensors), (small, SMALL, integers)):
        if some:
            described.append(f"True if {usual} else ({', '.join(form.format(a=name) for name in some)},)")
    return eval(f"lambda {', '.join(names)}: (({', '.join(described)},), ({', '.join(passed)},))")
