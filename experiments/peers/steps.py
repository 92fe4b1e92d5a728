"""A training step of a network under a library, compiled, with what the compiler says of it."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
    variables = generated_variables(applied, images)
    state = variables, optimizer.init(variables["params"])

    def step(state: State, images: Array, labels: Array, alpha: Array) -> tuple[State, Array]:
        variables, moments = state

        def of(params: Any) -> tuple[Array, Variables]:
            logits, changed = applied.apply({**variables, "params": params}, images, True, alpha)
            return loss(logits, labels), changed

        (value, changed), gradient = jax.value_and_grad(of, has_aux=True)(variables["params"])
        updates, moments = optimizer.update(gradient, moments)
        params = optax.apply_updates(variables["params"], updates)
        return ({**variables, **changed, "params": params}, moments), value

    # An argument as in training, where a ramp gives it: what holds for one alpha alone is not used.
    at = jnp.float32(alpha)
    options = cpu_options() if jax.default_backend() == "cpu" else None
    started = time.perf_counter()
    compiled = (
        jax.jit(step, donate_argnums=0, compiler_options=options)
        .lower(state, images, labels, at)
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
    return Compiled(
        lambda state, images, labels: compiled(state, images, labels, at), state, took, int(peak)
    )


def generated_variables(applied: Applied, images: Array) -> Variables:
    """Kernels of unit gain, norms that change nothing, whatever a library counts at zero.

    The same for every library. Drawn here since compiling a model's own `init` takes as long as a
    step of it.
    """
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(applied.init, jax.random.key(0), images)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> Array:
        name = getattr(path[-1], "key", "")
        if name == "kernel":
            gain = np.sqrt(2 / np.prod(leaf.shape[:-1]))
            return jnp.asarray(gain * rng.standard_normal(leaf.shape), leaf.dtype)
        return jnp.full(leaf.shape, name in ("scale", "var"), leaf.dtype)

    return jax.tree.map_with_path(draw, shapes)  # random numbers go to the kernels alone


def generated_images(
    batch_size: int, image_size: int, classes: int, seed: int = 0
) -> tuple[Array, Array]:
    """Normal noise, float32 [batch, size, size, 3], and labels, int32 [batch]."""
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((batch_size, image_size, image_size, 3), np.float32)
    return jnp.asarray(images), jnp.asarray(rng.integers(0, classes, batch_size), jnp.int32)
