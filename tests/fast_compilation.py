"""For programs that run a few times at most: compiling takes nearly all of their time."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest

#: XLA_FLAGS of a process.
FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def compiled(function: Callable[..., Any], *args: Any) -> Any:
    """What a function of arrays returns once compiled, in a fraction of the usual time."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function).lower(*args).compile(options)(*args)


@pytest.fixture(scope="module")
def fast_compilation() -> Iterator[None]:
    """Programs that a module's tests compile are compiled so too, and forgotten after them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()  # later tests may look at bits, and shall have their own programs
