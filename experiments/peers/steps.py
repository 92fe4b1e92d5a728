"""A training step of a network under a library, compiled, with what the compiler says of it."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from ab_jax.training.parallel import cpu_options
from experiments.peers.libraries import Applied, Variables, loss

State = tuple[Variables, Any]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step and what it took to compile it.

    Attributes:
      step: `(state, images, labels) -> (state, loss)`; the state is given away.
      state: the first one.
      compile_seconds: to trace and to compile it, once.
      peak_bytes: what the program holds at its peak by the compiler's own count: arguments,
        temporaries, and results that take no argument's place.
    """

    step: Callable[[State, Array, Array], tuple[State, Array]]
    state: State
    compile_seconds: float
    peak_bytes: int


def compile_step(applied: Applied, images: Array, labels: Array, alpha: float) -> Compiled:
    """A step of SGD with momentum on the mean cross-entropy of these images.

    Raises: whatever the library or the compiler raises.
    """
    optimizer = optax.sgd(0.01, momentum=0.9)
    variables = jax.jit(applied.init)(jax.random.key(0), images)
    state = variables, optimizer.init(variables["params"])

    def step(state: State, images: Array, labels: Array) -> tuple[State, Array]:
        variables, moments = state

        def of(params: Any) -> tuple[Array, Variables]:
            logits, changed = applied.apply({**variables, "params": params}, images, True, alpha)
            return loss(logits, labels), changed

        (value, changed), gradient = jax.value_and_grad(of, has_aux=True)(variables["params"])
        updates, moments = optimizer.update(gradient, moments)
        params = optax.apply_updates(variables["params"], updates)
        return ({**variables, **changed, "params": params}, moments), value

    options = cpu_options() if jax.default_backend() == "cpu" else None
    started = time.perf_counter()
    compiled = (
        jax.jit(step, donate_argnums=0, compiler_options=options)
        .lower(state, images, labels)
        .compile()
    )
    took = time.perf_counter() - started
    memory: Any = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return Compiled(compiled, state, took, int(peak))


def generated_images(batch_size: int, image_size: int, classes: int) -> tuple[Array, Array]:
    """Normal noise, float32 [batch, size, size, 3], and labels, int32 [batch]."""
    key = jax.random.key(0)
    images = jax.random.normal(key, (batch_size, image_size, image_size, 3), jnp.float32)
    return images, jax.random.randint(key, (batch_size,), 0, classes, jnp.int32)
