"""Functions that do nothing but allocate and launch: what they do is taken down once, then done again in other memory.

What such a function works out on the host follows from the layout of its tensors and from numbers, and takes longer
than its launches. From the third call of a kind on there is a tape: memory to make, launches with the places of
addresses among their arguments, results. It is kept with the tables of the batch, and goes with them.
"""

from dataclasses import dataclass
from functools import wraps
from itertools import count
from operator import itemgetter
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longspan.kernels import launch

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
        if launch.recording.launches is not None:  # part of what is recorded
            return function(*args)
        key, tensors, tables, bits = [function], [], [], 0
        _describe(args, key, tensors, tables)
        addresses = [x.data_ptr() for x in tensors]
        for address in addresses:
            bits |= address
        if bits & 15 or not tables or not tensors[0].is_cuda:
            return function(*args)
        if len(set(addresses)) < len(addresses):
            key += map(addresses.index, addresses)  # which are the same
        key.append(launch.driver.active.get_current_device())
        key, tapes = tuple(key), vars(tables[0]).setdefault("_tapes", {})
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
        elif getattr(kind, "__dataclass_params__", None) is None or not kind.__dataclass_params__.frozen:
            raise TypeError(f"recorded functions take no {kind.__name__}")
        else:
            key.append(id(x))
            tables.append(x)


class _At(NamedTuple):
    """An address: so many bytes behind that of one of the tensors. fields: those of a TMA descriptor of it, or None."""

    number: int
    offset: int
    fields: dict | None


class _Recorder(TorchDispatchMode):
    """While entered, takes down what memory is made and what is launched."""

    def __enter__(self):
        self.made, self.zero, self.refused = [], set(), False
        self.launches = launch.recording.launches = []
        return super().__enter__()

    def __exit__(self, *raised):
        launch.recording.launches = None
        return super().__exit__(*raised)

    def __torch_dispatch__(self, operation, types, args=(), options=None):
        result, packet = operation(*args, **(options or {})), operation.overloadpacket
        if packet in MAKING:
            self.zero |= {len(self.made)} if packet is aten.new_zeros else set()
            self.made.append(result)
        self.refused |= packet not in VIEWS and not (packet in MAKING and result.is_contiguous() and result.numel())
        return result

    def tape(self, result, tensors, tables):
        """The _Tape of what was done, or None."""
        memory, given = [*tensors, *self.made], len(tensors)
        fixed = {x.data_ptr() for table in tables for x in _tensors_of(table)}
        if self.refused or None in self.launches or any(x.data_ptr() in fixed for x in tensors):
            return None
        starts = {x.data_ptr(): number for number, x in reversed([*enumerate(memory)])}

        def place(x, fields=None):
            at = x.data_ptr()
            inside = [starts[at]] if at in starts else [n for n, y in enumerate(memory) if 0 <= at - y.data_ptr() < _span(y)]
            (number,) = inside
            return _At(number, at - memory[number].data_ptr(), fields)

        def argument(x):
            if isinstance(x, launch.TensorDescriptor):
                return place(x.base, vars(x))
            if not isinstance(x, torch.Tensor):
                return x
            return x.data_ptr() if x.data_ptr() in fixed else place(x)

        try:
            launches = [(*grid, run, head, [*map(argument, args)]) for grid, run, head, args in self.launches]
            results = [None if x is None else _returned(x, place(x), memory, given) for x in result]
        except ValueError:  # memory from elsewhere, or that is a part of two tensors
            return None
        # What is nobody's result lies in one piece of memory, in turn where it is used in turn.
        kept = {at[0] for at in results if at} | {given + number for number in self.zero}
        scratch = [(n, x.nbytes) for n, x in enumerate(self.made, given) if n not in kept]
        offsets, size = _laid_out(scratch, [{x.number for x in step[-1] if type(x) is _At} for step in launches])
        own = [n for n in range(given, len(memory)) if n not in offsets]
        places = {n: (given + place, 0) for place, n in enumerate(own)} | {n: (n, 0) for n in range(given)}
        places |= {n: (given + len(own), offset) for n, offset in offsets.items()}
        shapes = [(n - given in self.zero, memory[n].shape, memory[n].dtype) for n in own]
        shapes += [(False, (size,), torch.uint8)] if size else []
        at = {(n, 0): n for n in range(given + len(shapes))}  # the places of addresses

        def address(x):
            number, offset = places[x.number]
            return at.setdefault((number, offset + x.offset), len(at))

        every = [x for step in launches for x in step[-1]]
        described = [(x.fields, address(x)) for x in every if type(x) is _At and x.fields]
        plain = [address(x) for x in every if type(x) is _At]
        descriptor, value = count(len(at)), count(len(at) + len(described))

        def index(x):
            return next(value) if type(x) is not _At else next(descriptor) if x.fields else address(x)

        launches = [(*step, itemgetter(*map(index, args))) for *step, args in launches]
        values, derived = [x for x in every if type(x) is not _At], [*at][given + len(shapes) :]
        results = [(places[x[0]][0], x[1]) if x else (None, None) for x in results]
        return _Tape(shapes, derived, described, launches, values, results, tables[1:])


def _span(x):
    """Bytes from the first number of x to behind its last."""
    return (1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))) * x.itemsize


def _returned(x, at, memory, given):
    """(number of a tensor, what x is of it by as_strided, or None for all)."""
    like = memory[at.number]
    if at.offset == 0 and (x.dtype, x.shape, x.stride()) == (like.dtype, like.shape, like.stride()):
        return at.number, None
    if at.number < given or x.dtype != like.dtype:
        raise ValueError
    return at.number, (x.shape, x.stride(), at.offset // x.itemsize)


def _tensors_of(table):
    if isinstance(table, torch.Tensor):
        return [table]
    inside = table if isinstance(table, (tuple, list)) else vars(table).values() if hasattr(table, "__dict__") else ()
    return [x for part in inside for x in _tensors_of(part)]


def _laid_out(scratch, used):
    """({number: offset}, bytes in all) of (number, bytes); used: the numbers that each launch uses."""
    placed, offsets = [], {}
    for number, size in scratch:
        turns = [turn for turn, numbers in enumerate(used) if number in numbers] or [0]
        offset = 0
        for begin, end, first, last in sorted(placed):
            if first <= turns[-1] and turns[0] <= last and begin < offset + size and offset < end:
                offset = end
        placed.append((offset, offset + -(-size // APART) * APART, turns[0], turns[-1]))
        offsets[number] = offset
    return offsets, max((end for _, end, *_ in placed), default=0)


@dataclass(frozen=True)
class _Tape:
    """memory: whether of zeros, shape and dtype; derived: places of addresses and bytes from them; described: fields of
    TMA descriptors, and places of their addresses; launches: grid, what launches, and the places of its arguments;
    values: arguments that stay; results: places of tensors, and their views of these. tables: kept, so that nothing
    else gets their addresses."""

    memory: list
    derived: list
    described: list
    launches: list
    values: list
    results: list
    tables: list

    def play(self, tensors, at, device):
        """at: the addresses of the tensors."""
        like = tensors[0]
        for zero, shape, dtype in self.memory:
            made = like.new_zeros(shape, dtype=dtype) if zero else like.new_empty(*shape, dtype=dtype)
            tensors.append(made)
            at.append(made.data_ptr())
        at += [at[place] + offset for place, offset in self.derived]
        at += [launch.described_again(fields, at[place]) for fields, place in self.described]
        at += self.values
        stream = launch.driver.active.get_current_stream(device)
        for x, y, z, run, head, arguments in self.launches:
            run(x, y, z, stream, *head, arguments(at))
        found = [None if place is None else tensors[place] for place, _ in self.results]
        return tuple([x if view is None else x.as_strided(*view) for x, (_, view) in zip(found, self.results)])
