"""AdaRound: whether each weight goes up or down is learned, by gradient descent.

Source: arXiv 2004.10568, section 3.2. A weight becomes `floor(w / scale) + h(v)` steps, where `h`
is a sigmoid stretched beyond [0, 1] and clipped (equation 23), and a regularizer that grows sharper
with time (equation 24) drives every `h(v)` to 0 or 1. What it starts from is the weight itself.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from ab_jax.calibration.even_grid import Levels

# Ends of the stretched sigmoid, the exponents of the regularizer at its start and its end, and the
# part of all steps that goes by without it.
_LOWER, _UPPER = -0.1, 1.1
_BLUNT, _SHARP = 20.0, 2.0
_FREE = 0.2


def share_up(v: Array) -> Array:
    """How far up each weight goes, in 0 to 1: the rectified sigmoid."""
    return jnp.clip(jax.nn.sigmoid(v) * (_UPPER - _LOWER) + _LOWER, 0, 1)


def variable_of(share: ArrayLike) -> Array:
    """The variable that goes up by a share, in 0 to 1."""
    stretched = (jnp.asarray(share) - _LOWER) / (_UPPER - _LOWER)
    return jnp.log(stretched / (1 - stretched))


def undecided(v: Array, progress: ArrayLike) -> Array:
    """The regularizer, a mean over weights: 0 where each goes wholly up or down.

    Args:
      v: the variables.
      progress: which part of all steps is done, in 0 to 1; it counts from a fifth on.
    """
    done = jnp.clip((jnp.asarray(progress) - _FREE) / (1 - _FREE), 0, 1)
    # Half a cosine from blunt to sharp: first only what lies in the middle is left alone.
    sharpness = _SHARP + (_BLUNT - _SHARP) * 0.5 * (1 + jnp.cos(done * jnp.pi))
    terms = 1 - jnp.abs(2 * share_up(v) - 1) ** sharpness
    return jnp.where(jnp.asarray(progress) < _FREE, 0.0, jnp.mean(terms))


def adaround(
    weight: np.ndarray,
    moments: np.ndarray,
    levels: Levels,
    *,
    steps: int = 1000,
    learning_rate: float = 0.1,
    weight_of_undecided: float = 10.0,
) -> np.ndarray:
    """The codes of a weight that lose least of its outputs' squares.

    Args:
      weight: float64 [groups, n, m], of products `[rows, n] @ [n, m]`.
      moments: float64 [groups, n, n], of the rows: their second moments, or covariances.
      levels: what is rounded to.
      steps: of Adam.
      learning_rate: of the variables, at the start; it falls along a cosine.
      weight_of_undecided: of the regularizer, in parts of what rounding to the nearest loses.

    Returns:
      float64 codes [groups, n, m].
    """
    scale = np.where(levels.scale > 0, levels.scale, 1)
    position = (weight / scale + levels.zero - levels.lowest) / levels.step
    highest = (levels.highest - levels.lowest) // levels.step
    below = np.clip(np.floor(position), 0, highest - 1)
    nearest = levels.values(levels.codes(weight)) - weight
    lost = float(np.einsum("gim,gij,gjm->", nearest, moments, nearest)) or 1.0
    v = _learned(
        jnp.asarray(np.clip(position - below, 0, 1), jnp.float32),
        jnp.asarray(levels.values(levels.lowest + levels.step * below) - weight, jnp.float32),
        jnp.asarray(levels.step * levels.scale, jnp.float32),
        jnp.asarray(moments / lost, jnp.float32),
        steps=steps,
        learning_rate=learning_rate,
        weight_of_undecided=weight_of_undecided,
    )
    goes_up = np.asarray(share_up(v)) > 0.5
    codes: np.ndarray = levels.lowest + levels.step * (below + goes_up)
    return codes


@functools.partial(jax.jit, static_argnames=("steps", "learning_rate", "weight_of_undecided"))
def _learned(
    share: Array,
    error_below: Array,
    step_size: Array,
    moments: Array,
    *,
    steps: int,
    learning_rate: float,
    weight_of_undecided: float,
) -> Array:
    """The variables after all steps; errors are those of the levels just below the weights."""
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def loss(v: Array, progress: Array) -> Array:
        error = error_below + share_up(v) * step_size
        lost = jnp.sum(error * jnp.einsum("gij,gjm->gim", moments, error))
        return lost + weight_of_undecided * undecided(v, progress)

    def step(i: Array, carry: tuple[Array, optax.OptState]) -> tuple[Array, optax.OptState]:
        v, state = carry
        updates, state = optimizer.update(jax.grad(loss)(v, i / steps), state)
        return jnp.asarray(optax.apply_updates(v, updates)), state

    # Not at the very ends, where the clipped sigmoid has no slope.
    v = variable_of(jnp.clip(share, 0.01, 0.99))
    return jax.lax.fori_loop(0, steps, step, (v, optimizer.init(v)))[0]
