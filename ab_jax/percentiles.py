"""Percentiles of magnitudes by counting, which every device does many times faster than sorting.

Floats that are not negative are ordered as their bits are. So the first 16 of these are found by
bisection, whatever the numbers are: one outlier may be ten thousand times as large as all others.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

# Sign, exponent and seven digits: numbers that have them in common differ by less than 0.8 %.
_FIRST_BITS = 16


def percentile(magnitudes: Array, share: float) -> Array:
    """As `numpy.percentile(magnitudes, 100 * share, axis=(1, 2, ...))`, within 0.8 %.

    Args:
      magnitudes: float32, [rows, ...], not negative. No axis is merged with another: each may lie
        on several devices.
      share: from 0 to 1.

    Returns:
      [rows]; not finite where a number of the row is not.
    """
    inside = tuple(range(1, magnitudes.ndim))
    position = share * (math.prod(magnitudes.shape[1:]) - 1)
    rank = math.floor(position)
    bits = jax.lax.bitcast_convert_type(magnitudes, jnp.int32)

    def reaches(first_bits: Array) -> Array:
        """Whether numbers begin with these bits of their row, or lie below."""
        end = ((first_bits + 1) << _FIRST_BITS) - 1
        return bits <= jnp.expand_dims(end, inside)

    def up_to(first_bits: Array) -> Array:
        """How many numbers of each row do."""
        return jnp.sum(reaches(first_bits).astype(jnp.int32), axis=inside)

    def halve(_: Any, interval: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = interval  # of what the number of this rank begins with
        middle = (low + high) >> 1
        enough = up_to(middle) > rank
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    # Zeros of the data, which vary over devices as these do.
    lowest = jnp.minimum(jnp.min(bits, axis=inside), 0)
    ends = lowest, lowest + ((1 << 15) - 1)
    _, found = jax.lax.fori_loop(0, _FIRST_BITS - 1, halve, ends)
    among = reaches(found)
    low = jnp.max(jnp.where(among, magnitudes, 0), axis=inside)
    # The next one may be the outlier.
    above = jnp.min(jnp.where(among, jnp.inf, magnitudes), axis=inside)
    high = jnp.where(up_to(found) > rank + 1, low, jnp.where(jnp.isinf(above), low, above))
    not_finite = 0 * jnp.max(magnitudes, axis=inside)
    return low + (high - low) * (position - rank) + not_finite
