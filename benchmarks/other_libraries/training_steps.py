"""A training step of a network under a library, compiled, with what the compiler says of it."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from ab_jax.training.parallel import cpu_options
from benchmarks.measuring.generated_arrays import generated_variables
from benchmarks.other_libraries.libraries import Applied, Variables, loss

State = tuple[Variables, Any]  # with the moments of the parameters
Compiled = tuple[Callable[[State], tuple[State, Array]], State, dict[str, float]]


def first_state(variables: Variables) -> State:
    """These variables, with moments at zero."""
    return variables, jax.tree.map(jnp.zeros_like, variables["params"])


def sgd_step(applied: Applied) -> Callable[..., tuple[State, Array]]:
    """A step of SGD with momentum on the mean cross-entropy, to be compiled.

    It is `(state, images, labels, *, rate, alpha) -> (state, loss)`.
    """

    def step(
        state: State, images: Array, labels: Array, *, rate: ArrayLike, alpha: ArrayLike
    ) -> tuple[State, Array]:
        variables, moments = state

        def of(params: Any) -> tuple[Array, Variables]:
            logits, changed = applied.apply({**variables, "params": params}, images, True, alpha)
            return loss(logits, labels), changed

        (value, changed), gradient = jax.value_and_grad(of, has_aux=True)(variables["params"])
        moments = jax.tree.map(lambda m, g: 0.9 * m + g, moments, gradient)
        params = jax.tree.map(lambda w, m: w - jnp.multiply(rate, m), variables["params"], moments)
        return ({**variables, **changed, "params": params}, moments), value

    return step


def compile_step(applied: Applied, images: Array, labels: Array, alpha: float) -> Compiled:
    """A step on these images at a rate of 0.01, which takes over its state's memory.

    Returns:
      `state -> (state, loss)`, the first state, and what it took: `compile_seconds`, to trace and
      to compile it once, and `peak_bytes`, what the program holds at its peak by the compiler's own
      count (arguments, temporaries, and results that take no argument's place).

    Raises: whatever the library or the compiler raises.
    """
    state = first_state(generated_variables(applied.init, images))
    # An argument as in training, where a ramp gives it: what holds for one alpha alone is not used.
    at = jnp.float32(alpha)
    options = cpu_options() if jax.default_backend() == "cpu" else None
    step = functools.partial(sgd_step(applied), rate=0.01)
    started = time.perf_counter()
    jitted = jax.jit(step, donate_argnums=0, compiler_options=options)
    program = jitted.lower(state, images, labels, alpha=at).compile()
    took = {"compile_seconds": time.perf_counter() - started}
    memory: Any = program.memory_analysis()
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    took["peak_bytes"] = int(held - memory.alias_size_in_bytes)
    return lambda state: program(state, images, labels, alpha=at), state, took
