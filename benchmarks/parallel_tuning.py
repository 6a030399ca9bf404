"""Autotuning of peers with the compilers on all cores: the same configurations are timed, none is waited for alone."""

import os
from concurrent.futures import ThreadPoolExecutor


def compile_in_parallel(threads: int | None = None) -> None:
    """From now on, whenever Triton's autotuner meets a new problem in this process, it first compiles all of its
    configurations at once, in `threads` threads (default: one per core), and then times them one by one as ever. What
    does not compile is left to the timing to report. Needs Triton 3.5; does nothing before."""
    from triton.runtime.autotuner import Autotuner

    try:
        from triton.runtime import _async_compile as async_compile
    except ImportError:
        return
    if hasattr(Autotuner.prune_configs, "original"):
        return
    original = Autotuner.prune_configs

    def prune_configs(self, kwargs):
        configs = original(self, kwargs)  # called for new problems only, by run (and by warmup)
        options = {name: value for name, value in kwargs.items() if name != "warmup"}
        if len(configs) > 1 and async_compile.active_mode.get() is None:
            with (
                ThreadPoolExecutor(threads or os.cpu_count()) as pool,
                async_compile.AsyncCompileMode(pool, ignore_errors=True),
            ):
                for config in configs:
                    self.fn.warmup(*self.nargs.values(), **options, **config.all_kwargs())
        return configs

    prune_configs.original = original
    Autotuner.prune_configs = prune_configs
