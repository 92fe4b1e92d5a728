"""The levels of a quantizer as the matrices of a product see them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array

from ab_jax.quantized import BinaryCoded, Quantized, expand


@dataclasses.dataclass(frozen=True)
class Levels:
    """Levels `(code - zero) * scale`, each weight of a matrix with a scale of its own.

    Attributes:
      scale, zero: float64 [groups, n, m].
      blocks: int [groups, n, m], which entry of the quantized weight's scale each one is.
      lowest, highest, step: of the codes.
    """

    scale: np.ndarray
    zero: np.ndarray
    blocks: np.ndarray
    lowest: int
    highest: int
    step: int

    @classmethod
    def of(cls, quantized: Quantized, places: np.ndarray) -> "Levels":
        """Of a quantized weight.

        Args:
          quantized: what a quantizer makes of it.
          places: where the entries of the matrix stand in the flattened weight.

        Raises:
          TypeError: its levels are not evenly spaced.
        """
        if isinstance(quantized, BinaryCoded):
            raise TypeError("its levels are not evenly spaced (LeastSquaresBinary)")
        shape = quantized.codes.shape
        zero = np.zeros(places.shape)
        if quantized.zero_point is not None:
            zero = of_each(quantized.zero_point, shape, places).astype(np.float64)
        scale = of_each(quantized.scale, shape, places).astype(np.float64)
        return cls(scale, zero, blocks_of(quantized, places), *quantized.code_range())

    def at(self, row: np.ndarray) -> "Levels":
        """Of one row in each group, [groups, m]."""
        each = np.arange(len(row))
        return dataclasses.replace(
            self, **{n: getattr(self, n)[each, row] for n in ("scale", "zero", "blocks")}
        )

    def codes(self, w: np.ndarray) -> np.ndarray:
        """The codes of the nearest levels, float64, of weights of the shape of `scale`."""
        # A block of zeros may have the scale 0.
        scale = np.where(self.scale > 0, self.scale, 1)
        steps = np.round((w / scale + self.zero - self.lowest) / self.step)
        return np.clip(self.lowest + self.step * steps, self.lowest, self.highest)

    def values(self, codes: np.ndarray) -> np.ndarray:
        """What the codes stand for."""
        return (codes - self.zero) * self.scale


def of_each(per_block: Array, shape: tuple[int, ...], places: np.ndarray) -> np.ndarray:
    """The entry of a scale, or the like, for weights at places of the flattened weight."""
    return np.broadcast_to(expand(per_block, shape), shape).ravel()[places]


def blocks_of(quantized: Quantized, places: np.ndarray) -> np.ndarray:
    """Which entry of the flattened scale serves the weights at places of the flattened weight."""
    blocks = jnp.arange(quantized.scale.size).reshape(quantized.scale.shape)
    return of_each(blocks, quantized.codes.shape, places)
