"""For programs that run a few times at most: compiling takes nearly all of their time."""

from collections.abc import Callable
from typing import Any

import jax

#: XLA_FLAGS of a process.
FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def compiled(function: Callable[..., Any], *args: Any) -> Any:
    """What a function of arrays returns once compiled, in a fraction of the usual time."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function).lower(*args).compile(options)(*args)
