"""Which ranks wait for others and which are waited for, by where their main threads are."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from longspan.launcher.stacks import elsewhere


@pytest.mark.parametrize(
    "modules, waits",
    [
        (["longspan.models.decoder", "torch.distributed.fsdp", "torch.distributed.distributed_c10d"], True),
        (["longspan.attention.softmax", "longspan.parallel.exchange"], True),
        (["longspan.launcher.checkpoint", "torch.distributed.checkpoint", "torch.distributed.distributed_c10d"], True),
        (["longspan.launcher.trainer", "longspan.launcher.errors"], True),
        (["longspan.launcher.metrics", "longspan.launcher.clock", "torch.cuda.streams"], True),
        (["longspan.launcher.checkpoint", "torch.distributed.checkpoint.filesystem", "io"], False),
        (["torch.distributed.fsdp._fully_shard", "longspan.models.layers", "torch.nn.modules.linear"], False),
        (["longspan.launcher.trainer", "longspan.launcher.batches", "threading"], False),
        (["longspan.kernels.compiler", "torch._inductor.compile_fx"], False),
        (["__main__", "torch.distributed_of_somebody_else"], False),
    ],
)  # fmt: skip
def test_who_waits_for_others(modules, waits):
    with ThreadPoolExecutor(1) as other:
        found = _within(modules, lambda: other.submit(elsewhere).result())
    assert found.startswith("" if waits else "MainThread:\n") and bool(found) is not waits
    assert waits or found.count("in reached") == len(modules)


def _within(modules, action):
    """What `action` returns when it is called by code of modules of these names, each called by the one before."""
    for name in reversed(modules):
        scope = {"__name__": name, "action": action}
        exec("def reached(): return action()", scope)
        action = scope["reached"]
    return action()
