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
    """As `numpy.percentile(magnitudes, 100 * share, axis=1)`, within 0.8 %.

    Args:
      magnitudes: float32, [rows, numbers], not negative.
      share: from 0 to 1.

    Returns:
      [rows]; not finite where a number of the row is not.
    """
    count = magnitudes.shape[1]
    position = share * (count - 1)
    rank = math.floor(position)
    bits = jax.lax.bitcast_convert_type(magnitudes, jnp.int32)

    def up_to(first_bits: Array) -> Array:
        """How many numbers of each row begin with these bits, or lie below."""
        end = ((first_bits + 1) << _FIRST_BITS) - 1
        return jnp.sum((bits <= end[:, None]).astype(jnp.int32), axis=1)

    def halve(_: Any, interval: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = interval  # of what the number of this rank begins with
        middle = (low + high) >> 1
        enough = up_to(middle) > rank
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    # Zeros of the data, which vary over devices as these do.
    lowest = jnp.minimum(bits[:, 0], 0)
    ends = lowest, lowest + ((1 << 15) - 1)
    _, found = jax.lax.fori_loop(0, _FIRST_BITS - 1, halve, ends)
    inside = bits <= (((found + 1) << _FIRST_BITS) - 1)[:, None]
    low = jnp.max(jnp.where(inside, magnitudes, 0), axis=1)
    # The next one may be the outlier.
    above = jnp.min(jnp.where(inside, jnp.inf, magnitudes), axis=1)
    high = jnp.where(up_to(found) > rank + 1, low, jnp.where(jnp.isinf(above), low, above))
    not_finite = 0 * jnp.max(magnitudes, axis=1)
    return low + (high - low) * (position - rank) + not_finite
