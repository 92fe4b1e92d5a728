"""Random variables and images for networks that are timed, which need not have learnt anything."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def generated_variables(init: Callable[[Array, Any], Any], images: Any) -> Any:
    """Kernels of unit gain, norms that change nothing, whatever else there is at zero.

    The same for every library. Drawn here since compiling a model's own `init` takes as long as a
    step of it.

    Args:
      init: `(key, images) -> variables`, a model's own; it is not run.
      images: for it, or their `jax.ShapeDtypeStruct`.
    """
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(init, jax.random.key(0), images)

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
