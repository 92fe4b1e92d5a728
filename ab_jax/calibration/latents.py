"""Weights to train from: near the float ones, and rounded to the codes that calibration chose."""

import jax.numpy as jnp
import numpy as np
from jax import Array

from ab_jax.calibration.even_grid import Levels
from ab_jax.quantized import BinaryCoded, Quantized

# Of half a step: so far a weight stays from the border of its cell, that its division by the scale
# in another precision rounds to the same code.
_MARGIN = 2e-3


def within_cells(quantized: Quantized, w: Array) -> Array:
    """A weight, each entry moved as little as needed to be rounded to its code.

    A code of calibration is not always the nearest: it makes good what other codes lose. Rounded to
    the nearest, the network would lose all that calibration has won.

    Args:
      quantized: codes and scales.
      w: of the shape of the codes.

    Returns:
      An array of the shape and dtype of `w`; `w` itself where levels are not evenly spaced, since
      such codes are never calibrated.
    """
    if isinstance(quantized, BinaryCoded):
        return w
    levels = Levels.of(quantized, np.arange(w.size).reshape(w.shape))
    codes = np.asarray(quantized.codes, np.float64)
    half = levels.step / 2 * (1 - _MARGIN)
    # Beyond the outermost levels a weight is rounded to them however far it is.
    low = np.where(codes <= levels.lowest, -np.inf, codes - half)
    high = np.where(codes >= levels.highest, np.inf, codes + half)
    entries = np.asarray(w, np.float64)
    scale = np.where(levels.scale > 0, levels.scale, 1)
    offsets = entries / scale + levels.zero
    inside = (low <= offsets) & (offsets <= high)
    moved = levels.values(np.clip(offsets, low, high))
    found = jnp.asarray(np.where(inside, entries, moved), w.dtype)
    # Of 8 bits in bfloat16 a cell may be narrower than the margin's rounding: there the level.
    holds = levels.codes(np.asarray(found, np.float64)) == codes
    return jnp.where(jnp.asarray(holds), found, quantized.dequantize().astype(w.dtype))
