"""Functions that do nothing but allocate and launch: what they do is taken down once, then done again in other memory.

What such a function works out on the host follows from the layout of its tensors and from numbers, and takes longer
than its launches. From the third call of a kind on there is a tape: memory to make, launches with the places of
addresses among their arguments, results. It is kept with the tables of the batch, and goes with them.
"""

import importlib
from dataclasses import dataclass
from functools import cache, partial, wraps
from itertools import count
from operator import itemgetter
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten, TENSORS = torch.ops.aten, (torch.Tensor, torch.nn.Parameter)
MAKING = {aten.new_empty, aten.empty_like, aten.new_zeros}
VIEWS = {aten.view, aten.unbind, aten.split_with_sizes, aten.select, aten.slice, aten.detach, aten.alias}
ATOMS = {type(None), bool, int, float, str, torch.dtype, torch.Size}
MOST = 64  # kinds of calls that are kept with a table
APART = 512  # bytes, at multiples of which memory begins, as where torch makes it
SEEN, REFUSED = object(), object()


def recorded(function):
    """Decorates a function of positional arguments that allocates and launches: tensors, ATOMS, tables (dataclasses of
    tensors that stay as they are; at least one), what says in `recorded_as` what it consists of, and tuples of these.
    It returns a tuple of tensors and None. What cannot be recorded runs as it is."""

    @wraps(function)
    def call(*args):
        key, tensors, tables, bits = [function], [], [], 0
        try:
            _describe(args, key, tensors, tables)
        except _Traced:
            return function(*args)
        addresses = [x.data_ptr() for x in tensors]
        for address in addresses:
            bits |= address
        if bits & 15 or not tables or not tensors[0].is_cuda:
            return function(*args)
        launch = _launch()
        if launch.thread.launches is not None:  # part of what is recorded
            return function(*args)
        if len(set(addresses)) < len(addresses):
            key += map(addresses.index, addresses)  # which are the same
        key.append(launch.driver.active.get_current_device())
        key, tapes = tuple(key), _tapes_of(tables[0])
        tape = tapes.get(key)
        if type(tape) is _Tape and not launch.hooked():
            return tape.play(tensors, addresses, key[-1])
        if tape is SEEN:
            with _Recorder() as recorder:
                result = function(*args)
            tapes[key] = recorder.tape(result, tensors, tables) or REFUSED
            return result
        if tape is None and len(tapes) < MOST:
            tapes[key] = SEEN
        return function(*args)

    return call


@cache
def _launch():
    """The module, which needs Triton, where there is a GPU."""
    return importlib.import_module("longspan.kernels.launch")


def _tapes_of(table):
    """Kept where a frozen dataclass keeps its cached properties."""
    return vars(table).get("_tapes") or vars(table).setdefault("_tapes", _Tapes())


class _Traced(Exception):
    """A tensor stands for something else."""


def _describe(args, key, tensors, tables):
    """Adds to `key` what tells calls apart, and to the others what there is."""
    for x in args:
        kind = type(x)
        if kind in TENSORS:
            key += (x.dtype, x.shape, x.stride())
            tensors.append(x)
        elif kind in ATOMS:
            key += (kind, x)
        elif kind is tuple or hasattr(x, "recorded_as"):
            parts = x if kind is tuple else x.recorded_as
            key += (kind, len(parts))
            _describe(parts, key, tensors, tables)
        elif isinstance(x, torch.Tensor):
            raise _Traced
        elif not getattr(kind, "__dataclass_params__", None) or not kind.__dataclass_params__.frozen:
            raise TypeError(f"recorded functions take no {kind.__name__}")
        else:
            key.append(id(x))
            tables.append(x)


class _Tapes(dict):
    """With their tables, but in this process alone."""

    def __reduce__(self):
        return _Tapes, ()


class _Address(int):
    def data_ptr(self):
        return self


class _At(NamedTuple):
    """An address: bytes behind that of a tensor among those given and made. make: what is made of it, or None."""

    number: int
    offset: int
    make: object


class _Recorder(TorchDispatchMode):
    """While entered, takes down what memory is made and what is launched."""

    def __enter__(self):
        self.made, self.zero, self.refused = [], [], False
        self.launches = _launch().thread.launches = []
        return super().__enter__()

    def __exit__(self, *raised):
        _launch().thread.launches = None
        return super().__exit__(*raised)

    def __torch_dispatch__(self, operation, types, args=(), options=None):
        result, packet = operation(*args, **(options or {})), operation.overloadpacket
        if packet in MAKING:
            self.made.append(result)
            self.zero.append(packet is aten.new_zeros)
        self.refused |= packet not in VIEWS and not (packet in MAKING and result.is_contiguous() and result.numel())
        return result

    def tape(self, result, tensors, tables):
        """The _Tape of what was done, or None."""
        memory, given, launch = [*tensors, *self.made], len(tensors), _launch()
        fixed = {x.data_ptr() for table in tables for x in _tensors_of(table)}
        if self.refused or not self.launches or None in self.launches or any(x.data_ptr() in fixed for x in tensors):
            return None

        def place(x, make=None):
            at = x.data_ptr()
            inside = [n for n, y in enumerate(memory) if 0 <= at - y.data_ptr() < _span(y)]
            (number,) = [n for n in inside if memory[n].data_ptr() == at][:1] or inside
            return _At(number, at - memory[number].data_ptr(), make)

        def argument(x):
            if isinstance(x, launch.TensorDescriptor):
                fields = {name: value for name, value in vars(x).items() if name != "base"}
                return place(x.base, partial(launch.describe_again, type(x), fields))
            if not isinstance(x, torch.Tensor):
                return x
            return x.data_ptr() if x.data_ptr() in fixed else place(x)

        try:
            launches = [(*grid, run, head, [*map(argument, args)]) for grid, run, head, args in self.launches]
            results = [x if x is None else [x is y for y in memory].index(True) for x in result]
        except ValueError:  # memory from elsewhere, or that is a part of two tensors; a view
            return None
        # What is nobody's result lies in one piece of memory, in turn where it is used in turn.
        used = [{x.number for x in args if type(x) is _At} for *_, args in launches]
        own = [n for n, zero in enumerate(self.zero, given) if zero or n in results]
        scratch, size = _laid_out([(n, memory[n].nbytes) for n in range(given, len(memory)) if n not in own], used)
        numbers = {n: place for place, n in enumerate([*range(given), *own])}
        shapes = [(self.zero[n - given], memory[n].shape, memory[n].dtype) for n in own] + [
            (False, (size,), torch.uint8)
        ]
        values, steps = [x for *_, args in launches for x in args if type(x) is not _At], {}
        value, first, last = count(), len(values), given + len(shapes)

        def index(x):
            if type(x) is not _At:
                return next(value)
            offset, number = x.offset + scratch.get(x.number, 0), first + numbers.get(x.number, last - 1)
            if not offset and x.make is None:
                return number
            return steps.setdefault((number, offset, x.make), first + last + len(steps))

        launches = [(*step, itemgetter(*map(index, args))) for *step, args in launches]
        results = [x if x is None else numbers[x] for x in results]
        return _Tape(values, shapes, [*steps], launches, results, tables[1:])


def _span(x):
    """Bytes from the first number of x to behind its last."""
    return (1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))) * x.itemsize


def _tensors_of(table):
    if isinstance(table, torch.Tensor):
        return [table]
    inside = table if isinstance(table, (tuple, list)) else vars(table).values() if hasattr(table, "__dict__") else ()
    return [x for part in inside for x in _tensors_of(part)]


def _laid_out(scratch, used):
    """({number: offset}, bytes in all) of (number, bytes) each; used: the numbers that each launch uses."""
    placed, offsets = [], {}
    for number, size in scratch:
        turns, offset = [turn for turn, numbers in enumerate(used) if number in numbers] or [0], 0
        for begin, end, first, last in sorted(placed):
            if first <= turns[-1] and turns[0] <= last and begin < offset + size and offset < end:
                offset = end
        placed.append((offset, offset + -(-size // APART) * APART, turns[0], turns[-1]))
        offsets[number] = offset
    return offsets, max((end for _, end, *_ in placed), default=0)


@dataclass(frozen=True)
class _Tape:
    """values: arguments that stay; behind them come addresses of what is given and of `memory` (whether of zeros,
    shape, dtype), and what `steps` make of these (place, bytes behind it, what). launches: grid, what launches, what it
    takes besides, and what takes its arguments out of all that. results: numbers of what is given and made. tables:
    kept, so that nothing else gets their addresses."""

    values: list
    memory: list
    steps: list
    launches: list
    results: list
    tables: list

    def play(self, tensors, addresses, device):
        like, at = tensors[0], self.values + addresses
        for zero, shape, dtype in self.memory:
            made = like.new_zeros(shape, dtype=dtype) if zero else like.new_empty(*shape, dtype=dtype)
            tensors.append(made)
            at.append(made.data_ptr())
        for place, offset, make in self.steps:
            at.append(at[place] + offset if make is None else make(_Address(at[place] + offset)))
        stream = _launch().driver.active.get_current_stream(device)
        for x, y, z, run, head, arguments in self.launches:
            run(x, y, z, stream, *head, arguments(at))
        return tuple([None if number is None else tensors[number] for number in self.results])
