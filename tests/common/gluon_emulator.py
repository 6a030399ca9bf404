"""Runs kernels written in Gluon for Hopper on a CPU: programs in order, TOGETHER at a time, parts of each in threads.

`load(path, ...)` imports sources with these definitions in the place of Triton's. What is checked on the way: barriers
(a wait that nothing ends, and a count of bytes that is not what arrives, end in TimeoutError), that products are waited
for before they are used, that shared memory keeps what a product reads until it is done, and that no pointer leaves the
tensor it was given for. Layouts are not looked at, nor whether the threads of a warpgroup wait for one another.
"""

import importlib.util
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import torch

SECONDS = 20.0  # a wait that takes longer is taken to be without end
TOGETHER = 1  # programs at work at the same time
_changed = threading.Condition()  # of numbers in memory that atomics change
_here = threading.local()  # program, programs, and the products under way in this thread


class Tensor(torch.Tensor):
    """Values do not change: x += y makes a new x."""

    def __iadd__(self, other):
        return self + other

    def __isub__(self, other):
        return self - other

    def __imul__(self, other):
        return self * other


def _memory(x):
    """All numbers in memory from the first to the last of x: a kernel may touch no others through it."""
    count = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride())) + 1 if x.numel() else 0
    return x.as_strided((count,), (1,))


def _tensor(x):
    return torch.as_tensor(x).as_subclass(Tensor)


class Pointer:
    def __init__(self, memory, offset=0):
        self.memory, self.offset = memory, offset

    @property
    def dtype(self):
        return type("PointerType", (), {"element_ty": self.memory.dtype})

    def __add__(self, offset):
        return Pointer(self.memory, self.offset + offset)


class Shared:
    """Shared memory, or a part of it."""

    def __init__(self, memory):
        self.memory, self.dtype, self.shape = memory, memory.dtype, list(memory.shape)

    def index(self, n):
        return Shared(self.memory[int(n)])

    def slice(self, start, length, dim=0):
        return Shared(self.memory.narrow(dim, start, length))

    def permute(self, order):
        return Shared(self.memory.permute(order))

    def load(self, layout):
        return _tensor(self.memory.clone())

    def store(self, x):
        assert x.dtype == self.dtype and list(x.shape) == self.shape, (x.dtype, x.shape, self.dtype, self.shape)
        self.memory.copy_(x)


class Descriptor:
    """As Triton's, whose fields may also be set without its checks; what TMA demands is checked where it fetches."""

    def __init__(self, base, shape, strides, block_shape, layout):
        self.base, self.shape, self.strides = base, shape, strides
        self.block_shape, self.layout = block_shape, layout

    @property
    def dtype(self):
        return self.base.dtype

    @property
    def array(self):
        assert self.base.data_ptr() % 16 == 0 and self.strides[-1] == 1 and len(self.block_shape) == len(self.shape)
        assert all(stride * self.base.element_size() % 16 == 0 for stride in self.strides[:-1])
        return self.base.as_strided(self.shape, self.strides)


class Barrier:
    def __init__(self):
        self.condition, self.count, self.phase, self.bytes = threading.Condition(), None, 0, 0

    def add(self, arrivals=0, transferred=0):
        with self.condition:
            self.left -= arrivals
            self.bytes += transferred
            assert self.left >= 0, "more arrivals than the barrier counts"
            if self.left == 0 and self.bytes == 0:
                self.left, self.phase = self.count, self.phase ^ 1
                self.condition.notify_all()

    def wait(self, phase):
        with self.condition:
            if not self.condition.wait_for(lambda: self.phase != int(phase), SECONDS):
                raise TimeoutError("a barrier that nothing completes")


class Product:
    """A product under way."""

    def __init__(self, a, b, acc, use_acc):
        self.operands, self.acc, self.use_acc, self.result = (a, b), acc, use_acc, None
        self.seen = [_values(x).clone() for x in self.operands]

    def finish(self):
        assert all(torch.equal(_bits(_values(x)), _bits(y)) for x, y in zip(self.operands, self.seen)), (
            "shared memory changed under a product"
        )
        a, b = (x.float() for x in self.seen)
        acc = self.acc.result if isinstance(self.acc, Product) else self.acc
        assert a.shape[0] % 64 == 0 and a.dtype == b.dtype and acc.dtype == torch.float32
        self.result = _tensor(a @ b + acc if self.use_acc else a @ b)


def _values(x):
    return x.memory if isinstance(x, Shared) else x


def _bits(x):
    return x.contiguous().view(torch.int16)


def _wait(left, deps):
    while len(_here.products) > left:
        _here.products.pop(0).finish()
    done = [x.result if isinstance(x, Product) else x for x in deps]
    assert all(x is not None for x in done), "a product is used before it has been waited for"
    return tuple(done) if len(done) > 1 else done[0]


def _multiply(a, b, acc, *, use_acc=True, is_async=False):
    product = Product(a, b, acc, use_acc)
    _here.products.append(product)
    return product if is_async else _wait(0, [product])


def _fetch(descriptor, start, barrier, target):
    start, shape = [int(x) for x in start], descriptor.block_shape
    assert target.shape == shape and start[-1] * target.memory.element_size() % 16 == 0
    source = descriptor.array[tuple(slice(x, x + n) for x, n in zip(start, shape))]
    assert list(source.shape[1:]) == shape[1:]
    target.memory.zero_()
    target.memory[: len(source)] = source
    barrier.memory.add(transferred=-target.memory.numel() * target.memory.element_size())


class Barriers:
    """What allocate_shared_memory makes of a layout of barriers."""

    def __init__(self, count):
        self.all = [Barrier() for _ in range(count)]

    def index(self, n):
        return type("Place", (), {"memory": self.all[int(n)]})


def _init(barrier, count):
    barrier.memory.count = barrier.memory.left = count


def _allocate(dtype, shape, layout):
    if isinstance(layout, BarrierLayout):
        return Barriers(shape[0])
    return Shared(torch.full(shape, float("nan") if dtype.is_floating_point else -(2**31), dtype=dtype))


class BarrierLayout:
    pass


class Kernel:
    def __init__(self, function):
        self.function = function

    def __call__(self, *args, **options):
        return self.function(*args, **options)

    def __getitem__(self, grid):
        def launch(*args, **options):
            options.pop("maxnreg", None)
            warps = options.pop("num_warps")
            given = [Pointer(_memory(x)) if isinstance(x, torch.Tensor) else x for x in args]

            def run(program):
                _here.program, _here.programs, _here.products, _here.warps = _tensor(program), grid[0], [], warps
                with torch.no_grad():  # each thread has a setting of its own
                    self.function(*given, **options)
                assert not _here.products, "a product is never waited for"

            if TOGETHER == 1:
                for program in range(grid[0]):
                    run(program)
            else:
                with ThreadPoolExecutor(TOGETHER) as pool:
                    list(pool.map(run, range(grid[0])))

        return launch


def _specialize(parts, warps, registers):
    place, failed = (_here.program, _here.programs, _here.warps), []

    def run(function, args):
        _here.program, _here.programs, _here.warps, _here.products = *place, []
        try:
            with torch.no_grad():  # each thread has a setting of its own
                function(*args)
            assert not _here.products, "a product is never waited for"
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise min(failed, key=lambda error: isinstance(error, TimeoutError))  # what others then wait for in vain


def _jit(function=None, **options):
    return Kernel if function is None else Kernel(function)


def _places(pointer, mask):
    """Where the pointers point, and which of them are used. What is past the end torch finds by itself."""
    at = _tensor(pointer.offset)
    used = torch.ones_like(at, dtype=torch.bool) if mask is None else mask.expand(at.shape)
    if (used & (at < 0)).any():  # to torch, places counted from the end
        raise IndexError(f"{int((used & (at < 0)).sum())} elements in front of a tensor, from {int(at.min())}")
    return at, used


def _load(pointer, mask=None, other=0.0):
    at, used = _places(pointer, mask)
    if mask is None:
        return _tensor(pointer.memory[at])
    values = torch.zeros(at.shape, dtype=pointer.memory.dtype)  # of a tensor without elements nothing may be used
    values[used] = pointer.memory[at[used]]
    return torch.where(used, _tensor(values), other).to(pointer.memory.dtype)


def _store(pointer, value, mask=None):
    at, used = _places(pointer, mask)
    pointer.memory[at[used]] = _tensor(value).expand(at.shape)[used].to(pointer.memory.dtype)


def _atomic_add(pointer, value, sem=None, scope=None):
    """Who adds nothing again, where nothing has changed, waits for a change."""
    with _changed:
        at = pointer.memory[int(pointer.offset) :]
        before, seen = at[0].clone(), (at.data_ptr(), int(at[0]))
        at[0] += value
        if value != 0:
            _changed.notify_all()
        elif seen == getattr(_here, "seen", None) and not _changed.wait(SECONDS):
            raise TimeoutError("a flag that nobody raises")
        _here.seen = None if value != 0 else seen
    return _tensor(before)


def _atomic_xchg(pointer, value, sem=None, scope=None):
    with _changed:
        before = pointer.memory[int(pointer.offset)].clone()
        pointer.memory[int(pointer.offset)] = value
        _changed.notify_all()
    return _tensor(before)


def _two(function):
    return lambda x, y: function(_tensor(x), _tensor(y))


def _anything(*args, **options):
    return None


def _modules() -> dict[str, ModuleType]:
    names = dict(
        jit=_jit, constexpr_function=lambda f: f, constexpr=lambda x: x, static_range=range, to_tensor=_tensor,
        program_id=lambda n: _here.program, num_programs=lambda n: _here.programs,
        num_warps=lambda: _here.warps, load=_load, store=_store,
        convert_layout=lambda x, layout: x,
        arange=lambda start, stop, layout: _tensor(torch.arange(start, stop)),
        full=lambda shape, value, dtype, layout: _tensor(torch.full(shape, value, dtype=dtype)),
        where=lambda c, x, y: torch.where(_tensor(c), x, y), minimum=_two(torch.minimum), maximum=_two(torch.maximum),
        exp=torch.exp, abs=torch.abs, sqrt=torch.sqrt, rsqrt=torch.rsqrt, exp2=torch.exp2,
        min=lambda x, axis: x.amin(axis), max=lambda x, axis: x.amax(axis),
        fma=lambda x, y, z: x * y + z, log2=torch.log2, full_like=lambda x, value: torch.zeros_like(x) + value,
        atomic_add=_atomic_add, atomic_xchg=_atomic_xchg, join=lambda x, y: torch.stack([x, y], -1),
        permute=torch.permute, reshape=torch.reshape,
        zeros_like=torch.zeros_like, sum=lambda x, axis: x.sum(axis), cdiv=lambda a, b: -(-a // b),
        allocate_shared_memory=_allocate, warp_specialize=_specialize, thread_barrier=lambda: None,
        float64=torch.float64, float32=torch.float32, float16=torch.float16, bfloat16=torch.bfloat16,
        int64=torch.int64, int32=torch.int32, associative_scan=lambda x, axis, combine: x.cumsum(axis),
        SliceLayout=_anything, BlockedLayout=_anything, NVMMADistributedLayout=_anything, DotOperandLayout=_anything,
        NVMMASharedLayout=_anything, SwizzledSharedLayout=_anything, DistributedLinearLayout=_anything,
    )  # fmt: skip
    barrier = dict(
        init=_init, wait=lambda b, phase: b.memory.wait(phase), arrive=lambda b: b.memory.add(arrivals=1),
        expect=lambda b, count, pred=True: pred and b.memory.add(arrivals=1, transferred=count),
        MBarrierLayout=BarrierLayout,
    )  # fmt: skip
    hopper = dict(
        fence_async_shared=lambda: None, warpgroup_mma=_multiply, warpgroup_mma_wait=_wait,
        mbarrier=_module("mbarrier", barrier), tma=_module("tma", {"async_copy_global_to_shared": _fetch}),
    )  # fmt: skip
    gluon, root = _module("language", names), "triton.experimental.gluon"
    host = {"TensorDescriptor": Descriptor}
    package = _module("gluon", {"jit": _jit, "constexpr_function": lambda f: f, "language": gluon})
    return {
        "triton.experimental": _module("experimental", {"gluon": package}),
        root: package,
        f"{root}.language": gluon,
        f"{root}.language.nvidia": _module("nvidia", {}),
        f"{root}.language.nvidia.hopper": _module("hopper", hopper),
        f"{root}.nvidia": _module("nvidia", {}),
        f"{root}.nvidia.hopper": _module("hopper", host),
    }


def _module(name, content) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(content)
    module.__path__ = []
    return module


def load(*names: str) -> list[ModuleType]:
    """These modules, imported anew in this order, with Gluon emulated."""
    from longspan.kernels.compiler import tl

    kept, fake, modules = dict(sys.modules), _modules(), []
    sys.modules.update(fake)
    try:
        for name in names:
            spec = importlib.util.find_spec(name)
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
            for key, value in vars(module).items():
                if isinstance(value, tl.constexpr):
                    setattr(module, key, value.value)
            modules.append(module)
        return modules
    finally:
        for name in [*fake, *names]:
            if name in kept:
                sys.modules[name] = kept[name]
            else:
                del sys.modules[name]


def load_linear(names) -> dict:
    """Modules of kernels.linear.hopper, emulated, by name."""
    _, _, *modules = load(
        "longspan.kernels.sparse.hopper.tiles",
        *(f"longspan.kernels.linear.hopper.{name}" for name in ("tiles", *names)),
    )
    return dict(zip(names, modules, strict=True))


def use_linear(emulated, monkeypatch) -> None:
    """Forms of linear attention take these modules, as on a Hopper GPU."""
    from longspan.kernels.linear import hopper
    from longspan.kernels.sparse import hopper as sparse_hopper

    monkeypatch.setattr(sparse_hopper, "on_hopper", lambda x: True)
    for name, module in emulated.items():
        monkeypatch.setattr(hopper, name, module, raising=False)
