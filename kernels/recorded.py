"""Functions that do nothing but allocate and launch: what they do is taken down once, then done again with other memory.

All that such a function works out on the host follows from the layout of its tensors and from numbers, and takes longer
than the launches. From the third call of a kind on there is a tape: memory to allocate, launches with the places of
addresses among their arguments, results. It is kept with the tables of the batch, and goes with them.
"""

from dataclasses import dataclass
from functools import wraps
from operator import itemgetter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longspan.kernels import launch

aten, TENSORS = torch.ops.aten, (torch.Tensor, torch.nn.Parameter)
MAKING = {aten.new_empty: "new_empty", aten.empty_like: "new_empty", aten.new_zeros: "new_zeros"}
VIEWS = {aten.view, aten.unbind, aten.split_with_sizes, aten.select, aten.slice, aten.detach, aten.alias, aten.as_strided}
ATOMS = {type(None), bool, int, float, str, torch.dtype, torch.Size}
MOST = 64  # kinds of calls that are kept with the tables of a batch


def recorded(function):
    """Decorates a function of positional arguments, one of which is a table: tensors, ATOMS, tuples of both, what says
    in `recorded_as` what it consists of, and tables, dataclasses of tensors that stay as they are."""

    @wraps(function)
    def call(*args):
        if launch.recording.launches is not None:  # part of what is recorded
            return function(*args)
        key, tensors, tables = [function], [], []
        try:
            _describe(args, key, tensors, tables)
            key.append(launch.driver.active.get_current_device())
            tapes = vars(tables[0]).setdefault("_tapes", {})
            tape = tapes.get(key := tuple(key))
        except _Refused:
            return function(*args)
        if type(tape) is _Tape and not launch.hooked():
            return tape.play(tensors, key[-1])
        if len(tapes) >= MOST and tape is None:
            return function(*args)
        if tape != 1:  # a first call, or one that cannot be recorded
            tapes[key] = 1 if tape is None else 0
            return function(*args)
        with _Recorder() as recorder:
            result = function(*args)
        tapes[key] = recorder.tape(result, tensors, tables) or 0
        return result

    return call


class _Refused(Exception):
    pass


def _describe(args, key, tensors, tables):
    """Adds to `key` what tells calls apart, and to the others what there is."""
    for x in args:
        kind = type(x)
        if kind in TENSORS:
            if not x.is_cuda or x.data_ptr() & 15:
                raise _Refused
            place = next((n for n, y in enumerate(tensors) if y is x), None)
            key += (x.dtype, x.shape, x.stride(), place)
            if place is None:
                tensors.append(x)
        elif kind is tuple:
            key.append(len(x))
            _describe(x, key, tensors, tables)
        elif kind in ATOMS:
            key += (kind, x)
        elif hasattr(x, "recorded_as"):
            _describe(x.recorded_as, key, tensors, tables)
        else:
            key.append(id(x))
            tables.append(x)


class _Recorder(TorchDispatchMode):
    """While entered: memory that is made, and launches."""

    def __enter__(self):
        self.made, self.refused = [], False
        self.launches = launch.recording.launches = []
        return super().__enter__()

    def __exit__(self, *raised):
        launch.recording.launches = None
        return super().__exit__(*raised)

    def __torch_dispatch__(self, operation, types, args=(), options=None):
        result = operation(*args, **(options or {}))
        packet = operation.overloadpacket
        if packet in MAKING:
            self.made.append((result, MAKING[packet]))
        self.refused |= packet not in MAKING and packet not in VIEWS
        return result

    def tape(self, result, tensors, tables):
        """The _Tape of what was done, or None."""
        made, known = [x for x, _ in self.made], _tensors_of(tables[0]) + _tensors_of(tuple(tables[1:]))
        fixed = {x.data_ptr() for x in known}
        if self.refused or len(fixed | {x.data_ptr() for x in tensors}) < len(fixed) + len(tensors) or not all(x.numel() for x in made):
            return None
        if None in self.launches or not all(x.is_contiguous() for x in made):
            return None
        tape = _Tape([], [], [], [], (), None, tables[1:])
        tape.memory = [(name, tuple(x.shape), x.dtype) for x, name in self.made]
        places = {x.data_ptr(): place for place, x in enumerate([*tensors, *made])}
        spans = [(x.data_ptr(), x.data_ptr() + _span(x)) for x in (*tensors, *made)]
        values = []

        def place(x):
            """Where a tensor's address is among those of a call."""
            at = x.data_ptr()
            if at not in places:
                inside = [(n, at - first) for n, (first, stop) in enumerate(spans) if first <= at < stop]
                if len(inside) != 1:
                    raise _Refused
                places[at] = len(spans) + len(tape.beside)
                tape.beside += inside
            return places[at]

        try:
            for grid, run, head, args, passed in self.launches:
                indices = []
                for x, value in zip((*args, *[None] * len(passed)), passed):
                    if isinstance(x, launch.TensorDescriptor):
                        tape.described.append((place(x.base), vars(x)))
                        indices.append(-len(tape.described))
                    elif type(x) in TENSORS and x.data_ptr() not in fixed:
                        indices.append(place(x))
                    else:
                        indices.append(("value", len(values)))
                        values.append(value)
                tape.launches.append((grid, run, head, indices))
            tape.result = _placed(result, place, tensors, made)
        except _Refused:
            return None
        addresses = len(tensors) + len(made) + len(tape.beside)
        tape.values = tuple(values)
        first = addresses + len(tape.described)
        index = lambda i: first + i[1] if type(i) is tuple else i if i >= 0 else addresses - 1 - i  # noqa: E731
        tape.launches = [(*grid, run, head, itemgetter(*map(index, found))) for grid, run, head, found in tape.launches]
        return tape


def _span(x):
    """Bytes from its first number to behind its last."""
    return (1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride()))) * x.itemsize


def _tensors_of(table):
    if isinstance(table, torch.Tensor):
        return [table]
    inside = table if isinstance(table, (tuple, list)) else vars(table).values() if hasattr(table, "__dict__") else ()
    return [x for part in inside for x in _tensors_of(part)]


def _placed(result, place, tensors, made):
    """Of a tensor: (its number among what is given and made, shape, strides, offset); of a tuple one for each."""
    if isinstance(result, (tuple, list)):
        return tuple(_placed(x, place, tensors, made) for x in result)
    if result is None:
        return None
    for number, x in enumerate([*tensors, *made]):
        if x is result or (number >= len(tensors) and x.untyped_storage().data_ptr() == result.untyped_storage().data_ptr()):
            if x.dtype != result.dtype:
                raise _Refused
            same = x.shape == result.shape and x.stride() == result.stride()
            return [number, None if same else (result.shape, result.stride(), result.storage_offset())]
    raise _Refused


@dataclass
class _Tape:
    """memory: what to make; beside: addresses inside of it; described: TMA descriptors; launches; values: arguments
    that stay; result; tables: kept, so that their addresses stay theirs."""

    memory: list
    beside: list
    described: list
    launches: list
    values: tuple
    result: tuple
    tables: list

    def play(self, tensors, device):
        like = tensors[0]
        for name, shape, dtype in self.memory:
            tensors.append(getattr(like, name)(shape, dtype=dtype))
        at = [x.data_ptr() for x in tensors]
        at += [at[number] + offset for number, offset in self.beside]
        at += [launch.described_again(fields, at[number]) for number, fields in self.described]
        at += self.values
        stream = launch.driver.active.get_current_stream(device)
        for x, y, z, run, head, pick in self.launches:
            run(x, y, z, stream, *head, pick(at))
        return _result(self.result, tensors)


def _result(placed, tensors):
    if placed is None:
        return None
    if type(placed) is tuple:
        return tuple([_result(x, tensors) for x in placed])
    number, view = placed
    return tensors[number] if view is None else tensors[number].as_strided(*view)
