"""Ramps: schedules that raise alpha from 0 to 1 as training goes on.

Each function returns an optax schedule, a function from the step (an int, or a traced integer
scalar) to alpha (a float32 scalar): 0 up to `start`, 1 from `stop` on, both in steps.

Start the ramp from a network that is trained already and let it end before training does: under
alpha-blending the weights move by a factor `1 - alpha`, so a ramp from the very first step starves
them, and one that ends with training leaves batch norm no time to settle.
"""

import math

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike


def cubic_ramp(start: int, stop: int) -> optax.Schedule:
    """`alpha = 1 - (1 - p)**3` with `p = (step - start) / (stop - start)`.

    Fast at first and slow towards the end, where the gradient is nearly gone: the ramp of QKeras,
    which adopted alpha-blending. Under plain SGD it lets a quarter of the movement through.

    >>> [float(cubic_ramp(start=100, stop=300)(step)) for step in (0, 100, 200, 300, 400)]
    [0.0, 0.0, 0.875, 1.0, 1.0]

    Raises:
      ValueError: `stop <= start`, or a negative `start`.
    """
    return _polynomial_ramp("cubic_ramp", start, stop, power=3)


def linear_ramp(start: int, stop: int) -> optax.Schedule:
    """`alpha = (step - start) / (stop - start)`.

    >>> [float(linear_ramp(start=100, stop=300)(step)) for step in (0, 100, 200, 300, 400)]
    [0.0, 0.0, 0.5, 1.0, 1.0]

    Raises:
      ValueError: `stop <= start`, or a negative `start`.
    """
    return _polynomial_ramp("linear_ramp", start, stop, power=1)


def cosine_ramp(start: int, stop: int) -> optax.Schedule:
    """`alpha = (1 - cos(pi * p)) / 2` with `p = (step - start) / (stop - start)`.

    Slow at both ends.

    >>> [round(float(cosine_ramp(start=100, stop=300)(step)), 3) for step in (0, 150, 200, 400)]
    [0.0, 0.146, 0.5, 1.0]

    Raises:
      ValueError: `stop <= start`, or a negative `start`.
    """
    _check("cosine_ramp", start, stop)
    # Optax's cosine falls from 1 to 0; read backwards it is 0 up to `start`, 1 from `stop` on.
    falling = optax.cosine_decay_schedule(init_value=1.0, decay_steps=stop - start)
    return _of_signed_steps(
        optax.join_schedules(
            [optax.constant_schedule(0.0), lambda count: 1 - falling(count)], boundaries=[start]
        )
    )


def sigmoid_ramp(start: int, stop: int, steepness: float = 10.0) -> optax.Schedule:
    """`alpha = (S(p) - S(0)) / (S(1) - S(0))` with `S(p) = 1 / (1 + exp(-steepness * (p - 1/2)))`.

    And `p = (step - start) / (stop - start)`: PARQ's annealing (arXiv 2503.15748), whose inverse
    slope is `1 - alpha`. Slow at both ends, the more so the larger the steepness; with a steepness
    below 1 it is almost linear. The default is that of the authors' code.

    >>> [round(float(sigmoid_ramp(100, 300)(step)), 3) for step in (0, 150, 200, 250, 400)]
    [0.0, 0.07, 0.5, 0.93, 1.0]

    Raises:
      ValueError: `stop <= start`, a negative `start`, or a steepness that is not positive and
        finite.
    """
    _check("sigmoid_ramp", start, stop)
    if not 0 < steepness < math.inf:
        raise ValueError(
            f"sigmoid_ramp(start={start}, stop={stop}, steepness={steepness}): the steepness must "
            f"be positive and finite. Give 10 for PARQ's, or use linear_ramp."
        )
    # Optax has no sigmoid; its line from -1 to 1 is exact at both ends, and tanh is odd.
    line = optax.linear_schedule(-1.0, 1.0, transition_steps=stop - start, transition_begin=start)
    half = steepness / 4

    def ramp(step: ArrayLike) -> ArrayLike:
        p = line(step)
        rising = 0.5 + 0.5 * jnp.tanh(half * p) / math.tanh(half)
        return jnp.where(p <= -1, 0.0, jnp.where(p >= 1, 1.0, jnp.clip(rising, 0, 1)))

    return _of_signed_steps(ramp)


def jump(at: int) -> optax.Schedule:
    """0 before step `at`, 1 from it on: a ramp whose start and stop are one.

    >>> [float(jump(at=100)(step)) for step in (0, 99, 100, 101)]
    [0.0, 0.0, 1.0, 1.0]

    Raises:
      ValueError: a negative `at`.
    """
    if at < 0:
        raise ValueError(f"jump(at={at}): a step cannot be negative. Give at >= 0.")
    return _of_signed_steps(
        optax.join_schedules(
            [optax.constant_schedule(0.0), optax.constant_schedule(1.0)], boundaries=[at]
        )
    )


def _polynomial_ramp(name: str, start: int, stop: int, power: int) -> optax.Schedule:
    _check(name, start, stop)
    return _of_signed_steps(
        optax.polynomial_schedule(
            init_value=0.0,
            end_value=1.0,
            power=power,
            transition_steps=stop - start,
            transition_begin=start,
        )
    )


def _of_signed_steps(schedule: optax.Schedule) -> optax.Schedule:
    """Optax subtracts `start` from the step, and an unsigned step before it would wrap around."""

    def ramp(step: ArrayLike) -> ArrayLike:
        return schedule(jnp.asarray(step).astype(jnp.int32))

    return ramp


def _check(name: str, start: int, stop: int) -> None:
    if stop <= start:
        raise ValueError(
            f"{name}(start={start}, stop={stop}): the ramp must stop after it starts. "
            f"Give stop > start, in steps, or use jump(at={start}) for a sudden change."
        )
    if start < 0:
        raise ValueError(
            f"{name}(start={start}, stop={stop}): a step cannot be negative. Give start >= 0."
        )
